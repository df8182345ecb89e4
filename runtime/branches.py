"""Token trees: further ways in which a sequence may go on, verified beside its draft in the same step.

A branch is a path from the sequence's last token, as a row of its own: it shares the full blocks of the sequence, has a
copy of the one that is being filled, and computes the last token and its own guesses there. So every artifact with
a paged step verifies trees, its attention being that of sequences. Tokens that paths have in common are computed
once for each path: trees are for drafts that part early. Branches live for one step.

Source of the idea: Miao et al. 2023, "SpecInfer", https://arxiv.org/abs/2305.09781 (there by a mask within one row).
"""

from __future__ import annotations

import copy

from irc.runtime.block_manager import BlockManager
from irc.runtime.requests import SequenceState

MOST_ROWS = 16
"""Branches of all sequences of a step."""


class Branches:
    """The branches of the step that is being planned.

    Args:
        first_row: of the block tables, whose rows from there to first_row + MOST_ROWS are for branches.
    """

    def __init__(self, blocks: BlockManager, first_row: int) -> None:
        self._blocks = blocks
        self._rows = list(range(first_row, first_row + MOST_ROWS))
        self._of: dict[SequenceState, list[SequenceState]] = {}

    def of(self, sequence: SequenceState) -> list[SequenceState]:
        """The branches that a sequence has in this step, in the order of its guesses."""
        return self._of.get(sequence, [])

    def fork(self, sequence: SequenceState, budget: int) -> tuple[list[SequenceState], list[tuple[int, int]]]:
        """Rows for a sequence's branches, as far as budget, rows and blocks go: nobody gives way for them.

        Returns:
            The branches, and the (source, target) blocks that are to be copied for them.
        """
        found: list[SequenceState] = []
        copies: list[tuple[int, int]] = []
        full = sequence.num_computed // self._blocks.block_size
        partial = sequence.num_computed % self._blocks.block_size
        for guess in sequence.branches:
            count = 1 + len(guess.tokens)
            own = self._blocks.blocks_for(sequence.num_computed + count) - full
            if count > budget or not self._rows:
                break
            taken = self._blocks.allocate(own)
            if taken is None:
                break
            budget -= count
            shared = sequence.blocks[:full]
            self._blocks.share(shared)
            if partial:
                copies.append((sequence.blocks[full], taken[0]))
            branch = copy.copy(sequence)
            branch.blocks, branch.row, branch.moved = shared + taken, self._rows.pop(), True
            branch.draft, branch.draft_probs, branch.branches = guess.tokens, guess.probabilities, ()
            found.append(branch)
        if found:
            self._of[sequence] = found
        return found, copies

    def adopt(self, sequence: SequenceState, branch: SequenceState) -> None:
        """The branch was right: its blocks become the sequence's."""
        sequence.blocks, branch.blocks = branch.blocks, sequence.blocks
        sequence.moved = True

    def end(self) -> None:
        """The step is over: all branches go, with their blocks."""
        for branches in self._of.values():
            for branch in branches:
                self._blocks.release(branch.blocks)
                self._rows.append(branch.row)
        self._of.clear()
