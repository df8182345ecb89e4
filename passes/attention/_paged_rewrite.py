"""The rewrite of cache insertion for pages: one row of N tokens, whatever sequences they belong to.

The data part of a program that works per position does not care which sequence a token is of: positions and block
tables say it. So the batch becomes one row (`one_row`), the step is made as for a contiguous cache (`_step_rewrite`),
and only the attentions and the inputs differ.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx

from irc.core.dims import new_dim
from irc.core.program import VAL, Program, is_size
from irc.passes.attention._sequence import Sequence
from irc.passes.attention._step_rewrite import ATEN, StepRewrite, free_name

_ARGUMENTS = ("mask", "window", "scale", "softcap", "sinks")


def one_row(program: Program, sequence: Sequence) -> None:
    """Fix the batch of a program to 1, in place, and call its sequence N: a step's number of tokens."""
    dim = sequence.dim
    name = free_name("N", {n: d for n, d in program.dims.items() if n != dim.name})
    dims = {n: d for n, d in program.dims.items() if n != dim.name}
    if sequence.batch is not None:
        dims.pop(sequence.batch.name)
    program.dims = {name: dataclasses.replace(dim, name=name, minimum=1, maximum=None), **dims}
    tokens = sequence.tokens
    if sequence.batch is None:
        return
    shape: list[Any] = list(tokens.meta[VAL].shape)
    shape[sequence.batch_axis] = 1
    with program.fake_mode:
        tokens.meta[VAL] = torch.empty(shape, dtype=tokens.meta[VAL].dtype, device=tokens.meta[VAL].device)
    for node in list(program.graph.nodes):
        if node.op != "call_function":
            continue
        program.infer_type(node)
        value = node.meta[VAL]
        if is_size(node) and isinstance(value, (int, float, bool)):
            _replace_by_number(node, value)


def _replace_by_number(node: fx.Node, value: float) -> None:
    def number(used: fx.Node) -> Any:
        return value if used is node else used

    for user in list(node.users):
        user.args, user.kwargs = fx.map_arg((user.args, dict(user.kwargs)), number)
    node.graph.erase_node(node)


@dataclass
class PagedRewrite(StepRewrite):
    """Edits a program of one row into a step over flat tokens and pages, in place."""

    block_size: int = 16

    def run(self) -> None:
        super().run()
        program = self.program
        for node in (self.analysis.sequence.tokens, self.positions, self.logit_indices):
            self._flatten(node, self.analysis.sequence.axis if node is self.analysis.sequence.tokens else 1)
        logits, *caches = program.outputs
        wanted = program.shape_expr(self.logit_indices)[0]
        at = program.shape_expr(logits).index(wanted)
        with program.graph.inserting_before(program.output_node):
            flat = program.insert(ATEN.squeeze.dim, logits, 1 - at, before=program.output_node)
        program.output_node.args = ((flat, *caches),)
        program.infer_types()

    def _cache_inputs(self) -> None:
        program = self.program
        sizes = {}
        for name, hint in (("Q", 2), ("M", 3), ("K", 8)):
            dim = new_dim(program.fake_mode, free_name(name, program.dims), hint)
            program.dims[dim.name] = dim
            sizes[name] = dim.size
        count = self.analysis.sequence.dim.size
        wanted = self.logit_indices
        self.sequence_ids = self._placeholder("sequence_ids", [count], torch.int64, before=wanted)
        self.block_tables = self._placeholder("block_tables", [sizes["Q"], sizes["M"]], torch.int64, before=wanted)
        self.slots = self._placeholder("slots", [count], torch.int64, before=wanted)
        for index, node in enumerate(self.analysis.attentions):
            for kind, operand in zip("kv", node.args[1:3], strict=True):
                value = operand.meta[VAL]
                shape = [sizes["K"], self.block_size, int(value.shape[1]), int(value.shape[3])]
                self.caches.append(self._placeholder(f"cache_{kind}_{index}", shape, self.cache_dtype or value.dtype))
                self.heads.append((shape[2], shape[3]))

    def _cache_attention(self, node: fx.Node, index: int) -> None:
        pages = []
        for slot, operand in enumerate(node.args[1:3], start=2 * index):
            assert isinstance(operand, fx.Node)
            rows = self._by_token(operand, node)
            new = self.program.insert(
                torch.ops.irc.paged_cache_write.default, self.caches[slot], rows, self.slots, before=node
            )
            self.updated.append(new)
            pages.append(self.read_back(new, operand, node))
        kwargs = {key: node.kwargs[key] for key in _ARGUMENTS if node.kwargs.get(key) is not None}
        kwargs.setdefault("mask", "full")
        bias = self._bias(node, kwargs)
        if bias is not None:
            kwargs["bias"] = self._bias_by_token(bias, node)
        query = node.args[0]
        assert isinstance(query, fx.Node)
        made = self.program.insert(
            torch.ops.irc.paged_attention.default, self._by_token(query, node), *pages, self.block_tables,
            self.sequence_ids, self._flat_positions(node), before=node, **kwargs,
        )  # fmt: skip
        turned = self.program.insert(ATEN.transpose.int, made, 0, 1, before=node)
        result = self.program.insert(ATEN.unsqueeze.default, turned, 0, before=node)
        self._cut_moves(node, result)
        self.program.replace(node, result)

    def _by_token(self, node: fx.Node, before: fx.Node) -> fx.Node:
        """[1, H, N, D] → [N, H, D]."""
        row = self.program.insert(ATEN.squeeze.dim, node, 0, before=before)
        return self.program.insert(ATEN.transpose.int, row, 0, 1, before=before)

    def _bias_by_token(self, bias: fx.Node, before: fx.Node) -> fx.Node:
        """[1, H|1, N|1, L] → [N|1, H|1, L]."""
        return self._by_token(bias, before)

    def _flat_positions(self, before: fx.Node) -> fx.Node:
        if "flat positions" not in self._gathered:
            first = next(n for n in self.program.graph.nodes if n.op != "placeholder")
            self._gathered["flat positions"] = self.program.insert(ATEN.squeeze.dim, self.positions, 0, before=first)
        return self._gathered["flat positions"]

    def _flatten(self, node: fx.Node, axis: int) -> None:
        """An input [1, X] (or [X, 1]) becomes [X]."""
        program, users = self.program, list(node.users)
        with program.fake_mode:
            value = node.meta[VAL]
            node.meta[VAL] = torch.empty([value.shape[axis]], dtype=value.dtype, device=value.device)
        first = next(n for n in program.graph.nodes if n.op != "placeholder")
        row: fx.Node | None = None
        for user in users:
            if user.target is ATEN.sym_size.int:
                user.args = (node, 0)
            elif user.target is ATEN.squeeze.dim and user.args[0] is node:
                program.replace(user, node)
            else:
                if row is None:
                    row = program.insert(ATEN.unsqueeze.default, node, 1 - axis, before=first)
                user.replace_input_with(node, row)
