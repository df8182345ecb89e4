"""Speculative decoding: the same tokens when greedy, the same distribution when sampled, and off where it loses."""

from __future__ import annotations

import functools
import random
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from irc.core.errors import OptionError
from irc.core.paged import PagedModel
from irc.core.target import get_target
from irc.runtime.engine import Engine, EngineOptions
from irc.runtime.models import paged_model
from irc.runtime.requests import Proposal, Request, SequenceState
from irc.runtime.sampling import Sampling, draw, uniforms
from irc.runtime.speculation.acceptance import follow
from irc.runtime.speculation.controller import Controller, expected_tokens, predicted_speedup
from irc.runtime.speculation.costs import Costs
from irc.runtime.speculation.draft_model import DraftModelProposer
from irc.runtime.speculation.ngram import NgramProposer
from irc.runtime.speculation.speculation import Speculation
from tests.lowering import steps
from tests.runtime.driving import alone, drive, engine_of, model, random_requests

VOCABULARY = 6
# 99.9th percentiles of chi-square by degrees of freedom.
CHI_SQUARE = {5: 20.5, 35: 66.6, 63: 103.4}


def distribution(seed: int) -> Tensor:
    return torch.rand(VOCABULARY, generator=torch.Generator().manual_seed(seed)).pow(2).add(0.02)


def normal(x: Tensor) -> Tensor:
    return x / x.sum(-1, keepdim=True)


def chi_square(counts: Sequence[float], expected: Sequence[float]) -> float:
    return sum((c - e) ** 2 / e for c, e in zip(counts, expected, strict=True))


# ---------------------------------------------------------------- the acceptance rule


def accept(draft: Any, target: Tensor, proposal: Any, accepts: np.ndarray, draws: np.ndarray) -> list[int]:
    """The tokens of a tree of one path."""
    return follow([draft], [target], [proposal], [accepts], draws)[0]


def first_two_tokens(rule: Callable[..., list[int]], *, drawn: bool, rounds: int = 4000) -> list[int]:
    """How often each pair of first tokens comes out, with one draft token from another distribution."""
    p, q = normal(torch.stack([distribution(1), distribution(2)])), normal(distribution(3))
    counts = [0] * VOCABULARY**2
    keys, positions = list(range(rounds)), [0] * rounds
    proposals = draw(q.expand(rounds, -1), uniforms(keys, positions, 2)).tolist() if drawn else [2] * rounds
    accepts, draws = uniforms(keys, positions, 1), np.stack([uniforms(keys, [n] * rounds) for n in (0, 1)], 1)
    for n in range(rounds):
        tokens = rule([proposals[n]], p, q.unsqueeze(0) if drawn else None, accepts[n : n + 1], draws[n])
        # A rejected draft gives one token: the second comes from the model as ever.
        second = tokens[1] if len(tokens) > 1 else int(draw(p[1:], uniforms([n], [1], 7)))
        counts[tokens[0] * VOCABULARY + second] += 1
    return counts


@functools.cache
def pair_expectation(rounds: int = 4000) -> list[float]:
    p = normal(torch.stack([distribution(1), distribution(2)])).double()
    return (p[0].unsqueeze(1) * p[1] * rounds).flatten().tolist()


@pytest.mark.parametrize("drawn", [True, False])
def test_tokens_are_distributed_as_the_model_says(drawn: bool) -> None:
    assert chi_square(first_two_tokens(accept, drawn=drawn), pair_expectation()) < CHI_SQUARE[35]


def too_generous(draft: Any, target: Tensor, proposal: Any, accepts: np.ndarray, draws: Any) -> list[int]:
    """Accepts more than it should."""
    return accept(draft, target, proposal, accepts * 0.7, draws)


def wrong_residual(draft: Any, target: Tensor, proposal: Any, accepts: np.ndarray, draws: Any) -> list[int]:
    """On rejection draws from the model instead of from what is left."""
    made = accept(draft, target, proposal, accepts, draws)
    return made if made[0] == draft[0] and len(made) > 1 else [int(draw(target[:1], draws[:1]))]


@pytest.mark.parametrize("rule", [too_generous, wrong_residual])
def test_a_biased_rule_is_caught_by_the_same_test(rule: Callable[..., list[int]]) -> None:
    assert chi_square(first_two_tokens(rule, drawn=True), pair_expectation()) > CHI_SQUARE[35]


def test_equal_distributions_accept_everything() -> None:
    p = normal(distribution(1)).expand(4, -1)
    for n in range(200):
        draft = draw(p[:3], uniforms([n] * 3, [0, 1, 2], 2)).tolist()
        assert len(accept(draft, p, p[:3], uniforms([n] * 3, [0, 1, 2], 1), uniforms([n] * 4, [0, 1, 2, 3]))) == 4


# ---------------------------------------------------------------- whole engine


class Stubborn:
    """Proposes the same tokens always: often wrong."""

    def propose(self, sequences: Sequence[SequenceState], lengths: Sequence[int]) -> list[Proposal]:
        return [Proposal([(7 * len(s.ids) + n) % steps.VOCABULARY for n in range(k)])
                for s, k in zip(sequences, lengths, strict=True)]  # fmt: skip

    def forget(self, sequence: SequenceState) -> None:
        pass


@functools.cache
def draft() -> PagedModel:
    """The tiny model with disturbed weights: right about half of the time."""
    program = steps.step("insert-kv-cache{layout=paged,block-size=8,max-length=32}")
    torch.manual_seed(3)
    weights = {
        name: w + 0.15 * w.std() * torch.randn_like(w) if w.dim() == 2 else w for name, w in program.weights.items()
    }
    other = program.copy(replace_weights=weights)
    return paged_model(get_target("reference").lower(other), other)


def samples(speculation: Speculation | None, prompt: list[int], count: int = 300) -> list[list[int]]:
    engine = engine_of(speculation=speculation, max_sequences=64)
    sampling = Sampling(temperature=1.0, top_k=8)
    requests = [Request(prompt=prompt, max_new_tokens=3, sampling=sampling, key=977 * n) for n in range(count)]
    answers = drive(engine, requests, arrivals=0.99)
    return [answers[n, 0].ids for n in range(count)]


def test_samples_cannot_be_told_from_plain_ones() -> None:
    """Third tokens, which come out of draft rounds, against what plain sampling gives: a two-sample test."""
    speculation = Speculation(DraftModelProposer(draft(), model()), Controller(fixed=2))
    prompt = [1, 5, 9]
    plain, guessed = (Counter(tuple(ids[1:]) for ids in samples(s, prompt)) for s in (None, speculation))
    assert speculation.stats.acceptance_rate is not None
    assert 0.2 < speculation.stats.acceptance_rate < 0.98
    seen = [pair for pair in plain | guessed if plain[pair] + guessed[pair] >= 8]
    statistic = sum((plain[x] - guessed[x]) ** 2 / (plain[x] + guessed[x]) for x in seen)
    freedom = len(seen)
    assert freedom > 5
    assert statistic < freedom + 3.7 * (2 * freedom) ** 0.5  # about p = 0.0005


@pytest.mark.parametrize("what", ["draft model", "stubborn", "draft model in tiny memory"])
def test_greedy_tokens_are_the_same(what: str) -> None:
    small = {"blocks": 9} if "tiny" in what else {}
    proposer = Stubborn() if what == "stubborn" else DraftModelProposer(
        draft(), model(), memory_bytes=12 * draft().block_bytes if small else None
    )  # fmt: skip
    speculation = Speculation(proposer, Controller(fixed=3))
    requests = random_requests(40, 5)
    engine = engine_of(speculation=speculation, **small)
    answers = drive(engine, requests)
    expected = {key: a for key, a in alone(70, 5).items() if key[0] < 40}
    assert answers.keys() == expected.keys()
    assert all(answers[k] == a for k, a in expected.items() if not requests[k[0]].sampling.temperature)
    assert speculation.stats.drafted > 50
    if isinstance(proposer, DraftModelProposer):
        assert proposer.blocks.num_used == 0
        assert speculation.stats.accepted > 10


def test_the_model_itself_as_draft_is_always_right() -> None:
    speculation = Speculation(DraftModelProposer(model(), model()), Controller(fixed=3))
    drive(engine_of(speculation=speculation), [Request(prompt=[1, 2], max_new_tokens=9)])
    assert speculation.stats.acceptance_rate == 1.0
    assert speculation.stats.tokens_per_step == 4.0


def test_vocabularies_must_agree() -> None:
    class Other:
        vocabulary_size = 65

    with pytest.raises(OptionError, match="the draft model has 65 tokens, the model 64"):
        DraftModelProposer(Other(), model())


# ---------------------------------------------------------------- look-up


def state(ids: list[int]) -> SequenceState:
    return SequenceState(0, 0, Request(prompt=ids[:1]), ids, 1, 0, 0, longest=1 << 30)


def test_lookup_continues_the_latest_and_longest_match() -> None:
    proposer = NgramProposer(longest=3, shortest=1)
    sequence = state([1, 2, 3, 4, 9, 2, 3, 5, 2, 3])
    assert proposer.propose([sequence], [3])[0].tokens == [5, 2, 3]
    sequence.ids += [4]
    assert proposer.propose([sequence], [2])[0].tokens == [9, 2]  # (2, 3, 4) is longer than (3, 4)
    sequence.ids += [77]
    assert proposer.propose([sequence], [2])[0].tokens == []
    proposer.forget(sequence)
    assert proposer._indices == {}


def test_lookup_finds_other_ways_to_go_on() -> None:
    proposer = NgramProposer(branches=2)
    (made,) = proposer.propose([state([1, 2, 7, 8, 1, 2, 9, 1, 2, 9, 4, 1, 2])], [2])
    assert [made.tokens, *(b.tokens for b in made.branches)] == [[9, 4], [7, 8]]
    proposer.forget(sequence := state([]))
    assert proposer.propose([sequence], [2])[0].tokens == []


def test_lookup_goes_on_repeating() -> None:
    assert NgramProposer(shortest=1).propose([state([8, 1, 2, 1, 2, 1])], [7])[0].tokens == [2, 1, 2, 1, 2, 1, 2]


# ---------------------------------------------------------------- length


def test_formulas() -> None:
    assert expected_tokens(0.0, 5) == 1.0
    assert expected_tokens(1.0, 5) == 6.0
    assert expected_tokens(0.5, 2) == pytest.approx(1 + 0.5 + 0.25)
    assert predicted_speedup(0.8, 4, 0.1) == pytest.approx(3.3616 / 1.4)


def settled(acceptance: Callable[[int], bool], *, plain_ms: float, token_ms: float, draft_ms: float) -> Controller:
    """A controller after 400 rounds in a world with these costs, where the n-th guess stands if `acceptance(n)`."""
    controller, sequence, count = Controller(), state([1, 2]), 0
    for _ in range(400):
        (length,) = controller.lengths([sequence])
        if length:
            controller.measured_draft(length, draft_ms * length)
        controller.measured(1 + length, plain_ms + token_ms * (1 + length))
        accepted = 0
        while accepted < length and acceptance(count := count + 1):
            accepted += 1
        if length:
            controller.verified(sequence, length, accepted)
    return controller


def test_length_follows_acceptance_and_cost() -> None:
    good = settled(lambda n: n % 10 != 0, plain_ms=10, token_ms=0.1, draft_ms=0.5)
    fair = settled(lambda n: n % 3 != 0, plain_ms=10, token_ms=0.1, draft_ms=2.0)
    bad = settled(lambda n: n % 10 == 0, plain_ms=10, token_ms=0.1, draft_ms=3.0)
    dear = settled(lambda n: n % 10 != 0, plain_ms=10, token_ms=0.1, draft_ms=20.0)
    lengths = [c.best_length([c.acceptance()]) for c in (good, fair, bad, dear)]
    assert lengths[0] > lengths[1] > lengths[2] == lengths[3] == 0


def test_costs_stay_what_they_are_on_a_machine_that_changes_its_pace() -> None:
    """A step of four tokens costs one and a half of one token, a draft half of one, whatever else the machine does."""
    rng, costs = random.Random(0), Costs()
    for turn in range(200):
        pace = rng.choice([1.0, 1.7, 5.0])
        for row in range(rng.randrange(5, 60)):
            costs.begin(guesses=False)
            # Behind a draft the weights are gone from the caches.
            costs.plain(pace * (3.0 if row < 2 else rng.uniform(0.95, 1.1)))
        for _ in range(rng.randrange(2, 60)):
            costs.begin(guesses=True)
            costs.draft(3, pace * rng.uniform(0.45, 0.55))
            costs.step(4, pace * rng.uniform(1.4, 1.6) * (8.0 if rng.random() < 0.05 else 1.0))
        if turn > 5:
            assert costs.steps.at(4) == pytest.approx(1.5, rel=0.15)
            assert costs.draft_at(3) == pytest.approx(0.5, rel=0.15)


def test_the_pace_is_carried_where_plain_steps_are_long_ago() -> None:
    costs = Costs()
    for guesses, count in ((False, 8), (True, 12)):
        for _ in range(count):
            costs.begin(guesses)
            costs.step(4, 1.5) if guesses else costs.plain(1.0)
    for step in range(200):
        costs.begin(guesses=True)
        # Now the machine is half as fast, and later on longer drafts are tried.
        costs.step(4, 3.0) if step < 150 else costs.step(8, 4.0)
    assert costs.steps.at(4) == pytest.approx(1.5)
    assert costs.steps.at(8) == pytest.approx(2.0, rel=0.1)


def test_where_it_loses_it_is_rarely_tried() -> None:
    controller, sequence, tries = Controller(), state([1, 2]), 0
    for step in range(2000):
        (length,) = controller.lengths([sequence])
        controller.measured(1 + length, 10.0)
        if length:
            tries += step > 100
            controller.measured_draft(length, 5.0 * length)
            controller.verified(sequence, length, 0)
    assert 0 < tries < 20


def test_speculation_is_reported() -> None:
    speculation = Speculation(Stubborn(), Controller(fixed=2))
    engine = Engine(model(), EngineOptions(), speculation)
    drive(engine, [Request(prompt=[1, 2, 1, 2, 1], max_new_tokens=8)])
    stats = speculation.stats
    assert (stats.rounds + stats.plain_steps, stats.accepted) == (7, 0)
    assert stats.rounds == 6  # before the last token nothing can be gained
    assert stats.drafted == 2 * 5 + 1
    assert (stats.acceptance_rate, stats.tokens_per_step) == (0.0, 1.0)


# ---------------------------------------------------------------- trees


def tree(drawn: bool, n: int) -> tuple[list[list[int]], list[Tensor | None]]:
    """Two paths that part at the first token, and one that parts from the first path at the second token."""
    q = normal(torch.stack([distribution(3), distribution(4)]))
    numbers = [uniforms([n], [i], 2 + 3 * turn)[0] for turn in range(2) for i in range(2)]
    if not drawn:
        return [[2, 1], [4], [2, 3]], [None, None, None]
    without = q.clone()
    first = int(draw(q[:1], np.array([numbers[0]])))
    without[0, first] = 0.0
    sibling = int(draw(without[:1], np.array([numbers[2]])))
    second = int(draw(q[1:], np.array([numbers[1]])))
    without[1, second] = 0.0
    cousin = int(draw(without[1:], np.array([numbers[3]])))
    return [[first, second], [sibling], [first, cousin]], [q, q[:1], q]


@pytest.mark.parametrize("drawn", [True, False])
@pytest.mark.parametrize("biased", [False, True])
def test_a_tree_gives_tokens_as_the_model_says(drawn: bool, biased: bool) -> None:
    p = normal(torch.stack([distribution(1), distribution(2), distribution(5)]))
    counts, rounds = [0] * VOCABULARY**2, 4000
    for n in range(rounds):
        drafts, proposals = tree(drawn, n)
        accepts = [uniforms([n] * 3, [0, 1, 2], 1 + 3 * turn) * (0.7 if biased else 1.0) for turn in range(2)]
        tokens, path = follow(drafts, [p, p[:2], p], proposals, accepts, uniforms([n] * 3, [0, 1, 2]))
        assert tokens[:-1] == drafts[path][: len(tokens) - 1]
        second = tokens[1] if len(tokens) > 1 else int(draw(p[1:2], uniforms([n], [1], 7)))
        counts[tokens[0] * VOCABULARY + second] += 1
    distance = chi_square(counts, pair_expectation())
    assert distance > CHI_SQUARE[35] if biased else distance < CHI_SQUARE[35]


class Guessing(Stubborn):
    """Random trees, whose paths part at any token."""

    def propose(self, sequences: Sequence[SequenceState], lengths: Sequence[int]) -> list[Proposal]:
        rng = random.Random(sum(len(s.ids) for s in sequences))
        made = []
        for length in lengths:
            first = [rng.randrange(steps.VOCABULARY) for _ in range(length)]
            paths = []
            for _ in range(rng.randrange(6)):
                shared = rng.randrange(length)
                paths.append(
                    Proposal([*first[:shared], *(rng.randrange(steps.VOCABULARY) for _ in range(rng.randint(1, 3)))])
                )
            made.append(Proposal(first, branches=tuple(paths)))
        return made


PROPOSERS: dict[str, Callable[[], Any]] = {
    "guessing": Guessing,
    "draft model": lambda: DraftModelProposer(draft(), model(), siblings=(2, 1)),
}


@pytest.mark.parametrize("blocks", [None, 9])
@pytest.mark.parametrize("proposer", PROPOSERS)
def test_trees_do_not_change_greedy_tokens(proposer: str, blocks: int | None) -> None:
    speculation = Speculation(PROPOSERS[proposer](), Controller(fixed=3))
    engine = engine_of(speculation=speculation, **({} if blocks is None else {"blocks": blocks}))
    requests = random_requests(40, 3)
    answers = drive(engine, requests, seed=1)
    greedy = {key for key in alone(40, 3) if requests[key[0]].sampling.greedy}
    assert {key: answers[key] for key in greedy} == {key: alone(40, 3)[key] for key in greedy}
    assert speculation.stats.branches > 20
    assert blocks is not None or speculation.stats.branches_taken > 5


def test_trees_keep_the_distribution() -> None:
    prompt = [3, 1, 4, 1, 5]
    speculation = Speculation(DraftModelProposer(draft(), model(), siblings=(1, 1)), Controller(fixed=2))
    trees = Counter(ids[1] for ids in samples(speculation, prompt))
    expected = Counter(ids[1] for ids in samples(None, prompt, 1200))
    common = [token for token, count in expected.items() if count >= 40]
    assert speculation.stats.branches > 50
    assert chi_square([trees[t] for t in common], [expected[t] / 4 for t in common]) < CHI_SQUARE[35]


def test_a_branch_that_is_right_is_taken_over() -> None:
    """The draft is wrong at once, its sibling is right: two tokens a step, and the books are right."""

    class Sibling(Stubborn):
        def propose(self, sequences: Sequence[SequenceState], lengths: Sequence[int]) -> list[Proposal]:
            expected = alone_ids()
            return [
                Proposal([(expected[len(s.ids)] + 1) % steps.VOCABULARY], branches=(Proposal([expected[len(s.ids)]]),))
                for s in sequences
            ]

    @functools.cache
    def alone_ids() -> list[int]:
        (answer,) = drive(Engine(model(), EngineOptions()), [request]).values()
        return [*request.prompt, *answer.ids]

    request = Request(prompt=[1, 2, 3], max_new_tokens=13)
    speculation = Speculation(Sibling(), Controller(fixed=1))
    engine = engine_of(speculation=speculation)
    (answer,) = drive(engine, [request]).values()
    assert [*request.prompt, *answer.ids] == alone_ids()
    assert speculation.stats.branches_taken == 6 == engine.stats.steps - 1
