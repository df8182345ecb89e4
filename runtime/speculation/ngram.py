"""Prompt lookup: what followed the last times that the latest n tokens stood there.

Source: Saxena 2023, "Prompt Lookup Decoding"; the index makes a look-up independent of the length.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from irc.runtime.requests import Proposal, SequenceState

_LOOKS = 8
"""How many earlier places are looked at for another way to go on."""


@dataclass
class _Index:
    """Where each n-gram ended last, for every n, and where it had ended before that; up to `length`."""

    length: int = 0
    ends: dict[tuple[int, ...], int] = field(default_factory=dict)
    earlier: dict[tuple[int, int], int] = field(default_factory=dict)  # (n, an end) → the end before it


@dataclass
class NgramProposer:
    """Looks for the longest suffix of `longest` to `shortest` tokens that occurred before.

    Attributes:
        branches: proposals besides the first one: what followed at earlier places, where that was something else.
    """

    longest: int = 4
    shortest: int = 2
    branches: int = 0
    _indices: dict[SequenceState, _Index] = field(default_factory=dict)

    def propose(self, sequences: Sequence[SequenceState], lengths: Sequence[int]) -> list[Proposal]:
        return [self._proposal(s, n) for s, n in zip(sequences, lengths, strict=True)]

    def forget(self, sequence: SequenceState) -> None:
        self._indices.pop(sequence, None)

    def _proposal(self, sequence: SequenceState, length: int) -> Proposal:
        ids, found = sequence.ids, dict[int, list[int]]()
        index = self._brought_up(sequence)
        for end in self._places(index, ids):
            if ids[end + 1] not in found:
                found[ids[end + 1]] = _continuation(ids, end, length)
                if len(found) > self.branches:
                    break
        if not found:
            return Proposal([])
        first, *others = found.values()
        return Proposal(first, branches=tuple(map(Proposal, others)))

    def _brought_up(self, sequence: SequenceState) -> _Index:
        """The index of all tokens but the last one, behind which nothing has followed yet."""
        ids = sequence.ids
        index = self._indices.setdefault(sequence, _Index())
        for end in range(index.length, len(ids) - 1):
            for n in range(self.shortest, self.longest + 1):
                if end + 1 >= n:
                    gram = tuple(ids[end + 1 - n : end + 1])
                    if self.branches and gram in index.ends:
                        index.earlier[n, end] = index.ends[gram]
                    index.ends[gram] = end
        index.length = max(index.length, len(ids) - 1)
        return index

    def _places(self, index: _Index, ids: Sequence[int]) -> Iterator[int]:
        """Ends of the longest suffixes, the latest first; then of shorter ones."""
        for n in range(self.longest, self.shortest - 1, -1):
            end = index.ends.get(tuple(ids[-n:])) if len(ids) >= n else None
            for _ in range(_LOOKS):
                if end is None:
                    break
                yield end
                end = index.earlier.get((n, end))


def _continuation(ids: Sequence[int], end: int, length: int) -> list[int]:
    found = list(ids[end + 1 : end + 1 + length])
    period = len(ids) - 1 - end
    while len(found) < length:  # the text repeats itself: go on as it would
        found.append(found[-period])
    return found
