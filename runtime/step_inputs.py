"""The model's inputs for the work of one step: flat tokens, positions, block tables, slots."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from irc.core.paged import StepInputs
from irc.runtime.requests import SequenceState
from irc.runtime.scheduler import Work


class StepBuilder:
    """Makes `StepInputs`. Keeps the block tables of all rows, and what stays the same while the same sequences decode.

    Args:
        num_rows: most sequences of a step; a sequence's row is `sequence.row`.
        blocks_per_sequence: most blocks of one.
    """

    def __init__(self, block_size: int, num_rows: int, blocks_per_sequence: int) -> None:
        self._block_size = block_size
        self._tables = np.zeros((num_rows, blocks_per_sequence), dtype=np.int64)
        self._decoding: list[SequenceState] = []
        self._order = np.arange(num_rows, dtype=np.int64)
        self._chosen_tables = np.zeros((0, 0), dtype=np.int64)

    def build(self, works: Sequence[Work]) -> StepInputs:
        """The step's inputs; logits are wanted behind the last token of `ids` and behind each draft token."""
        sequences = [work.sequence for work in works]
        moved = self._refresh(sequences)
        if all(work.count == 1 and len(work.sequence.ids) == work.sequence.num_computed + 1 for work in works):
            return self._decode(sequences, moved)
        self._decoding = []
        return self._mixed(works, sequences)

    def _refresh(self, sequences: Sequence[SequenceState]) -> bool:
        """Write the table rows of sequences whose blocks have changed; whether there were any."""
        moved = [sequence for sequence in sequences if sequence.moved]
        for sequence in moved:
            self._tables[sequence.row, : len(sequence.blocks)] = sequence.blocks
            sequence.moved = False
        return bool(moved)

    def _tables_of(self, sequences: Sequence[SequenceState]) -> np.ndarray:
        most = max([len(sequence.blocks) for sequence in sequences])
        found: np.ndarray = self._tables[[sequence.row for sequence in sequences], :most]
        return found

    def _decode(self, sequences: list[SequenceState], moved: bool) -> StepInputs:
        """One token of each sequence. This is nearly every step, so what did not change is not made again."""
        if moved or sequences != self._decoding:
            self._decoding, self._chosen_tables = sequences, self._tables_of(sequences)
        tokens = np.array([sequence.ids[-1] for sequence in sequences], dtype=np.int64)
        at = np.array([sequence.num_computed for sequence in sequences], dtype=np.int64)
        return decoding_inputs(tokens, at, self._order[: len(sequences)], self._chosen_tables, self._block_size)

    def _mixed(self, works: Sequence[Work], sequences: Sequence[SequenceState]) -> StepInputs:
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
        tables, at = self._tables_of(sequences), np.array(positions, dtype=np.int64)
        ids_of = np.repeat(self._order[: len(works)], [work.count for work in works])
        slots = slots_of(tables, ids_of, at, self._block_size)
        return StepInputs(*_tensors(np.array(tokens, np.int64), at, ids_of, tables, slots, np.array(wanted, np.int64)))


def decoding_inputs(
    tokens: np.ndarray, at: np.ndarray, order: np.ndarray, tables: np.ndarray, block_size: int
) -> StepInputs:
    """A step over one token of each of Q sequences, with the logits of all.

    Shapes: tokens, at (positions), order (0 … Q - 1) i64[Q]; tables i64[Q, M].
    """
    slots = slots_of(tables, order, at, block_size)
    flat, positions, rows, block_tables, writes = _tensors(tokens, at, order, tables, slots)
    return StepInputs(flat, positions, rows, block_tables, writes, rows)


def slots_of(tables: np.ndarray, sequence_ids: np.ndarray, at: np.ndarray, block_size: int) -> np.ndarray:
    """Where each token's keys and values go: i64[N]."""
    block, offset = np.divmod(at, block_size)
    found: np.ndarray = tables[sequence_ids, block] * block_size + offset
    return found


def _tensors(*arrays: np.ndarray) -> tuple[Tensor, ...]:
    return tuple(torch.from_numpy(array) for array in arrays)
