"""The numeric check of a run: the outputs it keeps, and the error when a pass breaks its promise."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from irc.core.contract import Pass, PassResult, Preserves, Replay
from irc.core.errors import IrcError, NumericError, PassError, VerificationError
from irc.core.excerpt import node_text, window
from irc.core.localize import explain
from irc.core.numeric import (
    Comparison,
    allowed_error,
    compare_outputs,
    compare_stages,
    inputs_at,
    other_sizes,
    run_outputs,
)
from irc.core.program import Program
from irc.core.report import Row

_RUNNING = re.compile(r"while running node (\S+) =")
# What PyTorch raises when a program is run at sizes it does not accept.
_RUN_ERRORS = (RuntimeError, ValueError, IndexError, TypeError)


@dataclass
class InputSet:
    """Flat inputs and the outputs that the current stage gives on them."""

    inputs: tuple[Any, ...]
    outputs: list[Any]
    what: str = ""


@dataclass
class NumericCheck:
    """Outputs of the current stage, and of the first one, on every set of inputs.

    Each stage is executed once: the outputs after a pass are those before the next.
    """

    current: list[InputSet]
    first: list[InputSet]
    notes: list[str] = field(default_factory=list)
    replay: Replay | None = None
    replayed: int = 0

    @staticmethod
    def start(program: Program, inputs: Sequence[Any] | None) -> NumericCheck:
        """Run the program that the pipeline starts from.

        Raises:
            IrcError: there is nothing to run it on.
        """
        if inputs is None:
            raise IrcError(
                f"program {program.name} has no example inputs to compare numbers on: give inputs, or use verify='off'"
            )
        if any(weight.device.type == "meta" for weight in program.weights.values()):
            raise IrcError(f"program {program.name} has weights on the meta device: load them, or use verify='off'")
        notes: list[str] = []
        sets = _input_sets(program, inputs, notes)
        return NumericCheck(sets, sets, notes)

    def advance(
        self, one: Pass, before: Program, after: Program, result: PassResult, row: Row, *, compare: bool
    ) -> None:
        """Compare (if asked) the new stage with the kept outputs, and keep its outputs instead."""
        if result.replay is None and len(after.placeholders) != len(before.placeholders):
            raise PassError(
                f"pass {one.name!r} changed the inputs from ({', '.join(before.input_names)}) to"
                f" ({', '.join(after.input_names)}) without a replay in its result, so that nothing can be compared",
                pass_name=one.name,
            )
        if result.replay is not None:
            self.replay, self.replayed = result.replay, self.replayed + 1
        if not compare:
            return
        row_comparison, moved = Comparison(), []
        for given in self.current:
            comparison, outputs = _guarded(one, after, given, result)
            row_comparison.differences.extend(comparison.differences)
            _raise_if_broken(one, before, after, result, given, comparison)
            if outputs is not None:
                moved.append(InputSet(given.inputs, outputs, given.what))
        record(row, row_comparison)
        if result.replay is not None:
            if after.example_inputs is None:
                raise PassError(
                    f"pass {one.name!r} changed the inputs and gave the program no example inputs",
                    pass_name=one.name,
                )
            moved = _input_sets(after, after.example_inputs, row.notes)
        self.current = moved

    def finish(self, passes: Sequence[Pass], program: Program, row: Row) -> None:
        """Compare the last stage with the first, within what all passes together may change."""
        if self.replayed > 1:
            raise IrcError("verify='end' cannot look through two changes of the inputs; use verify='each'")
        promise = combined(passes)
        total = Comparison()
        for given in self.first:
            if self.replay is not None:
                comparison = compare_outputs(given.outputs, self.replay(program, given.inputs))
            else:
                comparison = compare_outputs(given.outputs, run_outputs(program, given.inputs))
            total.differences.extend(comparison.differences)
            broken = comparison.violations(promise, allowed_error(promise, program))
            if broken:
                raise NumericError(
                    f"the pipeline changed the numbers of program {program.name}{given.what}:"
                    f" {broken[0][1]}\n  `irc bisect` or verify='each' finds the pass"
                )
        record(row, total)


def combined(passes: Sequence[Pass]) -> Preserves:
    """What all passes together may change."""
    promises = [one.preserves for one in passes]
    lossy = [p for p in promises if p.kind != "exact"]
    limits = [p.max_kl for p in lossy if p.max_kl is not None]
    return Preserves(
        kind="lossy" if lossy else "exact",
        rtol=sum(p.rtol for p in promises),
        max_kl=sum(limits) if lossy and len(limits) == len(lossy) else None,
    )


def record(row: Row, comparison: Comparison) -> None:
    """Write a comparison into a report row."""
    row.absolute_error, row.relative_error = comparison.absolute, comparison.relative
    row.kl, row.top1 = comparison.kl, comparison.top1


def _input_sets(program: Program, inputs: Sequence[Any], notes: list[str]) -> list[InputSet]:
    """The example inputs, and for a dynamic program inputs of other sizes that it accepts."""
    sets = [InputSet(tuple(inputs), run_outputs(program, inputs))]
    refused: list[str] = []
    for sizes in other_sizes(program):
        what = ", ".join(f"{name}={size}" for name, size in sizes.items())
        try:
            others = inputs_at(program, inputs, sizes)
            sets.append(InputSet(others, run_outputs(program, others), f" at {what}"))
            return sets
        except (*_RUN_ERRORS, IrcError) as error:
            refused.append(f"the program does not run at {what} ({_first_line(error)})")
    if refused:
        notes.append(f"checked at the example's sizes only: {'; '.join(refused)}")
    return sets


def _guarded(one: Pass, after: Program, given: InputSet, result: PassResult) -> tuple[Comparison, list[Any] | None]:
    """Run and compare; a program that does not run is an error that names pass and node."""
    try:
        return compare_stages(given.outputs, after, result, given.inputs)
    except _RUN_ERRORS as error:
        names = [found[1] for note in getattr(error, "__notes__", []) if (found := _RUNNING.search(note))]
        node = next((n for n in after.graph.nodes if n.name in names), None)
        where = f" at {node_text(node)}\n{window(after, node)}" if node is not None else ""
        raise VerificationError(
            f"after pass {one.name!r} the program does not run{given.what}: {_first_line(error)}{where}",
            pass_name=one.name,
            node=node.name if node is not None else None,
        ) from error


def _raise_if_broken(
    one: Pass, before: Program, after: Program, result: PassResult, given: InputSet, comparison: Comparison
) -> None:
    allowed = allowed_error(one.preserves, before)
    broken = comparison.violations(one.preserves, allowed)
    if not broken:
        return
    worst, problem = broken[0]
    lines = [f"pass {one.name!r} changed the numbers{given.what}: {problem}"]
    lines += [f"  also {text}" for _, text in broken[1:4]]
    node = None
    if result.replay is None or result.trace is not None:
        found = explain(before, after, given.inputs, allowed, trace=result.trace, moved=result.moved)
        node = found.node
        lines.append(found.text)
    elif worst.position:
        lines.append(f"  largest difference at {list(worst.position)}; the inputs changed, so nodes are not compared")
    lines.append("  to find the rewrite that does it: irc bisect")
    if not worst.problem:
        limit = "max_kl" if worst.relative <= allowed else "rtol"
        lines.append(
            f'  if it is meant to: preserves=Preserves(kind="lossy", {limit}=…) of the pass or rule says by how much'
        )
    raise NumericError("\n".join(lines), pass_name=one.name, node=node)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


__all__ = ["InputSet", "NumericCheck", "combined", "record"]
