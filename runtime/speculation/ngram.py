"""Prompt lookup: what followed the last time that the latest n tokens stood there.

Source: Saxena 2023, "Prompt Lookup Decoding"; the index makes a look-up independent of the length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from irc.runtime.requests import SequenceState
from irc.runtime.speculation.speculation import Proposal


@dataclass
class _Index:
    """Where each n-gram ended last, for every n; n-grams that end before `length` are in it."""

    length: int = 0
    ends: dict[tuple[int, ...], int] = field(default_factory=dict)


@dataclass
class NgramProposer:
    """Looks for the longest suffix of `longest` to `shortest` tokens that occurred before."""

    longest: int = 4
    shortest: int = 2
    _indices: dict[SequenceState, _Index] = field(default_factory=dict)

    def propose(self, sequences: Sequence[SequenceState], lengths: Sequence[int]) -> list[Proposal]:
        return [Proposal(self._continuation(s, n)) for s, n in zip(sequences, lengths, strict=True)]

    def forget(self, sequence: SequenceState) -> None:
        self._indices.pop(sequence, None)

    def _continuation(self, sequence: SequenceState, length: int) -> list[int]:
        ids = sequence.ids
        index = self._indices.setdefault(sequence, _Index())
        for end in range(index.length, len(ids) - 1):
            for n in range(self.shortest, self.longest + 1):
                if end + 1 >= n:
                    index.ends[tuple(ids[end + 1 - n : end + 1])] = end
        index.length = max(index.length, len(ids) - 1)
        for n in range(self.longest, self.shortest - 1, -1):
            last = index.ends.get(tuple(ids[-n:])) if len(ids) >= n else None
            if last is not None:
                found = ids[last + 1 : last + 1 + length]
                period = len(ids) - 1 - last
                while len(found) < length:  # the text repeats itself: go on as it would
                    found.append(found[-period])
                return found
        return []
