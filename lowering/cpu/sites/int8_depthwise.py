"""Depthwise convolutions whose activations and weights are both 8-bit integers with static scales.

The same law as of `int8_product`, with a window of its own for each channel.
"""

from __future__ import annotations

import sympy
import torch.fx as fx

from irc.core.program import Program
from irc.lowering.cpp.function import PrintedFunction
from irc.lowering.cpp.templates import int8_depthwise as template
from irc.lowering.cpp.templates.conv2d import ConvProblem
from irc.lowering.cpu.options import CpuOptions
from irc.lowering.cpu.sites._convolution import Convolution, conv_arguments, convolution_function
from irc.lowering.cpu.sites._integers import BYTES, Int8Weight, IntegerOperands, StaticInt8
from irc.lowering.cpu.sites._requantize import Requantization
from irc.lowering.cpu.sites.registry import SiteKind, register_site
from irc.lowering.cpu.weights import WeightBlock
from irc.lowering.kernels.definitions import Definer
from irc.lowering.kernels.sites import Site, TemplateCall


def match(options: CpuOptions, definer: Definer, node: fx.Node) -> Site | None:
    """The site of a depthwise convolution over integers on both sides, or None."""
    layer = Convolution.of(definer, node)
    if layer is None:
        return None
    x, weight = StaticInt8.of(definer, layer.x), Int8Weight.of(layer.weight)
    if x is None or weight is None or definer.dtype(node) != "f32" or definer.dtype(weight.stored) != "i8":
        return None
    problem = layer.problem(definer, activation=definer.dtype(x.stored), weight="i8")
    if template.refuses(problem, "plain") is not None or definer.dtype(weight.scale) not in ("f32", "f16"):
        return None
    return Site("int8_depthwise", node, ((x.stored, "channels_last"),), problem, covers=weight.nodes,
                order=(0, 2, 3, 1), finish=layer.finish())  # fmt: skip


def emit(call: TemplateCall, program: Program, weights: WeightBlock) -> PrintedFunction:
    """The call; the weight is packed with the product of both scales."""
    problem: ConvProblem = call.site.problem
    definer = Definer(program)
    layer = Convolution.of(definer, call.site.node)
    assert layer is not None
    x, weight = StaticInt8.of(definer, layer.x), Int8Weight.of(layer.weight)
    assert x is not None
    assert weight is not None
    operands = IntegerOperands.of(program, x, weight, problem.channels)
    name, shape = f"{operands.name} as lines of four places", (problem.channels, 1, *problem.kernel)
    integers, scale, zero = operands.integers.reshape(shape), operands.scale, operands.zero
    weights.add_made(name, template.packed_bytes(problem), lambda _: template.pack(problem, integers, scale, zero))
    sizes: set[sympy.Symbol] = set()
    args = conv_arguments(definer, call, sizes)
    args["narrow"] = "true" if template.is_narrow(integers) else "false"
    found = Requantization.of(call, program, problem.channels)
    return convolution_function(
        call, template, args, input_type=BYTES[problem.activation],
        packed=f"arguments.weights + {weights.offsets[name]}", sizes=sizes,
        epilogue=None if found is None else found.epilogue(call, weights, scale),
    )  # fmt: skip


register_site(SiteKind("int8_depthwise", match, emit, order=-1))
