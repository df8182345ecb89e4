"""The target `reference` and its artifact."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from irc.core.contract import Pass
from irc.core.errors import OptionError, StorageError, TargetError
from irc.core.folder import prepare, save
from irc.core.kv_cache import KVCache
from irc.core.paged import StepInputs
from irc.core.program import VAL, Program
from irc.core.target import Artifact, Coverage, Options, Target, count_ops, op_name, read_options, register_target
from irc.lowering.reference.executable import build

aten = torch.ops.aten
_OPTIONS_FILE = "artifact.json"
_CONVOLUTIONS = (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.convolution.default)


@dataclass(frozen=True, kw_only=True)
class ReferenceOptions:
    """Options of the target.

    Attributes:
        device: `cpu`, `cuda`, `cuda:1`, `mps`.
        dequantize: quantized weights become floats once, at `load` (faster, as large as before quantization),
            or at every `step` (small, slow).
    """

    device: str = "cpu"
    dequantize: Literal["load", "step"] = "load"

    def __post_init__(self) -> None:
        if self.dequantize not in ("load", "step"):
            raise OptionError(f"dequantize must be load or step, not {self.dequantize!r}")
        try:
            torch.device(self.device)
        except RuntimeError as error:
            raise OptionError(f"{self.device!r} is no device: {str(error).splitlines()[0]}") from None


class ReferenceArtifact(Artifact):
    """A program compiled to a plain PyTorch function."""

    target: ClassVar[str] = "reference"

    def __init__(self, program: Program, options: ReferenceOptions) -> None:
        super().__init__(program.input_names, KVCache.of(program))
        self.program, self.options = program, options
        self.device = _usable_device(options.device)
        in_place = self.kv_cache is not None
        made = build(program, device=self.device, fold_dequantize=options.dequantize == "load", in_place=in_place)
        self._run = made.run
        self._written = list(program.aliases.values()) if in_place else []
        self.weight_bytes = made.weight_bytes
        self.notes.extend(made.notes)
        if made.weight_bytes != program.weight_bytes:
            self.notes.append(f"weights take {made.weight_bytes / 1e6:.1f} MB while running")

    def run(self, *inputs: Any) -> list[Any]:
        self.check_inputs(inputs)
        given = [self._moved(value) for value in inputs]
        for index in self._written:
            if given[index] is inputs[index]:
                given[index] = given[index].clone()
        return self._run(*given)

    def new_caches(self, batch: int) -> list[Tensor]:
        with torch.inference_mode():
            return self._cache("contiguous").empty(batch, device=self.device)

    def step(self, caches: list[Tensor], tokens: Tensor, positions: Tensor, logit_indices: Tensor) -> Tensor:
        self._cache("contiguous")
        moved = (self._moved(value) for value in (tokens, positions, logit_indices))
        logits, *caches[:] = self._run(*moved, *caches)
        return logits

    def new_pages(self, num_blocks: int) -> list[Tensor]:
        with torch.inference_mode():
            return self._cache("paged").empty(num_blocks, device=self.device)

    def paged_step(self, pages: list[Tensor], inputs: StepInputs) -> Tensor:
        self._cache("paged")
        logits, *pages[:] = self._run(*map(self._moved, inputs.flat()), *pages)
        return logits

    def copy_blocks(self, pages: list[Tensor], sources: Sequence[int], targets: Sequence[int]) -> None:
        with torch.inference_mode():
            super().copy_blocks(pages, sources, targets)

    def _moved(self, value: Any) -> Any:
        return value.to(self.device) if isinstance(value, Tensor) else value

    def save(self, path: str | Path) -> Path:
        """Write a program folder, and the options beside it. An artifact that is there already is replaced."""
        entry = {"target": self.target, "options": asdict(self.options)}
        save(self.program, path, beside={_OPTIONS_FILE: json.dumps(entry) + "\n"})
        return Path(path)

    @classmethod
    def check_place(cls, path: Path) -> None:
        prepare(path, marks=[_OPTIONS_FILE])

    @classmethod
    def load(cls, path: str | Path, options: Options | None = None) -> ReferenceArtifact:
        from irc.core.storage import load

        folder = Path(path)
        program = load(folder)
        stored: Any = {}
        if (folder / _OPTIONS_FILE).is_file():
            try:
                stored = json.loads((folder / _OPTIONS_FILE).read_text())["options"]
            except (ValueError, KeyError, TypeError) as error:
                raise StorageError(f"{folder / _OPTIONS_FILE} is damaged: {error}") from None
        return cls(program, read_options(ReferenceOptions, {**stored, **(options or {})}, what="target reference"))


def _usable_device(name: str) -> torch.device:
    device = torch.device(name)
    reasons = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if device.type not in reasons:
        raise TargetError(f"target 'reference' runs on cpu, cuda or mps, not {device.type}")
    if not reasons[device.type]:
        raise TargetError(f"target 'reference': PyTorch finds no {device.type} device here")
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


@register_target
class ReferenceTarget(Target):
    """Runs the program's graph with PyTorch."""

    name: ClassVar[str] = "reference"
    description: ClassVar[str] = "the program run by PyTorch, on cpu, cuda or mps"
    options_type: ClassVar[type] = ReferenceOptions
    artifact_type: ClassVar[type[Artifact]] = ReferenceArtifact

    def check(self, program: Program) -> Coverage:
        return Coverage(self.name, supported=count_ops(program.operations()))

    def lower(self, program: Program, options: Options | None = None) -> ReferenceArtifact:
        return ReferenceArtifact(program, read_options(ReferenceOptions, options, what="target reference"))

    def default_passes(self, program: Program) -> list[Pass]:
        return portable_passes(program)


def portable_passes(program: Program) -> list[Pass]:
    """Exact passes that help any target, as far as the program has something for them."""
    from irc.passes.attention.insert_kv_cache import InsertKVCache
    from irc.passes.fuse.fold_conv_batch_norm import FoldConvBatchNorm

    targets = {node.target for node in program.operations()}
    passes: list[Pass] = []
    if targets.intersection(_CONVOLUTIONS) and any("batch_norm" in str(target) for target in targets):
        passes.append(FoldConvBatchNorm())
    if KVCache.of(program) is None and _takes_numbers_of_tokens(program) and not InsertKVCache().requires(program):
        passes.append(InsertKVCache())
    return passes


def merges_of_siblings(program: Program) -> list[Pass]:
    """Passes that make one layer of several with the same input, as far as the program has some."""
    from irc.passes.fuse.merge_gate_up import MergeGateUp
    from irc.passes.fuse.merge_qkv import MergeQkv

    operations = {op_name(node) for node in program.operations()}
    merges: list[Pass] = []
    if operations & {"irc.attention", "irc.flash_attention"}:
        merges.append(MergeQkv())
    if "irc.glu" in operations:
        merges.append(MergeGateUp())
    return merges


def _takes_numbers_of_tokens(program: Program) -> bool:
    """Whether a step over a cache can stand for the program: one over embeddings has to be asked for."""
    values = [node.meta.get(VAL) for node in program.placeholders]
    return all(isinstance(value, Tensor) and not value.is_floating_point() for value in values)


__all__ = ["ReferenceArtifact", "ReferenceOptions", "ReferenceTarget", "merges_of_siblings", "portable_passes"]
