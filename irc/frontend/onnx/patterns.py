"""Layers that exporters write in several nodes, put together again before the graph is run.

Attention: Softmax(q·s · (kᵀ·s) + mask) · v, with the results of empty rows set to 0, as torch.onnx writes
`scaled_dot_product_attention`. Linear layers: a product with a stored matrix and the sum with a stored vector. The
nodes in between stay; what nobody uses any more falls away later.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np

DOMAIN = "irc"
ATTENTION, LINEAR = "Attention", "Linear"


def put_together(graph: Any) -> list[Any]:
    """The graph's nodes in order, with the last node of each layer found replaced by one of the domain `irc`."""
    view = _View(graph)
    return [view.attention(node) or view.linear(node) or node for node in graph.node]


class _View:
    """Who makes a value, and what is known about it."""

    def __init__(self, graph: Any) -> None:
        self.makers = {name: node for node in graph.node for name in node.output}
        self.stored = {tensor.name: tensor for tensor in graph.initializer}
        self.users = Counter(name for node in graph.node for name in node.input)
        self.users.update(value.name for value in graph.output)

    def maker(self, name: str, *ops: str) -> Any:
        """The node that makes a value, if it is one of these operators."""
        node = self.makers.get(name)
        return node if node is not None and node.op_type in ops and node.domain in ("", "ai.onnx") else None

    def number(self, name: str) -> float | None:
        """The value of a constant of one element."""
        from onnx import numpy_helper

        tensor = self.stored.get(name)
        node = self.maker(name, "Constant") if tensor is None else None
        if node is not None:
            tensor = next((a.t for a in node.attribute if a.name == "value" and a.HasField("t")), None)
        if tensor is None or math.prod(tensor.dims) != 1 or tensor.external_data:
            return None
        try:
            return float(np.asarray(numpy_helper.to_array(tensor)).reshape(-1)[0])
        except (ValueError, TypeError, IndexError):
            return None

    def scaled(self, name: str) -> tuple[str, float]:
        """(x, c) where a value is x · c or x / c, else (it, 1)."""
        node = self.maker(name, "Mul", "Div")
        if node is None:
            return name, 1.0
        for index in (0, 1) if node.op_type == "Mul" else (0,):
            factor = self.number(node.input[1 - index])
            if factor:
                return node.input[index], factor if node.op_type == "Mul" else 1 / factor
        return name, 1.0

    # ---------------------------------------------------------------- attention

    def attention(self, node: Any) -> Any:
        """One node for the layer whose last product this is, or None."""
        from onnx import helper

        if node.op_type != "MatMul" or node.domain not in ("", "ai.onnx"):
            return None
        softmax = self._softmax(node.input[0])
        if softmax is None or _attribute(softmax, "axis", -1) not in (-1, 3):
            return None
        scores, mask = self._masked(softmax.input[0])
        scores, scale = self.scaled(scores)
        product = self.maker(scores, "MatMul")
        if product is None:
            return None
        query, left = self.scaled(product.input[0])
        turned, right = self.scaled(product.input[1])
        key = self._turned(turned)
        if key is None:
            return None
        # The scaled factors, too: where the shapes turn out to be others, the operator computes what the nodes do.
        inputs = [query, key, turned, node.input[1], *([mask] if mask else [])]
        factor = scale * left * right
        return helper.make_node(ATTENTION, inputs, list(node.output), name=node.name, domain=DOMAIN, scale=factor)

    def _softmax(self, name: str) -> Any:
        choice = self.maker(name, "Where")
        if choice is not None:
            empty = self.maker(choice.input[0], "IsNaN")
            if empty is None or empty.input[0] != choice.input[2] or self.number(choice.input[1]) != 0:
                return None
            name = choice.input[2]
        return self.maker(name, "Softmax")

    def _masked(self, name: str) -> tuple[str, str | None]:
        """(scores, what is added to them: a bias, or the condition that keeps a score)."""
        total = self.maker(name, "Add")
        if total is None:
            return name, None
        for index in (0, 1):
            other = total.input[1 - index]
            if self.maker(self.scaled(total.input[index])[0], "MatMul") is not None:
                choice = self.maker(other, "Where")
                keeps = choice is not None and (
                    self.number(choice.input[1]) == 0 and self.number(choice.input[2]) == -math.inf
                )
                return total.input[index], choice.input[0] if keeps else other
        return name, None

    def _turned(self, name: str) -> str | None:
        """Keys, whose last two axes were exchanged, perhaps with the axes in front made one meanwhile."""
        node = self.maker(name, "Transpose")
        if node is not None and _attribute(node, "perm", []) == [0, 1, 3, 2]:
            return str(node.input[0])
        outer = self.maker(name, "Reshape")
        swap = self.maker(outer.input[0], "Transpose") if outer is not None else None
        inner = self.maker(swap.input[0], "Reshape") if swap is not None else None
        if inner is None or _attribute(swap, "perm", []) != [0, 2, 1]:
            return None
        return str(inner.input[0])

    # ---------------------------------------------------------------- linear layers

    def linear(self, node: Any) -> Any:
        """One node for x · W + b, or None."""
        from onnx import helper

        if node.op_type != "Add" or node.domain not in ("", "ai.onnx"):
            return None
        for index in (0, 1):
            bias = self.stored.get(node.input[1 - index])
            product = self.maker(node.input[index], "MatMul")
            if bias is None or product is None or self.users[node.input[index]] != 1 or len(bias.dims) != 1:
                continue
            matrix = self.stored.get(product.input[1])
            if matrix is not None and len(matrix.dims) == 2 and list(bias.dims) == [matrix.dims[1]]:
                inputs = [product.input[0], product.input[1], node.input[1 - index]]
                return helper.make_node(LINEAR, inputs, list(node.output), name=node.name, domain=DOMAIN)
        return None


def _attribute(node: Any, name: str, default: Any) -> Any:
    for attribute in node.attribute:
        if attribute.name == name:
            return list(attribute.ints) if isinstance(default, list) else attribute.i
    return default
