"""Linear layers with integer weights whose activations are int8 with a scale a token.

Activations are so where the program says it, x → irc.dynamic_scale → irc.quantize{int8.row} → irc.dequantize → linear,
or where the option `activations="int8"` allows it.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.fx as fx

from irc.core.ops.registry import is_irc_op
from irc.core.program import Program
from irc.lowering.cpp.function import PrintedFunction
from irc.lowering.cpp.printer import print_epilogue
from irc.lowering.cpp.templates import quantized_matmul as template
from irc.lowering.cpp.templates.base import C_TYPES, MatmulProblem
from irc.lowering.cpu.options import CpuOptions
from irc.lowering.cpu.sites._linear import function, matmul_body, rows_text
from irc.lowering.cpu.sites.registry import SiteKind, register_site
from irc.lowering.cpu.weights import WeightBlock
from irc.lowering.kernels.definitions import Definer
from irc.lowering.kernels.layers import Linear, dequantized_parts, quantized_by_token, rows_of
from irc.lowering.kernels.sites import Site, TemplateCall

_ROUND = 64


def match(options: CpuOptions, definer: Definer, node: fx.Node) -> Site | None:
    """The site of a linear layer with packed integers, or None."""
    layer = Linear.of(node)
    if layer is None or not is_irc_op(layer.weight.target, "dequantize"):
        return None
    parts = dequantized_parts(layer.weight)
    if parts is None or parts[3] is not None:
        return None
    x = quantized_by_token(layer.x)
    if x is None:
        if options.activations != "int8":
            return None
        x = layer.x
    shape, wide = definer.shape(x), definer.shape(layer.weight)
    scale = definer.dtype(parts[1]) if parts[1] is not None else "f16"
    if not all(size.is_Integer for size in wide):
        return None
    problem = MatmulProblem(
        rows=rows_text(rows_of(shape)), columns=int(wide[0]), depth=int(wide[1]),
        weight=str(layer.weight.kwargs["format"]), scale=scale if scale == "f16" else "f32",
        asymmetric=parts[2] is not None, activation=definer.dtype(x),
    )  # fmt: skip
    if template.refuses(problem, "plain") is not None:
        return None
    return Site("quantized_matmul", node, ((x, "rows"),), problem, covers=(layer.weight,), finish=layer.finish())


def emit(call: TemplateCall, program: Program, weights: WeightBlock) -> PrintedFunction:
    """The call; the weight is packed, with scales in f16 where they are exact in it."""
    layer = Linear.of(call.site.node)
    assert layer is not None
    assert call.epilogue is not None
    parts = dequantized_parts(layer.weight)
    assert parts is not None
    tensors = [None if part is None else program.weight(part).detach() for part in parts]
    problem = _narrow(call.site.problem, tensors[1])
    name = f"{parts[0].target} as {problem.weight} {problem.scale}"
    weights.add_made(name, template.packed_bytes(problem), lambda place: template.pack(problem, *tensors, out=place))
    epilogue = print_epilogue(call.epilogue)
    args = {"worker": "worker", "x": "x", "stride": str(problem.depth), "packed": "packed", "scratch": "scratch"}
    memory = call.reads[0]
    rows = rows_of(memory.shape)
    filled = _ROUND + template.FILLING_ROWS
    a_row = template.scratch_bytes(problem, _ROUND, 1) // filled
    share = f"({problem.rows} == 1 ? workers : 1)"
    rows_with_filling = f"({problem.rows} == 1 ? 1 : {problem.rows} + {template.FILLING_ROWS})"
    return function(
        call,
        (f"const {C_TYPES[problem.activation]}* x", "const uint8_t* packed", "uint8_t* scratch"),
        (memory, f"arguments.weights + {weights.offsets[name]}", "arguments.arena + scratch"),
        matmul_body(epilogue, template.call(problem, args, "epilogue")),
        sizes=set(rows.free_symbols), includes=(*template.INCLUDES, "irc/columns.h"), epilogue=epilogue,
        scratch=f"{share} * ({rows_with_filling} * {a_row} + {3 * _ROUND})",
    )  # fmt: skip


def _narrow(problem: MatmulProblem, scale: torch.Tensor | None) -> MatmulProblem:
    """The problem with scales in f16, if nothing is lost."""
    if scale is None or problem.scale == "f16" or not torch.equal(scale.half().to(scale.dtype), scale):
        return problem
    return replace(problem, scale="f16")


register_site(SiteKind("quantized_matmul", match, emit, order=1))
