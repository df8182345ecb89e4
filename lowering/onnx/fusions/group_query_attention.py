"""Rotary positions, cache writes and attention of a step → `GroupQueryAttention`.

Keys and values are appended to a cache of fixed length; an artifact hands the operator the same memory as past and
present, and nothing is copied. Rotary positions go along where queries and keys are turned by the same tables over
their whole width. With the input `query_seqlens` (ONNX Runtime 1.32) several sequences may continue by several tokens;
older ones take that for one sequence only and say so.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor

from irc.core.contract import Skip
from irc.core.kv_cache import KVCache
from irc.core.operands import input_node, int_argument
from irc.core.ops.registry import is_irc_op
from irc.core.program import VAL, Program
from irc.lowering.onnx import installed
from irc.lowering.onnx.fusing import Match, call, is_reshape, only_user, register_fusion, swaps_heads
from irc.lowering.onnx.registry import Setting

_OP = "GroupQueryAttention"
_ROTARY_MULTIPLE = 16
aten = torch.ops.aten


def find(setting: Setting, program: Program) -> Iterator[Match | Skip]:
    """Attentions of a step over its own caches."""
    cached = KVCache.of(program)
    if cached is None or cached.layout != "contiguous":
        return
    for node in program.operations():
        if not is_irc_op(node.target, "attention"):
            continue
        reason = _why_not(program, node)
        if reason is not None:
            yield Skip.at(node, f"{_OP}: {reason}")
            continue
        query, key_write, value_write = (input_node(node, index) for index in range(3))
        key = input_node(key_write, 1)
        parts = {"key": key_write, "value": value_write, "rotary": _rotary(program, query, key)}
        rope = (query, key) if parts["rotary"] else ()
        yield Match(node, parts, (node, key_write, value_write, *rope))


def _why_not(program: Program, node: fx.Node) -> str | None:
    positions, inputs = program.placeholders[1], set(program.placeholders)
    query, key, value = (input_node(node, index) for index in range(3))
    kwargs = node.kwargs
    for write in (key, value):
        if not is_irc_op(write.target, "cache_write"):
            return "its keys or values come from no cache"
        if write.args[0] not in inputs or write.args[2] is not positions:
            return "its cache is no input, or is written at other positions"
        if any(user is not node and user.op != "output" for user in write.users):
            return "its cache is read elsewhere, too"
    if kwargs.get("positions") is not positions or kwargs.get("mask", "full") not in ("causal", "sliding"):
        return "its mask is neither causal nor a sliding window"
    if kwargs.get("bias") is not None:
        return "adds a bias to the scores"
    tensors = [n.meta[VAL] for n in (query, key, value, input_node(key, 1), input_node(value, 1))]
    if {t.dtype for t in tensors} != {torch.float32}:
        return "is used for f32 only"
    if tensors[1].shape[-1] != tensors[2].shape[-1]:
        return "takes keys and values of one width"
    if tensors[0].shape[-1] % 8:
        return "takes heads of a multiple of 8"
    if not installed.has_kernel(_OP, installed.CONTRIB, 1):
        return "this ONNX Runtime has no kernel for it"
    return None


def _rotary(program: Program, query: Any, key: Any) -> dict[str, Any] | None:
    """Tables and order of pairs, if queries and keys are turned alike by stored tables over their whole width."""
    if not (is_irc_op(query.target, "rope") and is_irc_op(key.target, "rope")):
        return None
    if query.args[1:3] != key.args[1:3] or query.kwargs != key.kwargs:
        return None
    tables = [_table(program, node) for node in query.args[1:3]]
    width = query.meta[VAL].shape[-1]
    if any(table is None or 2 * table.meta[VAL].shape[-1] != width for table in tables) or width % _ROTARY_MULTIPLE:
        return None
    return {"tables": tables, "interleaved": int(query.kwargs.get("interleaved", False))}


def _table(program: Program, angles: Any) -> fx.Node | None:
    """The stored table [L, R] behind angles that are looked up by the step's positions."""
    if angles.target is not aten.unsqueeze.default or angles.args[1] != 1:
        return None
    lookup = angles.args[0]
    if lookup.target is not aten.embedding.default or lookup.args[1] is not program.placeholders[1]:
        return None
    table = lookup.args[0]
    known = table.op == "get_attr" and table.meta[VAL].dtype == torch.float32 and table.meta[VAL].dim() == 2
    return table if known else None


def write(setting: Setting, program: Program, match: Match) -> None:
    """Edits the program: the attention becomes the operator, its caches the operator's outputs."""
    node, rotary = match.root, match.parts["rotary"]
    key_write, value_write = match.parts["key"], match.parts["value"]
    query, key, value = node.args[0], key_write.args[1], value_write.args[1]
    if rotary is not None:
        query, key = query.args[0], key.args[0]
    flat: list[Any] = [_flat(program, setting, x, before=node) for x in (query, key, value)]
    packed = _packed(program, flat)
    if packed is not None:  # one product gave all three, and the operator takes them so
        flat = [packed, None, None]
    attributes: dict[str, Any] = {
        "num_heads": int(node.args[0].meta[VAL].shape[1]),
        "kv_num_heads": int(key_write.meta[VAL].shape[1]),
        "scale": float(node.kwargs.get("scale", 1.0)),
    }
    if node.kwargs.get("softcap") is not None:
        attributes["softcap"] = float(node.kwargs["softcap"])
    if node.kwargs["mask"] == "sliding":
        attributes["local_window_size"] = int(node.kwargs["window"])
    tables = []
    if rotary is not None:
        attributes |= {"do_rotary": 1, "rotary_interleaved": rotary["interleaved"]}
        tables = [_again(program, table, node) for table in rotary["tables"]]
    sizes = _sizes(program, setting)
    outputs = call(
        program, setting, group_query_attention, *flat, key_write.args[0], value_write.args[0], *sizes,
        tables, node.kwargs.get("sinks"), attributes, before=node,
    )  # fmt: skip
    new = [_item(program, outputs, index, before=node) for index in range(3)]
    _use_output(program, setting, node, new[0])
    for old, cache in zip((key_write, value_write), new[1:], strict=True):
        old.replace_all_uses_with(cache)


def _again(program: Program, weight: fx.Node, before: fx.Node) -> fx.Node:
    """The same stored tensor, certainly before its new user."""
    with program.graph.inserting_before(before):
        node = program.graph.get_attr(str(weight.target))
    node.meta[VAL] = weight.meta[VAL]
    return node


def _item(program: Program, outputs: fx.Node, index: int, *, before: fx.Node) -> fx.Node:
    with program.graph.inserting_before(before):
        node = program.graph.call_function(operator.getitem, (outputs, index))
    node.meta[VAL] = outputs.meta[VAL][index]
    return node


def _flat(program: Program, setting: Setting, x: Any, *, before: fx.Node) -> fx.Node:
    """[B, H, S, D] → [B, S, H·D]: what it was before the heads were split, if it can be seen."""
    if swaps_heads(x) and is_reshape(x.args[0]):
        source = x.args[0].args[0]
        batch, heads, length, width = program.shape_expr(x)
        if program.shape_expr(source) == (batch, length, heads * width):
            return source
    return call(program, setting, merge_heads, x, before=before)


def _packed(program: Program, flat: list[Any]) -> fx.Node | None:
    """The tensor that queries, keys and values are three consecutive parts of."""
    if any(part.target is not operator.getitem or part.args[1] != i for i, part in enumerate(flat)):
        return None
    split = flat[0].args[0]
    if any(part.args[0] is not split for part in flat) or split.target is not aten.split_with_sizes.default:
        return None
    source = split.args[0]
    last = len(program.shape_expr(source)) - 1
    whole = len(split.args[1]) == len(flat) and (split.args[2] if len(split.args) > 2 else 0) in (-1, last)
    return source if whole else None


def _use_output(program: Program, setting: Setting, node: fx.Node, out: fx.Node) -> None:
    """Let the users of the attention [B, H, S, D] use the operator's [B, S, H·D]."""
    batch, heads, length, width = program.shape_expr(node)
    swapped = only_user(node)
    merged = only_user(swapped) if swapped is not None and swaps_heads(swapped) else None
    if merged is not None and is_reshape(merged) and program.shape_expr(merged) == (batch, length, heads * width):
        merged.replace_all_uses_with(out)
        return
    split = call(program, setting, split_heads, out, int(heads), before=node)
    node.replace_all_uses_with(split)


def merge_heads(setting: Setting, x: Tensor) -> Tensor:
    """[B, H, S, D] → [B, S, H·D]."""
    return x.transpose(1, 2).flatten(2)


def split_heads(setting: Setting, x: Tensor, heads: int) -> Tensor:
    """[B, S, H·D] → [B, H, S, D]."""
    return x.unflatten(2, (heads, -1)).transpose(1, 2)


def _sizes(program: Program, setting: Setting) -> list[fx.Node]:
    """What the operator asks about lengths, computed once for all layers."""
    positions = program.placeholders[1]
    name = f"{sizes.__module__}.{sizes.__name__}"
    for user in positions.users:
        if f"{getattr(user.target, '__module__', '')}.{getattr(user.target, '__name__', '')}" == name:
            return sorted(user.users, key=lambda item: int_argument(item, 1))
    first = program.placeholders[-1].next
    made = call(program, setting, sizes, positions, before=first)
    return [_item(program, made, index, before=first) for index in range(3)]


def sizes(setting: Setting, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(last position of each row, longest sequence, new tokens of each row), i32."""
    last = positions[:, -1]
    return (
        last.to(torch.int32),
        (last.max() + 1).to(torch.int32),
        (last - positions[:, 0] + 1).to(torch.int32),
    )


def group_query_attention(
    setting: Setting,
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    key_cache: Tensor,
    value_cache: Tensor,
    last: Tensor,
    longest: Tensor,
    lengths: Tensor,
    tables: list[Tensor],
    sinks: Tensor | None,
    attributes: dict[str, Any],
) -> tuple[Tensor, Tensor, Tensor]:
    """(attention [B, S, H·D], key cache, value cache); without keys and values, the query holds all three."""
    cos, sin = tables or (None, None)
    inputs: list[Tensor | None] = [
        query,
        key,
        value,
        key_cache,
        value_cache,
        last,
        longest,
        cos,
        sin,
        None,
        None,
        sinks,
    ]
    if installed.has_input(_OP, "query_seqlens"):
        inputs += [None] * 4 + [lengths]
    while inputs[-1] is None:
        inputs.pop()
    out, keys, values = torch.onnx.ops.symbolic_multi_out(
        f"{installed.CONTRIB}::{_OP}",
        inputs,
        dict(attributes),
        dtypes=(query.dtype, key_cache.dtype, value_cache.dtype),
        shapes=((*query.shape[:2], attributes["num_heads"] * key_cache.shape[-1]), key_cache.shape, value_cache.shape),
        version=1,
    )
    return out, keys, values


register_fusion(_OP, find, write, order=20)
