"""Removes what export leaves behind and computes nothing. Runs first, so that patterns see only mathematics.

It does not remove: a cast that changes the type, an expand that enlarges, dropout that is active.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.fx as fx
from torch import Tensor

from irc.core.contract import Pass, PassContext, PassResult, Skip, register_pass
from irc.core.operands import input_node
from irc.core.program import VAL, Program

aten = torch.ops.aten

CHECKS = {
    overload
    for packet in ("_assert_tensor_metadata", "_assert_async", "_assert_scalar", "sym_constrain_range",
                   "sym_constrain_range_for_size", "_functional_assert_scalar", "_functional_assert_async")
    if hasattr(aten, packet)
    for overload in (getattr(getattr(aten, packet), name) for name in getattr(aten, packet).overloads())
}  # fmt: skip

# Ops that give their first input back, in another layout at most, whenever type, device and shape stay the same.
IDENTITIES = {
    overload
    for packet in ("to", "_to_copy", "alias", "lift_fresh_copy", "lift_fresh", "detach", "clone", "contiguous",
                   "expand", "expand_as", "slice", "narrow", "view", "view_as", "reshape", "reshape_as",
                   "_unsafe_view", "flatten", "unflatten", "squeeze", "repeat", "type_as", "broadcast_to",
                   "positive", "resolve_conj", "resolve_neg")
    for overload in (getattr(getattr(aten, packet), name) for name in getattr(aten, packet).overloads())
    if "Tensor" in str(overload._schema.returns[0].type) and not overload._schema.is_mutable
}  # fmt: skip

DROPOUTS = {aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default,
            aten.feature_alpha_dropout.default}  # fmt: skip

# Second spellings of one meaning: what later passes would otherwise each have to know.
RESPELLED = {
    aten.view.default: aten.reshape.default,
    aten._unsafe_view.default: aten.reshape.default,
    aten.broadcast_to.default: aten.expand.default,
}


@register_pass
@dataclass(frozen=True, kw_only=True)
class DropNoise(Pass):
    """f(x) → x for every f that the types prove to be the identity; assertions → nothing.

    1. Checks of metadata and sizes go: the program's own types say the same.
    2. Casts, copies, slices, expands, views … to the type, device and shape that the input has.
    3. Dropout that is off, or has probability 0.
    4. `view` becomes `reshape`: the same meaning, but right for every memory layout, which 2 may change;
       `broadcast_to` becomes `expand`.
    """

    name: ClassVar[str] = "drop-noise"

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        counts: Counter[str] = Counter()
        skips: list[Skip] = []
        moved: set[fx.Node] = set()
        for node in list(program.graph.nodes):
            if node.op != "call_function":
                continue
            if node.target in CHECKS and not node.users and ctx.allow(node):
                program.graph.erase_node(node)
                counts["check"] += 1
                continue
            if node.target in DROPOUTS and _is_active(node):
                skips.append(Skip.at(node, "dropout is active (train=True): capture the model in evaluation mode"))
                continue
            if _is_identity(node):
                if not ctx.allow(node):
                    continue
                counts[_kind(node)] += 1
                source = node.args[0]
                assert isinstance(source, fx.Node)
                if _strides(source) != _strides(node):
                    moved.update(node.users)
                program.replace(node, source)
            elif node.target in RESPELLED and ctx.allow(node):
                node.target = RESPELLED[node.target]
                counts["respelled"] += 1
                moved.add(node)
        _update_layouts(program, moved)
        matches = sum(counts.values())
        return PassResult(program, matches=matches, skips=skips, modified=matches > 0, statistics=dict(counts))


def _is_identity(node: fx.Node) -> bool:
    if node.target in DROPOUTS:
        return isinstance(node.args[0], fx.Node)
    return node.target in IDENTITIES and bool(node.args) and isinstance(node.args[0], fx.Node) and _same_type(node)


def _is_active(node: fx.Node) -> bool:
    _, probability, train = (*node.args, *node.kwargs.values())[:3]
    return bool(train) and bool(probability != 0.0)


def _same_type(node: fx.Node) -> bool:
    before, after = input_node(node).meta.get(VAL), node.meta.get(VAL)
    if not isinstance(before, Tensor) or not isinstance(after, Tensor):
        return False
    return bool(
        before.dtype == after.dtype
        and before.device == after.device
        and before.layout == after.layout
        and len(before.shape) == len(after.shape)
        and all(_equal(a, b) for a, b in zip(before.shape, after.shape, strict=True))
    )


def _equal(a: int | torch.SymInt, b: int | torch.SymInt) -> bool:
    """Proved equal for every size; no guard is added."""
    return bool(_expr(a) == _expr(b))


def _expr(size: int | torch.SymInt) -> Any:
    return size.node.expr if isinstance(size, torch.SymInt) else size


def _strides(node: fx.Node) -> tuple[Any, ...]:
    return tuple(_expr(s) for s in node.meta[VAL].stride())


def _kind(node: fx.Node) -> str:
    target = node.target
    assert isinstance(target, torch._ops.OpOverload)
    name = target._schema.name.removeprefix("aten::").lstrip("_")
    return "cast" if name in ("to", "to_copy", "type_as") else name


def _update_layouts(program: Program, changed: set[fx.Node]) -> None:
    """Recompute types downstream of a changed memory layout, as far as it reaches."""
    if not changed:
        return
    for node in program.graph.nodes:
        if node not in changed or node.op != "call_function":
            continue
        before = node.meta[VAL]
        program.infer_type(node)
        after = node.meta[VAL]
        if isinstance(before, Tensor) and isinstance(after, Tensor) and _expr_strides(before) == _expr_strides(after):
            continue
        changed.update(node.users)


def _expr_strides(value: Tensor) -> tuple[Any, ...]:
    return tuple(_expr(s) for s in value.stride())
