"""`PassManager`: runs a pipeline and checks everything a pass claims.

For each pass: copy the program → requires → run → weights untouched → types and IR rules → claims and
matches → ensures(result) → the numbers. Timing, memory, dumps and statistics are taken here, never in a pass.
"""

from __future__ import annotations

import contextlib
import dataclasses
import resource
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from irc.core import checks, provenance
from irc.core.contract import Applications, Pass, PassContext, PassResult
from irc.core.errors import IrcError, OptionError
from irc.core.hashing import Structure
from irc.core.instruments import DumpInstrument, Instrument
from irc.core.pipeline import Source, parse_pipeline
from irc.core.program import Program
from irc.core.report import Report, Row
from irc.core.reproducer_folder import write_reproducer
from irc.core.verification import NumericCheck

Verify = Literal["each", "end", "off"]
FIRST_STAGE = "capture"


@dataclass
class PipelineResult:
    """The last program, every stage by name in order (first: `capture`), and the report."""

    program: Program
    stages: dict[str, Program]
    report: Report


@dataclass
class _State:
    """Where a run stands."""

    program: Program
    inputs: tuple[Any, ...]
    guard: checks.WeightGuard
    structure: Structure
    check: NumericCheck | None
    report: Report
    stages: dict[str, Program] = field(default_factory=dict)


class PassManager:
    """Runs passes over programs.

    Args:
        passes: passes, rewrite rules, text or a YAML file (see `parse_pipeline`).
        verify: compare numbers after `each` pass, at the `end` against the start, or not at all (`off`;
            IR rules and claims are checked all the same).
        instruments: observers.
        dump_dir: folder for numbered dumps of every stage.
        repro_dir: folder that gets a reproducer when a pass fails.
        ctx: what passes may ask for.
        keep_stages: keep every stage in the result; without, weights that were replaced are freed.
    """

    def __init__(
        self,
        passes: Source,
        *,
        verify: Verify = "each",
        instruments: Sequence[Instrument] = (),
        dump_dir: str | Path | None = None,
        repro_dir: str | Path | None = None,
        ctx: PassContext | None = None,
        keep_stages: bool = True,
    ) -> None:
        if verify not in ("each", "end", "off"):
            raise OptionError(f"verify must be each, end or off, not {verify!r}")
        self.passes = parse_pipeline(passes)
        self.verify = verify
        self.instruments = [*instruments, *([DumpInstrument(dump_dir)] if dump_dir is not None else [])]
        self.repro_dir = Path(repro_dir) if repro_dir is not None else None
        self.ctx = ctx or PassContext()
        self.keep_stages = keep_stages
        self.applications = Applications()
        """Rewrites that the last pass asked leave for."""

    def run(self, program: Program, inputs: Sequence[Any] | None = None) -> PipelineResult:
        """Run all passes; the given program stays as it is.

        `inputs` are flat inputs to compare on; default: the program's example inputs.

        Raises:
            PassError: a pass cannot run, claims what is not so, or matched less than was expected.
            VerificationError: its result breaks a rule of the IR or of the pass.
            NumericError: its result computes something else.
        """
        state = self._start(program, inputs)
        for index, one in enumerate(self.passes, start=1):
            for instrument in self.instruments:
                instrument.before_pass(index, one, state.program)
            before = state.program
            try:
                row = self._step(state, one)
                if index == len(self.passes):
                    self._end(state, row)
            except Exception as error:
                raised = checks.named_error(error, one)
                self._failed(index, one, before, state.inputs, raised)
                if raised is error:
                    raise
                raise raised from error
            for instrument in self.instruments:
                instrument.after_pass(index, one, before, state.program, row)
        for instrument in self.instruments:
            instrument.finished(state.report)
        return PipelineResult(state.program, state.stages, state.report)

    # ---------------------------------------------------------------- steps

    def _start(self, program: Program, inputs: Sequence[Any] | None) -> _State:
        clock = _Clock()
        given = tuple(inputs) if inputs is not None else tuple(program.example_inputs or ())
        guard = checks.WeightGuard(program, given, content=self.verify != "off")
        check = None
        if self.verify != "off":
            check = NumericCheck.start(program, inputs if inputs is not None else program.example_inputs)
        row = Row(name=FIRST_STAGE)
        state = _State(program, given, guard, Structure(program), check, Report(program.name))
        self._record(state, row)
        row.verify_ms = clock.ms()
        row.notes.extend(check.notes if check else [])
        for instrument in self.instruments:
            instrument.started(program, self.passes, row)
        return state

    def _step(self, state: _State, one: Pass) -> Row:
        """Run and check one pass; the state moves on only if everything holds."""
        before = state.program
        checks.check_requires(one, before)
        result, row = self._run_pass(before, one)
        clock, after = _Clock(), result.program
        state.guard.check(one)
        checks.check_matches(one, result)
        checks.check_types(one, after)
        structure = Structure(after)
        row.modified = not structure.same_as(state.structure)
        checks.check_claim(one, result, row.modified)
        checks.check_ensures(one, before, result)
        if state.check is not None and (row.modified or result.replay is not None):
            state.check.advance(one, before, after, result, row, compare=self.verify == "each")
        if after.example_inputs is not None and after.input_names != before.input_names:
            state.inputs = tuple(after.example_inputs)
        state.program, state.structure = after, structure
        state.guard = checks.WeightGuard(after, state.inputs, content=self.verify != "off", known=state.guard)
        self._record(state, row, same_flops=not row.modified)
        row.verify_ms += clock.ms()
        return row

    def _run_pass(self, before: Program, one: Pass) -> tuple[PassResult, Row]:
        own = before.copy()
        provenance.mark_stage_start(own.graph)
        self.applications = Applications(self.ctx.applications.limit)
        ctx = dataclasses.replace(self.ctx, applications=self.applications)
        row, memory, clock = Row(name=one.name), _Memory(), _Clock()
        with provenance.track(own.graph_module):
            given = one.run(own, ctx)
        row.ms, row.memory_bytes = clock.ms(), memory.growth()
        result = checks.check_result(one, given)
        unknown = [node for node in result.program.graph.nodes if not provenance.sources_of(node)]
        if result.program.graph is not own.graph:
            provenance.fill_missing_sources(unknown)
        row.matches, row.skips, row.statistics = result.matches, list(result.skips), dict(result.statistics)
        return result, row

    def _end(self, state: _State, row: Row) -> None:
        if state.check is not None and self.verify == "end":
            clock = _Clock()
            state.check.finish(self.passes, state.program, row)
            row.verify_ms += clock.ms()

    def _record(self, state: _State, row: Row, *, same_flops: bool = False) -> None:
        """Fill the row in from the program and add it, with the stage, to what was done."""
        from irc.core.cost import evaluate_cost, program_flops

        program = state.program
        times = sum(other.name.split("#")[0] == row.name for other in state.report.rows)
        row.name += f"#{times + 1}" * (times > 0)
        row.nodes, row.weight_bytes = program.num_nodes, program.weight_bytes
        previous = state.report.rows[-1].flops if same_flops else None
        row.flops = evaluate_cost(program_flops(program), program) if previous is None else previous
        state.report.rows.append(row)
        if not self.keep_stages:
            state.stages.clear()
        state.stages[row.name] = program

    def _failed(self, index: int, one: Pass, before: Program, inputs: tuple[Any, ...], error: IrcError) -> None:
        if self.repro_dir is not None:
            try:
                folder = write_reproducer(self.repro_dir, before, one, inputs, error, verify=self.verify)
                error.args = (f"{error}\n  reproducer: {folder}",)
            except (IrcError, OSError) as problem:  # the first error must not be lost to the second
                error.args = (f"{error}\n  no reproducer could be written: {problem}",)
        for instrument in self.instruments:
            instrument.failed(index, one, before, error)


class _Clock:
    def __init__(self) -> None:
        self._start = time.perf_counter()

    def ms(self) -> float:
        return (time.perf_counter() - self._start) * 1e3


class _Memory:
    """Growth of resident memory: of its peak where a new one was set, else what was there at the end.

    The operating system's peak is never reset: others in the process may be measuring it.
    """

    def __init__(self) -> None:
        self._resident, self._peak = _resident_bytes(), _peak_bytes()

    def growth(self) -> int:
        peak = _peak_bytes()
        reached = peak if peak > self._peak else _resident_bytes()
        return max(0, reached - self._resident)


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _RSS_UNIT


def _resident_bytes() -> int:
    with contextlib.suppress(FileNotFoundError):  # no /proc (macOS): the peak is all there is
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * resource.getpagesize()
    return _peak_bytes()


_RSS_UNIT = 1 if Path("/System/Library").exists() else 1024
