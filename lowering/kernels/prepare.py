"""Before scheduling: what depends on weights alone is computed once, but for weights that a template packs itself."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.fx as fx
from torch import Tensor

from irc.core.operands import apply_op
from irc.core.ops.registry import is_irc_op
from irc.core.program import VAL, Program
from irc.lowering.kernels.definitions import Definer
from irc.lowering.kernels.sites import Matcher, first_match


def fold_constants(program: Program, matchers: Sequence[Matcher]) -> tuple[Program, list[str]]:
    """(a copy with constants computed, notes about quantized weights that became floats)."""
    own = program.copy()
    covered = _covered(own, matchers)
    constant: set[fx.Node] = set()
    for node in own.graph.nodes:
        if node.op == "get_attr":
            constant.add(node)
        elif node.op == "call_function" and _foldable(node) and node not in covered:
            inputs = node.all_input_nodes
            if inputs and all(used in constant for used in inputs):
                constant.add(node)
    widened = 0
    for node in list(own.operations()):
        if node not in constant:
            continue
        needed = any(user not in constant for user in node.users)
        if needed and isinstance(node.meta.get(VAL), Tensor):
            value = _evaluated(own, node)
            widened += is_irc_op(node.target, "dequantize")
            own.replace(node, own.weight_node(f"{node.name}_constant", value, before=node))
    own.erase_dead()
    notes = [f"{widened} quantized weights are read as floats: no kernel takes them as they are"] if widened else []
    return own, notes


def _foldable(node: fx.Node) -> bool:
    # Constructors of constants have no weight to start from and cost nothing where they are used.
    return isinstance(node.target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded not in node.target.tags


def _covered(program: Program, matchers: Sequence[Matcher]) -> set[fx.Node]:
    """Nodes that some template stands for."""
    definer = Definer(program)
    found: set[fx.Node] = set()
    for node in program.operations():
        site = first_match(matchers, definer, node)
        if site is not None:
            found.update(site.covers)
    return found


def _evaluated(program: Program, node: fx.Node) -> Tensor:
    """The value of a node that depends on weights alone."""
    known: dict[fx.Node, Tensor] = {}

    def value(one: fx.Node) -> Tensor:
        if one not in known:
            if one.op == "get_attr":
                known[one] = program.weight(one).detach()
            else:
                args, kwargs = fx.map_arg((one.args, one.kwargs), value)
                with torch.no_grad():
                    known[one] = apply_op(one, *args, **kwargs)
        return known[one]

    return value(node).contiguous()
