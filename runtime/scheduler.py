"""Who computes what in the next step: running sequences first, then waiting ones, within a budget of tokens.

- Continuous batching: sequences come and go between steps; prompts are read in chunks beside decoding.
- When blocks run out, the last sequence in order (priority, arrival) gives its blocks back and waits to be computed
  again; a sequence that waits with a better priority takes the place of a running one with a worse.
- Among waiting requests of one priority, the client that has been served least goes first.
"""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from irc.runtime.block_manager import BlockManager
from irc.runtime.branches import Branches
from irc.runtime.cohort import Cohort
from irc.runtime.requests import SequenceState


@dataclass(slots=True)
class Work:
    """Tokens `ids + draft` of a sequence at positions num_computed to num_computed + count.

    Attributes:
        branch: of the sequence of an earlier piece of work.
    """

    sequence: SequenceState
    count: int
    branch: bool = False


class Scheduler:
    """Queues, and the plan of each step.

    Attributes:
        running: in order; each holds blocks and a row of the block tables.
        waiting: in order of arrival.
        copies: (source, target) blocks to be copied before the step runs.
        branches: of the step's sequences; the rows of block tables behind `max_sequences` are theirs.
        settled: the plan is that of the step before, in which every running sequence got one token; nothing has come,
            gone or been guessed since.
        cohort: the sequences of the plan, if it may be the next step's too.
        crossed: where the plan is settled, the indices of its works whose token begins a block.
    """

    def __init__(self, blocks: BlockManager, *, max_tokens: int, max_sequences: int, prefill_chunk: int | None) -> None:
        self.blocks = blocks
        self.max_tokens, self.max_sequences, self.prefill_chunk = max_tokens, max_sequences, prefill_chunk
        self.running: list[SequenceState] = []
        self.waiting: list[SequenceState] = []
        self.copies: list[tuple[int, int]] = []
        self.served: Counter[str] = Counter()
        self.num_preemptions = 0
        self.prefix_hits = 0
        self._rows = list(range(max_sequences))[::-1]
        self.branches = Branches(blocks, max_sequences)
        self.settled = False
        self.cohort: Cohort | None = None
        self.crossed: Sequence[int] = ()
        self._same: list[Work] = []
        self._crossings: dict[int, list[int]] = {}  # by the step from here, and every block_size-th behind it
        self._phase = 0

    # ---------------------------------------------------------------- the plan

    def plan(self) -> list[Work]:
        """Work of the next step; every sequence in it has the blocks that it writes to, to itself alone."""
        self.copies.clear()
        self.settled = bool(self._same) and not self.waiting and self._go_on()
        if self.settled:
            return self._same
        if self.waiting and self.running:
            self._yield_to_urgent()
        budget, works, index, size = self.max_tokens, list[Work](), 0, self.blocks.block_size
        while index < len(self.running) and budget > 0:
            sequence = self.running[index]
            index += 1
            at = sequence.num_computed
            if (
                at + 1 == len(sequence.ids)
                and at < len(sequence.blocks) * size
                and not (sequence.draft or sequence.shared)
            ):  # one more token in a block of its own: nearly always, and worth being quick
                works.append(Work(sequence, 1))
                budget -= 1
                continue
            count = len(sequence.ids) + len(sequence.draft) - sequence.num_computed
            if count > budget or (count > 1 and sequence.num_computed < len(sequence.ids) - 1):
                count = self._chunk(sequence, budget)
            count = self._make_room(sequence, count)
            if count == 0:
                break  # it was the last one, and gave its own blocks back
            works.append(Work(sequence, count))
            budget -= count
        if self.waiting and budget > 0:
            budget = self._admit(works, budget)
        for work in works[: len(self.running)]:
            if work.sequence.branches:
                budget = self._fork_branches(work.sequence, works, budget)
        self._settle(works)
        return works

    def _fork_branches(self, sequence: SequenceState, works: list[Work], budget: int) -> int:
        """Add the work on a sequence's branches; the budget that is left."""
        branches, copies = self.branches.fork(sequence, budget)
        self.copies += copies
        works += [Work(branch, 1 + len(branch.draft), branch=True) for branch in branches]
        return budget - sum(1 + len(branch.draft) for branch in branches)

    def _settle(self, works: list[Work]) -> None:
        """Keep a plan in which all decode: until something else is to be done, only blocks that fill need a look."""
        self.unsettle()
        if self.waiting or len(works) != len(self.running):
            return
        size, crossings = self.blocks.block_size, dict[int, list[int]]()
        for index, work in enumerate(works):
            sequence = work.sequence
            if work.count != 1 or sequence.num_computed + 1 != len(sequence.ids) or sequence.shared:
                return
            crossings.setdefault(-(sequence.num_computed + 1) % size, []).append(index)
        self._same, self._crossings, self._phase = works, crossings, -1
        self.cohort = Cohort([work.sequence for work in works])

    def _go_on(self) -> bool:
        """One token further with the same plan; False: a block is missing."""
        size = self.blocks.block_size
        self._phase = (self._phase + 1) % size
        self.crossed = self._crossings.get(self._phase, ())
        for index in self.crossed:
            sequence = self._same[index].sequence
            if sequence.num_computed == len(sequence.blocks) * size and not self._extend(sequence, 1):
                self.unsettle()
                return False
        return True

    def unsettle(self) -> None:
        """Something else than one more token of each running sequence is to be done."""
        self._same, self.cohort = [], None

    def _chunk(self, sequence: SequenceState, budget: int) -> int:
        """Fewer tokens than the sequence has left: no more than the budget and a chunk of prefill; no draft then."""
        sequence.drop_draft()
        left = len(sequence.ids) - sequence.num_computed
        limit = budget if self.prefill_chunk is None else min(budget, self.prefill_chunk)
        return min(left, limit)

    def _yield_to_urgent(self) -> None:
        """Stop running sequences of worse priority than one that waits and has no place or too few blocks."""
        urgent = min(self.waiting, key=self._turn)
        needed = self.blocks.blocks_for(len(urgent.ids))
        while self.running and self.running[-1].request.priority > urgent.request.priority:
            if len(self.running) < self.max_sequences and needed <= self.blocks.num_available:
                return
            self.preempt(self.running[-1])

    def _admit(self, works: list[Work], budget: int) -> int:
        """Let waiting sequences in while there is room; the budget that is left."""
        while self.waiting and budget > 0 and len(self.running) < self.max_sequences:
            sequence = min(self.waiting, key=self._turn)
            sequence.blocks, sequence.contents = self.blocks.match(sequence.ids)
            sequence.num_computed = len(sequence.blocks) * self.blocks.block_size
            count = self._chunk(sequence, budget)
            needed = self.blocks.blocks_for(sequence.num_computed + count) - len(sequence.blocks)
            found = self.blocks.allocate(needed)
            if found is None:
                self.blocks.release(sequence.blocks)
                sequence.blocks, sequence.contents, sequence.num_computed = [], [], 0
                break
            self.prefix_hits += sequence.num_computed
            sequence.blocks += found
            self.waiting.remove(sequence)
            self._enter(sequence)
            works.append(Work(sequence, count))
            budget -= count
        return budget

    def _turn(self, sequence: SequenceState) -> tuple[int, int, int, int]:
        request = sequence.request
        return (request.priority, self.served[request.client], sequence.arrival, sequence.sample)

    def _make_room(self, sequence: SequenceState, count: int) -> int:
        """Give a running sequence the blocks for `count` tokens, or without its draft; 0: it gave up its own."""
        while True:
            missing = self.blocks.blocks_for(sequence.num_computed + count) - len(sequence.blocks)
            if missing <= 0 and not sequence.shared:
                return count
            if self._own_blocks(sequence) and (missing <= 0 or self._extend(sequence, missing)):
                return count
            if sequence.draft:
                count -= len(sequence.draft)  # a guess is not worth another one's place
                sequence.drop_draft()
                continue
            last = self.running[-1]
            self.preempt(last)
            if last is sequence:
                return 0

    def _extend(self, sequence: SequenceState, missing: int) -> bool:
        found = self.blocks.allocate(missing)
        if found is not None:
            sequence.blocks += found
            sequence.moved = True
        return found is not None

    def _own_blocks(self, sequence: SequenceState) -> bool:
        """Copy-on-write: the block that is written next must be the sequence's own."""
        if not sequence.shared:
            return True
        at = sequence.num_computed // self.blocks.block_size
        if at < len(sequence.blocks) and self.blocks.refs[sequence.blocks[at]] > 1:
            found = self.blocks.allocate(1)
            if found is None:
                return False
            self.copies.append((sequence.blocks[at], found[0]))
            self.blocks.release([sequence.blocks[at]])
            sequence.blocks[at] = found[0]
            sequence.moved = True
        sequence.shared = False
        return True

    # ---------------------------------------------------------------- coming and going

    def _enter(self, sequence: SequenceState) -> None:
        self.unsettle()
        sequence.row, sequence.moved = self._rows.pop(), True
        bisect.insort(self.running, sequence, key=lambda s: s.order)

    def preempt(self, sequence: SequenceState) -> None:
        """Take a running sequence's blocks; it waits to be computed again."""
        self.leave(sequence)
        sequence.num_preemptions += 1
        self.num_preemptions += 1
        self.waiting.append(sequence)

    def leave(self, sequence: SequenceState) -> None:
        """Remove a sequence from wherever it is, and give its blocks back."""
        if sequence.row >= 0:
            self.unsettle()
            self.running.remove(sequence)
            self._rows.append(sequence.row)
            sequence.row = -1
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        self.blocks.release(sequence.blocks)
        sequence.blocks, sequence.contents, sequence.num_computed = [], [], 0
        sequence.drop_draft()
        sequence.shared = False

    def fork(self, parent: SequenceState, child: SequenceState) -> None:
        """A further sample of a prompt that has been read: shares its blocks if there is a place, else waits."""
        if len(self.running) >= self.max_sequences:
            self.waiting.append(child)
            return
        self.blocks.share(parent.blocks)
        child.blocks, child.contents = list(parent.blocks), list(parent.contents)
        child.num_computed = parent.num_computed
        child.shared = parent.shared = True
        self._enter(child)

    def computed(self, sequence: SequenceState, count: int) -> None:
        """`count` more tokens of a sequence are in its blocks for good; full blocks can be found from now on."""
        sequence.num_computed += count
        size = self.blocks.block_size
        while (len(sequence.contents) + 1) * size <= sequence.num_computed:
            start = len(sequence.contents) * size
            block = sequence.blocks[len(sequence.contents)]
            content = self.blocks.register(sequence.last_content, sequence.ids[start : start + size], block)
            sequence.contents.append(content)

    def went_on(self, cohort: Cohort) -> None:
        """Every sequence of the cohort, which is this step's plan, has got one more token and computed one more."""
        for client, count in cohort.clients.items():
            self.served[client] += count
        for index in self._crossings.get((self._phase + 1) % self.blocks.block_size, ()):
            self.computed(cohort.sequences[index], 0)

    def check(self) -> None:
        """Check the books; see `BlockManager.check`."""
        self.blocks.check([s.blocks for s in self.running] + [s.blocks for s in self.waiting])
