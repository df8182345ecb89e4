"""Drafts from a smaller model: it decodes a few tokens ahead of each sequence, over pages of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from irc.core.errors import OptionError
from irc.core.paged import PagedModel, StepInputs
from irc.runtime.block_manager import BlockManager
from irc.runtime.requests import SequenceState
from irc.runtime.sampling import Row, adjusted_logits, draw, kept_probabilities, likeliest, uniforms
from irc.runtime.speculation.speculation import Proposal
from irc.runtime.speculation.verification import PROPOSE
from irc.runtime.step_inputs import decoding_inputs, slots_of

_DEFAULT_MEMORY = 1 << 28


@dataclass
class _State:
    """What the draft model has in its pages for one sequence: keys and values of `tokens`."""

    tokens: list[int] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)


class _Rows:
    """The sequences that the draft model decodes together, as inputs of its steps."""

    def __init__(self, states: Sequence[_State], block_size: int) -> None:
        self.states, self._block_size = states, block_size
        width = max(len(state.blocks) for state in states)
        self._tables = np.array([s.blocks + [0] * (width - len(s.blocks)) for s in states], dtype=np.int64)
        self._order = np.arange(len(states), dtype=np.int64)
        self._at = np.zeros(len(states), dtype=np.int64)

    def catching_up(self, new: Sequence[Sequence[int]]) -> StepInputs:
        """A step over the tokens that each sequence's pages lack; the last one's logits are wanted."""
        counts = [len(tokens) for tokens in new]
        starts = [len(state.tokens) for state in self.states]
        self._at = np.array(starts, dtype=np.int64) + counts - 1
        if len(new) == sum(counts):
            return self._decoding([tokens[0] for tokens in new])
        sequence_ids = np.repeat(self._order, counts)
        positions = [start + i for start, count in zip(starts, counts, strict=True) for i in range(count)]
        at = np.array(positions, dtype=np.int64)
        slots = slots_of(self._tables, sequence_ids, at, self._block_size)
        tokens = np.array([token for row in new for token in row], dtype=np.int64)
        wanted = np.cumsum(counts, dtype=np.int64) - 1
        return StepInputs(*map(torch.from_numpy, (tokens, at, sequence_ids, self._tables, slots, wanted)))

    def one_more(self, tokens: Sequence[int]) -> StepInputs:
        """The step behind the last one, over one token of each sequence."""
        self._at = self._at + 1
        return self._decoding(tokens)

    def _decoding(self, tokens: Sequence[int]) -> StepInputs:
        return decoding_inputs(np.array(tokens, dtype=np.int64), self._at, self._order, self._tables, self._block_size)


class DraftModelProposer:
    """Proposes what the draft model would say: its likeliest tokens, or drawn from it where the request samples.

    A sequence for which there is no memory gets no draft.
    """

    def __init__(self, draft: PagedModel, target: PagedModel, *, memory_bytes: int | None = None) -> None:
        if draft.vocabulary_size != target.vocabulary_size:
            raise OptionError(
                f"the draft model has {draft.vocabulary_size} tokens, the model {target.vocabulary_size}:"
                " both must read the same ids"
            )
        self._model = draft
        per_sequence = -(-draft.max_length // draft.block_size)
        count = max((memory_bytes or _DEFAULT_MEMORY) // draft.block_bytes, 1)
        if memory_bytes is None:
            count = min(count, 64 * per_sequence)
        self.blocks = BlockManager(count, draft.block_size, prefix_cache=False)
        self._pages = draft.new_pages(count)
        self._states: dict[SequenceState, _State] = {}

    def forget(self, sequence: SequenceState) -> None:
        state = self._states.pop(sequence, None)
        if state is not None:
            self.blocks.release(state.blocks)

    def propose(self, sequences: Sequence[SequenceState], lengths: Sequence[int]) -> list[Proposal]:
        made = [Proposal([]) for _ in sequences]
        able = [i for i, s in enumerate(sequences) if self._prepare(s, lengths[i])]
        drawn: dict[int, list[Tensor]] = {i: [] for i in able if not sequences[i].request.sampling.greedy}
        active = [i for i in able if lengths[i] > 0]
        rows: _Rows | None = None
        while active:
            if rows is None or len(rows.states) != len(active):
                rows = _Rows([self._states[sequences[i]] for i in active], self._model.block_size)
                new = [[*sequences[i].ids, *made[i].tokens][len(self._states[sequences[i]].tokens) :] for i in active]
                inputs = rows.catching_up(new)
            else:
                new = [made[i].tokens[-1:] for i in active]
                inputs = rows.one_more([row[0] for row in new])
            logits = self._model.paged_step(self._pages, inputs)
            for state, row in zip(rows.states, new, strict=True):
                state.tokens += row
            for i, token, probabilities in self._chosen(active, sequences, made, logits):
                made[i].tokens.append(token)
                if probabilities is not None:
                    drawn[i].append(probabilities)
            active = [i for i in active if lengths[i] > len(made[i].tokens)]
        return [Proposal(p.tokens, torch.stack(drawn[i]) if drawn.get(i) else None) for i, p in enumerate(made)]

    def _prepare(self, sequence: SequenceState, length: int) -> bool:
        """Drop what was guessed wrong, and get the blocks; False: no room."""
        state = self._states.setdefault(sequence, _State())
        ids, known = sequence.ids, state.tokens
        keep = min(len(known), len(ids) - 1)
        if known[:keep] != ids[:keep]:
            keep = next(i for i in range(keep) if known[i] != ids[i])
        del known[keep:]
        if len(ids) + length - 1 > self._model.max_length:
            return False
        missing = self.blocks.blocks_for(len(ids) + length - 1) - len(state.blocks)
        if missing > 0:
            found = self.blocks.allocate(missing)
            if found is None:
                return False
            state.blocks += found
        return True

    def _chosen(
        self, active: Sequence[int], sequences: Sequence[SequenceState], made: Sequence[Proposal], logits: Tensor
    ) -> list[tuple[int, int, Tensor | None]]:
        """(sequence, next token, the probabilities it was drawn from) for each active sequence."""
        chosen = [sequences[i] for i in active]
        if all(s.request.sampling.plain for s in chosen):
            return [(i, token, None) for i, token in zip(active, likeliest(logits), strict=True)]
        rows = []
        for i, sequence in zip(active, chosen, strict=True):
            ids = [*sequence.ids, *made[i].tokens]
            rows.append(Row(sequence.request.sampling, sequence.key, len(ids), ids, sequence.prompt_length))
        adjusted = adjusted_logits(logits, rows)
        best = adjusted.argmax(-1)
        drawn = [n for n, row in enumerate(rows) if not row.sampling.greedy]
        probabilities: dict[int, Tensor] = {}
        if drawn:
            kept = kept_probabilities(adjusted[drawn], [rows[n].sampling for n in drawn])
            numbers = uniforms([rows[n].key for n in drawn], [rows[n].position for n in drawn], PROPOSE)
            best[drawn] = draw(kept, numbers)
            probabilities = dict(zip(drawn, kept, strict=True))
        return [(i, int(best[n]), probabilities.get(n)) for n, i in enumerate(active)]
