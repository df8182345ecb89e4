"""The requests that have not ended: how they come, which samples they have, and how each of them ends."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

from irc.runtime.engine_options import EngineStats
from irc.runtime.requests import Output, Request, SequenceState
from irc.runtime.results import FinishReason


@dataclass
class _Open:
    """A request with samples that have not ended."""

    request: Request
    sequences: list[SequenceState] = field(default_factory=list)


class OpenRequests:
    """Requests by number, in the order in which they came.

    Args:
        max_length: most positions of a sequence.
        leave: told of every sequence that ends.
        stats: where requests that have ended are counted.
    """

    def __init__(self, max_length: int, leave: Callable[[SequenceState], None], stats: EngineStats) -> None:
        self._max_length, self._leave, self._stats = max_length, leave, stats
        self._open: dict[int, _Open] = {}
        self._count = 0
        self._num_deadlines = 0

    @property
    def numbers(self) -> Collection[int]:
        return self._open.keys()

    def add(self, request: Request) -> SequenceState:
        """Give a request a number; its first sample, which the others are split off from."""
        number = self._count
        self._count += 1
        first = self._sequence(number, request, 0)
        first.pending_samples = request.num_samples - 1
        self._open[number] = _Open(request, [first])
        self._num_deadlines += request.deadline is not None
        return first

    def split(self, first: SequenceState) -> list[SequenceState]:
        """The other samples of a prompt that the first one has read."""
        count, first.pending_samples = first.pending_samples, 0
        children = [self._sequence(first.request_id, first.request, 1 + i) for i in range(count)]
        self._open[first.request_id].sequences += children
        return children

    def cancel(self, number: int) -> None:
        """End a request at once, without a further output. Unknown numbers (it has ended already) are fine."""
        for sequence in self._running(number):
            sequence.pending_samples = 0
            self._end(sequence, FinishReason.CANCELLED)

    def expire(self, outputs: list[Output]) -> None:
        """End the requests whose deadline has passed."""
        if not self._num_deadlines:
            return
        now = time.monotonic()
        for number, one in list(self._open.items()):
            if one.request.deadline is not None and one.request.deadline <= now:
                for sequence in self._running(number):
                    self.finish(sequence, FinishReason.DEADLINE, outputs)

    def finish(
        self, sequence: SequenceState, reason: FinishReason, outputs: list[Output], output: Output | None = None,
        error: str = "",
    ) -> None:  # fmt: skip
        """End a sample, and those of its prompt that were not split off yet, with an output for each.

        Args:
            output: the last one of this sample, which may have tokens.
        """
        made = output if output is not None else Output(sequence.request_id, sequence.sample, [])
        if sequence.text is not None:
            made.text += sequence.text.finish()
            # What was held back may complete a stop text.
            if sequence.text.stopped and reason is not FinishReason.ERROR:
                reason = FinishReason.STOP
        made.finish_reason, made.error = reason, error
        outputs.append(made)
        while sequence.pending_samples:  # of a prompt that was not read to its end
            outputs.append(Output(sequence.request_id, sequence.pending_samples, [], finish_reason=reason, error=error))
            sequence.pending_samples -= 1
        self._end(sequence, reason)

    def _running(self, number: int) -> list[SequenceState]:
        one = self._open.get(number)
        return [s for s in one.sequences if s.finish_reason is None] if one is not None else []

    def _sequence(self, number: int, request: Request, sample: int) -> SequenceState:
        length = len(request.prompt)
        return SequenceState(
            number, sample, request, list(request.prompt), length, number,
            (request.key + sample) % 2**64,
            min(length + request.max_new_tokens - 1, self._max_length),
            request.text() if request.text is not None else None,
            request.constraint() if request.constraint is not None else None,
        )  # fmt: skip

    def _end(self, sequence: SequenceState, reason: FinishReason) -> None:
        sequence.finish_reason = reason
        self._leave(sequence)
        one = self._open[sequence.request_id]
        if sequence.pending_samples == 0 and all(s.finish_reason is not None for s in one.sequences):
            del self._open[sequence.request_id]
            self._num_deadlines -= one.request.deadline is not None
            self._stats.finished += 1
