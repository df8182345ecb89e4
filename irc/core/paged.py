"""The step that a serving engine drives: N flat tokens of any sequences, with positions and block tables.

This is the whole interface between the runtime and whatever computes logits. An artifact of a program with a paged
cache (`insert-kv-cache{layout=paged}`) offers it; the runtime wraps artifacts with other caches to offer it, too.

    pages = model.new_pages(num_blocks)
    logits = model.paged_step(pages, inputs)      # writes keys and values of the N tokens, then attends

A token is written before anything reads it: all N tokens' keys and values are in the pages when attention runs, and
each token sees the positions of its own sequence that its mask allows. Which block holds what, the engine knows alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class StepInputs:
    """One step's inputs, in the order in which a step program takes them (its caches follow).

    Q sequences take part with any number of tokens each. All are i64 and contiguous; P is the block size.

    Attributes:
        tokens: [N] token ids. Tokens of one sequence lie side by side, in order of position.
        positions: [N], absolute within the sequence, below the cache's max_length.
        sequence_ids: [N], non-decreasing, 0 ≤ id < Q: the row of `block_tables`.
        block_tables: [Q, M]; position p of sequence q is in block `block_tables[q, p // P]` at offset p % P. Entries
            behind a sequence's last block are any valid block.
        slots: [N], where each token's keys and values are written: block · P + offset. Negative: padding, not written
            (and its result is not used).
        logit_indices: [R], which of the N tokens' logits are wanted, in any order.
    """

    tokens: Tensor
    positions: Tensor
    sequence_ids: Tensor
    block_tables: Tensor
    slots: Tensor
    logit_indices: Tensor

    def flat(self) -> tuple[Tensor, ...]:
        """The inputs in order."""
        return self.tokens, self.positions, self.sequence_ids, self.block_tables, self.slots, self.logit_indices

    @staticmethod
    def of_rows(
        tokens: Tensor, first: int, block_tables: Tensor, block_size: int, logit_indices: Tensor | None = None
    ) -> StepInputs:
        """A batch whose rows all start at position `first`; logits of all tokens unless told otherwise.

        Shapes: tokens i64[B, S]; block_tables i64[B, M].
        """
        batch, count = tokens.shape
        device = tokens.device
        positions = torch.arange(first, first + count, device=device).repeat(batch)
        sequence_ids = torch.arange(batch, device=device).repeat_interleave(count)
        slots = block_tables[sequence_ids, positions // block_size] * block_size + positions % block_size
        wanted = torch.arange(batch * count, device=device) if logit_indices is None else logit_indices
        return StepInputs(tokens.reshape(-1), positions, sequence_ids, block_tables, slots, wanted)


NUM_STEP_INPUTS = 6


class PagedModel(Protocol):
    """What the engine drives.

    Attributes:
        block_size: P, tokens a block.
        block_bytes: bytes of one block in all caches of all layers.
        max_length: most positions that a sequence can have.
        vocabulary_size: V; token ids are below it.
        max_sequences: most sequences that can be in memory at once, or None.
        notice: what the user should know (a slow path, say), or an empty string.
    """

    block_size: int
    block_bytes: int
    max_length: int
    vocabulary_size: int
    max_sequences: int | None
    notice: str

    def new_pages(self, num_blocks: int) -> Any:
        """Memory of `num_blocks` blocks, opaque to the engine; what is in it does not matter."""

    def paged_step(self, pages: Any, inputs: StepInputs) -> Tensor:
        """Write the tokens' keys and values into `pages` and give logits [R, V] of the wanted ones, floating."""

    def copy_blocks(self, pages: Any, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copy whole blocks: copy-on-write, when sequences that share a block go apart."""


def tables_in_order(batch: int, length: int, block_size: int, device: torch.device | None = None) -> Tensor:
    """Block tables i64[batch, M] for sequences of up to `length` tokens that lie one behind the other."""
    blocks = -(-length // block_size)
    return torch.arange(batch * blocks, device=device).view(batch, blocks)
