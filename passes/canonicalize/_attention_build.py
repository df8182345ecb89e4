"""Put `irc.attention` in the place of a match."""

from __future__ import annotations

import torch
import torch.fx as fx

from irc.core.program import VAL, Program
from irc.passes.canonicalize._attention_masks import MaskPlan, Term, build_bias
from irc.passes.canonicalize._attention_match import AttentionMatch

aten = torch.ops.aten

_LAYOUT_ONLY = frozenset({
    aten.transpose.int, aten.permute.default, aten.unsqueeze.default, aten.squeeze.dim, aten.alias.default,
    aten.slice.Tensor, aten.select.int, aten.expand.default,
})  # fmt: skip


def build(program: Program, match: AttentionMatch, plan: MaskPlan) -> fx.Node:
    """Insert the attention in front of the anchor and let it take over the anchor's users."""
    anchor = match.anchor
    query, key, value = (heads.materialise(program, anchor) for heads in (match.query, match.key, match.value))
    merged = match.score_ndim == 3 and "h" in match.query.layout

    def as_scores(term: Term) -> fx.Node:
        return _four_axes(program, term, match, anchor)

    bias = build_bias(program, plan.terms, as_scores, anchor)
    if match.top_left_causal:
        bias = _with_top_left_causal(program, query, key, bias, anchor)
    attention = program.insert(
        torch.ops.irc.attention.default,
        query,
        key,
        value,
        before=anchor,
        name="attention",
        **_options(match, plan, bias),
    )
    if match.value.factor != 1.0:
        attention = program.insert(aten.mul.Tensor, attention, match.value.factor, before=anchor)
    result = _like_anchor(program, attention, match, anchor, merged)
    program.replace(anchor, result)
    _relax_views(result)
    return attention


def _relax_views(result: fx.Node) -> None:
    """Views further down relied on the memory layout of the old result: reshape asks for none."""
    pending = list(result.users)
    while pending:
        user = pending.pop()
        if user.target is aten.view.default:
            user.target = aten.reshape.default
        elif user.target in _LAYOUT_ONLY:
            pending.extend(user.users)


def _options(match: AttentionMatch, plan: MaskPlan, bias: fx.Node | None) -> dict[str, object]:
    """Keyword arguments that differ from the operator's defaults."""
    options: dict[str, object] = {}
    if bias is not None:
        options["bias"] = bias
    if match.sinks is not None:
        options["sinks"] = match.sinks
    if plan.kind.kind != "full":
        options["mask"] = plan.kind.kind
    if plan.kind.window is not None:
        options["window"] = plan.kind.window
    options["scale"] = match.scale
    if match.softcap is not None:
        options["softcap"] = match.softcap
    return options


def _four_axes(program: Program, term: Term, match: AttentionMatch, anchor: fx.Node) -> fx.Node:
    """A mask or bias over scores of `term.score_ndim` axes as [B|1, H|1, S|1, T]."""
    node, num_heads = term.node, match.query.num_heads
    shape = node.meta[VAL].shape
    if term.score_ndim == 3 and len(shape) == 3 and not (isinstance(shape[0], int) and shape[0] == 1):
        if "h" not in match.query.layout:
            return program.insert(aten.unsqueeze.default, node, 1, before=anchor)
        return program.insert(aten.unflatten.int, node, 0, [-1, num_heads], before=anchor)
    for _ in range(4 - len(shape)):
        node = program.insert(aten.unsqueeze.default, node, 0, before=anchor)
    return node


def _with_top_left_causal(
    program: Program, query: fx.Node, key: fx.Node, bias: fx.Node | None, anchor: fx.Node
) -> fx.Node:
    """t ≤ s, counted from the first query and the first key."""
    sizes = [_size(program, node, 2, anchor) for node in (query, key)]
    rows, columns = (program.insert(aten.arange.default, size, before=anchor) for size in sizes)
    rows = program.insert(aten.unsqueeze.default, rows, 1, before=anchor)
    keep = program.insert(aten.le.Tensor, columns, rows, before=anchor)
    for _ in range(2):
        keep = program.insert(aten.unsqueeze.default, keep, 0, before=anchor)
    if bias is None:
        return keep
    if bias.meta[VAL].dtype == torch.bool:
        return program.insert(aten.bitwise_and.Tensor, keep, bias, before=anchor)
    return program.insert(aten.where.ScalarOther, keep, bias, -torch.inf, before=anchor)


def _size(program: Program, node: fx.Node, axis: int, anchor: fx.Node) -> fx.Node | int:
    size = node.meta[VAL].shape[axis]
    return size if isinstance(size, int) else program.insert(aten.sym_size.int, node, axis, before=anchor)


def _like_anchor(program: Program, attention: fx.Node, match: AttentionMatch, anchor: fx.Node, merged: bool) -> fx.Node:
    """[B, H, S, Dv] in the axes and the type of the node that it replaces."""
    result = attention
    if match.score_ndim == 3:
        if merged:
            result = program.insert(aten.flatten.using_ints, result, 0, 1, before=anchor)
        else:
            result = program.insert(aten.squeeze.dim, result, 1, before=anchor)
    elif match.score_ndim == 2:
        for _ in range(2):
            result = program.insert(aten.squeeze.dim, result, 0, before=anchor)
    if match.output_order is not None:
        result = program.insert(aten.permute.default, result, list(match.output_order), before=anchor)
    if result.meta[VAL].dtype != anchor.meta[VAL].dtype:
        result = program.insert(aten.to.dtype, result, anchor.meta[VAL].dtype, before=anchor)
    return result
