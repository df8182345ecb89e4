"""What the sites of convolutions share: a convolution over two axes, as graphs have it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType, ModuleType

import sympy
import torch.fx as fx

from irc.core.target import op_name
from irc.lowering.cpp.expressions import size_text
from irc.lowering.cpp.function import PrintedEpilogue, PrintedFunction
from irc.lowering.cpp.printer import print_epilogue
from irc.lowering.cpp.templates.conv2d import ROWS_AHEAD, ConvProblem
from irc.lowering.cpu.sites._linear import function, matmul_body
from irc.lowering.kernels.definitions import At, Call, Definer, apply, convert, settle
from irc.lowering.kernels.ops.pointwise import activation
from irc.lowering.kernels.ops.windows import pairs
from irc.lowering.kernels.sites import Finish, TemplateCall
from irc.lowering.kernels.values import Value

_NAMES = ("aten.conv2d", "aten.convolution", "irc.conv_activation")


@dataclass(frozen=True)
class Convolution:
    """A convolution of images whose channels and window are known."""

    node: fx.Node
    x: fx.Node
    weight: fx.Node

    @staticmethod
    def of(definer: Definer, node: fx.Node) -> Convolution | None:
        """The convolution that a node is, or None."""
        if op_name(node) not in _NAMES:
            return None
        call = Call(definer, node)
        if call._arguments.get("transposed") or isinstance(call.raw("padding"), str):
            return None
        x, weight = call.operand("x" if "x" in call._arguments else "input"), call.operand("weight")
        if len(weight.shape) != 4 or len(x.shape) != 4 or x.node is None or weight.node is None:
            return None
        if not x.shape[1].is_Integer or not all(size.is_Integer for size in weight.shape):
            return None
        return Convolution(node, x.node, weight.node)

    def problem(self, definer: Definer, *, activation: str, weight: str) -> ConvProblem:
        """The template's problem."""
        call, shape = Call(definer, self.node), definer.shape(self.weight)
        stride, padding, dilation = (tuple(pairs(call.raw(n), 2)) for n in ("stride", "padding", "dilation"))
        return ConvProblem(
            channels=int(definer.shape(self.x)[1]), out_channels=int(shape[0]), kernel=(int(shape[2]), int(shape[3])),
            stride=stride, padding=padding, dilation=dilation, groups=int(call.raw("groups")),
            activation=activation, weight=weight,
        )  # fmt: skip

    def finish(self) -> Finish:
        """acc + bias, rounded as the program rounds it, and the activation."""

        def finished(definer: Definer, acc: Value, index: At) -> Value:
            own, value = Call(definer, self.node), acc
            if own.has("bias"):
                value = apply("add", value, convert(own.operand("bias").at((index[1],)), value.dtype))
            value = settle(value, own.dtype)
            chosen = own._arguments.get("activation")
            return value if chosen is None else settle(activation(str(chosen), value), own.dtype)

        return finished


def convolution_function(
    call: TemplateCall, template: ModuleType, args: Mapping[str, str], *, input_type: str, packed: str,
    sizes: set[sympy.Symbol], numbers: Mapping[str, int] = MappingProxyType({}),
    epilogue: PrintedEpilogue | None = None,
) -> PrintedFunction:  # fmt: skip
    """The call of a template for convolutions behind its epilogue.

    Args:
        args: those of the template, without the operands.
        input_type: of the activations, in C++.
        packed: name of the packed weights' place as C++.
        numbers: further arguments that differ between layers which are otherwise alike.
        epilogue: None: that of the call, printed.
    """
    assert call.epilogue is not None
    problem = call.site.problem
    epilogue = epilogue or print_epilogue(call.epilogue, ahead=ROWS_AHEAD)
    scratch = template.scratch_bytes(problem, 0, 1)
    names = ("worker", "x", "packed", *numbers, *(["scratch"] if scratch else []))
    parameters, arguments = [f"const {input_type}* x", "const uint8_t* packed"], [call.reads[0], packed]
    parameters += [f"int {name}" for name in numbers]
    arguments += [str(number) for number in numbers.values()]
    if scratch:
        parameters.append("uint8_t* scratch")
        arguments.append("arguments.arena + scratch")
    return function(
        call, tuple(parameters), tuple(arguments),
        matmul_body(epilogue, template.call(problem, {**args, **{name: name for name in names}}, "epilogue")),
        sizes=sizes, includes=(*template.INCLUDES, "irc/columns.h"), epilogue=epilogue,
        scratch=f"workers * {scratch}" if scratch else "",
    )  # fmt: skip


def conv_arguments(definer: Definer, call: TemplateCall, sizes: set[sympy.Symbol]) -> dict[str, str]:
    """Sizes of a convolution as arguments of its template; the dimensions in them are added to `sizes`."""
    batch, _, height, width = call.reads[0].shape
    out_height, out_width = definer.shape(call.site.node)[2:]
    named = {"batch": batch, "height": height, "width": width, "out_height": out_height, "out_width": out_width}
    for expr in named.values():
        sizes.update(expr.free_symbols)
    return {name: f"int64_t({size_text(expr, {})})" for name, expr in named.items()}
