"""From logits to tokens for all sequences of a step, with and without drafts, in one vectorised pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from torch import Tensor

from irc.runtime.requests import SequenceState
from irc.runtime.sampling import Row, adjusted_logits, draw, kept_probabilities, uniforms
from irc.runtime.speculation.acceptance import follow, follow_greedy

ACCEPT, PROPOSE, MOST_PURPOSES = 1, 2, 3
"""Purposes of random numbers besides drawing from the target (0); the n-th of several tries adds n · MOST_PURPOSES."""


@dataclass(frozen=True, slots=True)
class Path:
    """One way in which a sequence may go on: the sequence with its draft, or a branch of it.

    Attributes:
        row: of the logits behind its last token; those behind its draft tokens follow.
    """

    sequence: SequenceState
    row: int


def verified(
    logits: Tensor, paths: Sequence[Sequence[Path]], allowed: Sequence[Sequence[Sequence[Tensor | None]]]
) -> list[tuple[list[int], int]]:
    """For each sequence the guessed tokens that stand with one more, and which of its paths they follow.

    Args:
        logits: [R, V].
        paths: of each sequence, its own draft first.
        allowed: for each path the masks of its rows (`Constraint.masks`).
    """
    flat = [(path, masks) for found, wanted in zip(paths, allowed, strict=True)
            for path, masks in zip(found, wanted, strict=True)]  # fmt: skip
    rows = [row for path, masks in flat for row in _rows(path.sequence, masks)]
    places = [path.row + i for path, masks in flat for i in range(len(masks))]
    whole = len(places) == len(logits) and places == list(range(len(places)))
    adjusted = adjusted_logits(logits if whole else logits[places], rows)
    best = adjusted.argmax(-1)
    drawn = [i for i, row in enumerate(rows) if not row.sampling.greedy]
    probabilities, place = adjusted, dict[int, int]()
    if drawn:
        probabilities = kept_probabilities(adjusted[drawn], [rows[i].sampling for i in drawn])
        place = {row: i for i, row in enumerate(drawn)}
        numbers = uniforms([rows[i].key for i in drawn], [rows[i].position for i in drawn])
        best[drawn] = draw(probabilities, numbers)
    tokens, made, first = best.tolist(), [], 0
    for found, wanted in zip(paths, allowed, strict=True):
        # A request that has just failed has no draft any more, but rows it still has.
        drafts = [path.sequence.draft for path in found]
        starts = list(accumulate((len(masks) for masks in wanted), initial=first))
        first = starts.pop()
        sequence = found[0].sequence
        if sequence.request.sampling.greedy or (len(found) == 1 and not drafts[0]):
            made.append(follow_greedy(drafts, [tokens[at:] for at in starts]))
        else:
            targets = [probabilities[place[at] : place[at] + len(draft) + 1]
                       for at, draft in zip(starts, drafts, strict=True)]  # fmt: skip
            made.append(_followed(sequence, [path.sequence for path in found], targets))
    return made


def _rows(sequence: SequenceState, allowed: Sequence[Tensor | None]) -> list[Row]:
    sampling = sequence.request.sampling
    length, ids = len(sequence.ids), sequence.ids
    made = []
    for index in range(len(allowed)):
        before = [*ids, *sequence.draft[:index]] if sampling.penalizes else ()
        made.append(Row(sampling, sequence.key, length + index, before, sequence.prompt_length, allowed[index]))
    return made


def _followed(
    sequence: SequenceState, paths: Sequence[SequenceState], targets: Sequence[Tensor]
) -> tuple[list[int], int]:
    positions = [len(sequence.ids) + i for i in range(max(len(path.draft) for path in paths) + 1)]
    keys = [sequence.key] * len(positions)
    return follow(
        [path.draft for path in paths], targets, [path.draft_probs for path in paths],
        [uniforms(keys, positions, ACCEPT + MOST_PURPOSES * turn) for turn in range(len(paths))],
        uniforms(keys, positions),
    )  # fmt: skip
