"""The model's inputs for the work of one step: flat tokens, positions, block tables, slots."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from irc.core.paged import StepInputs
from irc.runtime.requests import SequenceState
from irc.runtime.scheduler import Work

_ONE = np.ones((), dtype=np.int64)


class StepBuilder:
    """Makes `StepInputs`. Keeps the block tables of all rows, and the inputs of sequences that go on decoding together.

    Args:
        num_rows: most sequences and branches of a step; a sequence's row is `sequence.row`.
        blocks_per_sequence: most blocks of one.
    """

    def __init__(self, block_size: int, num_rows: int, blocks_per_sequence: int) -> None:
        self._block_size = block_size
        self._tables = np.zeros((num_rows, blocks_per_sequence), dtype=np.int64)
        self._order = np.arange(num_rows, dtype=np.int64)
        self._together: _Together | None = None

    def build(self, works: Sequence[Work], crossed: Sequence[int] | None = None) -> StepInputs:
        """The step's inputs; logits are wanted behind the last token of `ids` and behind each draft token.

        They are good for this step: the next one's may be written over them.

        Args:
            crossed: given where the works are those of the step before, one token each: which of them begin a block.
        """
        together = self._together
        if crossed is not None and together is not None and together.follows(works, crossed):
            return together.inputs_for(crossed)
        sequences = [work.sequence for work in works]
        self._refresh(sequences)
        tables = self._tables_of(sequences)
        if all(work.count == 1 and len(work.sequence.ids) == work.sequence.num_computed + 1 for work in works):
            self._together = _Together(sequences, self._order[: len(sequences)], tables, self._block_size)
            return self._together.inputs_for()
        self._together = None
        return self._mixed(works, tables)

    def went_on(self, tokens: Sequence[int]) -> None:
        """Each of the last step's sequences, which decode together, has got one more token.

        Not needed, but here what it takes is still in the processor's caches; behind the next plan it is not.
        """
        if self._together is not None:
            self._together.forward(tokens)

    def _refresh(self, sequences: Sequence[SequenceState]) -> None:
        """Write the table rows of sequences whose blocks have changed."""
        for sequence in sequences:
            if sequence.moved:
                self._tables[sequence.row, : len(sequence.blocks)] = sequence.blocks
                sequence.moved = False

    def _tables_of(self, sequences: Sequence[SequenceState]) -> np.ndarray:
        most = wide(max([len(sequence.blocks) for sequence in sequences]), self._tables.shape[1])
        found: np.ndarray = self._tables[[sequence.row for sequence in sequences], :most]
        return found

    def _mixed(self, works: Sequence[Work], tables: np.ndarray) -> StepInputs:
        """Any number of tokens of each: parts of prompts, and drafts to verify."""
        tokens: list[int] = []
        positions: list[int] = []
        wanted: list[int] = []
        for work in works:
            ids, draft, start = work.sequence.ids, work.sequence.draft, work.sequence.num_computed
            stop = start + work.count
            tokens += ids[start:stop]
            tokens += draft[: max(stop - len(ids), 0)]
            positions += range(start, stop)
            if stop == len(ids) + len(draft):
                wanted += range(len(tokens) - 1 - len(draft), len(tokens))
        at = np.array(positions, dtype=np.int64)
        ids_of = np.repeat(self._order[: len(works)], [work.count for work in works])
        slots = slots_of(tables, ids_of, at, self._block_size)
        return StepInputs(*_tensors(np.array(tokens, np.int64), at, ids_of, tables, slots, np.array(wanted, np.int64)))


class _Together:
    """The inputs of sequences that decode together, one token each, brought forward from step to step.

    A step of a small model takes less than a millisecond; making six tensors anew is a tenth of that, for processors
    come back from a model's step with none of this in their caches.
    """

    def __init__(self, sequences: list[SequenceState], order: np.ndarray, tables: np.ndarray, block_size: int) -> None:
        self._sequences, self._block_size = sequences, block_size
        self._tokens = np.array([sequence.ids[-1] for sequence in sequences], dtype=np.int64)
        at = np.array([sequence.num_computed for sequence in sequences], dtype=np.int64)
        # One array of both, as a call of numpy's with nothing of it in the caches costs 20 µs.
        self._moving = np.stack([at, slots_of(tables, order, at, block_size)])
        at, self._slots = self._moving
        self._first_at, self._width = sequences[0].num_computed, tables.shape[1]
        self._tables = tables
        flat, positions, rows, block_tables, writes = _tensors(self._tokens, at, order, tables, self._slots)
        self._inputs = StepInputs(flat, positions, rows, block_tables, writes, rows)

    def follows(self, works: Sequence[Work], crossed: Sequence[int]) -> bool:
        """Whether works that are those of the step before are the ones of these inputs, with blocks that fit."""
        first = self._sequences[0]
        return (
            len(works) == len(self._sequences)
            and works[0].sequence is first
            and first.num_computed - self._first_at in (0, 1)  # brought forward, or to be
            and all(len(self._sequences[index].blocks) <= self._width for index in crossed)
        )

    def forward(self, tokens: Sequence[int]) -> None:
        """One token further, but for the sequences that begin a block with it."""
        self._first_at += 1
        np.add(self._moving, _ONE, out=self._moving)
        self._tokens[:] = tokens

    def inputs_for(self, crossed: Sequence[int] = ()) -> StepInputs:
        """The step's inputs; `crossed` begin a block."""
        if self._sequences[0].num_computed != self._first_at:
            self.forward([sequence.ids[-1] for sequence in self._sequences])
        for index in crossed:
            sequence = self._sequences[index]
            block = sequence.num_computed // self._block_size
            self._tables[index, : len(sequence.blocks)] = sequence.blocks
            self._slots[index] = sequence.blocks[block] * self._block_size
        return self._inputs


def wide(blocks: int, most: int) -> int:
    """Columns of a block table with so many blocks: rounded up, as targets work shapes out that they have not seen."""
    return min(-(-blocks // 8) * 8, most)


def slots_of(tables: np.ndarray, sequence_ids: np.ndarray, at: np.ndarray, block_size: int) -> np.ndarray:
    """Where each token's keys and values go: i64[N]."""
    block, offset = np.divmod(at, block_size)
    found: np.ndarray = tables[sequence_ids, block] * block_size + offset
    return found


def _tensors(*arrays: np.ndarray) -> tuple[Tensor, ...]:
    return tuple(torch.from_numpy(array) for array in arrays)
