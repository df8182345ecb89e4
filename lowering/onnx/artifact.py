"""An ONNX file and a session of ONNX Runtime on it."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from irc.core.errors import StorageError, TargetError
from irc.core.kv_cache import KVCache
from irc.core.target import Artifact, Options, read_options
from irc.lowering.onnx import installed
from irc.lowering.onnx.options import OnnxOptions

if TYPE_CHECKING:
    import onnx_ir as ir

MODEL_FILE = "model.onnx"
_CPU_NAMES = ("cpu", "CPUExecutionProvider")
METADATA = "irc.metadata"
"""Key of what the model says about itself, as JSON."""
CONSECUTIVE = "consecutive_positions"
"""In it: true when the positions of a step must count up by one in each row."""
WRITES_PART = "writes_part_of_caches"
"""In it: true when new caches hold only what has been written, unless they are the same memory as the old."""
INTERFACE = "interface"
"""In it: whose inputs and outputs the model has, where they are not the program's."""
_EXTERNAL_BYTES = 1_900_000_000
"""Weights beyond this go to a file of their own: an ONNX file cannot exceed 2 GB."""


class OnnxArtifact(Artifact):
    """An ONNX model file and a session of ONNX Runtime on it."""

    target: ClassVar[str] = "onnx"

    def __init__(self, path: Path, options: OnnxOptions, *, temporary: bool = False) -> None:
        self.path, self.options = path, options
        if temporary:  # the folder goes when the artifact does
            weakref.finalize(self, shutil.rmtree, path.parent, ignore_errors=True)
        self._session = _session(path, options)
        metadata = _metadata(self._session)
        super().__init__([value.name for value in self._session.get_inputs()], KVCache.from_metadata(metadata))
        self.metadata = metadata
        self.output_names = [value.name for value in self._session.get_outputs()]

    def run(self, *inputs: Any) -> list[Any]:
        self.check_inputs(inputs)
        self._check_positions(inputs)
        tensors = [value if isinstance(value, Tensor) else torch.as_tensor(value) for value in inputs]
        feeds = {name: array_of(name, tensor) for name, tensor in zip(self.input_names, tensors, strict=True)}
        outputs = [torch.from_numpy(array) for array in self._session.run(None, feeds)]
        return self._with_rest(tensors, outputs) if self.metadata.get(WRITES_PART) else outputs

    def _with_rest(self, inputs: list[Tensor], outputs: list[Tensor]) -> list[Tensor]:
        """The new caches with what was behind the last token: the operator leaves memory of its own unwritten there."""
        assert self.kv_cache is not None
        _, positions, _, caches = self.kv_cache.split(inputs)
        unwritten = torch.arange(self.kv_cache.max_length) > positions[:, -1:].cpu()
        mask = unwritten[:, None, :, None]
        return [outputs[0], *(torch.where(mask, old.cpu(), new) for old, new in zip(caches, outputs[1:], strict=True))]

    def step(self, caches: list[Tensor], tokens: Tensor, positions: Tensor, logit_indices: Tensor) -> Tensor:
        """Logits [B, R, V] of one step. On the CPU, `caches` of the flavour `ort` are written in place."""
        if not self.metadata.get(WRITES_PART) or self.options.providers[0] not in _CPU_NAMES:
            return super().step(caches, tokens, positions, logit_indices)
        self._check_positions((tokens, positions, logit_indices, *caches))
        caches[:] = [cache.contiguous() for cache in caches]
        binding = self._session.io_binding()
        for name, value in zip(self.input_names, (tokens, positions, logit_indices), strict=False):
            binding.bind_cpu_input(name, array_of(name, value))
        binding.bind_output(self.output_names[0], "cpu")
        for index, cache in enumerate(caches):
            kind = array_of(self.input_names[index + 3], cache[:0]).dtype.type
            place = ("cpu", 0, kind, tuple(cache.shape), cache.data_ptr())
            binding.bind_input(self.input_names[index + 3], *place)
            binding.bind_output(self.output_names[index + 1], *place)
        self._session.run_with_iobinding(binding)
        return torch.from_numpy(binding.get_outputs()[0].numpy())

    def _check_positions(self, inputs: Sequence[Any]) -> None:
        """A step writes each row's tokens to consecutive places of the cache: other positions would go elsewhere."""
        if self.kv_cache is None or self.kv_cache.layout != "contiguous" or not self.metadata.get(CONSECUTIVE):
            return
        positions = torch.as_tensor(self.kv_cache.split(inputs)[1])
        if positions.shape[-1] > 1 and not bool((positions.diff(dim=-1) == 1).all()):
            raise TargetError(
                f"{self.path.name} takes positions that count up by one in each row; got {positions.tolist()}:"
                " lower with opset=23 for any order"
            )

    def save(self, path: str | Path) -> Path:
        import onnx_ir as ir

        target = Path(path)
        if target.is_dir():
            target = target / MODEL_FILE
        write_model(ir.load(self.path), target)
        return target

    @classmethod
    def load(cls, path: str | Path, options: Options | None = None) -> OnnxArtifact:
        file = Path(path)
        if not file.is_file():
            raise StorageError(f"{file} does not exist")
        return cls(file, read_options(OnnxOptions, options, what="target onnx"))


def array_of(name: str, tensor: Tensor) -> Any:
    if tensor.dtype == torch.bfloat16:
        raise TargetError(f"input {name}: bf16 arrays cannot be handed to ONNX Runtime from Python")
    return tensor.detach().cpu().contiguous().numpy()


def write_model(model: ir.Model, path: Path) -> None:
    """Write a model aside and move it into place; weights above 2 GB in a file `<name>.data` beside it."""
    import onnx_ir as ir

    num_bytes = sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)
    data = f"{path.name}.data" if num_bytes > _EXTERNAL_BYTES else None
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".irc-", dir=path.parent) as aside:
        ir.save(model, Path(aside) / path.name, external_data=data)
        for name in filter(None, (data, path.name)):
            os.replace(Path(aside) / name, path.parent / name)


def _session(path: Path, options: OnnxOptions) -> Any:
    import onnxruntime

    providers = installed.providers(options.providers)
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 3
    # Without it, kernels for processors without VNNI saturate sums of products of signed 8-bit weights.
    settings.add_session_config_entry("session.x64quantprecision", "1")
    # ONNX Runtime makes MatMulNBits of float products over 8-bit weights; by default that would round activations.
    settings.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", str(options.accuracy_level or 1))
    if options.threads is not None:
        settings.intra_op_num_threads = options.threads
    try:
        return onnxruntime.InferenceSession(str(path), settings, providers=providers)
    except Exception as error:  # ONNX Runtime's errors share no base class
        raise TargetError(f"ONNX Runtime does not take {path.name}: {str(error).splitlines()[0]}") from error


def _metadata(session: Any) -> dict[str, Any]:
    text = session.get_modelmeta().custom_metadata_map.get(METADATA, "{}")
    try:
        found = json.loads(text)
    except ValueError:
        raise StorageError(f"the metadata {METADATA} of the model is damaged") from None
    return found if isinstance(found, dict) else {}
