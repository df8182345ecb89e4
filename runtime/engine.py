"""The engine: requests in, tokens out, one step after the other over whatever is there.

    engine = Engine(model, EngineOptions(memory_bytes=…))
    engine.add(Request(prompt=…))
    while engine.has_work:
        for output in engine.step(): …

A step: decide who computes what (`scheduler`), guess tokens ahead (`speculation`), run the model once over all flat
tokens, choose or verify tokens (`sampling`, `speculation.acceptance`), end what is finished (`open_requests`). A
request gives the same tokens alone, in any batch, after preemption, with or without prefix cache and speculation.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from irc.core.errors import OptionError
from irc.core.paged import PagedModel, StepInputs
from irc.runtime.admission import blocks_of_cache, why_not_served
from irc.runtime.block_manager import BlockManager
from irc.runtime.branches import MOST_ROWS as MOST_BRANCHES
from irc.runtime.continuation import continued
from irc.runtime.engine_options import EngineOptions as EngineOptions
from irc.runtime.engine_options import EngineStats as EngineStats
from irc.runtime.open_requests import OpenRequests
from irc.runtime.requests import Output, Request, SequenceState
from irc.runtime.results import FinishReason
from irc.runtime.sampling import likeliest
from irc.runtime.scheduler import Scheduler, Work
from irc.runtime.speculation.acceptance import accept_greedy
from irc.runtime.speculation.speculation import Speculation
from irc.runtime.speculation.verification import Path, verified
from irc.runtime.step_inputs import StepBuilder


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
        self.num_blocks = blocks_of_cache(model, self.options.memory_bytes, most * per_sequence)
        self.blocks = BlockManager(self.num_blocks, model.block_size, prefix_cache=self.options.prefix_cache)
        self.scheduler = Scheduler(
            self.blocks, max_tokens=self.options.max_batch_tokens, max_sequences=most,
            prefill_chunk=self.options.prefill_chunk,
        )  # fmt: skip
        self._builder = StepBuilder(model.block_size, most + MOST_BRANCHES, per_sequence)
        self._pages = model.new_pages(self.num_blocks)
        self._open = OpenRequests(model.max_length, self._left, self.stats)

    # ---------------------------------------------------------------- requests

    @property
    def has_work(self) -> bool:
        return bool(self._open.numbers)

    @property
    def live(self) -> Collection[int]:
        """Numbers of the requests that have not ended."""
        return self._open.numbers

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
        first = self._open.add(request)
        self.scheduler.waiting.append(first)
        return first.request_id

    def require(self, request: Request) -> None:
        """Raise unless the engine can serve a request.

        Raises:
            OptionError: all problems at once.
        """
        problems = why_not_served(request, self.model, self.num_blocks)
        if problems:
            raise OptionError("this request cannot be served: " + "; ".join(problems))

    def cancel(self, number: int) -> None:
        """End a request at once, without a further output. Unknown numbers (it has ended already) are fine."""
        self._open.cancel(number)

    def _left(self, sequence: SequenceState) -> None:
        """A sequence has ended: nobody plans or guesses for it any more."""
        self.scheduler.leave(sequence)
        if self.speculation is not None:
            self.speculation.forget(sequence)

    # ---------------------------------------------------------------- a step

    def step(self) -> list[Output]:
        """Do one step; what it gave."""
        started = time.perf_counter()
        outputs: list[Output] = []
        self._open.expire(outputs)
        guess_ms = 0.0
        if self.speculation is not None and not self.speculation.rests(len(self.scheduler.running)):
            guess_ms = self._guess()
        works = self.scheduler.plan()
        if not works:
            return outputs
        if self.scheduler.copies:
            self.model.copy_blocks(self._pages, *map(list, zip(*self.scheduler.copies, strict=True)))
        inputs = self._builder.build(works, self.scheduler.crossed if self.scheduler.settled else None)
        before, chosen_before = time.perf_counter(), self.stats.choosing_ms
        works, logits = self._run(works, inputs, outputs)
        model_ms = (time.perf_counter() - before) * 1e3
        self._continue(works, logits, outputs)
        step_ms = (time.perf_counter() - started) * 1e3 - guess_ms
        if self.speculation is not None and self.speculation.measures:
            # Branches cost what they cost: lengths are compared by what a step with such drafts takes altogether.
            branches = sum(work.count for work in works if work.branch)
            self.speculation.measured(len(inputs.tokens) - branches, step_ms)
        self.stats.steps += 1
        self.stats.computed_tokens += len(inputs.tokens)
        self.stats.model_ms += model_ms + guess_ms
        self.stats.overhead_ms += step_ms - model_ms - (self.stats.choosing_ms - chosen_before)
        return outputs

    def _guess(self) -> float:
        assert self.speculation is not None
        started = time.perf_counter()
        if self.speculation.propose([s for s in self.scheduler.running if s.decoding], self.model.max_length):
            self.scheduler.unsettle()
        return (time.perf_counter() - started) * 1e3

    def _run(self, works: list[Work], inputs: StepInputs, outputs: list[Output]) -> tuple[list[Work], Tensor]:
        """The model's step. When it fails, sequences run one by one, and those that fail again are ended."""
        try:
            return works, self.model.paged_step(self._pages, inputs)
        except Exception as error:
            works = [work for work in works if not work.branch]
            self.scheduler.branches.end()
            self.scheduler.unsettle()  # the inputs of the next step begin anew
            if len(works) == 1 == len(inputs.block_tables):
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
        self._open.finish(sequence, FinishReason.ERROR, outputs, error=f"{type(error).__name__}: {error}")

    # ---------------------------------------------------------------- tokens

    def _continue(self, works: list[Work], logits: Tensor, outputs: list[Output]) -> None:
        """Choose the tokens that follow, for every sequence whose last token was computed, and add them."""
        if self.scheduler.settled and len(works) == len(logits) and self._go_on(logits, outputs):
            return
        rows: list[tuple[Work, int]] = []
        first_rows = dict[SequenceState, int]()
        count = 0
        for work in works:
            sequence = work.sequence
            if sequence.num_computed + work.count < len(sequence.ids) + len(sequence.draft):
                self.scheduler.computed(sequence, work.count)  # a part of a prompt
                continue
            if work.branch:
                first_rows[sequence] = count
            else:
                rows.append((work, count))
            count += 1 + len(sequence.draft)
        if first_rows:
            self._continue_trees(rows, first_rows, logits, outputs)
            self.scheduler.branches.end()
        elif all(work.sequence.plain for work, _ in rows):
            self._continue_plain(rows, logits, outputs)
        else:
            self._continue_trees(rows, first_rows, logits, outputs)

    def _go_on(self, logits: Tensor, outputs: list[Output]) -> bool:
        """One more token for each of the sequences that decode together; False: they are to be looked at one by one."""
        cohort = self.scheduler.cohort
        if cohort is None or not cohort.goes_on:
            return False
        started = time.perf_counter()
        best = likeliest(logits)
        self.stats.choosing_ms += (time.perf_counter() - started) * 1e3
        if not cohort.go_on(best, outputs):
            return False
        self._builder.went_on(best)
        self.scheduler.went_on(cohort)
        self.stats.new_tokens += len(best)
        return True

    def _continue_plain(self, rows: list[tuple[Work, int]], logits: Tensor, outputs: list[Output]) -> None:
        """The same where the likeliest token is wanted of all. Nearly every step is one, so it is worth being quick."""
        started = time.perf_counter()
        best = likeliest(logits) if rows else []
        self.stats.choosing_ms += (time.perf_counter() - started) * 1e3
        served, quick = self.scheduler.served, 0
        for work, row in rows:
            sequence, token = work.sequence, best[row]
            if sequence.draft:
                self._advance(work, row, accept_greedy(sequence.draft, best[row:]), logits, outputs)
            elif sequence.goes_on(token):
                quick += 1
                sequence.ids.append(token)
                served[sequence.request.client] += 1
                self.scheduler.computed(sequence, work.count)
                outputs.append(Output(sequence.request_id, sequence.sample, [token]))
            else:
                self._advance(work, row, [token], logits, outputs)
        self.stats.new_tokens += quick

    def _continue_trees(
        self, rows: list[tuple[Work, int]], first_rows: Mapping[SequenceState, int], logits: Tensor,
        outputs: list[Output],
    ) -> None:  # fmt: skip
        """The same for any sequences, those with branches among them; `first_rows` has the branches' rows of logits."""
        branches = self.scheduler.branches
        paths = [
            [Path(work.sequence, row), *(Path(branch, first_rows[branch]) for branch in branches.of(work.sequence))]
            for work, row in rows
        ]
        allowed, started = [self._allowed(found, outputs) for found in paths], time.perf_counter()
        chosen = verified(logits, paths, allowed)
        self.stats.choosing_ms += (time.perf_counter() - started) * 1e3
        for (work, _), found, (tokens, winner) in zip(rows, paths, chosen, strict=True):
            if work.sequence.finish_reason is None:
                if winner > 0:
                    branches.adopt(work.sequence, found[winner].sequence)
                self._advance(work, found[winner].row, tokens, logits, outputs, found[winner].sequence)

    def _allowed(self, paths: Sequence[Path], outputs: list[Output]) -> list[list[Tensor | None]]:
        """What a sequence's constraint allows in each row of its paths; one that fails ends its own request only."""
        allowed: list[list[Tensor | None]] = [[None] * (1 + len(path.sequence.draft)) for path in paths]
        sequence = paths[0].sequence
        if sequence.constraint is not None:
            try:
                return [sequence.constraint.masks(path.sequence.draft) for path in paths]
            except Exception as error:
                self._fail(sequence, error, outputs)
        return allowed

    def _advance(
        self, work: Work, row: int, tokens: list[int], logits: Tensor, outputs: list[Output],
        path: SequenceState | None = None,
    ) -> None:  # fmt: skip
        """Add the tokens of one sequence, which a path of its guesses led to, and split off samples of its prompt."""
        sequence = work.sequence
        drafted = len(sequence.draft)
        computed = work.count - drafted + len(tokens) - 1
        if drafted:
            if self.speculation is not None:
                guessed = drafted if path is None else len(path.draft)
                branch = path is not None and path is not sequence
                self.speculation.verified(sequence, guessed, len(tokens) - 1, branch)
            sequence.drop_draft()
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
        children = self._open.split(first)
        for child in children:
            self.scheduler.fork(first, child)
        several = logits[row : row + 1].expand(len(children), -1)
        paths = [[Path(child, index)] for index, child in enumerate(children)]
        chosen = verified(several, paths, [self._allowed(path, outputs) for path in paths])
        for child, (tokens, _) in zip(children, chosen, strict=True):
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
            self._open.finish(sequence, reason, outputs, output)

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
