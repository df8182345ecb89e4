"""Compute once, at compile time, what depends on weights and literals alone.

Runs after the raising passes, which leave small weight arithmetic behind (`1 + w` of a Gemma norm).
Position tables depend on the sizes of the inputs and are left as they are: other passes need them so.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.fx as fx
from torch import Tensor

from irc.core.contract import Pass, PassContext, PassResult, Skip, register_pass
from irc.core.errors import OptionError
from irc.core.program import VAL, Program, is_size
from irc.core.rewrite.graph import is_pure, is_view, layout_of, num_bytes, refresh_layouts


@register_pass
@dataclass(frozen=True, kw_only=True)
class FoldConstants(Pass):
    """f(weights, literals)  →  a new weight.

    1. Folded is the largest such expression: the last node all of whose inputs are constant.
    2. A size that is a fixed number becomes the literal number.

    Does not fold: `irc.dequantize` (it would undo quantization); views (they are free, and a copy may
    double a shared weight); a bare constructor (`zeros`, `arange`: cheaper than its result); anything
    that would grow the weights by more than `max_bytes`.
    Preserves: exact.
    """

    name: ClassVar[str] = "fold-constants"
    max_bytes: int = 1 << 20

    def __post_init__(self) -> None:
        if self.max_bytes < 0:
            raise OptionError(f"fold-constants: max_bytes is {self.max_bytes}, must be 0 or more")

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        matches = _fold_sizes(program, ctx)
        skips: list[Skip] = []
        folded: dict[str, Tensor] = {}
        constant = _constant_nodes(program)
        frontier = [node for node in constant if any(user not in constant for user in node.users)]
        for node in frontier:
            slice_nodes = _slice(node)
            if not _worth_folding(node, slice_nodes):
                continue
            growth = num_bytes(node.meta[VAL]) - _freed_bytes(program, node, slice_nodes)
            if growth > self.max_bytes:
                skips.append(
                    Skip.at(node, f"folding adds {growth} bytes of weights, more than max_bytes={self.max_bytes}")
                )
            elif ctx.allow(node):
                _fold(program, node, slice_nodes, folded)
                matches += 1
        return PassResult(program, matches=matches, skips=skips, modified=matches > 0)


def _fold_sizes(program: Program, ctx: PassContext) -> int:
    """Case 2: sizes that are plain numbers become literals in their users' arguments."""
    matches = 0
    for node in list(program.graph.nodes):
        value = node.meta.get(VAL)
        if node.op == "call_function" and is_size(node) and isinstance(value, (int, float)) and ctx.allow(node):
            for user in list(node.users):
                user.args, user.kwargs = _with_literal(user, node, value)
            program.graph.erase_node(node)
            matches += 1
    return matches


def _with_literal(user: fx.Node, size: fx.Node, value: float) -> Any:
    return fx.map_arg((user.args, user.kwargs), lambda used: value if used is size else used)


def _constant_nodes(program: Program) -> dict[fx.Node, None]:
    """Weights and what is computed from them alone, in graph order."""
    constant: dict[fx.Node, None] = {}
    for node in program.graph.nodes:
        if node.op == "get_attr":
            constant[node] = None
        elif node.op == "call_function" and is_pure(node) and not is_size(node):
            irc_op = isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "irc"
            if not irc_op and _is_static(node) and all(i in constant for i in node.all_input_nodes):
                constant[node] = None
    return constant


def _is_static(node: fx.Node) -> bool:
    values = node.meta.get(VAL)
    leaves = values if isinstance(values, (list, tuple)) else [values]
    return all(isinstance(v, Tensor) and all(isinstance(s, int) for s in v.shape) for v in leaves)


def _slice(node: fx.Node) -> dict[fx.Node, None]:
    """The node and all it is computed from, in an order in which they can be run."""
    found: dict[fx.Node, None] = {}

    def visit(current: fx.Node) -> None:
        if current not in found:
            for used in current.all_input_nodes:
                visit(used)
            found[current] = None

    visit(node)
    return found


def _worth_folding(node: fx.Node, slice_nodes: dict[fx.Node, None]) -> bool:
    if not isinstance(node.meta[VAL], Tensor):
        return False
    computing = [n for n in slice_nodes if n.op == "call_function" and not is_view(n) and _is_computation(n)]
    return any(n.all_input_nodes for n in computing)


def _is_computation(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload)


def _freed_bytes(program: Program, node: fx.Node, slice_nodes: dict[fx.Node, None]) -> int:
    """Bytes of the weights that only this expression reads."""
    freed: set[fx.Node] = {node}
    for current in reversed(slice_nodes):
        if current is not node and all(user in freed for user in current.users):
            freed.add(current)
    readers: dict[str, list[fx.Node]] = {}
    for read in program.graph.find_nodes(op="get_attr"):
        readers.setdefault(str(read.target), []).append(read)
    gone = {str(n.target) for n in freed if n.op == "get_attr" and all(r in freed for r in readers[str(n.target)])}
    return sum(num_bytes(program.weight(name)) for name in gone)


def _fold(program: Program, node: fx.Node, slice_nodes: dict[fx.Node, None], folded: dict[str, Tensor]) -> None:
    values: dict[fx.Node, Any] = {}
    with torch.no_grad():
        for current in slice_nodes:
            if current.op == "get_attr":
                values[current] = program.weight(current)
            else:
                args, kwargs = fx.map_arg((current.args, current.kwargs), values.__getitem__)
                assert callable(current.target)
                values[current] = current.target(*args, **kwargs)
    result = values[node].detach().clone(memory_format=torch.contiguous_format)
    name = next((known for known, old in folded.items() if _same_tensor(old, result)), None)
    if name is None:
        weights = [str(n.target) for n in slice_nodes if n.op == "get_attr"]
        name = program.add_weight(f"{weights[0]}_folded" if weights else "constant", result)
        folded[name] = result
    with program.graph.inserting_before(node):
        read = program.graph.get_attr(name)
    read.meta[VAL] = program.fake(result)
    moved = {read} if layout_of(read) != layout_of(node) else set()
    program.replace(node, read)
    refresh_layouts(program, moved)  # a folded weight is contiguous, which what it replaces need not be
    for current in reversed(slice_nodes):
        if current is not node and not current.users:
            program.graph.erase_node(current)


def _same_tensor(a: Tensor, b: Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape or a.is_meta or b.is_meta:
        return False
    return torch.equal(a, b)
