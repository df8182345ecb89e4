"""The artifact of target `cpu`: shared object, weights and manifest; runs without the model it came from."""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from irc.core.artifact_check import ArtifactCheck, check_artifact
from irc.core.errors import OptionError, StorageError, TargetError
from irc.core.folder import require_place
from irc.core.kv_cache import KVCache
from irc.core.paged import StepInputs
from irc.core.program import Program
from irc.core.target import Artifact, Options, read_options
from irc.core.text import parse
from irc.lowering.cpp.build import build, supported_isas
from irc.lowering.cpu.bound import BoundStep
from irc.lowering.cpu.library import Library, default_threads
from irc.lowering.cpu.options import CpuOptions
from irc.lowering.kernels.signature import Signature
from irc.passes.quantize.quantize_activations import QuantizeActivations

MANIFEST, WEIGHTS, SOURCE, HEADER = "manifest.json", "weights.bin", "program.cpp", "program.h"
GRAPH = "graph.irc"
FORMAT = 1
MOST_BOUND = 32
# Bytes of weights below which a step of a language model is a matter of microseconds: meeting other threads costs more
# than they help, and most where PyTorch's own threads, which wait by spinning, are on the same processors.
_SMALL_STEP = 4 << 20
"""Shapes of steps that are remembered with the caches they were called with."""


class CpuArtifact(Artifact):
    """A program built for this machine's processor."""

    target: ClassVar[str] = "cpu"

    def __init__(
        self, manifest: Mapping[str, Any], source: str, weights: Tensor, options: CpuOptions, *,
        folder: Path | None = None, notes: Sequence[str] = (), program: Program | None = None,
    ) -> None:  # fmt: skip
        try:
            self.signature = Signature(manifest["dims"], manifest["inputs"], manifest["outputs"])
            kv_cache = KVCache.from_metadata(manifest["metadata"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise StorageError(f"the manifest of a cpu artifact is damaged: {error!r}") from error
        super().__init__([name for name, _ in self.signature.inputs], kv_cache, notes)
        self.manifest, self.source, self.options = dict(manifest), source, options
        self.isa = choose_isa(options.isa)
        self._weights, self._program, self._folder = weights, program, folder
        self.object_path = _prebuilt(folder, self.isa) or build(source, isa=self.isa, flags=options.flags)
        small = kv_cache is not None and weights.numel() < _SMALL_STEP
        self._library = Library(self.object_path, weights, options.threads or (1 if small else default_threads()))
        self._bound: dict[tuple[torch.Size | None, ...], BoundStep] = {}
        self._written = {i for i in self.signature.in_place if i is not None}

    @property
    def program(self) -> Program:
        """The program that was lowered; of a loaded artifact its graph alone, with weights that hold no numbers."""
        if self._program is None:
            assert self._folder is not None
            try:
                self._program = parse((self._folder / GRAPH).read_text(encoding="utf-8"))
            except OSError as error:
                raise StorageError(f"{self._folder} does not hold the graph that it was made from: {error}") from None
        return self._program

    @property
    def weight_bytes(self) -> int:
        return self._weights.numel()

    @property
    def threads(self) -> int:
        return self._library.threads

    @property
    def arena_bytes(self) -> int:
        """Bytes that the last step's temporary values took."""
        return self._library.arena_bytes

    def verify(self, program: Program, inputs: Sequence[Any] | None = None) -> ArtifactCheck:
        """As `Artifact.verify`; activations quantized by an option may cost what those of a pass may."""
        quantized = self.options.activations == "int8"
        tolerance = QuantizeActivations(mode="dynamic").preserves.rtol if quantized else None
        return check_artifact(self.target, self.run, program, inputs, tolerance=tolerance)

    def run(self, *inputs: Any) -> list[Any]:
        self.check_inputs(inputs)
        given = [_dense(value) for value in inputs]
        for index in self._written:
            if given[index] is inputs[index]:
                given[index] = given[index].clone()
        return self._run(given)

    def _run(self, given: Sequence[Tensor]) -> list[Any]:
        """Flat outputs; inputs that an output continues are written into."""
        sizes = self.signature.sizes(given)
        results: list[Any] = []
        made: list[Tensor | None] = []
        for shape, dtype, source in zip(
            self.signature.results(sizes), self.signature.outputs, self.signature.in_place, strict=True
        ):
            if dtype is None:
                results.append(shape[0])
                made.append(None)
            elif source is not None:
                results.append(given[source])
                made.append(None)
            else:
                results.append(torch.empty(shape, dtype=dtype))
                made.append(results[-1])
        self._library.run(sizes, given, made)
        return results

    def kernel_times(self, *inputs: Any, runs: int = 5) -> list[tuple[str, float]]:
        """(kernel and the last node that it computes, milliseconds a run), in the order of the step.

        Raises:
            OptionError: the program was built without the option `profile`.
        """
        parts = self.manifest.get("parts")
        if not parts:
            raise OptionError("this artifact does not measure its kernels: compile with options={'profile': True}")
        self.run(*inputs)
        self._library.part_times(len(parts))
        for _ in range(runs):
            self.run(*inputs)
        return [
            (str(part), ns / runs / 1e6) for part, ns in zip(parts, self._library.part_times(len(parts)), strict=True)
        ]

    def step(self, caches: list[Tensor], tokens: Tensor, positions: Tensor, logit_indices: Tensor) -> Tensor:
        if self.kv_cache is None:
            raise TargetError("this cpu artifact has no key-value cache: use the pass insert-kv-cache")
        return self._step((tokens, positions, logit_indices), caches, "caches must be dense: take them from new_caches")

    def _step(self, inputs: tuple[Tensor, ...], caches: list[Tensor], sparse: str) -> Tensor:
        """One step that writes into the caches themselves, whatever their size."""
        shapes = tuple(getattr(x, "shape", None) for x in inputs)
        bound = self._bound.get(shapes)
        if bound is not None and bound.fits(inputs, caches):
            return bound.run(inputs)
        given = [*map(_dense, inputs), *caches]
        if not all(cache.is_contiguous() for cache in caches):
            raise OptionError(sparse)
        if BoundStep.possible(self.signature, len(inputs), len(caches)):
            sizes = self.signature.sizes(given)
            if len(self._bound) == MOST_BOUND:
                self._bound.clear()
            bound = self._bound[shapes] = BoundStep(self._library, self.signature, sizes, given[: len(inputs)], caches)
            return bound.run(given[: len(inputs)])
        logits, *caches[:] = self._run(given)
        return logits

    def paged_step(self, pages: list[Tensor], inputs: StepInputs) -> Tensor:
        """As the base class says; the pages themselves are written into, whatever their size."""
        self._cache("paged")
        return self._step(inputs.flat(), pages, "pages must be dense: take them from new_pages")

    # ------------------------------------------------------------ storage

    def save(self, path: str | Path) -> Path:
        """Write a folder: manifest, source, C header, weights, graph, and a shared object for each instruction set.

        With a name that ends in `.irca` too. An existing folder is replaced, if it is an artifact.
        """
        from irc.lowering.cpu.header import header_text

        target = Path(path)
        self.check_place(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
        try:
            (work / MANIFEST).write_text(json.dumps({**self.manifest, "isas": list(self._isas())}, indent=1) + "\n")
            (work / SOURCE).write_text(self.source)
            (work / GRAPH).write_text(str(self.program), encoding="utf-8")
            (work / HEADER).write_text(header_text(self.manifest))
            with open(work / WEIGHTS, "wb") as file:
                file.write(self._weights.numpy().data)
            for isa in self._isas():
                shutil.copyfile(build(self.source, isa=isa, flags=self.options.flags), work / f"program.{isa}.so")
            work.chmod(0o755)
            if target.exists():
                shutil.rmtree(target)
            os.replace(work, target)
        except BaseException:
            shutil.rmtree(work, ignore_errors=True)
            raise
        return target

    @classmethod
    def check_place(cls, path: Path) -> None:
        if path.exists() and not all((path / name).is_file() for name in (MANIFEST, SOURCE, WEIGHTS)):
            raise StorageError(f"{path} exists and is no cpu artifact: it is left alone")
        require_place(path)

    def _isas(self) -> Sequence[str]:
        return self.options.save_isas or (self.isa,)

    @classmethod
    def load(cls, path: str | Path, options: Options | None = None) -> CpuArtifact:
        folder = Path(path)
        if not (folder / MANIFEST).is_file():
            raise StorageError(f"{folder} is no cpu artifact: it has no {MANIFEST}")
        try:
            manifest = json.loads((folder / MANIFEST).read_text())
            source = (folder / SOURCE).read_text()
        except (OSError, ValueError) as error:
            raise StorageError(f"{folder} is damaged: {error}") from None
        if not isinstance(manifest, dict) or manifest.get("format") != FORMAT or manifest.get("target") != cls.target:
            found = manifest.get("format") if isinstance(manifest, dict) else None
            raise StorageError(f"{folder / MANIFEST} is of format {found!r}; this version reads {FORMAT}")
        weights = _mapped(folder / WEIGHTS, manifest.get("weight_bytes"))
        chosen = read_options(CpuOptions, options, what="target cpu")
        return cls(manifest, source, weights, chosen, folder=folder, notes=manifest.get("notes", ()))


def choose_isa(wanted: str | None) -> str:
    """The instruction set to build for: the one asked for, else the most capable that the processor has.

    Raises:
        TargetError: the processor lacks it.
    """
    found = supported_isas()
    if wanted is None:
        return found[-1]
    if wanted not in found:
        raise TargetError(f"this processor has no {wanted}; it has {', '.join(found)}")
    return wanted


def _prebuilt(folder: Path | None, isa: str) -> Path | None:
    """The object that came with an artifact, if it has one for the instruction set."""
    if folder is None:
        return None
    path = folder / f"program.{isa}.so"
    return path if path.is_file() else None


def _dense(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    if value.device.type != "cpu":
        raise OptionError(f"target cpu takes tensors on the cpu, not on {value.device}")
    return value if value.is_contiguous() else value.contiguous()


def _mapped(path: Path, expected: Any) -> Tensor:
    """A file's bytes, mapped: pages come when they are read and are shared between processes."""
    try:
        size = path.stat().st_size
        if size != expected:
            raise StorageError(f"{path} has {size} bytes, its manifest says {expected}")
        with open(path, "rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    except OSError as error:
        raise StorageError(f"{path} cannot be read: {error}") from None
    return torch.frombuffer(mapped, dtype=torch.uint8)


assert ctypes.sizeof(ctypes.c_void_p) == 8, "the interface of built programs assumes 64-bit addresses"
