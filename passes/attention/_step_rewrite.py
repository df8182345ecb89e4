"""Turns an analyzed program into one step of decoding: edits the graph, decides nothing."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor

from irc.core.dims import Dim, new_dim
from irc.core.errors import PassError
from irc.core.operands import input_node
from irc.core.program import VAL, Program, is_size
from irc.passes.attention._analysis import Analysis
from irc.passes.attention._head import find_cut
from irc.passes.attention._position_tables import Table

ATEN = torch.ops.aten


@dataclass
class Region:
    """Nodes that work on the same tokens: all S of the step, or the R whose logits are wanted."""

    dim: Dim
    positions: fx.Node


@dataclass
class StepRewrite:
    """Edits `program` in place; `caches` lists the new cache inputs, `updated` their next values."""

    program: Program
    analysis: Analysis
    cache_dtype: torch.dtype | None
    caches: list[fx.Node] = field(default_factory=list)
    updated: list[fx.Node] = field(default_factory=list)
    heads: list[tuple[int, int]] = field(default_factory=list)
    _gathered: dict[Any, fx.Node] = field(default_factory=dict)
    _resized: dict[fx.Node, Any] = field(default_factory=dict)
    _weights: dict[fx.Node, str] = field(default_factory=dict)

    def run(self) -> None:
        program, sequence = self.program, self.analysis.sequence
        self.cut = find_cut(program, self.analysis)
        order = list(program.graph.nodes)
        self.size_only = {node for node in order if node not in self.analysis.walk.data}
        tail = _downstream(program, self.cut)
        self.positions = self._placeholder("positions", [sequence.batch_size, sequence.dim.size], torch.int64)
        wanted_dim = new_dim(program.fake_mode, free_name("R", program.dims), 2)
        program.dims[wanted_dim.name] = wanted_dim
        self.logit_indices = self._placeholder("logit_indices", [sequence.batch_size, wanted_dim.size], torch.int64)
        self._cache_inputs()
        step = Region(sequence.dim, self.positions)
        for node in order:
            if node not in tail:
                self._edit(node, step)
        if isinstance(self.cut, fx.Node):
            self._tail([n for n in order if n in tail], wanted_dim)
        output = program.output_node
        output.args = ((program.outputs[0], *self.updated),)
        program.erase_dead()
        for node in program.placeholders:
            if not node.users and node not in (sequence.tokens, self.positions, self.logit_indices):
                program.graph.erase_node(node)

    # ------------------------------------------------------------ inputs

    def _placeholder(self, name: str, sizes: list[Any], dtype: torch.dtype, before: fx.Node | None = None) -> fx.Node:
        graph, last = self.program.graph, self.program.placeholders[-1]
        with graph.inserting_after(last) if before is None else graph.inserting_before(before):
            node = graph.placeholder(name)
        with self.program.fake_mode:
            node.meta[VAL] = torch.empty(sizes, dtype=dtype, device=self.analysis.sequence.tokens.meta[VAL].device)
        return node

    def _cache_inputs(self) -> None:
        sequence = self.analysis.sequence
        for index, node in enumerate(self.analysis.attentions):
            for kind, operand in zip("kv", node.args[1:3], strict=True):
                value = operand.meta[VAL]
                sizes = [sequence.batch_size, int(value.shape[1]), self.analysis.tables.length, int(value.shape[3])]
                self.caches.append(self._placeholder(f"cache_{kind}_{index}", sizes, self.cache_dtype or value.dtype))
                self.heads.append((sizes[1], sizes[3]))

    # ------------------------------------------------------------ nodes before the head

    def _edit(self, node: fx.Node, region: Region) -> None:
        if node in self.analysis.walk.data and node.op == "call_function":
            self._gather_operands(node, region)
            if node in self.analysis.attentions:
                self._cache_attention(node, self.analysis.attentions.index(node))

    def _gather_operands(self, node: fx.Node, region: Region) -> None:
        for operand in [p for (user, p) in self.analysis.walk.gathers if user is node]:
            table = self.analysis.tables.found[operand]
            node.replace_input_with(operand, self._gather(operand, table, node, region))

    def _cache_attention(self, node: fx.Node, index: int) -> None:
        keys_and_values = []
        for slot, operand in enumerate((input_node(node, 1), input_node(node, 2)), start=2 * index):
            new = self.program.insert(
                torch.ops.irc.cache_write.default, self.caches[slot], operand, self.positions, before=node
            )
            self.updated.append(new)
            keys_and_values.append(self.read_back(new, operand, node))
        kwargs = dict(node.kwargs) | {"positions": self.positions}
        bias = self._bias(node, kwargs)
        if bias is not None:
            kwargs["bias"] = bias
        node.args = (node.args[0], *keys_and_values)
        node.kwargs = kwargs

    def read_back(self, cache: fx.Node, operand: fx.Node, before: fx.Node) -> fx.Node:
        """A written cache in the type of the keys or values that attention had before."""
        dtype = operand.meta[VAL].dtype
        if self.cache_dtype in (None, dtype):
            return cache
        return self.program.insert(ATEN._to_copy.default, cache, before=before, dtype=dtype)

    def _bias(self, node: fx.Node, kwargs: dict[str, Any]) -> fx.Node | None:
        """The attention's bias at the step's positions; one that masks later keys turns `mask` into causal."""
        bias = node.kwargs.get("bias")
        if not isinstance(bias, fx.Node):
            return None
        if bias not in self.analysis.tables.biases:
            return bias
        if self.analysis.tables.biases[bias].causal and kwargs.get("mask", "full") == "full":
            kwargs["mask"] = "causal"
        return self._gather_bias(bias, node)

    def _cut_moves(self, old: fx.Node, new: fx.Node) -> None:
        """`new` takes the place of `old`, which may be where the head is cut off."""
        if self.cut is old:
            self.cut = new
            self.analysis.walk.layouts[new] = self.analysis.walk.layouts[old]

    # ------------------------------------------------------------ tables

    def _gather(self, operand: fx.Node, table: Table, user: fx.Node, region: Region) -> fx.Node:
        """The table's rows at the step's positions, laid out so that `user` broadcasts them as before."""
        rank, batch_at = self._place_of_batch(table, user)
        key = (operand, rank, batch_at, region.dim.name)
        if key not in self._gathered:
            self._gathered[key] = self._emit_gather(operand, table, rank, batch_at, region, before=user)
        return self._gathered[key]

    def _place_of_batch(self, table: Table, user: fx.Node) -> tuple[int, int | None]:
        """Rank of the gathered tensor and where its batch dimension goes (None: within the token's)."""
        sequence = self.analysis.sequence
        if table.outer:
            return table.rank, None
        if table.batch_dim is not None:
            return table.rank, table.batch_dim
        sizes = self.program.shape_expr(user)
        at = [i for i, size in enumerate(sizes) if sequence.batch_symbol in size.free_symbols]
        if not at:
            return table.rank, None
        place = at[0] - (len(sizes) - table.rank)
        return (table.rank, place) if place >= 0 else (len(sizes), at[0])

    def _emit_gather(
        self, operand: fx.Node, table: Table, rank: int, batch_at: int | None, region: Region, before: fx.Node
    ) -> fx.Node:
        values, extra = table.values, [] if table.token.inner == 1 else ["inner"]
        rest = [i for i in range(table.rank) if i != table.token.dim]
        sizes = values.shape[1 + len(extra) :]
        tags: list[Any] = ["B", "S", *extra, *(i for i, n in zip(rest, sizes, strict=True) if n != 1)]
        stored = values.reshape([*values.shape[: 1 + len(extra)], *(n for n in sizes if n != 1)])
        result = self._look_up(operand, stored, region.positions, before)
        place_batch = table.outer or batch_at is not None
        if not place_batch:
            result = self.program.insert(ATEN.squeeze.dim, result, 0, before=before)
            tags.remove("B")
        wanted: list[list[Any]] = []
        for dim in range(rank):
            original = dim - (rank - table.rank)
            if original == table.token.dim:
                wanted.append([*(["B"] if table.outer else []), "S", *extra])
            elif dim == batch_at and not table.outer:
                wanted.append(["B"])
            else:
                wanted.append([original] if original in tags else [])
        return self._arrange(result, tags, wanted, before)

    def _look_up(self, operand: fx.Node, stored: Tensor, positions: fx.Node, before: fx.Node) -> fx.Node:
        if operand not in self._weights:
            self._weights[operand] = self.program.add_weight(f"{operand.name}_table", stored)
        with self.program.graph.inserting_before(before):
            weight = self.program.graph.get_attr(self._weights[operand])
        weight.meta[VAL] = self.program.fake(stored)
        if stored.dim() == 2 and stored.dtype.is_floating_point:
            return self.program.insert(ATEN.embedding.default, weight, positions, before=before)
        return self.program.insert(ATEN.index.Tensor, weight, [positions], before=before)

    def _arrange(self, node: fx.Node, tags: list[Any], wanted: list[list[Any]], before: fx.Node) -> fx.Node:
        """Permute, merge and unsqueeze so that the dimensions named by `tags` become `wanted`."""
        order = [tags.index(tag) for group in wanted for tag in group]
        if order != sorted(order):
            node = self.program.insert(ATEN.permute.default, node, order, before=before)
        for dim, group in enumerate([g for g in wanted if g]):
            if len(group) > 1:
                node = self.program.insert(ATEN.flatten.using_ints, node, dim, dim + len(group) - 1, before=before)
        for dim, group in enumerate(wanted):
            if not group:
                node = self.program.insert(ATEN.unsqueeze.default, node, dim, before=before)
        return node

    def _gather_bias(self, operand: fx.Node, before: fx.Node) -> fx.Node:
        if operand in self._gathered:
            return self._gathered[operand]
        table = self.analysis.tables.biases[operand]
        if table.by_row:
            by_row = table.values[0].transpose(0, 1).contiguous()  # [L, H, L|1]
            rows = self._look_up(operand, by_row, self.positions, before)
            result = self.program.insert(ATEN.permute.default, rows, [0, 2, 1, 3], before=before)
        else:
            result = self.program.weight_node(f"{operand.name}_table", table.values, before=before)
        self._gathered[operand] = result
        return result

    # ------------------------------------------------------------ the head

    def _tail(self, tail: list[fx.Node], wanted_dim: Dim) -> None:
        """From the cut on, only the wanted tokens: R takes the place of S."""
        program, first = self.program, tail[0]
        positions = program.insert(ATEN.gather.default, self.positions, 1, self.logit_indices, before=first)
        picked = self._pick(first)
        region = Region(wanted_dim, positions)
        for node in tail:
            if node.op == "output":
                continue
            node.replace_input_with(self.cut, picked)
            self._gather_operands(node, region)
            for operand in node.all_input_nodes:
                if operand in self.size_only and self.analysis.tables.depends_on_length(operand):
                    node.replace_input_with(operand, self._resize(operand, node))
            program.infer_type(node)
        program.output_node.replace_input_with(self.cut, picked)

    def _pick(self, before: fx.Node) -> fx.Node:
        """The cut's values at `logit_indices`."""
        program, cut, walk = self.program, self.cut, self.analysis.walk
        token = walk.layout(cut)
        assert token is not None
        shape = program.shape_expr(cut)
        batch_at = shape.index(self.analysis.sequence.batch_expr)
        index = self.logit_indices
        if batch_at > token.dim:
            index = program.insert(ATEN.transpose.int, index, 0, 1, before=before)
        for dim in range(len(shape)):
            if dim not in (batch_at, token.dim):
                index = program.insert(ATEN.unsqueeze.default, index, dim, before=before)
        others = [-1 if dim in (batch_at, token.dim) else int(size) for dim, size in enumerate(shape)]
        if any(size > 1 for size in others):
            index = program.insert(ATEN.expand.default, index, others, before=before)
        return program.insert(ATEN.gather.default, cut, token.dim, index, before=before)

    def _resize(self, node: fx.Node, before: fx.Node) -> Any:
        """A size-only value computed again with R in the place of S."""
        if not self.analysis.tables.depends_on_length(node):
            return node
        if node not in self._resized:
            if is_size(node) and node.target is ATEN.sym_size.int:
                if self.program.expr(node.meta[VAL]) != self.analysis.sequence.symbol:
                    raise PassError(f"{node.name}: cannot compute size {node.meta[VAL]} for the wanted tokens")
                new = self.program.insert(ATEN.sym_size.int, self.logit_indices, 1, before=before)
            else:
                args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: self._resize(n, before))
                new = self.program.insert(node.target, *args, before=before, **dict[str, Any](kwargs))
            self._resized[node] = new
        return self._resized[node]


def _downstream(program: Program, cut: fx.Node) -> set[fx.Node]:
    found: set[fx.Node] = set()
    for node in program.graph.nodes:
        if node.op != "output" and any(i is cut or i in found for i in node.all_input_nodes) and not is_size(node):
            found.add(node)
    return found or {program.output_node}


def free_name(name: str, taken: dict[str, Dim]) -> str:
    """The name for a dimension, made another if it is taken."""
    while name in taken:
        name += "_"
    return name
