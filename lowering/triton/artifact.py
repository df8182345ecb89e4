"""The artifact of target `triton`: a Python module of kernels, weights and manifest; it needs no model to run."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import safetensors.torch
import torch
from torch import Tensor

from irc.core.errors import OptionError, StorageError, TargetError
from irc.core.folder import require_place
from irc.core.kv_cache import KVCache
from irc.core.paged import StepInputs
from irc.core.program import Program
from irc.core.target import Artifact, Options, read_options
from irc.core.text import parse
from irc.lowering.kernels.signature import Signature
from irc.lowering.triton.graphs import GraphStep
from irc.lowering.triton.module import import_module, interpreting
from irc.lowering.triton.options import TritonOptions

MANIFEST, WEIGHTS, SOURCE, GRAPH = "manifest.json", "weights.safetensors", "program.py", "graph.irc"
FORMAT = 1
_LEAST_TABLE = 8
MOST_GRAPHS = 32
"""Shapes of steps that are kept as CUDA graphs."""


class TritonArtifact(Artifact):
    """A program as Triton kernels, on one GPU (or in Triton's interpreter)."""

    target: ClassVar[str] = "triton"

    def __init__(
        self, manifest: Mapping[str, Any], source: str, weights: Mapping[str, Tensor], options: TritonOptions, *,
        folder: Path | None = None, notes: Sequence[str] = (), program: Program | None = None,
    ) -> None:  # fmt: skip
        try:
            self.signature = Signature(manifest["dims"], manifest["inputs"], manifest["outputs"])
            kv_cache = KVCache.from_metadata(manifest["metadata"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise StorageError(f"the manifest of a triton artifact is damaged: {error!r}") from error
        super().__init__([name for name, _ in self.signature.inputs], kv_cache, notes)
        self.manifest, self.source, self.options = dict(manifest), source, options
        self.weights, self._program, self._folder = dict(weights), program, folder
        self._loaded: _Loaded | None = None
        self._graphs: dict[Any, GraphStep] = {}

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
        return sum(w.numel() * w.element_size() for w in self.weights.values())

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self._ready().device

    def _ready(self) -> _Loaded:
        """The module, with its weights on the device: made when something runs, so that artifacts can be made anywhere.

        Raises:
            TargetError: neither a GPU nor the interpreter is there.
        """
        if self._loaded is None:
            self._loaded = _Loaded(self.source, self.weights, usable_device(self.options.device))
        return self._loaded

    # ------------------------------------------------------------ running

    def run(self, *inputs: Any) -> list[Any]:
        self.check_inputs(inputs)
        device = self._ready().device
        written = {i for i in self.signature.in_place if i is not None}
        given = [value.to(device).contiguous() if isinstance(value, Tensor) else value for value in inputs]
        for index in written:
            if given[index] is inputs[index]:
                given[index] = given[index].clone()
        home = next((value.device for value in inputs if isinstance(value, Tensor)), device)
        return [value.to(home) if isinstance(value, Tensor) else value for value in self.launch(given)]

    def launch(self, given: Sequence[Tensor]) -> list[Any]:
        """Flat outputs on the device, of dense inputs there; those that an output continues are written into."""
        sizes = self.signature.sizes(given)
        loaded = self._ready()
        results: list[Any] = []
        for shape, dtype, source in zip(
            self.signature.results(sizes), self.signature.outputs, self.signature.in_place, strict=True
        ):
            if dtype is None:
                results.append(shape[0])
            elif source is not None:
                results.append(given[source])
            else:
                results.append(torch.empty(shape, dtype=dtype, device=loaded.device))
        loaded.step(given, results, sizes)
        return results

    def new_caches(self, batch: int) -> list[Tensor]:
        return self._cache("contiguous").empty(batch, device=self.device)

    def new_pages(self, num_blocks: int) -> list[Tensor]:
        return self._cache("paged").empty(num_blocks, device=self.device)

    def step(self, caches: list[Tensor], tokens: Tensor, positions: Tensor, logit_indices: Tensor) -> Tensor:
        self._cache("contiguous")
        return self._step((tokens, positions, logit_indices), caches)

    def paged_step(self, pages: list[Tensor], inputs: StepInputs) -> Tensor:
        self._cache("paged")
        return self._step(_with_wide_tables(inputs).flat(), pages)

    def _step(self, inputs: Sequence[Tensor], caches: list[Tensor]) -> Tensor:
        """One step that writes into the caches themselves; steps of a shape that comes again are replayed as graphs."""
        device, home = self._ready().device, inputs[0].device
        if not all(cache.is_contiguous() and cache.device == device for cache in caches):
            raise OptionError(f"caches must be dense and on {device}: take them from new_caches or new_pages")
        in_place = self.signature.in_place == [None, *range(len(inputs), len(inputs) + len(caches))]
        if in_place and self.options.graphs and device.type == "cuda":
            key = (*(x.shape for x in inputs), caches[0].shape, *(cache.data_ptr() for cache in caches))
            if key not in self._graphs:
                if len(self._graphs) == MOST_GRAPHS:
                    self._graphs.clear()
                self._graphs[key] = GraphStep(self.launch, self._ready().arena)
            return self._graphs[key].run(inputs, caches).to(home)
        given = [x.to(device).contiguous() for x in inputs]
        logits, *caches[:] = self.launch([*given, *caches])
        return logits.to(home)

    # ------------------------------------------------------------ storage

    def save(self, path: str | Path) -> Path:
        """Write a folder: manifest, source, weights and graph. An existing folder is replaced, if it is an artifact."""
        target = Path(path)
        self.check_place(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
        try:
            (work / MANIFEST).write_text(json.dumps(self.manifest, indent=1) + "\n")
            (work / SOURCE).write_text(self.source, encoding="utf-8")
            (work / GRAPH).write_text(str(self.program), encoding="utf-8")
            safetensors.torch.save_file({name: _whole(w) for name, w in self.weights.items()}, work / WEIGHTS)
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
            raise StorageError(f"{path} exists and is no triton artifact: it is left alone")
        require_place(path)

    @classmethod
    def load(cls, path: str | Path, options: Options | None = None) -> TritonArtifact:
        folder = Path(path)
        if not (folder / MANIFEST).is_file():
            raise StorageError(f"{folder} is no triton artifact: it has no {MANIFEST}")
        try:
            manifest = json.loads((folder / MANIFEST).read_text())
            source = (folder / SOURCE).read_text(encoding="utf-8")
            weights = safetensors.torch.load_file(folder / WEIGHTS)
        except (OSError, ValueError, safetensors.SafetensorError) as error:
            raise StorageError(f"{folder} is damaged: {error}") from None
        if not isinstance(manifest, dict) or manifest.get("format") != FORMAT or manifest.get("target") != cls.target:
            found = manifest.get("format") if isinstance(manifest, dict) else None
            raise StorageError(f"{folder / MANIFEST} is of format {found!r}; this version reads {FORMAT}")
        missing = [name for name in manifest.get("weights", []) if name not in weights]
        if missing:
            raise StorageError(f"{folder / WEIGHTS} lacks {', '.join(missing)}")
        chosen = read_options(TritonOptions, options, what="target triton")
        return cls(manifest, source, weights, chosen, folder=folder, notes=manifest.get("notes", ()))


def _with_wide_tables(inputs: StepInputs) -> StepInputs:
    """Tables as wide as the next power of two, so that growing sequences seldom make a step of another shape."""
    missing = max(_LEAST_TABLE, 1 << (inputs.block_tables.shape[1] - 1).bit_length()) - inputs.block_tables.shape[1]
    # What lies behind a sequence's last block is any valid block.
    return replace(inputs, block_tables=torch.nn.functional.pad(inputs.block_tables, (0, missing)))


def _whole(weight: Tensor) -> Tensor:
    """The weight, dense in memory of its own, as safetensors wants it."""
    dense = weight.contiguous()
    return dense if dense.untyped_storage().nbytes() == dense.nbytes else dense.clone()


class _Loaded:
    """A program's module in this process, its weights on the device, and its arena."""

    def __init__(self, source: str, weights: Mapping[str, Tensor], device: torch.device) -> None:
        self.device = device
        self._module = import_module(source)
        self._weights = {name: weight.to(device).reshape(-1) for name, weight in weights.items()}
        self._memory = torch.empty(0, dtype=torch.uint8, device=device)

    def arena(self) -> Tensor:
        """The memory of temporary values, as it is now."""
        return self._memory

    def step(self, inputs: Sequence[Tensor], outputs: Sequence[Any], sizes: Sequence[int]) -> None:
        """One step: `outputs` are written."""
        slots = self._module.arena(*sizes)
        if self._memory.numel() < slots[-1]:
            self._memory = torch.empty(slots[-1], dtype=torch.uint8, device=self.device)
        on_device = torch.cuda.device(self.device) if self.device.type == "cuda" else contextlib.nullcontext()
        with torch.inference_mode(), on_device:
            self._module.step(inputs, outputs, self._weights, self._memory, slots, *sizes)


def usable_device(name: str | None) -> torch.device:
    """The device to run on.

    Raises:
        TargetError: kernels cannot run there.
    """
    if interpreting():
        if name not in (None, "cpu"):
            raise TargetError(f"Triton's interpreter (TRITON_INTERPRET=1) runs on the cpu, not on {name}")
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise TargetError(
            "target 'triton' finds no GPU to run on. Compile with verify='off' to make an artifact for another machine,"
            " or set TRITON_INTERPRET=1 before Python starts to run kernels slowly in Triton's interpreter"
        )
    device = torch.device(name or "cuda")
    if device.type != "cuda":
        raise TargetError(f"target 'triton' runs on cuda devices, not on {device}")
    return device if device.index is not None else torch.device("cuda", torch.cuda.current_device())
