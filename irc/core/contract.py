"""What a pass is: a frozen dataclass whose fields are its options, and the result of running it.

    requires(program) → run(program, ctx) → ensures(result) → verification (by the manager)

A pass rewrites and counts. Timing, dumps, verification and catching errors are the manager's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

import torch.fx as fx
from torch import Tensor

from irc.core import provenance
from irc.core.evaluate import Observer
from irc.core.program import Program

T = TypeVar("T")
Replay = Callable[[Program, Sequence[Any]], list[Any]]
Progress = Callable[[str, int, int], None]
Move = Callable[[Tensor], Tensor]
Trace = Callable[[Program, Sequence[Any], Observer], None]


@dataclass(frozen=True)
class Skip:
    """A candidate that was seen and not rewritten, with the reason.

    `progress` says how far the match got before it failed (nodes matched, say): among several skips the
    one that got furthest is reported as the nearest miss.
    """

    node: str
    reason: str
    location: str = ""
    progress: float = 0.0

    @staticmethod
    def at(node: fx.Node, reason: str, *, progress: float = 0.0) -> Skip:
        """A skip that names the node, its module and the user's line."""
        where = " ".join(filter(None, (provenance.module_path(node), provenance.location(node))))
        return Skip(node.name, reason, where, progress)


@dataclass(frozen=True)
class Preserves:
    """What a pass promises about the numbers.

    Attributes:
        kind: `exact` (same mathematics; rounding differs), or `lossy` (the function changes on purpose).
        rtol: largest |after - before| allowed, relative to the largest |before| of that value. For an
            exact pass this is the f32 bound (half types are allowed their own rounding on top); for a
            lossy pass it bounds the final outputs only.
        max_kl: for language models, largest mean KL divergence (nats a token) of a lossy pass.
    """

    kind: str = "exact"
    rtol: float = 1e-5
    max_kl: float | None = None


EXACT = Preserves()


@dataclass(frozen=True)
class Finding:
    """A rule that a result breaks, tied to a node."""

    node: str
    problem: str


@dataclass
class Applications:
    """The rewrites a pass has made so far, by node name; with a limit, further ones are refused.

    `irc bisect` finds the first wrong rewrite of a pass by lowering the limit.
    """

    limit: int | None = None
    nodes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class PassContext:
    """What a pass may ask for besides the program.

    Attributes:
        options: target- or user-supplied values shared by all passes (calibration data and such).
        progress: called with (what, done, total) by passes that take long; shown by whoever runs them.
    """

    options: Mapping[str, Any] = field(default_factory=dict)
    applications: Applications = field(default_factory=Applications, compare=False)
    progress: Progress | None = field(default=None, compare=False)

    def track(self, what: str, items: Sequence[T]) -> Iterator[T]:
        """The items one by one, telling `progress` about each."""
        for done, item in enumerate(items):
            if self.progress is not None:
                self.progress(what, done, len(items))
            yield item
        if self.progress is not None:
            self.progress(what, len(items), len(items))

    def allow(self, node: fx.Node) -> bool:
        """Ask this right before rewriting a match at `node`, and leave the match alone if it says no.

        It says yes, always, but under `irc bisect`, which looks for the first wrong rewrite.
        """
        if self.applications.limit is not None and len(self.applications.nodes) >= self.applications.limit:
            return False
        self.applications.nodes.append(node.name)
        return True


@dataclass(frozen=True)
class PassResult:
    """What a pass did.

    Attributes:
        program: the rewritten program (the one received, edited, or another).
        matches: how many places were rewritten.
        skips: candidates that were seen and refused, each with its reason.
        modified: whether anything changed; None: let the manager find out. Saying False wrongly is caught.
        statistics: further counts for the report.
        replay: only when the signature changed: runs the new program on the *old* flat inputs and gives
            outputs comparable to the old ones, so that verification can still compare.
        trace: goes with `replay`: the same run, showing an observer every node's value in the form that
            its counterpart has in a run of the old program, so that a wrong number finds its node.
        moved: nodes that compute another value on purpose while the outputs stay (scaled channels, a turned
            stream), by name: what the old value became, or None where that cannot be said. Used only to find the
            node behind outputs that are wrong, never to accept them.
    """

    program: Program
    matches: int = 0
    skips: Sequence[Skip] = ()
    modified: bool | None = None
    statistics: Mapping[str, int | float | str] = field(default_factory=dict)
    replay: Replay | None = None
    trace: Trace | None = None
    moved: Mapping[str, Move | None] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Pass:
    """Base of all passes. Subclass as a frozen keyword-only dataclass with a `name` and `run`.

    Attributes:
        name: kebab-case, used in pipelines and reports.
        preserves: the promise that verification holds the pass to.
        expect_matches: fail unless at least this many places are rewritten.
    """

    name: ClassVar[str] = ""
    expect_matches: int | None = None

    @property
    def preserves(self) -> Preserves:
        """Exact, unless the pass says otherwise: as a class variable, or here where its options decide."""
        return EXACT

    def get_ready(self, num_weights: int, num_bytes: int) -> int:
        """Told when much work lies ahead (a large model is about to be captured): start what `run` will need.

        What takes long belongs in a thread; `run` must give the same numbers without it. `irc.core.memory.expect`
        has memory found for weights that it will make.

        Args:
            num_weights, num_bytes: of the model as this pass will find it, roughly.

        Returns:
            Bytes of all weights behind this pass, roughly.
        """
        return num_bytes

    def requires(self, program: Program) -> list[str]:
        """Problems that keep the pass from running, all at once; empty when it may run."""
        return []

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        """Rewrite the program (its own copy; weights shared: add new ones, never write into them)."""
        raise TypeError(f"{type(self).__name__} has no run method: a pass must define run(self, program, ctx)")

    def ensures(self, before: Program, result: PassResult) -> list[Finding]:
        """Rules of this pass that the *result* breaks, checked by means other than those of `run`."""
        return []


_PASSES: dict[str, type[Pass]] = {}


def register_pass(cls: type[Pass]) -> type[Pass]:
    """Class decorator: gives the pass its name in text and YAML pipelines and on the command line."""
    if not cls.name:
        raise ValueError(f"{cls.__name__} needs a name")
    if cls.name in _PASSES and _PASSES[cls.name] is not cls:
        raise ValueError(f"two passes are called {cls.name!r}: {_PASSES[cls.name].__name__} and {cls.__name__}")
    _PASSES[cls.name] = cls
    return cls


def registered_passes() -> dict[str, type[Pass]]:
    """Passes by name, sorted."""
    return dict(sorted(_PASSES.items()))
