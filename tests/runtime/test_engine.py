"""The engine under a random driver: every request gets what it gets alone, whatever else happens."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import pytest
import torch

from irc.core.errors import IrcError, OptionError
from irc.core.paged import StepInputs
from irc.runtime.engine import Engine, EngineOptions
from irc.runtime.requests import Output, Request
from irc.runtime.results import FinishReason
from irc.runtime.sampling import Sampling
from irc.runtime.speculation.controller import Controller
from irc.runtime.speculation.ngram import NgramProposer
from irc.runtime.speculation.speculation import Speculation
from irc.runtime.step_inputs import StepBuilder
from tests.lowering import steps
from tests.runtime.driving import BLOCK, LENGTH, alone, contiguous_model, drive, engine_of, model, random_requests

COUNT, SEED = 70, 5


def lookup(length: int = 3) -> Speculation:
    return Speculation(NgramProposer(shortest=1), Controller(fixed=length))


SETTINGS: dict[str, dict[str, Any]] = {
    "roomy": {},
    "no prefix cache": {"prefix_cache": False},
    "chunked": {"prefill_chunk": 3, "max_batch_tokens": 9},
    "tiny memory": {"blocks": 9, "max_sequences": 8},
    "tiny memory, chunked, no prefix cache": {"blocks": 9, "prefill_chunk": 2, "prefix_cache": False},
    "few sequences": {"max_sequences": 3},
    "speculation": {"speculation": 3},
    "speculation in tiny memory": {"speculation": 4, "blocks": 9, "max_batch_tokens": 12},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_every_request_gets_what_it_gets_alone(name: str) -> None:
    options = dict(SETTINGS[name])
    speculation = lookup(options.pop("speculation")) if "speculation" in options else None
    engine = engine_of(speculation=speculation, **options)
    answers = drive(engine, random_requests(COUNT, SEED), seed=len(name))
    expected = alone(COUNT, SEED)
    assert answers.keys() == expected.keys()
    wrong = {
        key: (answers[key].ids, expected[key].ids)
        for key in expected
        # Speculation draws from the same distribution, but not the same tokens.
        if answers[key] != expected[key]
        and not (speculation and random_requests(COUNT, SEED)[key[0]].sampling.temperature)
    }
    assert wrong == {}
    if "tiny" in name:
        assert engine.scheduler.num_preemptions > 10
    if options.get("prefix_cache", True) and not speculation:
        assert engine.scheduler.prefix_hits > 0
    if speculation is not None:
        assert speculation.stats.accepted > 5


def test_requests_are_not_trivial() -> None:
    expected = alone(COUNT, SEED)
    assert len({tuple(a.ids) for a in expected.values()}) > COUNT / 2
    assert {a.reason for a in expected.values()} == {FinishReason.LENGTH, FinishReason.EOS}


@pytest.mark.parametrize("blocks", [9, 40])
def test_cancellations_disturb_nobody(blocks: int) -> None:
    engine = engine_of(blocks=blocks)
    answers = drive(engine, random_requests(COUNT, SEED), seed=2, cancel=0.15)
    expected = alone(COUNT, SEED)
    assert 5 < len({key[0] for key in expected}) - len({key[0] for key in answers}) < COUNT / 2
    assert all(answer == expected[key] for key, answer in answers.items())


def test_contiguous_cache_gives_the_same() -> None:
    requests = random_requests(40, SEED)
    engine = Engine(contiguous_model(), EngineOptions(max_sequences=6))
    assert drive(engine, requests) == {key: a for key, a in alone(COUNT, SEED).items() if key[0] < 40}


def test_equals_the_plain_model() -> None:
    for index, request in enumerate(random_requests(12, SEED)):
        if request.sampling.temperature or request.end_tokens:
            continue
        ids = torch.tensor([request.prompt])
        with torch.no_grad():
            for _ in range(request.max_new_tokens):
                ids = torch.cat((ids, steps.language_model()(ids)[:, -1:].argmax(-1)), 1)
        assert alone(COUNT, SEED)[index, 0].ids == ids[0, len(request.prompt) :].tolist()


# ---------------------------------------------------------------- the books


def test_check_sees_a_leak_and_a_block_owned_twice() -> None:
    engine = engine_of(blocks=20)
    engine.add(Request(prompt=[1, 2, 3, 4, 5, 6], max_new_tokens=5))
    engine.add(Request(prompt=[9, 8], max_new_tokens=5))
    engine.step()
    engine.check()
    first, second = engine.scheduler.running
    second.blocks.append(first.blocks[0])
    with pytest.raises(IrcError, match="references ≠ sequences that hold the block"):
        engine.check()
    second.blocks.pop()
    engine.blocks.refs[first.blocks[0]] = 2
    with pytest.raises(IrcError, match="references ≠"):
        engine.check()
    engine.blocks.refs[first.blocks[0]] = 1
    engine.blocks._free.pop()
    with pytest.raises(IrcError, match=r"free .* \+ cached .* \+ used .* ≠ 20"):
        engine.check()


def test_prefixes_are_compared_by_tokens() -> None:
    """Blocks of equal tokens behind different beginnings are different blocks."""
    engine = engine_of(blocks=20)
    prompts = [[1, 2, 3, 4, 9, 9, 9, 9, 5], [5, 6, 7, 8, 9, 9, 9, 9, 5], [1, 2, 3, 4, 9, 9, 9, 9, 6]]
    hits = []
    for prompt in prompts:
        before = engine.scheduler.prefix_hits
        drive(engine, [Request(prompt=prompt, max_new_tokens=1)])
        hits.append(engine.scheduler.prefix_hits - before)
    assert hits == [0, 0, 8]


def test_samples_share_the_prompt() -> None:
    engine = engine_of(blocks=40)
    sampling = Sampling(temperature=1.0)
    engine.add(Request(prompt=list(range(10)), max_new_tokens=4, num_samples=4, sampling=sampling))
    engine.step()
    assert len(engine.scheduler.running) == 4
    assert engine.blocks.num_used == 3  # 10 tokens in blocks of 4, held by all of them
    engine.step()
    engine.check()
    assert engine.blocks.num_used == 2 + 4  # each writes into a last block of its own
    assert engine.stats.computed_tokens == 10 + 4


# ---------------------------------------------------------------- limits


def run(engine: Engine, *requests: Request) -> dict[int, list[Output]]:
    for request in requests:
        engine.add(request)
    found: dict[int, list[Output]] = {}
    while engine.has_work:
        for output in engine.step():
            found.setdefault(output.request_id, []).append(output)
        engine.check()
    return found


def test_memory_is_respected_and_what_cannot_fit_is_refused() -> None:
    engine = engine_of(blocks=3)
    assert engine.num_blocks == 3
    assert sum(page.numel() * page.element_size() for page in engine._pages) <= 3 * model().block_bytes
    with pytest.raises(
        OptionError, match=r"can grow to 14 tokens, which take 4096 bytes of cache; the engine has 3072"
    ):
        engine.add(Request(prompt=[1] * 10, max_new_tokens=5))
    assert run(engine, Request(prompt=[1] * 10, max_new_tokens=3))
    with pytest.raises(OptionError, match="does not hold one block"):
        Engine(model(), EngineOptions(memory_bytes=10))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": []}, "the prompt is empty"),
        ({"prompt": [1] * (LENGTH + 1)}, "has 33 tokens, the cache holds at most 32"),
        ({"prompt": [-1]}, "has token -1; ids run from 0 to 63"),
        ({"prompt": [1], "max_new_tokens": 0, "num_samples": 0}, r"max_new_tokens must .*number of samples must"),
        ({"prompt": [1], "sampling": Sampling(logit_bias={64: 1.0})}, "logit_bias names token 64"),
    ],
)
def test_requests_that_cannot_be_served(options: dict[str, Any], message: str) -> None:
    engine = engine_of()
    with pytest.raises(OptionError, match=message):
        engine.add(Request(**options))
    assert not engine.has_work


def test_deadline() -> None:
    engine = engine_of()
    found = run(
        engine,
        Request(prompt=[1, 2], max_new_tokens=20, deadline=time.monotonic() - 1),
        Request(prompt=[1, 2], max_new_tokens=3, deadline=time.monotonic() + 100),
    )
    assert [found[i][-1].finish_reason for i in (0, 1)] == [FinishReason.DEADLINE, FinishReason.LENGTH]


def test_priorities_and_fairness() -> None:
    """One place: the urgent request takes it from the one that runs; clients take turns."""
    engine = engine_of(max_sequences=1)
    order: list[int] = []
    engine.add(Request(prompt=[1, 2, 3], max_new_tokens=6, priority=1, client="a"))
    engine.step()
    for client in ("a", "a", "b"):
        engine.add(Request(prompt=[4, 5], max_new_tokens=4, priority=1, client=client))
    engine.add(Request(prompt=[6], max_new_tokens=2, priority=0, client="a"))
    while engine.has_work:
        for output in engine.step():
            if output.finish_reason is not None:
                order.append(output.request_id)
    assert order == [4, 3, 0, 1, 2]


def test_decoding_goes_on_beside_a_long_prompt() -> None:
    engine = engine_of(prefill_chunk=2)
    engine.add(Request(prompt=[1], max_new_tokens=10))
    engine.step()
    engine.add(Request(prompt=[3] * 20, max_new_tokens=2))
    for _ in range(8):
        assert [o.request_id for o in engine.step()] == [0]


# ---------------------------------------------------------------- failures


class Failing:
    """The tiny model; steps with token 13 at position 0 raise."""

    def __init__(self) -> None:
        self.__dict__.update({name: getattr(model(), name) for name in (
            "block_size", "block_bytes", "max_length", "vocabulary_size", "max_sequences", "notice", "new_pages",
            "copy_blocks",
        )})  # fmt: skip

    def paged_step(self, pages: Any, inputs: StepInputs) -> torch.Tensor:
        if bool(((inputs.tokens == 13) & (inputs.positions == 0)).any()):
            raise RuntimeError("an unlucky token")
        return model().paged_step(pages, inputs)


def test_inputs_brought_forward_are_those_made_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sequences that go on decoding reuse their plan and their tensors: what the model gets is the same."""
    engine, reused = engine_of(max_sequences=6), 0
    build = engine._builder.build

    def checked(works: Any, crossed: Any = None) -> StepInputs:
        nonlocal reused
        made = build(works, crossed)
        moved = [work.sequence.moved for work in works]
        for work in works:
            work.sequence.moved = True
        fresh = StepBuilder(BLOCK, 64, LENGTH // BLOCK).build(works)
        for work, before in zip(works, moved, strict=True):
            work.sequence.moved = before
        for given, expected in zip(made.flat(), fresh.flat(), strict=True):
            if given.dim() == 2:  # what lies behind a sequence's blocks does not matter
                for row, work in enumerate(works):
                    assert given[row, : len(work.sequence.blocks)].tolist() == work.sequence.blocks
            else:
                assert torch.equal(given, expected)
        reused += crossed is not None
        return made

    monkeypatch.setattr(engine._builder, "build", checked)
    drive(engine, [Request(prompt=[1] * n, max_new_tokens=20 - n) for n in (1, 2, 3, 5, 8)], arrivals=0.9)
    assert reused > 8


def test_a_failing_request_takes_no_other_with_it() -> None:
    engine = Engine(Failing(), EngineOptions())
    prompts = [[1, 2, 3], [13, 1], [7, 2]]
    found = run(engine, *(Request(prompt=p, max_new_tokens=5) for p in prompts))
    assert found[1][-1].finish_reason == FinishReason.ERROR
    assert found[1][-1].error == "RuntimeError: an unlucky token"
    for number in (0, 2):
        expected = run(engine_of(), Request(prompt=prompts[number], max_new_tokens=5))[0]
        assert [o.token_ids for o in found[number]] == [o.token_ids for o in expected]
    assert engine.blocks.num_used == 0


def test_restart_computes_again() -> None:
    request = Request(prompt=[1, 2, 3, 4, 5], max_new_tokens=8)
    expected = [t for o in run(engine_of(), request)[0] for t in o.token_ids]
    engine = engine_of()
    engine.add(request)
    tokens = [t for _ in range(3) for o in engine.step() for t in o.token_ids]
    engine.restart()
    engine.check()
    assert engine.num_waiting == 1
    assert tokens + [t for o in run(engine).get(0, []) for t in o.token_ids] == expected


def test_logprobs_are_the_models_own() -> None:
    found = run(engine_of(), Request(prompt=[1, 5, 9], max_new_tokens=2, logprobs=3))[0]
    with torch.no_grad():
        logits = steps.language_model()(torch.tensor([[1, 5, 9, *found[0].token_ids]]))[0, 2:].log_softmax(-1)
    for output, row in zip(found, logits, strict=True):
        (one,) = output.logprobs
        assert one.token_id == output.token_ids[0]
        assert one.logprob == pytest.approx(float(row[one.token_id]), abs=1e-4)
        assert [t for t, _ in one.top] == row.topk(3).indices.tolist()
        assert [p for _, p in one.top] == pytest.approx(row.topk(3).values.tolist(), abs=1e-4)


def test_options_are_checked() -> None:
    with pytest.raises(OptionError, match=r"max_batch_tokens must be at least 1, not 0; max_sequences must"):
        EngineOptions(max_batch_tokens=0, max_sequences=0)
    assert replace(EngineOptions(), max_sequences=2).max_sequences == 2
    assert model().block_size == BLOCK


def test_a_step_that_fails_once_while_all_decode_costs_nobody_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    requests = [Request(prompt=[1, 2, number], max_new_tokens=12) for number in (3, 4, 5)]
    expected = drive(engine_of(), requests, arrivals=1.0)
    engine = engine_of()
    paged_step, count = engine.model.paged_step, 0

    def failing(pages: Any, inputs: StepInputs) -> torch.Tensor:
        nonlocal count
        count += 1
        if count == 8:  # by then all have come
            raise RuntimeError("for once")
        return paged_step(pages, inputs)

    monkeypatch.setattr(engine.model, "paged_step", failing)
    assert drive(engine, requests, arrivals=1.0) == expected
    assert count > 8
