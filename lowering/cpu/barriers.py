"""Where workers have to meet, and what each of them computes for itself instead.

A kernel of one row has nothing to share: while one worker computes it, the others would wait for it, twice. With one
token (`alone` in the step) every worker therefore computes such kernels into memory of its own, and neither reading nor
overwriting that memory needs a barrier. With more tokens the same kernels are shared as all others.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import sympy

from irc.lowering.kernels.buffers import Buffer
from irc.lowering.kernels.fusion import Schedule
from irc.lowering.kernels.kernel import Kernel


@dataclass
class Step:
    """A statement of the step: which memory it writes and reads, by name."""

    comment: list[str]
    statement: str
    writes: set[str]
    reads: set[str]


@dataclass
class Private:
    """What workers compute for themselves where all of `rows` are 1.

    Attributes:
        kernels: names of the kernels.
        buffers: what those write.
        rows: numbers of rows of the kernels; empty: no kernel is private.
    """

    kernels: set[str] = field(default_factory=set)
    buffers: set[Buffer] = field(default_factory=set)
    rows: list[sympy.Expr] = field(default_factory=list)


def find_private(schedule: Schedule) -> Private:
    """The kernels that may have one row only, and write nothing but temporary values of their own."""
    writers: dict[Buffer, int] = {}
    for step in schedule.steps:
        for buffer in step.writes if isinstance(step, Kernel) else [step.write]:
            writers[buffer] = writers.get(buffer, 0) + 1
    found = Private()
    for step in schedule.steps:
        if not isinstance(step, Kernel) or any(axis.kind == "vector" for axis in step.outer):
            continue
        rows = sympy.expand(sympy.prod([axis.extent for axis in step.outer]))
        if rows.xreplace({size: sympy.Integer(1) for size in rows.free_symbols}) != 1:
            continue
        if all(buffer.kind == "temporary" and writers[buffer] == 1 for buffer in step.writes):
            found.kernels.add(step.name)
            found.buffers.update(step.writes)
            if rows not in found.rows and rows != 1:
                found.rows.append(rows)
    return found


def with_barriers(steps: list[Step], private: set[str]) -> tuple[list[str], int, int]:
    """(the statements with barriers, barriers of a step, barriers of a step in which workers are alone).

    A barrier stands wherever one step needs memory that another worker may not be done with. `private` names memory
    that each worker has for itself when it is alone.
    """
    lines: list[str] = []
    shared, alone = _Pending(set()), _Pending(private)
    for step in steps:
        meets, meets_alone = shared.add(step), alone.add(step)
        if meets_alone:
            lines.append("    worker.barrier();" if meets else "    if (alone) worker.barrier();")
        elif meets:
            lines.append("    if (!alone) worker.barrier();" if private else "    worker.barrier();")
        lines += [f"    // {text}" for text in step.comment]
        lines.append(f"    {step.statement}")
    return lines, shared.barriers, alone.barriers


@dataclass
class _Pending:
    """Memory touched since the last barrier."""

    private: set[str]
    written: set[str] = field(default_factory=set)
    read: set[str] = field(default_factory=set)
    barriers: int = 0

    def add(self, step: Step) -> bool:
        """Whether the step needs a barrier in front."""
        writes, reads = step.writes - self.private, step.reads - self.private
        needed = bool(reads & self.written or writes & (self.written | self.read))
        if needed:
            self.written, self.read = set(), set()
            self.barriers += 1
        self.written |= writes
        self.read |= reads
        return needed
