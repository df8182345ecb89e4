"""What the kernel IR makes of a program, known before any work."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence, Set

import torch.fx as fx
from torch import Tensor

from irc.core.program import VAL, Program, dtype_name
from irc.core.target import Concern, Coverage, op_name
from irc.lowering.kernels.buffers import ITEM_BYTES
from irc.lowering.kernels.definitions import Call, Definer, definition_of
from irc.lowering.kernels.sites import Matcher, Site, first_match
from irc.lowering.kernels.stored import WRITES


def check(target: str, program: Program, matchers: Sequence[Matcher], anything: Set[str] = frozenset()) -> Coverage:
    """What has a kernel template, what is printed as loops, and what cannot be done.

    Args:
        anything: kinds of sites that compute what definitions refuse, or do not exist for.
    """
    coverage = Coverage(target)
    definer = Definer(program)
    supported: Counter[str] = Counter()
    refused: Counter[tuple[str, str]] = Counter()
    fallbacks: Counter[tuple[str, str]] = Counter()
    for node in program.operations():
        reason = _why_not(program, definer, node)
        taken = any(site.kind in anything for site in templates_of(node, definer, matchers))
        if reason is not None and not _constant(node) and not taken:
            refused[op_name(node), reason] += 1
            continue
        supported[op_name(node)] += 1
        definition = definition_of(node)
        product = definition is not None and definition.kind == "product"
        if product and not first_match(matchers, definer, node):
            fallbacks[op_name(node), "printed as plain loops: no template takes it"] += 1
    coverage.supported = dict(supported.most_common())
    coverage.fallbacks = [Concern(op, count, reason) for (op, reason), count in fallbacks.items()]
    coverage.refused = [Concern(op, count, reason) for (op, reason), count in refused.items()]
    for node in program.placeholders:
        value = node.meta.get(VAL)
        if not isinstance(value, Tensor):
            coverage.refused.append(Concern("input", 1, f"{node.target} is no tensor"))
        elif (reason := _why_not_type(value)) is not None:
            coverage.refused.append(Concern("input", 1, f"{node.target} has {reason}"))
    return coverage


def templates_of(node: fx.Node, definer: Definer, matchers: Sequence[Matcher]) -> list[Site]:
    """The sites that compute a node; of one with several results, those of all of them, or none."""
    value = node.meta.get(VAL)
    if not isinstance(value, (tuple, list)):
        found = first_match(matchers, definer, node)
        return [] if found is None else [found]
    sites = [first_match(matchers, definer, user) for user in node.users]
    return [] if None in sites else [site for site in sites if site is not None]


def _constant(node: fx.Node) -> bool:
    """Computed from weights alone: done when the program is lowered."""
    inputs = node.all_input_nodes
    return bool(inputs) and all(
        used.op == "get_attr" or (used.op == "call_function" and _constant(used)) for used in inputs
    )


def _why_not(program: Program, definer: Definer, node: fx.Node) -> str | None:
    value = node.meta.get(VAL)
    for one in value if isinstance(value, (tuple, list)) else [value]:
        reason = _why_not_type(one) if isinstance(one, Tensor) else None
        if reason is not None:
            return reason
    if op_name(node) in WRITES:
        return None
    definition = definition_of(node)
    if definition is None:
        return "no definition of the operation by element"
    reader = next((user for user in node.users), node) if isinstance(value, (tuple, list)) else node
    return definition.refuses(Call(definer, reader if isinstance(value, (tuple, list)) else node))


def _why_not_type(value: Tensor) -> str | None:
    printed = not value.is_complex() and dtype_name(value.dtype) in ITEM_BYTES
    return None if printed else f"numbers of type {value.dtype}"
