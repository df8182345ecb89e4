"""From logits to tokens for all sequences of a step, with and without drafts, in one vectorised pass."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from irc.runtime.requests import SequenceState
from irc.runtime.sampling import Row, adjusted_logits, draw, kept_probabilities, uniforms
from irc.runtime.speculation.acceptance import accept, accept_greedy

ACCEPT, PROPOSE = 1, 2
"""Purposes of random numbers besides drawing from the target (0)."""


def verified(
    logits: Tensor, sequences: Sequence[SequenceState], allowed: Sequence[Sequence[Tensor | None]]
) -> list[list[int]]:
    """The tokens that follow each sequence: its draft's that stand, and one more.

    `allowed`: for each sequence the masks of its rows (`Constraint.masks`).

    Shapes: logits [R, V]: for each sequence one row behind its last token and one behind each draft token.
    """
    rows = [row for s, masks in zip(sequences, allowed, strict=True) for row in _rows(s, masks)]
    adjusted = adjusted_logits(logits, rows)
    best = adjusted.argmax(-1)
    drawn = [i for i, row in enumerate(rows) if not row.sampling.greedy]
    probabilities, place = adjusted, dict[int, int]()
    if drawn:
        probabilities = kept_probabilities(adjusted[drawn], [rows[i].sampling for i in drawn])
        place = {row: i for i, row in enumerate(drawn)}
        numbers = uniforms([rows[i].key for i in drawn], [rows[i].position for i in drawn])
        best[drawn] = draw(probabilities, numbers)
    tokens, made, first = best.tolist(), [], 0
    for sequence, masks in zip(sequences, allowed, strict=True):
        count = len(masks)  # a request that has just failed has no draft any more, but rows it still has
        if sequence.request.sampling.greedy or count == 1:
            made.append(accept_greedy(sequence.draft, tokens[first : first + count]))
        else:
            start = place[first]
            made.append(_accepted(sequence, probabilities[start : start + count]))
        first += count
    return made


def _rows(sequence: SequenceState, allowed: Sequence[Tensor | None]) -> list[Row]:
    sampling = sequence.request.sampling
    length, ids = len(sequence.ids), sequence.ids
    made = []
    for index in range(len(allowed)):
        before = [*ids, *sequence.draft[:index]] if sampling.penalizes else ()
        made.append(Row(sampling, sequence.key, length + index, before, sequence.prompt_length, allowed[index]))
    return made


def _accepted(sequence: SequenceState, target: Tensor) -> list[int]:
    positions = [len(sequence.ids) + i for i in range(len(sequence.draft) + 1)]
    keys = [sequence.key] * len(positions)
    return accept(
        sequence.draft, target, sequence.draft_probs, uniforms(keys, positions, ACCEPT), uniforms(keys, positions)
    )
