"""Sequences that decode together, one token each in every step, until one of them ends or another comes.

Nearly every step of a busy engine is such a step. What can be said of all of them at once is said here once, so that a
step looks at each sequence only to add its token: with a model between two steps none of this is in the processor's
caches, and every object that is touched costs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from irc.runtime.requests import Output, SequenceState


class Cohort:
    """What holds for all of them until then.

    Args:
        sequences: in the order of their work, before the step that made them one cohort has given each its token.
    """

    def __init__(self, sequences: Sequence[SequenceState]) -> None:
        self.sequences = list(sequences)
        self.clients = Counter([sequence.request.client for sequence in sequences])
        self._simple = all(s.plain and s.quick and not s.pending_samples for s in sequences)
        self._ends = frozenset().union(*[sequence.ends for sequence in sequences])
        self._left = min([sequence.longest - len(sequence.ids) for sequence in sequences], default=0) - 1

    @property
    def goes_on(self) -> bool:
        """Whether the likeliest token of each is all that the next step adds, if none of them is an end."""
        return self._simple and self._left > 0

    def go_on(self, tokens: Sequence[int], outputs: list[Output]) -> bool:
        """Add a token to each; False: one of them ends with it, and nothing was done."""
        if not self._ends.isdisjoint(tokens):
            return False
        self._left -= 1
        for sequence, token in zip(self.sequences, tokens, strict=True):
            sequence.ids.append(token)
            sequence.num_computed += 1
            outputs.append(Output(sequence.request_id, sequence.sample, [token]))
        return True
