"""The program before cache insertion, replayed by steps of the program after it: what verification compares."""

from __future__ import annotations

import abc
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor

from irc.core.errors import PassError
from irc.core.evaluate import Observer, evaluate
from irc.core.kv_cache import KVCache
from irc.core.paged import StepInputs, tables_in_order
from irc.core.program import Program
from irc.passes.attention._sequence import Sequence as TokenSequence

_NUM_SINGLE_STEPS = 3


@dataclass(frozen=True)
class Axes:
    """Where batch and sequence are in the tokens and in the logits of the program before."""

    tokens_batch: int
    tokens_sequence: int
    logits_batch: int | None
    logits_sequence: int | None
    rank: int

    @staticmethod
    def of(program: Program, sequence: TokenSequence) -> Axes:
        """Read from the types; None where the logits have no such dimension."""
        shape = program.shape_expr(program.outputs[0])
        along = [i for i, size in enumerate(shape) if size == sequence.symbol]
        batch = [i for i, size in enumerate(shape) if size == sequence.batch_expr]
        return Axes(
            sequence.batch_axis, sequence.axis, batch[0] if batch else None, along[0] if along else None, len(shape)
        )

    def require_three(self, program: Program) -> None:
        """Raise unless the logits have batch, sequence and vocabulary.

        Raises:
            PassError: they do not.
        """
        if self.rank != 3 or self.logits_batch is None or self.logits_sequence is None:
            shape = ", ".join(map(str, program.shape_expr(program.outputs[0])))
            raise PassError(f"its logits are [{shape}]; layout=paged takes batch, sequence and vocabulary")


@dataclass(frozen=True)
class Steps(abc.ABC):
    """Runs a step program over parts of whole sequences: half at once, a few tokens one by one, the rest at once."""

    axes: Axes

    @abc.abstractmethod
    def example(self, step: Program, tokens: Tensor) -> tuple[Tensor, ...]:
        """A first step on the example's tokens: positions from zero, empty caches, logits of the last two."""

    @abc.abstractmethod
    def replay(self, step: Program, tokens: Tensor, observer: Observer | None = None) -> Tensor:
        """Logits of all tokens, as the program before gives them."""

    @abc.abstractmethod
    def trace(self, step: Program, tokens: Tensor, observer: Observer) -> None:
        """Show the values of the replay's steps joined along the tokens: what one run of the old program had."""

    def parts(self, step: Program, tokens: Tensor) -> Iterator[tuple[int, int]]:
        """First and last position (exclusive) of each part."""
        length, limit = tokens.shape[self.axes.tokens_sequence], cache_of(step).max_length
        if length > limit:
            raise PassError(f"the inputs have {length} tokens, the cache holds {limit}")
        start = max(length // 2, 1)
        singles = min(_NUM_SINGLE_STEPS, length - start)
        return itertools.pairwise(sorted({0, *range(start, start + singles + 1), length}))


class ContiguousSteps(Steps):
    """Steps over rows of a contiguous cache."""

    def example(self, step: Program, tokens: Tensor) -> tuple[Tensor, ...]:
        batch, length = tokens.shape[self.axes.tokens_batch], tokens.shape[self.axes.tokens_sequence]
        positions = torch.arange(length, device=tokens.device).expand(batch, -1).clone()
        caches = cache_of(step).empty(batch, device=tokens.device)
        return (tokens, positions, positions[:, max(length - 2, 0) :].clone(), *caches)

    def replay(self, step: Program, tokens: Tensor, observer: Observer | None = None) -> Tensor:
        batch = tokens.shape[self.axes.tokens_batch]
        caches = cache_of(step).empty(batch, device=tokens.device)
        logits = []
        for first, last in self.parts(step, tokens):
            count = last - first
            positions = torch.arange(first, last, device=tokens.device).expand(batch, -1).contiguous()
            wanted = torch.arange(count, device=tokens.device).expand(batch, -1).contiguous()
            inputs = (tokens.narrow(self.axes.tokens_sequence, first, count), positions, wanted, *caches)
            part, *caches = evaluate(step.graph, step.weight, inputs, observer)
            logits.append(part)
        return torch.cat(logits, dim=_wanted_dim(step))

    def trace(self, step: Program, tokens: Tensor, observer: Observer) -> None:
        parts: dict[fx.Node, list[Any]] = {}
        self.replay(step, tokens, lambda n, value: parts.setdefault(n, []).append(value))
        lengths = {step.shape_expr(node)[1] for node in step.placeholders[1:3]}
        for node, values in parts.items():
            if not isinstance(values[0], Tensor):
                continue  # a step's own sizes: those of the whole are other numbers
            shape = step.shape_expr(node)
            along = [dim for dim, size in enumerate(shape) if size in lengths]
            observer(node, torch.cat(values, dim=along[0]) if len(along) == 1 else values[-1])


class PagedSteps(Steps):
    """Steps over flat tokens of all rows, whose blocks lie in mixed order."""

    def example(self, step: Program, tokens: Tensor) -> tuple[Tensor, ...]:
        rows = self._rows(tokens)
        tables, caches = self._pages(step, rows)
        last = torch.arange(rows.shape[0], device=rows.device) * rows.shape[1] + rows.shape[1] - 1
        wanted = torch.cat(((last - 1).clamp(min=0), last))
        return (*StepInputs.of_rows(rows, 0, tables, _block_size(step), wanted).flat(), *caches)

    def replay(self, step: Program, tokens: Tensor, observer: Observer | None = None) -> Tensor:
        rows, logits = self._rows(tokens), []
        tables, caches = self._pages(step, rows)
        for first, last in self.parts(step, tokens):
            inputs = StepInputs.of_rows(rows[:, first:last], first, tables, _block_size(step))
            part, *caches = evaluate(step.graph, step.weight, (*inputs.flat(), *caches), observer)
            logits.append(part.unflatten(0, (rows.shape[0], -1)))
        joined = torch.cat(logits, dim=1)
        first_is_batch = self.axes.logits_batch == 0
        return joined if first_is_batch else joined.transpose(0, 1)

    def trace(self, step: Program, tokens: Tensor, observer: Observer) -> None:
        """Values of flat tokens [1, …, N, …] are shown as those of rows [B, …, S, …]."""
        parts: dict[fx.Node, list[Any]] = {}
        self.replay(step, tokens, lambda n, value: parts.setdefault(n, []).append(value))
        batch = self._rows(tokens).shape[0]
        lengths = {step.shape_expr(step.placeholders[i])[0] for i in (0, 5)}
        for node, values in parts.items():
            if not isinstance(values[0], Tensor):
                continue
            shape = step.shape_expr(node)
            along = [dim for dim, size in enumerate(shape) if size in lengths]
            if len(along) != 1:
                observer(node, values[-1])
                continue
            dim = along[0]
            joined = torch.cat([value.unflatten(dim, (batch, -1)) for value in values], dim=dim + 1)
            unit = next((i for i, size in enumerate(shape) if size == 1), None)
            if unit is not None:  # the dimension that held the batch
                joined = joined.movedim(dim, unit).squeeze(unit + 1) if unit < dim else joined.squeeze(unit + 1)
            observer(node, joined)

    def _rows(self, tokens: Tensor) -> Tensor:
        return tokens if self.axes.tokens_batch == 0 else tokens.transpose(0, 1)

    def _pages(self, step: Program, rows: Tensor) -> tuple[Tensor, list[Tensor]]:
        tables = tables_in_order(rows.shape[0], rows.shape[1], _block_size(step), rows.device)
        mixed = (tables.numel() - 1 - tables).contiguous()
        return mixed, cache_of(step).empty(tables.numel(), device=rows.device)


def cache_of(program: Program) -> KVCache:
    """The cache that insertion described."""
    cache = KVCache.of(program)
    assert cache is not None
    return cache


def _block_size(step: Program) -> int:
    size = cache_of(step).block_size
    assert size is not None
    return size


def _wanted_dim(step: Program) -> int:
    """Which dimension of the logits holds the wanted tokens."""
    wanted = step.shape_expr(step.placeholders[2])[1]
    return step.shape_expr(step.outputs[0]).index(wanted)
