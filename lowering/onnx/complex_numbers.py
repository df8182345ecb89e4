"""Complex numbers, which ONNX lacks, as pairs of real ones along a last axis of two.

Rotary positions are sometimes written as a product of complex numbers. Each operation on them becomes the operations on
real and imaginary parts; where one is not known here, nothing is changed, and `check` names it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor

from irc.core.operands import input_node, int_argument
from irc.core.program import VAL, Program

aten = torch.ops.aten


def is_complex(node: Any) -> bool:
    """Whether a node's value is a tensor of complex numbers."""
    value = node.meta.get(VAL) if isinstance(node, fx.Node) else None
    return isinstance(value, Tensor) and value.is_complex()


def write_as_pairs(program: Program) -> None:
    """Edits the program: no complex numbers are left, or, where some must stay, it is as it was."""
    nodes = [node for node in program.graph.nodes if is_complex(node)]
    if any(node.op != "get_attr" and node.target not in _PAIRS for node in nodes):
        return
    users = [user for node in nodes for user in node.users if not is_complex(user)]
    if any(user.target is not aten.view_as_real.default for user in users):
        return
    pairs: dict[fx.Node, fx.Node] = {}
    for node in nodes:
        if node.op == "get_attr":
            values = torch.view_as_real(program.weight(node).detach()).contiguous()
            pairs[node] = program.weight_node(f"{node.target}_pairs", values, before=node)
        else:
            pairs[node] = _PAIRS[node.target](_Writer(program, node), pairs)
    for node in nodes:
        for user in [user for user in node.users if user.target is aten.view_as_real.default]:
            program.replace(user, pairs[node])
    program.erase_dead()


class _Writer:
    """Adds operations in front of a node."""

    def __init__(self, program: Program, node: fx.Node) -> None:
        self.program, self.node, self.args = program, node, node.args

    def __call__(self, target: Any, *args: Any) -> fx.Node:
        return self.program.insert(target, *args, before=self.node)

    def parts(self, pair: fx.Node) -> tuple[fx.Node, fx.Node]:
        """Real and imaginary numbers."""
        return self(aten.select.int, pair, -1, 0), self(aten.select.int, pair, -1, 1)

    def axis(self, axis: int, added: int = 0) -> int:
        """An axis of the complex tensor as one of the pairs, counted from the front."""
        return axis % (input_node(self.node).meta[VAL].dim() + added)


Pairs = dict[fx.Node, fx.Node]


def _view(write: _Writer, pairs: Pairs) -> fx.Node:
    return input_node(write.node)


def _polar(write: _Writer, pairs: Pairs) -> fx.Node:
    size, angle = write.args
    both = [write(aten.mul.Tensor, size, write(turn, angle)) for turn in (aten.cos.default, aten.sin.default)]
    return write(aten.stack.default, both, -1)


def _mul(write: _Writer, pairs: Pairs) -> fx.Node:
    left, right = write.args[:2]
    if not (is_complex(left) and is_complex(right)):
        factor = right if is_complex(left) else left
        wide = write(aten.unsqueeze.default, factor, -1) if isinstance(factor, fx.Node) else factor
        return write(aten.mul.Tensor, pairs[input_node(write.node, 0 if is_complex(left) else 1)], wide)
    (a, b), (c, d) = (write.parts(pairs[input_node(write.node, index)]) for index in (0, 1))

    def product(x: fx.Node, y: fx.Node) -> fx.Node:
        return write(aten.mul.Tensor, x, y)

    real = write(aten.sub.Tensor, product(a, c), product(b, d))
    imaginary = write(aten.add.Tensor, product(a, d), product(b, c))
    return write(aten.stack.default, [real, imaginary], -1)


def _unsqueeze(write: _Writer, pairs: Pairs) -> fx.Node:
    return write(aten.unsqueeze.default, pairs[input_node(write.node)], write.axis(int_argument(write.node, 1), 1))


def _slice(write: _Writer, pairs: Pairs) -> fx.Node:
    axis = write.axis(int_argument(write.node, 1) if len(write.args) > 1 else 0)
    return write(aten.slice.Tensor, pairs[input_node(write.node)], axis, *write.args[2:])


def _index(write: _Writer, pairs: Pairs) -> fx.Node:
    return write(aten.index.Tensor, pairs[input_node(write.node)], *write.args[1:])


_PAIRS: dict[Any, Callable[[_Writer, Pairs], fx.Node]] = {
    aten.view_as_complex.default: _view,
    aten.polar.default: _polar,
    aten.mul.Tensor: _mul,
    aten.unsqueeze.default: _unsqueeze,
    aten.slice.Tensor: _slice,
    aten.index.Tensor: _index,
}
