"""A random driver of the engine: requests of all kinds, arrivals, cancellations; the books are checked each step."""

from __future__ import annotations

import functools
import random
from dataclasses import dataclass, field, replace

from irc.core.paged import PagedModel
from irc.core.target import get_target
from irc.runtime.engine import Engine, EngineOptions
from irc.runtime.models import paged_model
from irc.runtime.requests import Request
from irc.runtime.results import FinishReason
from irc.runtime.sampling import Sampling
from irc.runtime.speculation.speculation import Speculation
from tests.lowering import steps

BLOCK = 4
LENGTH = 32


@functools.cache
def model() -> PagedModel:
    program = steps.step(f"insert-kv-cache{{layout=paged,block-size={BLOCK},max-length={LENGTH}}}")
    return paged_model(get_target("reference").lower(program), program)


@functools.cache
def contiguous_model() -> PagedModel:
    return paged_model(get_target("reference").lower(steps.step()), steps.step())


def random_requests(count: int, seed: int, *, sampled: bool = True) -> list[Request]:
    """Prompts of 1 to 20 tokens, many with a common beginning; a third of the requests is sampled, some take several
    samples, some have penalties or end tokens."""
    rng = random.Random(seed)
    beginning = [rng.randrange(steps.VOCABULARY) for _ in range(12)]
    made = []
    for number in range(count):
        prompt = [rng.randrange(steps.VOCABULARY) for _ in range(rng.randint(1, 12))]
        if rng.random() < 0.5:
            prompt = beginning[: rng.randint(1, 12)] + prompt[:8]
        sampling = Sampling()
        if sampled and rng.random() < 0.4:
            sampling = Sampling(temperature=rng.choice([0.5, 1.0]), top_p=rng.choice([None, 0.9]),
                                repetition_penalty=rng.choice([1.0, 1.3]))  # fmt: skip
        made.append(
            Request(
                prompt=prompt, max_new_tokens=rng.randint(1, 14), sampling=sampling, key=number * 1000,
                num_samples=rng.choice([1, 1, 1, 3]), priority=rng.choice([0, 0, 0, 1]),
                end_tokens=frozenset([rng.randrange(steps.VOCABULARY)] if rng.random() < 0.3 else []),
                client=rng.choice(["a", "b"]),
            )
        )  # fmt: skip
    return made


@dataclass
class Answer:
    ids: list[int] = field(default_factory=list)
    reason: FinishReason | None = None


Answers = dict[tuple[int, int], Answer]


def drive(
    engine: Engine, requests: list[Request], *, seed: int = 0, arrivals: float = 0.6, cancel: float = 0.0
) -> Answers:
    """Serve the requests, which arrive at random steps; what each sample got. Cancelled requests are left out."""
    rng = random.Random(seed)
    waiting, numbers, answers = list(enumerate(requests)), dict[int, int](), Answers()
    while waiting or engine.has_work:
        while waiting and (rng.random() < arrivals or not engine.has_work):
            index, request = waiting.pop(0)
            numbers[engine.add(request)] = index
        for output in engine.step():
            answer = answers.setdefault((numbers[output.request_id], output.sample), Answer())
            answer.ids += output.token_ids
            answer.reason = output.finish_reason
            assert output.error == ""
        engine.check()
        if cancel and engine.has_work and rng.random() < cancel:
            number = rng.choice(list(engine.live))
            engine.cancel(number)
            answers = {key: a for key, a in answers.items() if key[0] != numbers[number]}
            engine.check()
    assert engine.blocks.num_used == 0
    assert engine.num_running == engine.num_waiting == 0
    return answers


@functools.cache
def alone(count: int, seed: int) -> Answers:
    """What each sample gets when it is the only one: no batching, no sharing, no memory pressure."""
    answers = Answers()
    for index, request in enumerate(random_requests(count, seed)):
        for sample in range(request.num_samples):
            engine = Engine(model(), EngineOptions(prefix_cache=False, max_sequences=1))
            one = replace(request, num_samples=1, key=request.key + sample)
            answers[index, sample] = drive(engine, [one])[0, 0]
    return answers


def engine_of(*, blocks: int | None = None, speculation: Speculation | None = None, **options: object) -> Engine:
    """An engine over the tiny model with so many blocks."""
    memory = None if blocks is None else blocks * model().block_bytes
    return Engine(model(), EngineOptions(memory_bytes=memory, **options), speculation)
