"""The target `onnx`."""

from __future__ import annotations

import importlib.util
import tempfile
from collections import Counter
from pathlib import Path
from typing import ClassVar

import torch
import torch.fx as fx
from torch import Tensor

from irc.core import formats
from irc.core.contract import Pass
from irc.core.errors import TargetError
from irc.core.ops.registry import find_op, is_irc_op
from irc.core.program import VAL, Program, dtype_name
from irc.core.target import Artifact, Concern, Coverage, Options, Target, op_name, read_options, register_target
from irc.lowering.onnx.artifact import MODEL_FILE, OnnxArtifact, write_model
from irc.lowering.onnx.complex_numbers import is_complex, write_as_pairs
from irc.lowering.onnx.options import OnnxOptions

_NEEDED = ("onnx", "onnxscript", "onnx_ir", "onnxruntime")
_UNSUPPORTED = (torch.complex64, torch.complex128)
_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)


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
        return self.coverage(program, OnnxOptions())

    def coverage(self, program: Program, options: OnnxOptions) -> Coverage:
        """What the target makes of a program with these options."""
        coverage = Coverage(self.name)
        if any(map(is_complex, program.graph.nodes)):
            program = program.copy()
            write_as_pairs(program)
        _count_operations(program, options, coverage)
        fakes = sum(is_irc_op(node.target, "fake_quantize") for node in program.operations())
        if fakes:
            concern = Concern(
                "irc.fake_quantize", fakes, "is for training: run convert-fake-quantization before lowering"
            )
            coverage.refused.append(concern)
        refused = Counter(filter(None, map(_why_not_at_run_time, program.operations())))
        coverage.refused.extend(Concern("irc.quantize", count, reason) for reason, count in refused.items())
        for node in program.graph.nodes:
            coverage.refused.extend(_refused_value(node))
        return coverage

    def lower(self, program: Program, options: Options | None = None) -> OnnxArtifact:
        import onnx

        from irc.lowering.onnx.export import export_model, setting_of

        self.require_available()
        chosen = read_options(OnnxOptions, options, what="target onnx")
        self.coverage(program, chosen).require(program)
        model = export_model(program, setting_of(chosen))
        path = Path(tempfile.mkdtemp(prefix="irc-onnx-")) / MODEL_FILE
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


def _count_operations(program: Program, options: OnnxOptions, coverage: Coverage) -> None:
    """Adds operations that are taken as they are, and those that are written in several operators with the reason."""
    from irc.lowering.onnx.export import setting_of
    from irc.lowering.onnx.fusing import Match, fusions
    from irc.lowering.onnx.quantized import stored_weights
    from irc.lowering.onnx.registry import find_translation

    setting, weights = setting_of(options), dict(stored_weights(program))
    supported: Counter[str] = Counter()
    fallbacks: Counter[tuple[str, str]] = Counter()
    fused: set[fx.Node] = set()
    for fusion in fusions(setting):
        for found in fusion.find(setting, program):
            if isinstance(found, Match) and fused.isdisjoint(found.covers):
                supported[f"{fusion.onnx_op}"] += 1
                fused.update(found.covers)
    for node in program.operations():
        name = op_name(node)
        if node in fused:
            continue
        if node in weights and not isinstance(weights[node], formats.QuantFormat):
            fallbacks[name, f"weights in {weights[node]} are written as floats"] += 1
        elif name == "irc.flash_attention":
            fallbacks[name, "attention in standard operators, all scores in memory"] += 1
        elif find_op(node.target) is not None and node not in weights:
            translation, reason = find_translation(setting, program, node)
            if translation is not None:
                supported[name] += 1
            else:
                fallbacks[name, f"written in several operators{': ' if reason else ''}{reason}"] += 1
        else:
            supported[name] += 1
    coverage.supported.update(supported.most_common())
    coverage.fallbacks.extend(Concern(op, count, reason) for (op, reason), count in fallbacks.items())


def _refused_value(node: fx.Node) -> list[Concern]:
    """Values that ONNX Runtime cannot take or compute with."""
    value, found = node.meta.get(VAL), []
    if node.op == "placeholder" and not isinstance(value, Tensor):
        found.append(Concern(node.name, 1, "this input is no tensor"))
    if not isinstance(value, Tensor):
        return found
    if node.op == "placeholder" and value.dtype in _FLOAT8:
        reason = f"ONNX Runtime's CPU kernels move no {dtype_name(value.dtype)} numbers: use an integer cache"
        found.append(Concern(node.name, 1, reason))
    if value.dtype in _UNSUPPORTED:
        found.append(Concern(node.name, 1, f"ONNX has no {dtype_name(value.dtype)} arithmetic"))
    return found
