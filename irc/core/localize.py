"""Find the first node of a rewritten program that computes something else than its origin did.

Both graphs are run node by node. Every node of the new graph that stands for a node of the old one
(`provenance.origin_of`) is compared with it. Starting from the outputs that differ, the search goes back
through nodes that differ or have no counterpart and stops at nodes that agree: what lies behind those
cannot be the cause. The first differing node that this reaches is the culprit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor

from irc.core import provenance
from irc.core.contract import Move, Trace
from irc.core.evaluate import evaluate
from irc.core.excerpt import node_text, window
from irc.core.numeric import Difference, compare_values
from irc.core.program import Program, describe, is_size

_ENTRIES = 4
_MAX_REMOVED = 4
"""How many removed nodes in a row one node may have taken over (conv, batch norm, relu, …)."""


@dataclass(frozen=True)
class Culprit:
    """The first diverging node (None: the outputs are wired differently) and the message about it."""

    node: str | None
    text: str


@dataclass
class _Compared:
    """One node of the new graph beside the value it should have."""

    node: fx.Node
    origin: str
    before: Any
    after: Any
    difference: Difference


def explain(
    before: Program, after: Program, inputs: Sequence[Any], allowed: float, *, trace: Trace | None = None,
    moved: Mapping[str, Move | None] | None = None,
) -> Culprit:  # fmt: skip
    """Run both programs on the same inputs and name the first node of `after` that diverges.

    `trace` runs the new program where it takes other inputs than the old one; `moved` says what values became that
    are others on purpose (see `PassResult`).
    """
    candidates = {node: _counterparts(before, after, node) for node in after.graph.nodes}
    wanted = {name for names in candidates.values() for name in names}
    old: dict[str, Any] = {}

    def keep(node: fx.Node, value: Any) -> None:
        if node.name not in wanted:
            return
        if moved is not None and node.name in moved:
            move = moved[node.name]
            if move is not None:
                old[node.name] = move(value)
        else:
            old[node.name] = value

    with torch.no_grad():
        old_outputs = evaluate(before.graph, before.weight, inputs, keep)
    compared: dict[fx.Node, _Compared] = {}
    outputs: dict[fx.Node, Any] = {node: None for node in after.outputs if isinstance(node, fx.Node)}

    def compare(node: fx.Node, value: Any) -> None:
        found = _best(node, value, [(name, old[name]) for name in candidates[node] if name in old], allowed)
        if found is not None:
            compared[node] = found
        if node in outputs:
            outputs[node] = value

    with torch.no_grad():
        if trace is not None:
            trace(after, inputs, compare)
        else:
            evaluate(after.graph, after.weight, inputs, compare)
    wrong = [
        out
        for out, expected in zip(after.outputs, old_outputs, strict=False)
        if isinstance(out, fx.Node) and _differs(compare_values(expected, outputs[out]), allowed)
    ]
    return _first_culprit(after, wrong, compared, allowed)


def _counterparts(before: Program, after: Program, node: fx.Node) -> list[str]:
    """Old nodes whose value the node may have: its origin, and removed ones that followed the origin.

    A node edited in place (a convolution that took over its batch norm) computes what the last removed
    node after it did.
    """
    origin = provenance.origin_of(node)
    if origin is None or node.op == "output":
        return []
    old = {n.name: n for n in before.graph.nodes}
    new_names = {n.name for n in after.graph.nodes}
    names = [origin] if origin in old else []
    frontier = [old[name] for name in names]
    for _ in range(_MAX_REMOVED):
        frontier = [user for n in frontier for user in n.users if user.name not in new_names]
        names += [n.name for n in frontier if n.name not in names]
    return names


def _best(node: fx.Node, value: Any, old: list[tuple[str, Any]], allowed: float) -> _Compared | None:
    """The node beside the counterpart it agrees with, else beside its origin; None if none is comparable."""
    found: _Compared | None = None
    for name, expected in old:
        if not isinstance(value, Tensor) or not isinstance(expected, Tensor):
            if is_size(node) and not isinstance(expected, Tensor) and value != expected:
                found = found or _Compared(node, name, expected, value, compare_values(expected, value))
            continue
        if value.shape != expected.shape or value.dtype != expected.dtype:
            continue
        one = _Compared(node, name, expected, value, compare_values(expected, value))
        if not _differs(one.difference, allowed):
            return one
        found = found or one
    return found


def _first_culprit(after: Program, wrong: list[fx.Node], compared: dict[fx.Node, _Compared], allowed: float) -> Culprit:
    agreeing = {node for node, one in compared.items() if not _differs(one.difference, allowed)}
    reached: set[fx.Node] = set()
    pending = list(wrong)
    while pending:
        node = pending.pop()
        if node not in reached and node not in agreeing:
            reached.add(node)
            pending.extend(node.all_input_nodes)
    for node in after.graph.nodes:
        if node in reached and node in compared:
            return Culprit(node.name, _text(after, compared[node]))
    for node in after.graph.nodes:
        if node in reached and node.op == "call_function":
            return Culprit(
                node.name,
                f"  first new node behind the wrong output: {node_text(node)}\n"
                f"  nothing before the pass computed its value, so it is not compared\n{window(after, node)}",
            )
    output = after.output_node
    return Culprit(
        None, f"  every node agrees with what it stands for: the outputs are wired wrongly\n{window(after, output)}"
    )


def _text(after: Program, one: _Compared) -> str:
    difference = one.difference
    size = f"  max |after - before| = {difference.absolute:.3g} ({difference.relative:.1e} relative)"
    return "\n".join(
        [
            f"  first wrong node: {node_text(one.node)}",
            f"    before: %{one.origin}: {_value(one.before, difference)}",
            f"    after:  %{one.node.name}: {_value(one.after, difference)}",
            f"  {size} at {list(difference.position)}" if difference.position else f"  its value {difference.problem}",
            "  what it is computed from agrees with the program before the pass",
            window(after, one.node),
        ]
    )


def _value(value: Any, difference: Difference) -> str:
    """Type and a few entries around the place where the values differ most."""
    if not isinstance(value, Tensor):
        return repr(value)
    row = value[difference.position[:-1]] if difference.position else value.flatten()
    start = min(difference.position[-1], max(0, len(row) - _ENTRIES)) if difference.position else 0
    entries = [f"{entry:.4g}" if isinstance(entry, float) else str(entry) for entry in row[start:][:_ENTRIES].tolist()]
    shown = ["…"] * (start > 0) + entries + ["…"] * (start + _ENTRIES < len(row))
    place = "".join(f"{index}, " for index in difference.position[:-1])
    return f"{describe(value)}, [{place}{start}:] = {', '.join(shown)}"


def _differs(difference: Difference, allowed: float) -> bool:
    return bool(difference.problem) or not difference.relative <= allowed


__all__ = ["Culprit", "explain"]
