"""Find the first bad pass of a pipeline, and inside it the first bad rewrite.

A pass is bad when it fails or breaks its promise on the program that the passes before it made; with all
promises kept, the last program is as near to the first as they add up to. Inside the pass, only the first
so many rewrites are allowed (`PassContext.allow`), and the number at which it goes wrong is bisected.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from irc.core.contract import Applications, Pass, PassContext, Preserves
from irc.core.errors import IrcError, NumericError, OptionError
from irc.core.excerpt import node_text
from irc.core.manager import PassManager
from irc.core.numeric import compare_outputs, run_outputs
from irc.core.pipeline import Source, parse_pipeline
from irc.core.program import Program
from irc.core.verification import NumericCheck

Progress = Callable[[str], None]


@dataclass(frozen=True)
class BisectResult:
    """What was found; `str()` of it is the message for people.

    Attributes:
        index: position of the first bad pass in the pipeline (from 0); None: nothing is wrong.
        bad_pass: that pass.
        application: number of the first bad rewrite in it (from 1); None where the pass fails even with
            no rewrite allowed, or does not ask for leave.
        num_applications: rewrites that the pass made in all.
        node: node that the first bad rewrite was asked for at, in the program before the pass.
        where: that node with its operation, module and line.
        error: what went wrong with the whole pass.
        only_matches: the pass matched fewer places than expected; what it rewrote is right.
        runs: how many times a pass was run.
    """

    index: int | None = None
    bad_pass: Pass | None = None
    application: int | None = None
    num_applications: int = 0
    node: str | None = None
    where: str = ""
    error: IrcError | None = None
    only_matches: bool = False
    runs: int = 0

    def __str__(self) -> str:
        if self.bad_pass is None:
            return f"no pass is bad ({self.runs} passes run)"
        name = f"pass {self.bad_pass.name!r} (number {(self.index or 0) + 1} of the pipeline)"
        if self.only_matches:
            inside = "with fewer matches expected, nothing is wrong"
        elif self.application is None:
            inside = "its rewrites cannot be told apart: it fails with none of them allowed too"
        else:
            inside = f"its rewrite {self.application} of {self.num_applications} is the first bad one: {self.where}"
        return f"first bad: {name}\n  {inside}\n  {self.runs} runs of a pass\n{self.error}"


def bisect(
    program: Program,
    passes: Source,
    inputs: Sequence[Any] | None = None,
    *,
    rtol: float | None = None,
    ctx: PassContext | None = None,
    progress: Progress | None = None,
) -> BisectResult:
    """Find the first bad pass and its first bad rewrite, comparing on `inputs` (default: the example inputs).

    With `rtol`, a pass is bad when it takes an output further than that from the *given program's*, whatever
    it promises: that finds out which of several lossy passes costs the accuracy.
    """
    search = _Search(list(parse_pipeline(passes)), ctx or PassContext(), progress or (lambda text: None), rtol)
    if rtol is not None:
        search.start = NumericCheck.start(program, inputs if inputs is not None else program.example_inputs)
    current, given = program, inputs
    for index, one in enumerate(search.passes):
        search.progress(f"{index + 1}/{len(search.passes)} {one.name}")
        after, error = search.try_pass(current, one, given)
        if after is None or error is not None:
            assert error is not None
            return search.inside(current, index, given, error)
        if after.input_names != current.input_names:
            given = None  # the pass changed the signature: the new program brings its own inputs
        current = after
    return BisectResult(runs=search.runs)


@dataclass
class _Search:
    passes: list[Pass]
    ctx: PassContext
    progress: Progress
    rtol: float | None = None
    start: NumericCheck | None = None
    runs: int = 0
    applications: Applications = dataclasses.field(default_factory=Applications)

    def try_pass(
        self, before: Program, one: Pass, inputs: Sequence[Any] | None, limit: int | None = None
    ) -> tuple[Program | None, IrcError | None]:
        """Run one pass, checked, with at most `limit` rewrites: the new program or the error."""
        self.runs += 1
        ctx = dataclasses.replace(self.ctx, applications=Applications(limit))
        manager = PassManager([one], verify="each" if self.start is None else "off", ctx=ctx)
        try:
            after = manager.run(before, inputs).program
            return after, self._strays(one, before, after)
        except OptionError:
            raise
        except IrcError as error:
            return None, error
        finally:
            self.applications = manager.applications

    def _strays(self, one: Pass, before: Program, after: Program) -> NumericError | None:
        """The error of a program that is further than `rtol` from the start."""
        if self.start is None or self.rtol is None:
            return None
        if after.input_names != before.input_names:
            raise OptionError(f"rtol compares with the first program, but pass {one.name!r} changes the inputs")
        limit = Preserves(kind="lossy", rtol=self.rtol)
        for given in self.start.current:
            comparison = compare_outputs(given.outputs, run_outputs(after, given.inputs))
            for _, text in comparison.violations(limit, self.rtol):
                return NumericError(
                    f"after pass {one.name!r}, compared with the first program{given.what}: {text}",
                    pass_name=one.name,
                )
        return None

    def inside(self, before: Program, index: int, inputs: Sequence[Any] | None, error: IrcError) -> BisectResult:
        """The first bad rewrite of a pass that fails on `before`."""
        one = dataclasses.replace(self.passes[index], expect_matches=None)
        nodes = list(self.applications.nodes)
        result = BisectResult(index, self.passes[index], None, len(nodes), error=error, runs=self.runs)
        if not nodes or self.try_pass(before, one, inputs, 0)[1] is not None:
            return dataclasses.replace(result, runs=self.runs)
        good, bad = 0, len(nodes)
        if self.try_pass(before, one, inputs, bad)[1] is None:
            return dataclasses.replace(result, only_matches=True, runs=self.runs)
        while bad - good > 1:
            middle = (good + bad) // 2
            self.progress(f"{one.name}: {middle} of {len(nodes)} rewrites")
            failed = self.try_pass(before, one, inputs, middle)[1] is not None
            good, bad = (good, middle) if failed else (middle, bad)
        name = nodes[bad - 1]
        node = next((n for n in before.graph.nodes if n.name == name), None)
        where = node_text(node) if node is not None else f"%{name} (made by an earlier rewrite of this pass)"
        return dataclasses.replace(result, application=bad, node=name, where=where, runs=self.runs)


__all__ = ["BisectResult", "bisect"]
