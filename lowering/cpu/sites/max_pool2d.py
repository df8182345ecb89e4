"""Max pooling over two axes, channels last: lanes are channels, which the kernel IR cannot put inside the window.

Of dequantized integers the largest integer is taken, and dequantized: the same number, as dequantizing keeps order.
"""

from __future__ import annotations

import sympy
import torch.fx as fx

from irc.core.program import Program
from irc.core.target import op_name
from irc.lowering.cpp.function import PrintedFunction
from irc.lowering.cpp.printer import print_epilogue
from irc.lowering.cpp.templates import max_pool2d as template
from irc.lowering.cpp.templates.base import C_TYPES
from irc.lowering.cpp.templates.conv2d import ConvProblem
from irc.lowering.cpu.options import CpuOptions
from irc.lowering.cpu.sites._convolution import conv_arguments
from irc.lowering.cpu.sites._integers import BYTES, StaticInt8
from irc.lowering.cpu.sites._linear import function, matmul_body
from irc.lowering.cpu.sites.registry import SiteKind, register_site
from irc.lowering.cpu.weights import WeightBlock
from irc.lowering.kernels.definitions import At, Call, Definer, apply, convert, settle
from irc.lowering.kernels.indexing import ZERO
from irc.lowering.kernels.ops.windows import pairs
from irc.lowering.kernels.sites import Site, TemplateCall
from irc.lowering.kernels.values import Value

_TYPES = {**C_TYPES, **BYTES}


def match(options: CpuOptions, definer: Definer, node: fx.Node) -> Site | None:
    """The site of a max pooling of images, or None."""
    if op_name(node) != "aten.max_pool2d":
        return None
    call = Call(definer, node)
    x = call.operand("self")
    if len(x.shape) != 4 or x.node is None or not x.shape[1].is_Integer:
        return None
    kernel = pairs(call.raw("kernel_size"), 2)
    stride = pairs(call.raw("stride") or kernel, 2)
    padding, dilation = (pairs(call.raw(name), 2) for name in ("padding", "dilation"))
    integers = StaticInt8.of(definer, x.node)
    if integers is not None and not bool((definer.program.weight(integers.scale) > 0).all()):
        integers = None
    read, channels = x.node if integers is None else integers.stored, int(x.shape[1])
    problem = ConvProblem(
        channels=channels, out_channels=channels, groups=channels, kernel=tuple(kernel), stride=tuple(stride),
        padding=tuple(padding), dilation=tuple(dilation), activation=definer.dtype(read),
    )  # fmt: skip
    if template.refuses(problem, "plain") is not None:
        return None

    def finish(own: Definer, acc: Value, index: At) -> Value:
        if integers is None:
            return settle(acc, own.dtype(node))
        start = (ZERO,) * 4
        if integers.zero_point is not None:
            acc = apply("sub", acc, convert(own.value(integers.zero_point, start), acc.dtype))
        return apply("mul", acc, own.value(integers.scale, start))

    return Site("max_pool2d", node, ((read, "channels_last"),), problem, order=(0, 2, 3, 1), finish=finish)


def emit(call: TemplateCall, program: Program, weights: WeightBlock) -> PrintedFunction:
    """The call."""
    problem: ConvProblem = call.site.problem
    assert call.epilogue is not None
    epilogue = print_epilogue(call.epilogue)
    sizes: set[sympy.Symbol] = set()
    args = {"worker": "worker", "x": "x", **conv_arguments(Definer(program), call, sizes)}
    return function(
        call, (f"const {_TYPES[problem.activation]}* x",), (call.reads[0],),
        matmul_body(epilogue, template.call(problem, args, "epilogue")), sizes=sizes,
        includes=(*template.INCLUDES, "irc/columns.h"), epilogue=epilogue,
    )  # fmt: skip


register_site(SiteKind("max_pool2d", match, emit))
