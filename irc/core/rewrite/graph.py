"""Questions that rewrites ask of graph nodes: purity, views, constants, types."""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.fx as fx
import torch.utils._pytree as pytree
from torch import Tensor

from irc.core.program import VAL, Program, is_size

_RANDOM_TAG = torch.Tag.nondeterministic_seeded
_RANDOM_OPS = {"aten::dropout", "aten::feature_dropout", "aten::alpha_dropout", "aten::feature_alpha_dropout"}


def is_mutating(node: fx.Node) -> bool:
    """True for an op that writes into one of its arguments."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def is_pure(node: fx.Node) -> bool:
    """True when running the node twice gives the same value and changes nothing else."""
    if node.op == "get_attr":
        return True
    if node.op != "call_function":
        return False
    if node.target is operator.getitem or is_size(node):
        return True
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return False
    schema = target._schema
    return not schema.is_mutable and _RANDOM_TAG not in target.tags and schema.name not in _RANDOM_OPS


def is_view(node: fx.Node) -> bool:
    """True for an op whose result may alias its input (view, transpose, expand, reshape, …)."""
    target = node.target
    if node.op != "call_function" or not isinstance(target, torch._ops.OpOverload):
        return False
    if target in (torch.ops.aten.reshape.default, torch.ops.aten.contiguous.default):
        return True
    return any(result.alias_info is not None for result in target._schema.returns)


def tensor_of(node: Any) -> Tensor | None:
    """The fake tensor of a node, or None when it is no node or has no tensor value."""
    value = node.meta.get(VAL) if isinstance(node, fx.Node) else None
    return value if isinstance(value, Tensor) else None


def num_bytes(value: Tensor) -> int:
    """Bytes of a tensor with static sizes."""
    return int(value.numel()) * value.element_size()


def layout_of(node: fx.Node) -> list[str]:
    """Strides of a node's tensors, comparable also where they are symbolic."""
    return [str(v.stride()) for v in pytree.tree_leaves(node.meta.get(VAL)) if isinstance(v, Tensor)]


def refresh_layouts(program: Program, changed: set[fx.Node]) -> None:
    """Infer again what follows from nodes whose strides changed, as far as the change reaches."""
    if not changed:
        return
    reached = set(changed)
    for node in program.graph.nodes:
        if node.op == "call_function" and any(used in reached for used in node.all_input_nodes):
            before = layout_of(node)
            program.infer_type(node)
            if layout_of(node) != before:
                reached.add(node)
