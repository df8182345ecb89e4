"""What a target is: it says what it can take, lowers a program, and gives an artifact that runs.

A new target is a new folder under `lowering/` with a `Target` decorated `@register_target`.
"""

from __future__ import annotations

import abc
import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeVar, cast

import torch.fx as fx
from torch import Tensor

from irc.core.artifact_check import ArtifactCheck, check_artifact
from irc.core.contract import Pass, Progress
from irc.core.errors import OptionError, TargetError, nearest
from irc.core.folder import require_place
from irc.core.kv_cache import KVCache
from irc.core.options import mismatch, option_types
from irc.core.paged import StepInputs
from irc.core.program import Program

Options = Mapping[str, Any]


@dataclass(frozen=True)
class Concern:
    """An operation that a target does not take as it is.

    Attributes:
        op: operation, e.g. `irc.rms_norm`.
        count: how many nodes.
        reason: why, and for a fallback what happens instead.
    """

    op: str
    count: int
    reason: str

    def __str__(self) -> str:
        return f"{self.op} × {self.count}: {self.reason}"


@dataclass
class Coverage:
    """What a target makes of a program, known before any work.

    Attributes:
        supported: operations that the target has as such → number of nodes.
        fallbacks: operations that are lowered in another way.
        refused: what keeps the program from being lowered.
    """

    target: str
    supported: dict[str, int] = field(default_factory=dict)
    fallbacks: list[Concern] = field(default_factory=list)
    refused: list[Concern] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        return not self.refused

    def require(self, program: Program) -> None:
        """Raise when something is refused.

        Raises:
            TargetError: lists all of it.
        """
        if self.refused:
            lines = "\n".join(f"  - {concern}" for concern in self.refused)
            raise TargetError(f"target {self.target!r} cannot take program {program.name}:\n{lines}")

    def __str__(self) -> str:
        lines = [f"{self.target}: {sum(self.supported.values())} operations supported"]
        lines += [f"  falls back: {concern}" for concern in self.fallbacks]
        lines += [f"  refused: {concern}" for concern in self.refused]
        return "\n".join(lines)


def op_name(node: fx.Node) -> str:
    """`aten.linear` for a node that calls `aten.linear.default`."""
    return str(node.target).removesuffix(".default")


def count_ops(nodes: Iterable[fx.Node]) -> dict[str, int]:
    """Operations by name, most frequent first."""
    return dict(Counter(op_name(node) for node in nodes).most_common())


class Artifact(abc.ABC):
    """A lowered program. Runs on flat inputs, one for each input of the program.

    Attributes:
        target: name of the target that made it.
        input_names: of the flat inputs, in order.
        kv_cache: the cache of a step program, else None.
        notes: what a person should know (what was folded, what fell back).
    """

    target: ClassVar[str] = ""

    def __init__(self, input_names: Sequence[str], kv_cache: KVCache | None = None, notes: Iterable[str] = ()) -> None:
        self.input_names = list(input_names)
        self.kv_cache = kv_cache
        self.notes = list(notes)

    @abc.abstractmethod
    def run(self, *inputs: Any) -> list[Any]:
        """Flat outputs; the inputs are left as they are."""

    @abc.abstractmethod
    def save(self, path: str | Path) -> Path:
        """Write the artifact; nothing partial is left behind when that fails."""

    @classmethod
    def check_place(cls, path: Path) -> None:
        """Find out, before any work, that `save` can write there: to a file, or into a folder that exists.

        Raises:
            StorageError: something else is there, or nothing can be written there.
        """
        require_place(path / path.name if path.is_dir() else path)

    @classmethod
    @abc.abstractmethod
    def load(cls, path: str | Path, options: Options | None = None) -> Artifact:
        """Read what `save` wrote."""

    def verify(self, program: Program, inputs: Sequence[Any] | None = None) -> ArtifactCheck:
        """Error figures against a program, at three lengths (one of them 1) and batch sizes 1 and 3."""
        return check_artifact(self.target, self.run, program, inputs)

    # ---------------------------------------------------------------- steps over a cache

    def new_caches(self, batch: int) -> list[Tensor]:
        """Empty caches for `batch` sequences, where the artifact runs."""
        return self._cache("contiguous").empty(batch)

    def step(self, caches: list[Tensor], tokens: Tensor, positions: Tensor, logit_indices: Tensor) -> Tensor:
        """Logits [B, R, V] of one step; `caches` becomes the state after it."""
        self._cache("contiguous")
        logits, *caches[:] = self.run(tokens, positions, logit_indices, *caches)
        return logits

    def whole_rows(self, tokens: Tensor) -> Tensor:
        """Logits [B, S, V] of every token i64[B, S], by one step with fresh caches of either layout.

        Raises:
            OptionError: the rows are longer than the cache.
        """
        if self.kv_cache is None or self.kv_cache.block_size is None:
            (_, positions, wanted), count = self._cache("contiguous").whole_rows(tokens)
            return self.step(self.new_caches(count), tokens, positions, wanted)
        inputs, count = self.kv_cache.whole_rows(tokens)
        return self.paged_step(self.new_pages(count), StepInputs(*inputs)).unflatten(0, tuple(tokens.shape))

    # ---------------------------------------------------------------- steps over pages: see irc.core.paged

    def new_pages(self, num_blocks: int) -> list[Tensor]:
        """Pages of `num_blocks` blocks, where the artifact runs."""
        return self._cache("paged").empty(num_blocks)

    def paged_step(self, pages: list[Tensor], inputs: StepInputs) -> Tensor:
        """Logits [R, V] of one step over flat tokens; `pages` becomes the state after it."""
        self._cache("paged")
        logits, *pages[:] = self.run(*inputs.flat(), *pages)
        return logits

    def copy_blocks(self, pages: list[Tensor], sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copy whole blocks within `pages`."""
        for page in pages:
            page[list(targets)] = page[list(sources)]

    def _cache(self, layout: str = "contiguous") -> KVCache:
        if self.kv_cache is None:
            raise TargetError(f"this {self.target} artifact has no key-value cache: use the pass insert-kv-cache")
        if self.kv_cache.layout != layout:
            raise TargetError(
                f"this {self.target} artifact has a {self.kv_cache.layout} key-value cache, not a {layout} one:"
                f" compile with insert-kv-cache{{layout={layout}}}"
            )
        return self.kv_cache

    def check_inputs(self, inputs: Sequence[Any]) -> None:
        """Raise unless there is one input for each name.

        Raises:
            OptionError: another number of inputs.
        """
        if len(inputs) != len(self.input_names):
            raise OptionError(
                f"the artifact takes {len(self.input_names)} inputs ({', '.join(self.input_names)}), got {len(inputs)}"
            )


class Target(abc.ABC):
    """A way to run programs outside the IR.

    Attributes:
        name: as in `compile(target=...)`.
        description: what it gives, in a line.
        options_type: frozen dataclass of the options that `lower` takes.
        suffix: of the file that artifacts are saved to; empty: a folder.
    """

    name: ClassVar[str] = ""
    description: ClassVar[str] = ""
    options_type: ClassVar[type]
    artifact_type: ClassVar[type[Artifact]]
    suffix: ClassVar[str] = ""

    def available(self) -> str | None:
        """Why the target cannot be used here, or None when it can."""
        return None

    @abc.abstractmethod
    def check(self, program: Program) -> Coverage:
        """What is supported, what falls back, what is refused, and why."""

    def check_with(self, program: Program, options: Options | None) -> Coverage:
        """As `check`, for targets whose options change what they have kernels for."""
        return self.check(program)

    def get_ready(self, num_bytes: int, options: Options | None) -> None:  # noqa: B027 (nothing, by default)
        """Told when a large model is about to be captured: start what `lower` will need, as `Pass.get_ready` does.

        Args:
            num_bytes: of the weights that it will lower, roughly.
        """

    @abc.abstractmethod
    def lower(self, program: Program, options: Options | None = None) -> Artifact:
        """Lower a program, which stays as it is.

        Raises:
            TargetError: the program is refused, or something the target needs is missing.
            OptionError: unknown options.
        """

    def lower_tuned(
        self, program: Program, options: Options | None, seconds: float, progress: Progress | None = None
    ) -> Artifact:
        """As `lower`, with choices that were measured on this machine, within about `seconds`.

        Raises:
            OptionError: the target has nothing to choose.
        """
        raise OptionError(f"target {self.name!r} has no choices to tune")

    def default_passes(self, program: Program) -> list[Pass]:
        """The pipeline for `compile(passes=None)`."""
        return []

    def check_place(self, path: str | Path) -> None:
        """Find out, before any work, that an artifact can be saved there and is found again by its name.

        Raises:
            OptionError: the name is that of another kind of file.
            StorageError: something else is there, or nothing can be written there.
        """
        place = Path(path)
        if self.suffix and place.suffix != self.suffix and not place.is_dir():
            raise OptionError(f"target {self.name!r} writes a {self.suffix} file, or into a folder; not {place}")
        others = [name for name, target in registered_targets().items() if target.suffix == place.suffix != ""]
        if not self.suffix and others:
            raise OptionError(f"target {self.name!r} writes a folder: {place} is a name for target {others[0]!r}")
        self.artifact_type.check_place(place)

    def load(self, path: str | Path, options: Options | None = None) -> Artifact:
        """Read an artifact that was saved."""
        return self.artifact_type.load(path, options)

    def require_available(self) -> None:
        """Raise when the target cannot be used here.

        Raises:
            TargetError: with the reason.
        """
        reason = self.available()
        if reason is not None:
            raise TargetError(f"target {self.name!r} cannot be used here: {reason}")


_OptionsT = TypeVar("_OptionsT")


def read_options(cls: type[_OptionsT], given: Options | _OptionsT | None, *, what: str) -> _OptionsT:
    """Options as the target's dataclass.

    Raises:
        OptionError: names every unknown option, with the nearest ones, and every value of another type.
    """
    if isinstance(given, cls):
        return given
    if given is not None and not isinstance(given, Mapping):
        raise OptionError(f"{what}: options are a mapping of names to values, not {given!r}")
    assert dataclasses.is_dataclass(cls)
    values = dict(cast("Options", given or {}))  # else it were a `cls`
    known = [f.name for f in dataclasses.fields(cls)]
    types = option_types(cls)
    problems = [f"no option {name!r}{nearest(name, known)}" for name in values if name not in known]
    wrong = {name: mismatch(value, types[name]) for name, value in values.items() if name in known}
    problems += [f"option {name!r}: {reason}" for name, reason in wrong.items() if reason is not None]
    if problems:
        raise OptionError(f"{what}: {'; '.join(problems)}")
    return cls(**values)


_TARGETS: dict[str, Target] = {}

_TargetT = TypeVar("_TargetT", bound=Target)


def register_target(cls: type[_TargetT]) -> type[_TargetT]:
    """Class decorator: makes the target known by its name."""
    if not cls.name:
        raise ValueError(f"{cls.__name__} needs a name")
    if cls.name in _TARGETS and type(_TARGETS[cls.name]) is not cls:
        raise ValueError(f"two targets are called {cls.name!r}")
    _TARGETS[cls.name] = cls()
    return cls


def registered_targets() -> dict[str, Target]:
    """Targets by name, sorted. Importing `irc.lowering` registers those that come with irc."""
    return dict(sorted(_TARGETS.items()))


def get_target(name: str) -> Target:
    """The target of that name.

    Raises:
        OptionError: there is none; names the nearest.
    """
    _load_providers()
    if name not in _TARGETS:
        raise OptionError(f"no target is called {name!r}{nearest(name, _TARGETS)}")
    return _TARGETS[name]


def _load_providers() -> None:
    """Import the packages that register targets: irc's own, and those of other distributions."""
    import importlib
    from importlib import metadata

    importlib.import_module(_PROVIDER)
    for entry in metadata.entry_points(group=_PROVIDER):
        entry.load()


_PROVIDER = "irc.lowering"
