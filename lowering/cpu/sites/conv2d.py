"""Convolutions over two axes with weights stored as floats, channels last."""

from __future__ import annotations

import sympy
import torch.fx as fx

from irc.core.program import Program
from irc.lowering.cpp.function import PrintedFunction
from irc.lowering.cpp.printer import print_epilogue
from irc.lowering.cpp.templates import conv2d as template
from irc.lowering.cpp.templates.base import C_TYPES
from irc.lowering.cpp.templates.conv2d import ROWS_AHEAD, ConvProblem
from irc.lowering.cpu.options import CpuOptions
from irc.lowering.cpu.sites._convolution import Convolution, conv_arguments
from irc.lowering.cpu.sites._linear import constant, function, matmul_body
from irc.lowering.cpu.sites.registry import SiteKind, register_site
from irc.lowering.cpu.weights import WeightBlock
from irc.lowering.kernels.definitions import Definer
from irc.lowering.kernels.sites import Site, TemplateCall


def match(options: CpuOptions, definer: Definer, node: fx.Node) -> Site | None:
    """The site of a convolution that the kernel can do, or None."""
    layer = Convolution.of(definer, node)
    if layer is None or not constant(layer.weight):
        return None
    problem = layer.problem(definer, activation=definer.dtype(layer.x), weight=definer.dtype(layer.weight))
    if template.refuses(problem, "plain") is not None:
        return None
    return Site("conv2d", node, ((layer.x, "channels_last"),), problem, order=(0, 2, 3, 1), finish=layer.finish())


def emit(call: TemplateCall, program: Program, weights: WeightBlock) -> PrintedFunction:
    """The call; the weight is packed."""
    problem: ConvProblem = call.site.problem
    definer = Definer(program)
    layer = Convolution.of(definer, call.site.node)
    assert layer is not None
    assert call.epilogue is not None
    name = f"{layer.weight.target} as panels of {problem.groups} groups"
    if name not in weights.offsets:
        weights.add(name, template.pack(problem, program.weight(layer.weight).detach()))
    epilogue = print_epilogue(call.epilogue, ahead=ROWS_AHEAD)
    sizes: set[sympy.Symbol] = set()
    args = {"worker": "worker", "x": "x", "packed": "packed", **conv_arguments(definer, call, sizes)}
    return function(
        call, (f"const {C_TYPES[problem.activation]}* x", "const uint8_t* packed"),
        (call.reads[0], f"arguments.weights + {weights.offsets[name]}"),
        matmul_body(epilogue, template.call(problem, args, "epilogue")), sizes=sizes,
        includes=(*template.INCLUDES, "irc/columns.h"), epilogue=epilogue,
    )  # fmt: skip


register_site(SiteKind("conv2d", match, emit))
