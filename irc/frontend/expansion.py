"""Puts the operations of a traced block where its repetitions stand (see `repeats.py`)."""

from __future__ import annotations

import operator
import re
from typing import Any

import torch.fx as fx
from torch import Tensor
from torch.export import ExportedProgram

from irc.core.operands import int_argument
from irc.frontend.repeats import ENTER, LEAVE, REPEAT, Block, Repeats

_SUFFIX = re.compile(r"_\d+$")


def expand(exported: ExportedProgram, found: Repeats) -> bool:
    """Replace every mark in the exported graph; False, and a graph of no use, where that would not be right.

    It is not where a block reads a tensor that it was not given, or has something inside that is used outside (an
    attention map that a hook collects). In-place operations are copied like others.
    """
    graph = exported.graph
    order = list(graph.nodes)
    entered = {node.args[1]: i for i, node in enumerate(order) if node.target is ENTER}
    left = {node.args[1]: i for i, node in enumerate(order) if node.target is LEAVE}
    weights = _Weights(exported)
    bodies: dict[int, _Body] = {}
    for node in order:
        if node.target is not REPEAT:
            continue
        _, call, number = node.args
        if call not in bodies:
            traced = next(one for one in found.traced if one.call == call)
            bodies[call] = _Body(traced.block, order[entered[call] : left[call] + 1])
            if not bodies[call].closed():
                return False
        if not bodies[call].repeat(graph, node, found.blocks[number], weights):
            return False
    for node in order:
        if node.target in (ENTER, LEAVE):
            _replace_items(node, list(node.args[0]))
            graph.erase_node(node)
        elif node.target is REPEAT:
            graph.erase_node(node)
    if bodies:
        _number(graph)
    return True


class _Body:
    """The operations between two marks."""

    def __init__(self, block: Block, nodes: list[fx.Node]) -> None:
        self.block = block
        self.enter, *self.inner, self.leave = nodes

    def closed(self) -> bool:
        """Whether nothing but arguments, weights and sizes goes in, and nothing but the results comes out."""
        own = {self.enter, self.leave, *self.inner}
        for node in self.inner:
            if node.target in (ENTER, LEAVE, REPEAT):
                return False
            if any(_is_tensor(used) and used not in own and used.op != "placeholder" for used in node.all_input_nodes):
                return False
            if _is_tensor(node) and any(user not in own for user in node.users):
                return False
        return True

    def repeat(self, graph: fx.Graph, call: fx.Node, block: Block, weights: _Weights) -> bool:
        """Copy the operations in front of a repetition, over its arguments and weights."""
        arguments: Any = call.args[0]
        mapping: dict[fx.Node, Any] = {}
        for node in self.inner:
            for used in node.all_input_nodes:
                if used.op == "placeholder" and used not in mapping:
                    mapping[used] = weights.counterpart(used, self.block, block)
                    if mapping[used] is None:
                        return False
        with graph.inserting_before(call):
            for node in self.inner:
                if node.target is operator.getitem and node.args[0] is self.enter:
                    mapping[node] = arguments[node.args[1]]
                    continue
                copied = graph.node_copy(node, lambda used: mapping.get(used, used))
                copied.meta = dict(node.meta)
                copied.meta["nn_module_stack"] = _moved(node.meta.get("nn_module_stack"), self.block.path, block.path)
                mapping[node] = copied
        results: Any = self.leave.args[0]
        _replace_items(call, [mapping.get(result, result) for result in results])
        return True


class _Weights:
    """Placeholders of an exported graph by the tensor that they stand for."""

    def __init__(self, exported: ExportedProgram) -> None:
        signature = exported.graph_signature
        names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers,
                 **signature.inputs_to_lifted_tensor_constants}  # fmt: skip
        tensors = {**exported.constants, **exported.state_dict}
        self._tensors = {place: tensors[name] for place, name in names.items() if isinstance(tensors.get(name), Tensor)}
        self._places = {id(tensor): place for place, tensor in self._tensors.items()}
        self._nodes = {node.name: node for node in exported.graph.find_nodes(op="placeholder")}
        self._inside: dict[str, dict[int, str]] = {}

    def counterpart(self, node: fx.Node, traced: Block, other: Block) -> fx.Node | None:
        """What a placeholder that the traced block reads is for the other; None if that cannot be told."""
        tensor = self._tensors.get(node.name)
        if tensor is None:
            return None  # an input of the program that the block was not given
        if traced.path not in self._inside:
            self._inside[traced.path] = {id(t): name for name, t in _named_tensors(traced)}
        name = self._inside[traced.path].get(id(tensor))
        if name is None:
            return node  # it belongs to no block, so it is the same for all of them
        path, _, leaf = name.rpartition(".")
        place = self._places.get(id(getattr(other.module.get_submodule(path), leaf)))
        return None if place is None else self._nodes[place]


def _named_tensors(block: Block) -> list[tuple[str, Tensor]]:
    return [
        *block.module.named_parameters(remove_duplicate=False), *block.module.named_buffers(remove_duplicate=False)
    ]  # fmt: skip


def _number(graph: fx.Graph) -> None:
    """Names in the order of the graph, as if all of it had been traced: `linear_7` before `linear_8`."""
    taken = {node.name for node in graph.nodes if node.op != "call_function"}
    counts: dict[str, int] = {}
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        stem = _SUFFIX.sub("", node.name)
        while True:
            count = counts.get(stem, 0)
            counts[stem] = count + 1
            name = f"{stem}_{count}" if count else stem
            if name not in taken:
                break
        node.name = name


def _replace_items(node: fx.Node, values: list[Any]) -> None:
    """Use the values instead of the items of a node that gives several."""
    for user in list(node.users):
        assert user.target is operator.getitem
        user.replace_all_uses_with(values[int_argument(user, 1)])
        user.graph.erase_node(user)


def _is_tensor(node: fx.Node) -> bool:
    value = node.meta.get("val")
    values = value if isinstance(value, (tuple, list)) else [value]
    return any(isinstance(one, Tensor) for one in values)


def _moved(stack: Any, source: str, target: str) -> Any:
    """A stack of modules with the path of one block exchanged for that of another."""
    if not stack:
        return stack

    def move(text: str) -> str:
        plain = text.removeprefix("L['self']").lstrip(".")
        inside = plain == source or plain.startswith(f"{source}.")
        return target + plain[len(source) :] if inside else text

    return {key: (move(str(path)), kind) for key, (path, kind) in stack.items()}
