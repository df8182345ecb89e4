"""Convolutions over two axes with weights in f32."""

from __future__ import annotations

import sympy
import torch.fx as fx

from irc.core.program import Program
from irc.core.target import op_name
from irc.lowering.cpp.expressions import size_text
from irc.lowering.cpp.function import PrintedFunction
from irc.lowering.cpp.printer import print_epilogue
from irc.lowering.cpp.templates import conv2d as template
from irc.lowering.cpp.templates.conv2d import ConvProblem
from irc.lowering.cpu.options import CpuOptions
from irc.lowering.cpu.sites._linear import function
from irc.lowering.cpu.sites.registry import SiteKind, register_site
from irc.lowering.cpu.weights import WeightBlock
from irc.lowering.kernels.definitions import At, Call, Definer, apply, convert, settle
from irc.lowering.kernels.ops.pointwise import activation
from irc.lowering.kernels.ops.reductions import pairs
from irc.lowering.kernels.sites import Site, TemplateCall
from irc.lowering.kernels.values import Value

_NAMES = ("aten.conv2d", "aten.convolution", "irc.conv_activation")


def match(options: CpuOptions, definer: Definer, node: fx.Node) -> Site | None:
    """The site of a convolution that the kernel can do, or None."""
    if op_name(node) not in _NAMES:
        return None
    call = Call(definer, node)
    if call._arguments.get("transposed") or isinstance(call.raw("padding"), str):
        return None
    x, weight = call.operand("x" if "x" in call._arguments else "input"), call.operand("weight")
    if len(weight.shape) != 4 or weight.node is None or weight.node.op != "get_attr":
        return None
    if not x.shape[1].is_Integer:
        return None
    stride, padding, dilation = (tuple(pairs(call.raw(n), 2)) for n in ("stride", "padding", "dilation"))
    problem = ConvProblem(
        channels=int(x.shape[1]), out_channels=int(weight.shape[0]),
        kernel=(int(weight.shape[2]), int(weight.shape[3])), stride=stride, padding=padding, dilation=dilation,  # type: ignore[arg-type]
        groups=int(call.raw("groups")), activation=x.dtype, weight=weight.dtype,
    )  # fmt: skip
    if template.refuses(problem, "plain") is not None:
        return None
    assert x.node is not None

    def finish(inner: Definer, acc: Value, index: At) -> Value:
        own = Call(inner, node)
        value = acc
        if own.has("bias"):
            value = apply("add", value, convert(own.operand("bias").at((index[1],)), value.dtype))
        value = settle(value, own.dtype)
        chosen = own._arguments.get("activation")
        return value if chosen is None else settle(activation(str(chosen), value), own.dtype)

    return Site("conv2d", node, ((x.node, "rows"),), problem, finish=finish, columns=2)


def emit(call: TemplateCall, program: Program, weights: WeightBlock) -> PrintedFunction:
    """The call; the weight is packed."""
    problem: ConvProblem = call.site.problem
    node = Call(Definer(program), call.site.node)
    stored = node._arguments["weight"]
    name = f"{stored.target} as blocks of {problem.groups} groups"
    if name not in weights.offsets:
        weights.add(name, template.pack(problem, program.weight(stored).detach()))
    assert call.epilogue is not None
    epilogue = print_epilogue(call.epilogue)
    sizes: set[sympy.Symbol] = set()

    def text(expr: sympy.Expr) -> str:
        sizes.update(expr.free_symbols)
        return f"int64_t({size_text(expr, {})})"

    batch, _, height, width = call.reads[0].shape
    out_height, out_width = node.shape[2:]
    args = {"worker": "worker", "x": "x", "packed": "packed", "batch": text(batch), "height": text(height),
            "width": text(width), "out_height": text(out_height), "out_width": text(out_width)}  # fmt: skip
    store = (
        "[&](int64_t b, int64_t o, int64_t p0, int64_t p1, const float* values) {\n"
        f"        epilogue(b * {problem.out_channels} + o, p0, p1, values);\n    }}"
    )
    body = f"    const auto store = {epilogue.text};\n    const irc::Columns epilogue(store);\n"
    body += f"    const auto pixels = {store};\n    const irc::Pixels sink(pixels);\n"
    body += "    " + template.call(problem, args, "sink")
    return function(
        call, ("const float* x", "const uint8_t* packed"),
        (call.reads[0], f"arguments.weights + {weights.offsets[name]}"), body,
        sizes=sizes, includes=(*template.INCLUDES, "irc/columns.h"), epilogue=epilogue,
    )  # fmt: skip


register_site(SiteKind("conv2d", match, emit))
