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
from irc.runtime.sampling import Row, adjusted_logits, draw, kept_probabilities, uniforms
from irc.runtime.speculation.speculation import Proposal
from irc.runtime.speculation.verification import PROPOSE

_DEFAULT_MEMORY = 1 << 28


@dataclass
class _State:
    """What the draft model has in its pages for one sequence: keys and values of `tokens`."""

    tokens: list[int] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)


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
        for depth in range(max((lengths[i] for i in able), default=0)):
            active = [i for i in able if lengths[i] > depth]
            logits = self._step([(sequences[i], made[i].tokens) for i in active])
            for i, token, probabilities in self._chosen(active, sequences, made, logits):
                made[i].tokens.append(token)
                if probabilities is not None:
                    drawn[i].append(probabilities)
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

    def _step(self, rows: Sequence[tuple[SequenceState, list[int]]]) -> Tensor:
        """Logits behind each sequence and its draft so far; what the pages lack is computed."""
        states = [self._states[sequence] for sequence, _ in rows]
        new = [[*s.ids, *draft][len(state.tokens) :] for (s, draft), state in zip(rows, states, strict=True)]
        width, size = max(len(state.blocks) for state in states), self._model.block_size
        tables = np.array([state.blocks + [0] * (width - len(state.blocks)) for state in states], dtype=np.int64)
        counts = [len(tokens) for tokens in new]
        sequence_ids = np.repeat(np.arange(len(rows), dtype=np.int64), counts)
        positions = np.array(
            [len(s.tokens) + i for s, count in zip(states, counts, strict=True) for i in range(count)], dtype=np.int64
        )
        slots = tables[sequence_ids, positions // size] * size + positions % size
        tokens = np.array([token for row in new for token in row], dtype=np.int64)
        wanted = np.cumsum(counts, dtype=np.int64) - 1
        inputs = StepInputs(*map(torch.from_numpy, (tokens, positions, sequence_ids, tables, slots, wanted)))
        logits = self._model.paged_step(self._pages, inputs)
        for state, row in zip(states, new, strict=True):
            state.tokens += row
        return logits

    def _chosen(
        self, active: Sequence[int], sequences: Sequence[SequenceState], made: Sequence[Proposal], logits: Tensor
    ) -> list[tuple[int, int, Tensor | None]]:
        """(sequence, next token, the probabilities it was drawn from) for each active sequence."""
        chosen = [sequences[i] for i in active]
        if all(s.request.sampling.plain for s in chosen):
            return [(i, token, None) for i, token in zip(active, logits.argmax(-1).tolist(), strict=True)]
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
