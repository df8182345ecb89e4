"""The target `onnx` and its artifact."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import tempfile
import weakref
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.fx as fx
from torch import Tensor

from irc.core import formats
from irc.core.contract import Pass
from irc.core.errors import OptionError, StorageError, TargetError
from irc.core.kv_cache import KVCache
from irc.core.ops.registry import find_op, is_irc_op
from irc.core.program import VAL, Program, dtype_name
from irc.core.target import Artifact, Concern, Coverage, Options, Target, count_ops, read_options, register_target

if TYPE_CHECKING:
    import onnx_ir as ir

_NEEDED = ("onnx", "onnxscript", "onnx_ir", "onnxruntime")
_MODEL_FILE = "model.onnx"
_EXTERNAL_BYTES = 1_900_000_000
"""Weights beyond this go to a file of their own: an ONNX file cannot exceed 2 GB."""
_UNSUPPORTED = (torch.complex64, torch.complex128)
_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)


@dataclass(frozen=True, kw_only=True)
class OnnxOptions:
    """Options of the target.

    Attributes:
        opset: None: 20, with quantized weights 21.
        providers: of ONNX Runtime, in order of preference.
        threads: of ONNX Runtime; None: its own choice.
    """

    opset: int | None = None
    providers: Sequence[str] = ("CPUExecutionProvider",)
    threads: int | None = None

    def __post_init__(self) -> None:
        if self.opset is not None and not 18 <= self.opset <= 25:
            raise OptionError(f"opset must be 18 to 25, not {self.opset!r}")
        if isinstance(self.providers, str) or not self.providers:
            raise OptionError(f"providers is a list of names, not {self.providers!r}")


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
        feeds = {}
        for name, value in zip(self.input_names, inputs, strict=True):
            tensor = value if isinstance(value, Tensor) else torch.as_tensor(value)
            if tensor.dtype == torch.bfloat16:
                raise TargetError(f"input {name}: bf16 arrays cannot be handed to ONNX Runtime from Python")
            feeds[name] = tensor.detach().cpu().contiguous().numpy()
        return [torch.from_numpy(array) for array in self._session.run(None, feeds)]

    def save(self, path: str | Path) -> Path:
        import onnx_ir as ir

        target = Path(path)
        if target.is_dir():
            target = target / _MODEL_FILE
        write_model(ir.load(self.path), target)
        return target

    @classmethod
    def load(cls, path: str | Path, options: Options | None = None) -> OnnxArtifact:
        file = Path(path)
        if not file.is_file():
            raise StorageError(f"{file} does not exist")
        return cls(file, read_options(OnnxOptions, options, what="target onnx"))


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

    known = onnxruntime.get_available_providers()
    missing = [name for name in options.providers if name not in known]
    if missing:
        raise TargetError(f"ONNX Runtime here has no {', '.join(missing)}; it has {', '.join(known)}")
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 3
    if options.threads is not None:
        settings.intra_op_num_threads = options.threads
    try:
        return onnxruntime.InferenceSession(str(path), settings, providers=list(options.providers))
    except Exception as error:  # ONNX Runtime's errors share no base class
        raise TargetError(f"ONNX Runtime does not take {path.name}: {str(error).splitlines()[0]}") from error


def _metadata(session: Any) -> dict[str, Any]:
    from irc.lowering.onnx.export import METADATA

    text = session.get_modelmeta().custom_metadata_map.get(METADATA, "{}")
    try:
        found = json.loads(text)
    except ValueError:
        raise StorageError(f"the metadata {METADATA} of the model is damaged") from None
    return found if isinstance(found, dict) else {}


def _why_not_at_run_time(node: fx.Node) -> str | None:
    """Why a quantize inside the graph cannot be written, or None."""
    if not is_irc_op(node.target, "quantize"):
        return None
    chosen = formats.parse(str(node.kwargs["format"]))
    if not isinstance(chosen, formats.QuantFormat):
        return f"gives {chosen} at run time, for which ONNX Runtime's CPU has no kernels: use 8-bit integers"
    if chosen.packs_two:
        return "packs 4-bit numbers at run time, which the exporter writes with mixed types: use 8 bits"
    return None


@register_target
class OnnxTarget(Target):
    """Lowers to an ONNX file of standard operators."""

    name: ClassVar[str] = "onnx"
    description: ClassVar[str] = "an ONNX file of standard operators, run by ONNX Runtime"
    options_type: ClassVar[type] = OnnxOptions
    artifact_type: ClassVar[type[Artifact]] = OnnxArtifact
    suffix: ClassVar[str] = ".onnx"

    def available(self) -> str | None:
        missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
        return f"missing: {', '.join(missing)} (pip install them)" if missing else None

    def check(self, program: Program) -> Coverage:
        from irc.lowering.onnx.quantized import stored_weights

        coverage = Coverage(self.name)
        for op, count in count_ops(program.operations()).items():
            if op == "irc.flash_attention":
                coverage.fallbacks.append(Concern(op, count, "attention in standard operators, all scores in memory"))
            else:
                coverage.supported[op] = count
        fakes = sum(is_irc_op(node.target, "fake_quantize") for node in program.operations())
        if fakes:
            concern = Concern(
                "irc.fake_quantize", fakes, "is for training: run convert-fake-quantization before lowering"
            )
            coverage.refused.append(concern)
        refused = Counter(filter(None, map(_why_not_at_run_time, program.operations())))
        coverage.refused.extend(Concern("irc.quantize", count, reason) for reason, count in refused.items())
        for node in program.graph.nodes:
            value = node.meta.get(VAL)
            if node.op == "placeholder" and isinstance(value, Tensor) and value.dtype in _FLOAT8:
                reason = f"ONNX Runtime's CPU kernels move no {dtype_name(value.dtype)} numbers: use an integer cache"
                coverage.refused.append(Concern(node.name, 1, reason))
            if isinstance(value, Tensor) and value.dtype in _UNSUPPORTED:
                concern = Concern(node.name, 1, f"ONNX has no {dtype_name(value.dtype)} arithmetic")
                coverage.refused.append(concern)
            if node.op == "placeholder" and not isinstance(value, Tensor):
                coverage.refused.append(Concern(node.name, 1, "this input is no tensor"))
        floats = Counter(
            str(chosen) for _, chosen in stored_weights(program) if not isinstance(chosen, formats.QuantFormat)
        )
        for text, count in floats.items():
            coverage.fallbacks.append(Concern("irc.dequantize", count, f"weights in {text} are written as floats"))
        composite = sum(find_op(node.target) is not None for node in program.operations())
        if composite:
            coverage.fallbacks.append(Concern("irc.*", composite, "written in standard operators, not as one fused"))
        return coverage

    def lower(self, program: Program, options: Options | None = None) -> OnnxArtifact:
        import onnx

        from irc.lowering.onnx.export import export_model

        self.require_available()
        chosen = read_options(OnnxOptions, options, what="target onnx")
        self.check(program).require(program)
        model = export_model(program, chosen.opset)
        path = Path(tempfile.mkdtemp(prefix="irc-onnx-")) / _MODEL_FILE
        write_model(model, path)
        try:
            onnx.checker.check_model(str(path), full_check=False)
        except onnx.checker.ValidationError as error:
            raise TargetError(f"the ONNX checker refuses program {program.name}: {error}") from error
        artifact = OnnxArtifact(path, chosen, temporary=True)
        if artifact.input_names != program.input_names:
            raise TargetError(
                f"the exporter changed the inputs of {program.name}: {program.input_names} became"
                f" {artifact.input_names}"
            )
        return artifact

    def default_passes(self, program: Program) -> list[Pass]:
        from irc.lowering.reference.target import portable_passes

        return portable_passes(program)


__all__ = ["OnnxArtifact", "OnnxOptions", "OnnxTarget", "write_model"]
