"""Sibling linear layers as one: `merge-qkv` and `merge-gate-up` choose the siblings, this joins them."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor

from irc.core import formats
from irc.core.contract import Finding, PassResult
from irc.core.memory import empty
from irc.core.operands import input_node
from irc.core.ops.registry import is_irc_op
from irc.core.program import VAL, Program
from irc.core.provenance import origin_of
from irc.passes._weights import merged_name, retype_from, tie_of, trainable_like
from irc.passes.fuse._layers import arguments

aten = torch.ops.aten


def is_linear(node: object) -> bool:
    return isinstance(node, fx.Node) and node.target is aten.linear.default


def why_not_mergeable(program: Program, linears: Sequence[fx.Node], uses: Counter[str]) -> str | None:
    """Why linear layers with one input cannot be joined, or None if they can."""
    args = [arguments(node) for node in linears]
    weights = [a["weight"] for a in args]
    for node, weight in zip(linears, weights, strict=True):
        if weight.meta[VAL].ndim != 2:
            return f"the weight of {node.name} has {weight.meta[VAL].ndim} dimensions"
        for parameter in filter(None, (weight, arguments(node)["bias"])):
            reason = _why_not_own(program, node, parameter, uses)
            if reason is not None:
                return reason
    if len({w.meta[VAL].dtype for w in weights}) > 1:
        return f"the weights have types {', '.join(str(w.meta[VAL].dtype) for w in weights)}"
    if len({w.meta[VAL].device for w in weights}) > 1:
        return "the weights are on different devices"
    forms = {_form(w) for w in weights}
    if len(forms) > 1:
        return f"the weights are stored differently: {', '.join(sorted(map(str, forms)))}"
    return None


def _why_not_own(program: Program, linear: fx.Node, parameter: fx.Node, uses: Counter[str]) -> str | None:
    """Why a parameter is not this layer's own stored tensor, or None if it is."""
    if parameter.op == "get_attr":
        tie = tie_of(program, parameter, uses)
        return None if tie is None else f"{tie}: merging would copy it"
    if not is_irc_op(parameter.target, "dequantize"):
        return f"{parameter.name}, used by {linear.name}, is computed by {parameter.target}"
    if len(parameter.users) > 1:
        return f"the dequantized weight {parameter.name} is shared by {len(parameter.users)} operations"
    chosen = formats.parse(str(parameter.kwargs["format"]))
    if chosen.per_tensor or chosen.has_tensor_scale:
        return f"the weight {parameter.name} has one scale for the whole tensor"
    parts = [part for part in parameter.args if part is not None]
    computed = [part for part in parts if not isinstance(part, fx.Node) or part.op != "get_attr"]
    if computed:
        return f"{computed[0]}, a part of weight {parameter.name}, is computed"
    ties = [tie for tie in (tie_of(program, p, uses) for p in parts if isinstance(p, fx.Node)) if tie]
    return f"{ties[0]}: merging would copy it" if ties else None


def _form(weight: fx.Node) -> tuple[str, ...]:
    if weight.op == "get_attr":
        return ("plain",)
    dtypes = [str(part.meta[VAL].dtype) for part in weight.args if isinstance(part, fx.Node)]
    return (str(weight.kwargs["format"]), *dtypes)


def merge_linears(program: Program, linears: Sequence[fx.Node]) -> fx.Node:
    """linear(x, Wi, bi) for each i → the slices of linear(x, [W1; W2; …], [b1; b2; …]); returns that layer.

    Missing biases become zeros when another sibling has one.
    """
    order = {node: i for i, node in enumerate(program.graph.nodes)}
    first = min(linears, key=order.__getitem__)
    args = [arguments(node) for node in linears]
    sizes = [a["weight"].meta[VAL].shape[0] for a in args]
    weight = _join(program, [a["weight"] for a in args], first)
    bias = _join_biases(program, args, sizes, first)
    merged = program.insert(aten.linear.default, args[0]["input"], weight, bias, before=first)
    parts = program.insert(aten.split_with_sizes.default, merged, sizes, -1, before=first)
    taken = [program.insert(operator.getitem, parts, i, before=first) for i in range(len(linears))]
    for linear, part in zip(linears, taken, strict=True):
        program.replace(linear, part)
    retype_from(program, taken)
    return merged


def _join(program: Program, nodes: Sequence[fx.Node], before: fx.Node) -> fx.Node:
    """The weights stacked along their rows; quantized ones are stacked as stored."""
    if nodes[0].op == "get_attr":
        originals = [program.weight(node) for node in nodes]
        name = merged_name(str(node.target) for node in nodes)
        return program.weight_node(name, _stack(originals), before=before)
    parts = [None if part is None else _join(program, column, before) for part, column in _columns(nodes)]
    options: dict[str, Any] = dict(nodes[0].kwargs)
    return program.insert(nodes[0].target, *parts, before=before, **options)


def _columns(nodes: Sequence[fx.Node]) -> list[tuple[object, list[fx.Node]]]:
    """(first, all) for each argument position of alike nodes."""
    return [(column[0], list(column)) for column in zip(*(node.args for node in nodes), strict=True)]


def _join_biases(
    program: Program, args: Sequence[dict[str, fx.Node]], sizes: Sequence[int], before: fx.Node
) -> fx.Node | None:
    nodes = [a["bias"] for a in args]
    present = [node for node in nodes if node is not None]
    if not present:
        return None
    like = program.weight(present[0])
    tensors = [
        like.new_zeros(size) if node is None else program.weight(node) for node, size in zip(nodes, sizes, strict=True)
    ]
    originals = [program.weight(node) for node in present]
    name = merged_name(str(node.target) for node in present)
    return program.weight_node(
        name, trainable_like(torch.cat([t.detach() for t in tensors]), *originals), before=before
    )


def _stack(tensors: Sequence[Tensor]) -> Tensor:
    parts = [t.detach() for t in tensors]
    stacked = empty((sum(len(part) for part in parts), *parts[0].shape[1:]), parts[0].dtype, parts[0].device)
    return trainable_like(torch.cat(parts, out=stacked), *tensors)


def check_merged(before: Program, result: PassResult) -> list[Finding]:
    """Each slice of a merged layer must hold exactly the rows of the layer it replaced."""
    after = result.program
    originals = {node.name: node for node in before.graph.nodes}
    findings = []
    for node in after.graph.nodes:
        if node.target is not operator.getitem or node.name in originals:
            continue
        split, index = node.args
        old = originals.get(origin_of(node) or "")
        if old is None or not is_linear(old):
            findings.append(Finding(node.name, "stands for no linear layer of the program before"))
            continue
        sizes = split.args[1]
        start = sum(sizes[:index])
        merged = split.args[0]
        for role in ("weight", "bias"):
            problem = _compare_rows(before, old, after, merged, role, start, sizes[index])
            if problem is not None:
                findings.append(Finding(node.name, problem))
    return findings


def _compare_rows(
    before: Program, old: fx.Node, after: Program, merged: fx.Node, role: str, start: int, size: int
) -> str | None:
    new_node, old_node = arguments(merged)[role], arguments(old)[role]
    if new_node is None:
        return None if old_node is None else f"{merged.name} has lost the bias of {old.name}"
    for new_part, old_part in _stored_parts(new_node, old_node):
        rows = after.weight(new_part)[start : start + size]
        if rows.device.type == "meta":
            continue
        expected = torch.zeros_like(rows) if old_part is None else before.weight(old_part)
        if not torch.equal(rows, expected):
            return f"rows {start} to {start + size} of {new_part.target} are not the {role} of {old.name}"
    return None


def _stored_parts(new: fx.Node, old: fx.Node | None) -> list[tuple[fx.Node, fx.Node | None]]:
    if new.op == "get_attr":
        return [(new, old)]
    assert old is not None
    return [
        (input_node(new, place), None if old.args[place] is None else input_node(old, place))
        for place, part in enumerate(new.args)
        if part is not None
    ]
