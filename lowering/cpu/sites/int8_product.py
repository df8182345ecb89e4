"""Convolutions and linear layers whose activations and weights are both 8-bit integers with static scales.

    dequantize(q_x, s_x, z_x) · dequantize(q_w, s_w)  →  s_x s_w Σ (q_x - z_x) q_w

The sum is exact; it is read from the integers as they are stored, and whatever follows, a quantize of the result
included, runs in the epilogue.
"""

from __future__ import annotations

import sympy
import torch.fx as fx

from irc.core.program import Program
from irc.lowering.cpp.expressions import size_text
from irc.lowering.cpp.function import PrintedFunction
from irc.lowering.cpp.templates import int8_conv2d as template
from irc.lowering.cpp.templates.conv2d import ConvProblem
from irc.lowering.cpu.options import CpuOptions
from irc.lowering.cpu.sites._convolution import Convolution, conv_arguments, convolution_function
from irc.lowering.cpu.sites._integers import BYTES, Int8Weight, IntegerOperands, StaticInt8
from irc.lowering.cpu.sites._requantize import Requantization
from irc.lowering.cpu.sites.registry import SiteKind, register_site
from irc.lowering.cpu.weights import WeightBlock
from irc.lowering.kernels.definitions import Definer
from irc.lowering.kernels.layers import Linear, rows_of
from irc.lowering.kernels.sites import Site, TemplateCall


def match(options: CpuOptions, definer: Definer, node: fx.Node) -> Site | None:
    """The site of a layer over integers on both sides, or None."""
    layer = Linear.of(node) or Convolution.of(definer, node)
    if layer is None:
        return None
    x, weight = StaticInt8.of(definer, layer.x), Int8Weight.of(layer.weight)
    if x is None or weight is None or definer.dtype(node) != "f32" or definer.dtype(weight.stored) != "i8":
        return None
    kinds = {"activation": definer.dtype(x.stored), "weight": "i8"}
    if isinstance(layer, Convolution):
        problem, layout, order = layer.problem(definer, **kinds), "channels_last", (0, 2, 3, 1)
    else:
        columns, depth = definer.shape(layer.weight)
        if not columns.is_Integer or not depth.is_Integer:
            return None
        problem = ConvProblem(channels=int(depth), out_channels=int(columns), kernel=(1, 1), **kinds)
        layout, order = "rows", None
    if template.refuses(problem, "plain") is not None or definer.dtype(weight.scale) not in ("f32", "f16"):
        return None
    return Site("int8_product", node, ((x.stored, layout),), problem, covers=weight.nodes, order=order,
                finish=layer.finish())  # fmt: skip


def emit(call: TemplateCall, program: Program, weights: WeightBlock) -> PrintedFunction:
    """The call; the weight is packed with the product of both scales."""
    problem: ConvProblem = call.site.problem
    definer = Definer(program)
    layer = Linear.of(call.site.node) or Convolution.of(definer, call.site.node)
    assert layer is not None
    x, weight = StaticInt8.of(definer, layer.x), Int8Weight.of(layer.weight)
    assert x is not None
    assert weight is not None
    operands = IntegerOperands.of(program, x, weight, problem.out_channels)
    name, shape = f"{operands.name} as panels of bytes", (problem.out_channels, -1, *problem.kernel)
    integers, scale, zero = operands.integers.reshape(shape), operands.scale, operands.zero
    weights.add_made(name, template.packed_bytes(problem), lambda _: template.pack(problem, integers, scale, zero))
    sizes: set[sympy.Symbol] = set()
    args = {"narrow": "true" if template.is_narrow(integers) else "false"}
    if isinstance(layer, Convolution):
        args |= conv_arguments(definer, call, sizes)
    else:
        rows = rows_of(call.reads[0].shape)
        sizes |= set(rows.free_symbols)
        args |= dict.fromkeys(("height", "width", "out_height", "out_width"), "1")
        args["batch"] = f"int64_t({size_text(rows, {})})"
    found = Requantization.of(call, program, problem.out_channels)
    epilogue = None if found is None else found.epilogue(call, weights, scale)
    return convolution_function(
        call, template, args, input_type=BYTES[problem.activation],
        packed=f"arguments.weights + {weights.offsets[name]}", sizes=sizes, numbers={"zero": zero},
        epilogue=epilogue,
    )  # fmt: skip


register_site(SiteKind("int8_product", match, emit, order=0))
