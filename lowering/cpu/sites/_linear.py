"""What the matmul sites share: x · wᵀ + bias with an activation, as graphs have it."""

from __future__ import annotations

from dataclasses import dataclass

import sympy
import torch.fx as fx

from irc.core.target import op_name
from irc.lowering.cpp.expressions import size_text
from irc.lowering.cpp.function import PrintedEpilogue, PrintedFunction
from irc.lowering.cpp.printer import print_epilogue
from irc.lowering.kernels.buffers import Buffer
from irc.lowering.kernels.definitions import At, Definer, convert, settle
from irc.lowering.kernels.ops.pointwise import activation
from irc.lowering.kernels.sites import Finish, Memory, TemplateCall
from irc.lowering.kernels.values import Apply, Value

_LINEAR = ("aten.linear", "irc.linear_activation")


@dataclass(frozen=True)
class Linear:
    """A linear layer in a graph."""

    node: fx.Node
    x: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    activation: str | None

    @staticmethod
    def of(node: fx.Node) -> Linear | None:
        """The layer that a node is, or None."""
        if op_name(node) not in _LINEAR:
            return None
        names = ("input" if op_name(node) == _LINEAR[0] else "x", "weight", "bias")
        given = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
        x, weight, bias = (given.get(name) for name in names)
        if not isinstance(x, fx.Node) or not isinstance(weight, fx.Node):
            return None
        chosen = given.get("activation")
        return Linear(node, x, weight, bias if isinstance(bias, fx.Node) else None,
                      str(chosen) if chosen is not None else None)  # fmt: skip

    def finish(self) -> Finish:
        """acc + bias, rounded as the program rounds it, and the activation."""

        def finished(definer: Definer, acc: Value, index: At) -> Value:
            value, dtype = acc, definer.dtype(self.node)
            if self.bias is not None:
                value = Apply("add", (value, convert(definer.value(self.bias, index[-1:]), value.dtype)), value.dtype)
            value = settle(value, dtype)
            return value if self.activation is None else settle(activation(self.activation, value), dtype)

        return finished


def rows_of(shape: At) -> sympy.Expr:
    """Rows of [..., K] seen as a matrix."""
    return sympy.prod(shape[:-1])


def function(
    call: TemplateCall, parameters: tuple[str, ...], arguments: tuple[Buffer | Memory | str, ...], body: str, *,
    sizes: set[sympy.Symbol], includes: tuple[str, ...], scratch: str = "", epilogue: PrintedEpilogue | None = None,
) -> PrintedFunction:  # fmt: skip
    """A template's call with its epilogue as a function."""
    printed = epilogue or (print_epilogue(call.epilogue) if call.epilogue is not None else None)
    if printed is not None:
        parameters = (*parameters, *printed.parameters)
        arguments = (*arguments, *printed.arguments)
        sizes = sizes | set(printed.sizes)
    return PrintedFunction(
        call.name, tuple(str(origin) for origin in call.origins), parameters, body, arguments,
        tuple(sorted(sizes, key=lambda s: s.name)), includes, scratch,
    )  # fmt: skip


def constant(node: fx.Node) -> bool:
    """Computed from weights alone: a weight once constants are folded."""
    inputs = node.all_input_nodes
    return node.op == "get_attr" or (
        node.op == "call_function" and bool(inputs) and all(constant(used) for used in inputs)
    )


def rows_text(rows: sympy.Expr) -> str:
    return f"int64_t({size_text(rows, {})})"


def matmul_body(epilogue: PrintedEpilogue, call: str) -> str:
    """A matmul's call behind its epilogue, which it takes without its type (irc/columns.h) if that is a lambda."""
    if epilogue.takes_sums:
        return f"    const {epilogue.text};\n    {call}"
    return f"    const auto store = {epilogue.text};\n    const irc::Columns epilogue(store);\n    {call}"
