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
from irc.runtime.requests import Proposal, SequenceState
from irc.runtime.sampling import Row, adjusted_logits, draw, kept_probabilities, likeliest, uniforms
from irc.runtime.speculation.verification import MOST_PURPOSES, PROPOSE
from irc.runtime.step_inputs import slots_of, wide

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
        most = max(len(state.blocks) for state in states)
        width = wide(most, most + 7)
        self._tables = np.array([s.blocks + [0] * (width - len(s.blocks)) for s in states], dtype=np.int64)
        self._order = np.arange(len(states), dtype=np.int64)
        self._tokens, self._at, self._slots = (np.zeros(len(states), dtype=np.int64) for _ in range(3))
        tokens, at, order, tables, slots = map(
            torch.from_numpy, (self._tokens, self._at, self._order, self._tables, self._slots)
        )
        self._inputs = StepInputs(tokens, at, order, tables, slots, order)

    def catching_up(self, new: Sequence[Sequence[int]]) -> StepInputs:
        """A step over the tokens that each sequence's pages lack; the last one's logits are wanted."""
        counts = [len(tokens) for tokens in new]
        starts = [len(state.tokens) for state in self.states]
        self._at[:] = [start + count - 1 for start, count in zip(starts, counts, strict=True)]
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
        self._at += 1
        return self._decoding(tokens)

    def _decoding(self, tokens: Sequence[int]) -> StepInputs:
        """The same tensors in every step, with what is new written into them."""
        size = self._block_size
        self._tokens[:] = tokens
        places = [divmod(at, size) for at in self._at.tolist()]
        self._slots[:] = [
            state.blocks[block] * size + offset for state, (block, offset) in zip(self.states, places, strict=True)
        ]
        return self._inputs


class DraftModelProposer:
    """Proposes what the draft model would say: its likeliest tokens, or drawn from it where the request samples.

    A sequence for which there is no memory gets no draft.

    Args:
        siblings: how many further tokens are guessed beside the first one of a draft, beside the second one, and so on;
            each is a branch that ends with it.
    """

    def __init__(
        self, draft: PagedModel, target: PagedModel, *, memory_bytes: int | None = None, siblings: Sequence[int] = ()
    ) -> None:
        if draft.vocabulary_size != target.vocabulary_size:
            raise OptionError(
                f"the draft model has {draft.vocabulary_size} tokens, the model {target.vocabulary_size}:"
                " both must read the same ids"
            )
        if any(count < 0 for count in siblings):
            raise OptionError(f"siblings are numbers of tokens, not {list(siblings)}")
        self._model, self._siblings = draft, tuple(siblings)
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
        made: list[list[int]] = [[] for _ in sequences]
        able = [i for i, s in enumerate(sequences) if self._prepare(s, lengths[i])]
        drawn: dict[int, list[Tensor]] = {i: [] for i in able if not sequences[i].request.sampling.greedy}
        others: dict[int, list[list[int]]] = {i: [] for i in able}
        active = [i for i in able if lengths[i] > 0]
        rows: _Rows | None = None
        while active:
            if rows is None or len(rows.states) != len(active):
                rows = _Rows([self._states[sequences[i]] for i in active], self._model.block_size)
                new = [[*sequences[i].ids, *made[i]][len(self._states[sequences[i]].tokens) :] for i in active]
                inputs = rows.catching_up(new)
            else:
                new = [made[i][-1:] for i in active]
                inputs = rows.one_more([row[0] for row in new])
            logits = self._model.paged_step(self._pages, inputs)
            for state, row in zip(rows.states, new, strict=True):
                state.tokens += row
            for i, tokens, probabilities in self._chosen(active, sequences, made, logits):
                others[i] += [[*made[i], token] for token in tokens[1:]]
                made[i].append(tokens[0])
                if probabilities is not None:
                    drawn[i].append(probabilities)
            active = [i for i in active if lengths[i] > len(made[i])]
        return [_proposal(made[i], others.get(i, []), drawn.get(i)) for i in range(len(sequences))]

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
        self, active: Sequence[int], sequences: Sequence[SequenceState], made: Sequence[list[int]], logits: Tensor
    ) -> list[tuple[int, list[int], Tensor | None]]:
        """(sequence, next token and its siblings, the probabilities they were drawn from) for each active sequence."""
        chosen = [sequences[i] for i in active]
        depths = [len(made[i]) for i in active]
        counts = [1 + self._siblings[depth] if depth < len(self._siblings) else 1 for depth in depths]
        if all(s.request.sampling.plain for s in chosen):
            if max(counts) == 1:
                return [(i, [token], None) for i, token in zip(active, likeliest(logits), strict=True)]
            found = logits.float().topk(max(counts)).indices.tolist()
            return [(i, tokens[:count], None) for i, tokens, count in zip(active, found, counts, strict=True)]
        rows = []
        for i, sequence in zip(active, chosen, strict=True):
            ids = [*sequence.ids, *made[i]]
            rows.append(Row(sequence.request.sampling, sequence.key, len(ids), ids, sequence.prompt_length))
        adjusted = adjusted_logits(logits, rows)
        tokens = adjusted.topk(max(counts)).indices
        drawn = [n for n, row in enumerate(rows) if not row.sampling.greedy]
        probabilities: dict[int, Tensor] = {}
        if drawn:
            kept = kept_probabilities(adjusted[drawn], [rows[n].sampling for n in drawn])
            tokens[drawn] = _drawn(kept, [rows[n] for n in drawn], max(counts))
            probabilities = dict(zip(drawn, kept, strict=True))
        made_tokens = tokens.tolist()
        return [(i, _known(made_tokens[n][: counts[n]]), probabilities.get(n)) for n, i in enumerate(active)]


def _drawn(kept: Tensor, rows: Sequence[Row], count: int) -> Tensor:
    """Tokens drawn one after the other, each without those before: i64[R, count]; -1 where none is left."""
    left, columns = kept.clone(), list[Tensor]()
    for turn in range(count):
        purpose = PROPOSE + MOST_PURPOSES * turn
        numbers = uniforms([row.key for row in rows], [row.position for row in rows], purpose)
        none = left.sum(-1) <= 0.0
        column = draw(left, numbers)
        left.scatter_(-1, column.unsqueeze(-1), 0.0)
        columns.append(column.masked_fill(none, -1))
    return torch.stack(columns, -1)


def _known(tokens: Sequence[int]) -> list[int]:
    return [token for token in tokens if token >= 0]


def _proposal(tokens: list[int], others: Sequence[list[int]], drawn: Sequence[Tensor] | None) -> Proposal:
    """A draft with branches that end beside one of its tokens."""
    probabilities = torch.stack(list(drawn)) if drawn else None
    branches = [Proposal(path, None if probabilities is None else probabilities[: len(path)]) for path in others]
    return Proposal(tokens, probabilities, tuple(branches))
