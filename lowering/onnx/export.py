"""From a program to an ONNX model, through `torch.export` and PyTorch's ONNX exporter.

Canonical operations become ONNX operators where a translation takes them (see `registry`); the others decompose to
ATen. Quantized weights are kept opaque and become `DequantizeLinear` afterwards (see `quantized`). Sizes keep the
program's names.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import onnx_ir as ir
import torch
import torch.fx as fx
from torch import Tensor

from irc.core.dims import dim_symbol
from irc.core.errors import TargetError
from irc.core.kv_cache import METADATA_KEY, KVCache
from irc.core.ops.registry import is_irc_op
from irc.core.program import VAL, Program
from irc.core.slices import evaluate_size
from irc.lowering.onnx import quantized
from irc.lowering.onnx.artifact import CONSECUTIVE, METADATA, WRITES_PART
from irc.lowering.onnx.complex_numbers import write_as_pairs
from irc.lowering.onnx.fusing import fuse
from irc.lowering.onnx.installed import newest_opset
from irc.lowering.onnx.options import OnnxOptions
from irc.lowering.onnx.registry import Setting, translate

# DequantizeLinear has blocks and 4-bit types from 21 on.
_OPSET_QUANTIZED = 21
# Operators that take where a row starts, and count from there.
_COUNT_UP = ("TensorScatter", "GroupQueryAttention")
_SYMBOL = re.compile(r"[A-Za-z_]\w*")


def setting_of(options: OnnxOptions) -> Setting:
    """What a program is lowered for, with the opset chosen."""
    return Setting(options.flavour, options.opset or newest_opset(), options.accuracy_level, options.integers)


def export_model(program: Program, setting: Setting) -> ir.Model:
    """An ONNX model that computes what the program does, with its input names, dimension names and metadata.

    Raises:
        TargetError: the exporter does not take the program, or the opset is too old for its weights.
    """
    own = program.copy()
    own.erase_dead()
    _store_all_scores(own)
    write_as_pairs(own)
    fuse(setting, own)
    quantized.fold_other_formats(own)
    if quantized.keep_opaque(own) and setting.opset < _OPSET_QUANTIZED:
        raise TargetError(f"quantized weights need ONNX opset {_OPSET_QUANTIZED} or newer, not {setting.opset}")
    translate(setting, own)
    exported = _exported(own)
    with quiet():
        try:
            made = torch.onnx.export(
                exported, dynamo=True, opset_version=setting.opset, verbose=False, optimize=True,
                input_names=program.input_names, output_names=output_names(program),
            )  # fmt: skip
        except Exception as error:  # the exporter raises errors of many kinds, all of them about this program
            raise TargetError(f"the ONNX exporter does not take program {program.name}: {_reason(error)}") from error
    assert made is not None
    model = made.model
    quantized.lower_opaque(model)
    _drop_statistics(model)
    _name_dimensions(model, _symbol_names(own, exported))
    model.graph.name = program.name
    model.metadata_props[METADATA] = json.dumps(_description(program, setting, model))
    return model


def _drop_statistics(model: ir.Model) -> None:
    """Results of norms that nothing uses are left out, so that the runtime does not compute them."""
    for node in model.graph:
        if node.op_type == "SkipSimplifiedLayerNormalization":
            for out in node.outputs[1:]:
                if not out.uses() and not out.is_graph_output():
                    out.name = ""


def output_names(program: Program) -> list[str]:
    """Names of the flat outputs: `logits` and the new caches of a step, else `output`, or `output_0` and so on."""
    cache = KVCache.of(program)
    if cache is not None:
        return ["logits", *(f"new_{one.name}" for one in cache.caches)]
    count = len(program.outputs)
    return ["output"] if count == 1 else [f"output_{i}" for i in range(count)]


def _store_all_scores(program: Program) -> None:
    # The blocks of flash attention are a loop in Python over sizes: it cannot be exported with dynamic ones.
    for node in program.operations():
        if is_irc_op(node.target, "flash_attention"):
            node.target = torch.ops.irc.attention.default


def _exported(program: Program) -> torch.export.ExportedProgram:
    program.graph.set_codegen(fx.graph.CodeGen())
    program.graph_module.recompile()
    dims = {
        name: torch.export.Dim(name, min=max(dim.minimum, 1), max=dim.maximum) for name, dim in program.dims.items()
    }
    symbols = {dim_symbol(name): dim for name, dim in dims.items()}
    shapes: list[Any] = []
    for node in program.placeholders:
        if not isinstance(node.meta[VAL], Tensor):
            raise TargetError(f"input {node.name} of program {program.name} is no tensor: ONNX inputs are")
        sizes = enumerate(program.shape_expr(node))
        shapes.append({i: symbols.get(s, torch.export.Dim.AUTO) for i, s in sizes if not s.is_Integer})
    with quiet(), torch.no_grad():
        try:
            return torch.export.export(
                program.graph_module, _inputs(program), dynamic_shapes=tuple(shapes), strict=False,
                prefer_deferred_runtime_asserts_over_guards=True,
            )  # fmt: skip
        except Exception as error:  # torch.export raises errors of many kinds, all of them about this program
            raise TargetError(f"program {program.name} cannot be exported again: {_reason(error)}") from error


def _inputs(program: Program) -> tuple[Tensor, ...]:
    """Zeros of the sizes that the program was captured at: only types matter here."""
    hints = {name: max(dim.hint, 2) for name, dim in program.dims.items()}
    made = []
    for node in program.placeholders:
        value = node.meta[VAL]
        shape = tuple(evaluate_size(program, size, hints) for size in value.shape)
        made.append(torch.zeros(shape, dtype=value.dtype, device=value.device))
    return tuple(made)


def _symbol_names(program: Program, exported: torch.export.ExportedProgram) -> dict[str, str]:
    """The exporter's symbols → the program's dimension names."""
    names: dict[str, str] = {}
    users = set(exported.graph_signature.user_inputs)
    inputs = [node for node in exported.graph.nodes if node.op == "placeholder" and node.name in users]
    for ours, theirs in zip(program.placeholders, inputs, strict=True):
        for expr, size in zip(program.shape_expr(ours), theirs.meta["val"].shape, strict=True):
            if expr.is_Symbol and isinstance(size, torch.SymInt):
                names.setdefault(str(size.node.expr), str(expr))
    return names


def _name_dimensions(model: ir.Model, names: Mapping[str, str]) -> None:
    values = [*model.graph.inputs, *(out for node in model.graph for out in node.outputs)]
    for value in values:
        if value.shape is None:
            continue
        sizes: list[Any] = []
        for size in value.shape:
            text = getattr(size, "value", None)
            renamed = _SYMBOL.sub(lambda m: names.get(m[0], m[0]), text) if isinstance(text, str) else None
            sizes.append(ir.SymbolicDim(renamed) if renamed is not None else size)
        value.shape = ir.Shape(sizes)


def _description(program: Program, setting: Setting, model: ir.Model) -> dict[str, Any]:
    """What the artifact must know to run the model."""
    found: dict[str, Any] = {
        "aliases": {str(k): v for k, v in program.aliases.items()}, "program": program.name, "flavour": setting.flavour,
    }  # fmt: skip
    if METADATA_KEY in program.metadata:
        found[METADATA_KEY] = program.metadata[METADATA_KEY]
        kinds = {node.op_type for node in model.graph}
        found[CONSECUTIVE] = not kinds.isdisjoint(_COUNT_UP)
        found[WRITES_PART] = "GroupQueryAttention" in kinds
    return found


def _reason(error: BaseException) -> str:
    """First line of the error that was at the root of it."""
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps the exporters' progress, and warnings about their own insides, from the user's screen."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.onnx._internal.exporter", "onnxscript")]
    found = [(logger, logger.level) for logger in loggers]
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            for logger in loggers:
                logger.setLevel(logging.ERROR)
            yield
    finally:
        for logger, level in found:
            logger.setLevel(level)
