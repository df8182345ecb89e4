"""Convolutions over two axes with weights stored as floats, channels last."""

from __future__ import annotations

from dataclasses import replace

import sympy
import torch.fx as fx

from irc.core.program import Program
from irc.lowering.cpp.function import PrintedFunction
from irc.lowering.cpp.templates import conv2d as template
from irc.lowering.cpp.templates.base import C_TYPES
from irc.lowering.cpp.templates.conv2d import ConvProblem
from irc.lowering.cpu.options import CpuOptions
from irc.lowering.cpu.sites._convolution import Convolution, conv_arguments, convolution_function
from irc.lowering.cpu.sites.registry import SiteKind, register_site
from irc.lowering.cpu.weights import WeightBlock
from irc.lowering.kernels.definitions import Definer
from irc.lowering.kernels.layers import constant
from irc.lowering.kernels.sites import Site, TemplateCall

# Numbers of a weight from which halves stay halves in memory: fetching them takes longer than widening them for each
# block of pixels. Smaller ones are widened when they are packed.
_LARGE = 1 << 21


def match(options: CpuOptions, definer: Definer, node: fx.Node) -> Site | None:
    """The site of a convolution that the kernel can do, or None."""
    layer = Convolution.of(definer, node)
    if layer is None or not constant(layer.weight):
        return None
    stored = definer.dtype(layer.weight)
    problem = layer.problem(definer, activation=definer.dtype(layer.x), weight="f32")
    if stored not in C_TYPES or template.refuses(problem, "plain") is not None:
        return None
    if options.winograd and template.winograd_pays(problem):
        problem = replace(problem, winograd=True)
    elif problem.places * problem.out_channels >= _LARGE and not problem.depthwise:
        problem = replace(problem, weight=stored)
    return Site("conv2d", node, ((layer.x, "channels_last"),), problem, order=(0, 2, 3, 1), finish=layer.finish())


def emit(call: TemplateCall, program: Program, weights: WeightBlock) -> PrintedFunction:
    """The call; the weight is packed."""
    problem: ConvProblem = call.site.problem
    definer = Definer(program)
    layer = Convolution.of(definer, call.site.node)
    assert layer is not None
    kind = "3 × 3 filters" if problem.winograd else f"panels of {problem.groups} groups"
    name, weight = f"{layer.weight.target} as {kind}", program.weight(layer.weight).detach()
    kind = template.DTYPES[problem.weight]
    weights.add_made(name, template.packed_bytes(problem), lambda _: template.pack(problem, weight.to(kind)))
    sizes: set[sympy.Symbol] = set()
    return convolution_function(
        call, template, conv_arguments(definer, call, sizes), input_type=C_TYPES[problem.activation],
        packed=f"arguments.weights + {weights.offsets[name]}", sizes=sizes,
    )  # fmt: skip


register_site(SiteKind("conv2d", match, emit))
