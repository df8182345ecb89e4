"""The engine: requests in, tokens out, one step after the other over whatever is there.

    engine = Engine(model, EngineOptions(memory_bytes=…))
    engine.add(Request(prompt=…))
    while engine.has_work:
        for output in engine.step(): …

A step: decide who computes what (`scheduler`), guess tokens ahead (`speculation`), run the model once over all flat
tokens, choose or verify tokens (`sampling`, `speculation.acceptance`), end what is finished. A request gives the same
tokens alone, in any batch, after preemption, with or without prefix cache and speculation.
"""

from __future__ import annotations

import time
from collections.abc import Container, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from irc.core.errors import OptionError
from irc.core.paged import PagedModel, StepInputs
from irc.runtime.block_manager import BlockManager
from irc.runtime.continuation import continued
from irc.runtime.requests import Output, Request, SequenceState
from irc.runtime.results import FinishReason
from irc.runtime.sampling import likeliest
from irc.runtime.scheduler import Scheduler, Work
from irc.runtime.speculation.acceptance import accept_greedy
from irc.runtime.speculation.speculation import Speculation
from irc.runtime.speculation.verification import verified
from irc.runtime.step_inputs import StepBuilder

_DEFAULT_MEMORY = 1 << 30


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """How an engine works.

    Attributes:
        memory_bytes: most bytes of the paged cache; None: as much as all sequences could need, at most 1 GiB.
        max_batch_tokens: most tokens of a step.
        max_sequences: most sequences that run at once.
        prefill_chunk: most tokens of one prompt in a step; None: as many as the step has left.
        prefix_cache: keep the pages of finished sequences for prompts that begin alike.
    """

    memory_bytes: int | None = None
    max_batch_tokens: int = 512
    max_sequences: int = 64
    prefill_chunk: int | None = None
    prefix_cache: bool = True

    def __post_init__(self) -> None:
        problems = [
            f"{name} must be at least 1, not {value}"
            for name, value in vars(self).items()
            if name != "prefix_cache" and value is not None and value < 1
        ]
        if problems:
            raise OptionError("engine: " + "; ".join(problems))


@dataclass
class EngineStats:
    """Totals since the engine was made. Times are of the steps: inside the model, and in Python around it."""

    steps: int = 0
    model_ms: float = 0.0
    overhead_ms: float = 0.0
    computed_tokens: int = 0
    new_tokens: int = 0
    finished: int = 0
    failed: int = 0


@dataclass
class _Live:
    """A request with samples that have not ended."""

    request: Request
    sequences: list[SequenceState] = field(default_factory=list)


class Engine:
    """Runs requests over a model. Not thread-safe: one thread calls it (`AsyncEngine` is that thread)."""

    def __init__(
        self, model: PagedModel, options: EngineOptions | None = None, speculation: Speculation | None = None
    ) -> None:
        self.model, self.options = model, options or EngineOptions()
        self.speculation, self.stats = speculation, EngineStats()
        most = self.options.max_sequences
        if model.max_sequences is not None:
            most = min(most, model.max_sequences)
        per_sequence = -(-model.max_length // model.block_size)
        self.num_blocks = self._num_blocks(most * per_sequence)
        self.blocks = BlockManager(self.num_blocks, model.block_size, prefix_cache=self.options.prefix_cache)
        self.scheduler = Scheduler(
            self.blocks, max_tokens=self.options.max_batch_tokens, max_sequences=most,
            prefill_chunk=self.options.prefill_chunk,
        )  # fmt: skip
        self._builder = StepBuilder(model.block_size, most, per_sequence)
        self._pages = model.new_pages(self.num_blocks)
        self._live: dict[int, _Live] = {}
        self._count = 0
        self._num_deadlines = 0

    def _num_blocks(self, wanted: int) -> int:
        size, limit = self.model.block_bytes, self.options.memory_bytes
        found = min(wanted, (_DEFAULT_MEMORY if limit is None else limit) // size)
        if limit is None:
            return max(found, -(-self.model.max_length // self.model.block_size))
        if found < 1:
            raise OptionError(f"memory_bytes={limit} does not hold one block of {size} bytes")
        return found

    # ---------------------------------------------------------------- requests

    @property
    def has_work(self) -> bool:
        return bool(self._live)

    @property
    def live(self) -> Container[int]:
        """Numbers of the requests that have not ended."""
        return self._live.keys()

    @property
    def num_running(self) -> int:
        return len(self.scheduler.running)

    @property
    def num_waiting(self) -> int:
        return len(self.scheduler.waiting)

    def add(self, request: Request) -> int:
        """Queue a request; its number.

        Raises:
            OptionError: it can never be served; says why.
        """
        self.require(request)
        number = self._count
        self._count += 1
        first = self._new_sequence(number, request, 0)
        first.pending_samples = request.num_samples - 1
        self._live[number] = _Live(request, [first])
        self._num_deadlines += request.deadline is not None
        self.scheduler.waiting.append(first)
        return number

    def require(self, request: Request) -> None:
        """Raise unless the engine can serve a request.

        Raises:
            OptionError: all problems at once.
        """
        size, limit, problems = self.model.vocabulary_size, self.model.max_length, []
        wrong = [token for token in request.prompt if not 0 <= token < size]
        if not request.prompt:
            problems.append("the prompt is empty: it has no token to go on from")
        elif wrong:
            problems.append(f"the prompt has token {wrong[0]}; ids run from 0 to {size - 1}")
        elif len(request.prompt) > limit:
            problems.append(f"the prompt has {len(request.prompt)} tokens, the cache holds at most {limit}")
        if request.max_new_tokens < 1:
            problems.append(f"max_new_tokens must be at least 1, not {request.max_new_tokens}")
        if request.num_samples < 1:
            problems.append(f"the number of samples must be at least 1, not {request.num_samples}")
        biased = [token for token, _ in request.sampling.logit_bias if token >= size]
        if biased:
            problems.append(f"logit_bias names token {biased[0]}; ids run from 0 to {size - 1}")
        longest = min(len(request.prompt) + request.max_new_tokens - 1, limit)
        needed = self.blocks.blocks_for(longest)
        if not problems and needed > self.num_blocks:
            problems.append(
                f"it can grow to {longest} tokens, which take {needed * self.model.block_bytes} bytes of cache;"
                f" the engine has {self.num_blocks * self.model.block_bytes}: ask for fewer tokens or give more memory"
            )
        if problems:
            raise OptionError("this request cannot be served: " + "; ".join(problems))

    def cancel(self, number: int) -> None:
        """End a request at once, without a further output. Unknown numbers (it has ended already) are fine."""
        live = self._live.get(number)
        if live is not None:
            for sequence in [s for s in live.sequences if s.finish_reason is None]:
                sequence.pending_samples = 0
                self._end(sequence, FinishReason.CANCELLED)

    def _new_sequence(self, number: int, request: Request, sample: int) -> SequenceState:
        length = len(request.prompt)
        return SequenceState(
            number, sample, request, list(request.prompt), length, number,
            (request.key + sample) % 2**64,
            min(length + request.max_new_tokens - 1, self.model.max_length),
            request.text() if request.text is not None else None,
            request.constraint() if request.constraint is not None else None,
        )  # fmt: skip

    def _end(self, sequence: SequenceState, reason: FinishReason) -> None:
        sequence.finish_reason = reason
        self.scheduler.leave(sequence)
        if self.speculation is not None:
            self.speculation.forget(sequence)
        live = self._live[sequence.request_id]
        if sequence.pending_samples == 0 and all(s.finish_reason is not None for s in live.sequences):
            del self._live[sequence.request_id]
            self._num_deadlines -= live.request.deadline is not None
            self.stats.finished += 1

    # ---------------------------------------------------------------- a step

    def step(self) -> list[Output]:
        """Do one step; what it gave."""
        started = time.perf_counter()
        outputs: list[Output] = []
        if self._num_deadlines:
            self._expire(outputs)
        guess_ms = self._guess() if self.speculation is not None else 0.0
        works = self.scheduler.plan()
        if not works:
            return outputs
        if self.scheduler.copies:
            self.model.copy_blocks(self._pages, *map(list, zip(*self.scheduler.copies, strict=True)))
        inputs = self._builder.build(works)
        before = time.perf_counter()
        works, logits = self._run(works, inputs, outputs)
        model_ms = (time.perf_counter() - before) * 1e3
        if self.speculation is not None:
            self.speculation.measured(len(inputs.tokens), model_ms)
        for work, row, tokens in self._chosen(works, logits, outputs):
            self._advance(work, row, tokens, logits, outputs)
        self.stats.steps += 1
        self.stats.computed_tokens += len(inputs.tokens)
        self.stats.model_ms += model_ms + guess_ms
        self.stats.overhead_ms += (time.perf_counter() - started) * 1e3 - model_ms - guess_ms
        return outputs

    def _expire(self, outputs: list[Output]) -> None:
        now = time.monotonic()
        for live in list(self._live.values()):
            if live.request.deadline is not None and live.request.deadline <= now:
                for sequence in [s for s in live.sequences if s.finish_reason is None]:
                    self._finish(sequence, FinishReason.DEADLINE, outputs)

    def _guess(self) -> float:
        assert self.speculation is not None
        started = time.perf_counter()
        self.speculation.propose([s for s in self.scheduler.running if s.decoding], self.model.max_length)
        return (time.perf_counter() - started) * 1e3

    def _run(self, works: list[Work], inputs: StepInputs, outputs: list[Output]) -> tuple[list[Work], Tensor]:
        """The model's step. When it fails, sequences run one by one, and those that fail again are ended."""
        try:
            return works, self.model.paged_step(self._pages, inputs)
        except Exception as error:
            if len(works) == 1:
                self._fail(works[0].sequence, error, outputs)
                return [], torch.empty(0, self.model.vocabulary_size)
        done, parts = [], []
        for work in works:
            kept, logits = self._run([work], self._builder.build([work]), outputs)
            done += kept
            parts.append(logits)
        return done, torch.cat(parts)

    def _fail(self, sequence: SequenceState, error: Exception, outputs: list[Output]) -> None:
        """End a request that cannot go on; the others do."""
        self.stats.failed += 1
        self._finish(sequence, FinishReason.ERROR, outputs, error=f"{type(error).__name__}: {error}")

    # ---------------------------------------------------------------- tokens

    def _chosen(
        self, works: list[Work], logits: Tensor, outputs: list[Output]
    ) -> Iterator[tuple[Work, int, list[int]]]:
        """For each piece of work its first row of logits and the tokens that follow (none: a part of a prompt)."""
        rows: list[tuple[Work, int]] = []
        count = 0
        for work in works:
            sequence = work.sequence
            if sequence.num_computed + work.count < len(sequence.ids) + len(sequence.draft):
                self.scheduler.computed(sequence, work.count)
                continue
            rows.append((work, count))
            count += 1 + len(sequence.draft)
        if all(work.sequence.plain for work, _ in rows):
            best = likeliest(logits) if rows else []
            for work, first in rows:
                draft = work.sequence.draft
                yield work, first, accept_greedy(draft, best[first:]) if draft else [best[first]]
            return
        sequences = [work.sequence for work, _ in rows]
        for (work, first), tokens in zip(
            rows, verified(logits, sequences, self._allowed(sequences, outputs)), strict=True
        ):
            if work.sequence.finish_reason is None:
                yield work, first, tokens

    def _allowed(self, sequences: list[SequenceState], outputs: list[Output]) -> list[list[Tensor | None]]:
        """What the constraints allow in each row; a constraint that fails ends its own request only."""
        allowed: list[list[Tensor | None]] = []
        for sequence in sequences:
            masks: list[Tensor | None] = [None] * (1 + len(sequence.draft))
            if sequence.constraint is not None:
                try:
                    masks = sequence.constraint.masks(sequence.draft)
                except Exception as error:
                    self._fail(sequence, error, outputs)
            allowed.append(masks)
        return allowed

    def _advance(self, work: Work, row: int, tokens: list[int], logits: Tensor, outputs: list[Output]) -> None:
        """Add the tokens of one sequence, and split off further samples of its prompt."""
        sequence = work.sequence
        drafted = len(sequence.draft)
        if not drafted and sequence.goes_on(tokens[0]):  # nearly always, and worth being quick
            sequence.ids.append(tokens[0])
            self.stats.new_tokens += 1
            self.scheduler.served[sequence.request.client] += 1
            self.scheduler.computed(sequence, work.count)
            outputs.append(Output(sequence.request_id, sequence.sample, tokens))
            return
        computed = work.count - drafted + len(tokens) - 1
        if drafted:
            if self.speculation is not None:
                self.speculation.verified(sequence, drafted, len(tokens) - 1)
            sequence.draft, sequence.draft_probs = [], None
        if sequence.pending_samples:
            self._split(sequence, computed, row, logits, outputs)
            computed = 0
        try:
            self._append(sequence, tokens, computed, logits, row, outputs)
        except Exception as error:  # a constraint or a tokenizer: no other request's business
            self._fail(sequence, error, outputs)

    def _split(self, first: SequenceState, computed: int, row: int, logits: Tensor, outputs: list[Output]) -> None:
        """The other samples of a prompt begin from the logits that the first one has."""
        self.scheduler.computed(first, computed)
        count, first.pending_samples = first.pending_samples, 0
        live = self._live[first.request_id]
        children = [self._new_sequence(first.request_id, first.request, 1 + i) for i in range(count)]
        live.sequences += children
        for child in children:
            self.scheduler.fork(first, child)
        several = logits[row : row + 1].expand(count, -1)
        for child, tokens in zip(children, verified(several, children, self._allowed(children, outputs)), strict=True):
            if child.finish_reason is None:
                self._append(child, tokens, 0, logits, row, outputs)

    def _append(
        self, sequence: SequenceState, tokens: list[int], computed: int, logits: Tensor, row: int, outputs: list[Output]
    ) -> None:
        request, output = sequence.request, Output(sequence.request_id, sequence.sample, [])
        reason = continued(sequence, tokens, logits, row, output, self.model.max_length)
        self.stats.new_tokens += len(output.token_ids)
        self.scheduler.served[request.client] += len(output.token_ids)
        self.scheduler.computed(sequence, min(computed, len(sequence.ids) - sequence.num_computed))
        if reason is None:
            outputs.append(output)
        else:
            self._finish(sequence, reason, outputs, output)

    def _finish(
        self,
        sequence: SequenceState,
        reason: FinishReason,
        outputs: list[Output],
        output: Output | None = None,
        error: str = "",
    ) -> None:
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

    # ---------------------------------------------------------------- invariants, recovery

    def check(self) -> None:
        """Check the books of blocks and sequences; see `BlockManager.check`."""
        self.scheduler.check()

    def restart(self) -> None:
        """After an error between two steps: all pages are given up, and what ran is computed again."""
        for sequence in list(self.scheduler.running):
            self.scheduler.preempt(sequence)
        self.blocks.forget()
        self._pages = self.model.new_pages(self.num_blocks)
