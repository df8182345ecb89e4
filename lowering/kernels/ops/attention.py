"""Attention by element: the definition that any kernel of it must agree with. Slow: scores are computed twice.

Targets have templates for it; this is what runs where a template refuses.
"""

from __future__ import annotations

from collections.abc import Callable

import sympy
from torch.utils._sympy.functions import FloorDiv, Mod

from irc.lowering.kernels.definitions import At, Call, apply, convert, defines, literal, settle
from irc.lowering.kernels.ops.windows import guarded
from irc.lowering.kernels.values import Value

Element = Callable[[sympy.Expr, sympy.Expr], Value]  # (key index t, channel) → element


@defines("irc.attention", "irc.flash_attention", kind="product")
def attention(call: Call, index: At) -> Value:
    """softmax(cap(q · kᵀ · scale) + bias, masked) · v."""
    b, h, s, channel = index
    query, key, value = (call.operand(n) for n in ("query", "key", "value"))
    group = query.shape[1] / key.shape[1]
    kv_head, keys = FloorDiv(h, group), key.shape[2]
    if call.has("positions"):
        p = convert(call.operand("positions").at((b, s)), "i64")
    else:
        p = call.definer.number(keys - query.shape[2] + s)

    def biased(score: Value, t: sympy.Expr) -> Value:
        if not call.has("bias"):
            return score
        bias = call.operand("bias")
        extra = bias.spread((b, h, s, t))
        if bias.dtype == "bool":
            return apply("where", extra, score, literal(float("-inf"), score.dtype), dtype=score.dtype)
        return apply("add", score, convert(extra, score.dtype))

    return _attend(
        call, query.shape[-1], keys, p, h, channel, biased,
        query=lambda t, d: query.at((b, h, s, d)),
        key=lambda t, d: key.at((b, kv_head, t, d)),
        value=lambda t, d: value.at((b, kv_head, t, d)),
    )  # fmt: skip


@defines("irc.paged_attention", kind="product")
def paged_attention(call: Call, index: At) -> Value:
    """Attention of flat tokens, each over the pages of its own sequence."""
    n, h, channel = index
    query, key, _value, tables = (call.operand(x) for x in ("query", "key_cache", "value_cache", "block_tables"))
    page = key.shape[1]
    group = query.shape[1] / key.shape[2]
    kv_head = FloorDiv(h, group)
    sequence = call.definer.gathered(convert(call.operand("sequence_ids").at((n,)), "i64"), tables.shape[0])
    p = convert(call.operand("positions").at((n,)), "i64")

    def paged(cache: str) -> Element:
        def at(t: sympy.Expr, d: sympy.Expr) -> Value:
            block = convert(tables.at((sequence, FloorDiv(t, page))), "i64")
            where = call.definer.gathered(block, key.shape[0])
            return call.operand(cache).at((where, Mod(t, page), kv_head, d))

        return at

    def biased(score: Value, t: sympy.Expr) -> Value:
        if not call._arguments.get("bias"):
            return score
        bias = call.operand("bias")
        # Keys behind the bias belong to no position: what they get is masked.
        inside = sympy.Min(t, bias.shape[-1] - 1)
        return apply("add", score, convert(bias.spread((n, h, inside)), score.dtype))

    return _attend(
        call, query.shape[-1], tables.shape[1] * page, p, h, channel, biased,
        query=lambda t, d: query.at((n, h, d)), key=paged("key_cache"), value=paged("value_cache"),
    )  # fmt: skip


def _attend(
    call: Call,
    width: sympy.Expr,
    keys: sympy.Expr,
    p: Value,
    head: sympy.Expr,
    channel: sympy.Expr,
    biased: Callable[[Value, sympy.Expr], Value],
    *,
    query: Element,
    key: Element,
    value: Element,
) -> Value:
    """The softmax over keys that `mask` lets a query at position p see."""
    mask, window = str(call.raw("mask")), call.raw("window")
    d, t = call.symbol("d", width), call.symbol("t", keys)
    wide = "f64" if call.dtype == "f64" else "f32"
    score = call.reduce("sum", [(d, width)], apply("mul", convert(query(t, d), wide), convert(key(t, d), wide)))
    score = apply("mul", score, literal(float(call.raw("scale")), wide))
    if call.raw("softcap") is not None:
        cap = literal(float(call.raw("softcap")), wide)
        score = apply("mul", cap, apply("tanh", apply("div", score, cap)))
    score = biased(score, t)
    stop = None if mask == "full" else apply("add", p, literal(1))
    score = guarded(_seen(call, mask, window, p, t), score, literal(float("-inf"), wide))
    axes = [(t, keys)]
    top = call.reduce("max", axes, score, stop)
    sink = convert(call.operand("sinks").at((head,)), wide) if call.has("sinks") else None
    if sink is not None:
        top = apply("maximum", top, sink)
    nothing = apply("eq", top, literal(float("-inf"), wide), dtype="bool")
    shift = apply("where", nothing, literal(0.0, wide), top, dtype=wide)
    weight = apply("exp", apply("sub", score, shift))
    total = call.reduce("sum", axes, weight, stop)
    if sink is not None:
        total = apply("add", total, apply("exp", apply("sub", sink, shift)))
    mixed = call.reduce("sum", axes, apply("mul", weight, convert(value(t, channel), wide)), stop)
    empty = apply("eq", total, literal(0.0, wide), dtype="bool")
    return settle(apply("div", mixed, apply("where", empty, literal(1.0, wide), total, dtype=wide)), call.dtype)


def _seen(call: Call, mask: str, window: int | None, p: Value, t: sympy.Expr) -> list[Value]:
    """Conditions beyond t ≤ p, which the loop's end takes care of."""
    key = call.definer.number(t)
    if mask == "sliding":
        return [apply("gt", key, apply("sub", p, literal(int(window or 0))), dtype="bool")]
    if mask == "chunked":
        size = literal(int(window or 1))
        return [apply("eq", apply("floor_div", key, size), apply("floor_div", p, size), dtype="bool")]
    return []
