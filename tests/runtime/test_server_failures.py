"""Many clients, clients that vanish, workers that die, and a graceful end."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from typing import Any

import httpx
import pytest
import torch

from irc.core.errors import OptionError
from irc.core.paged import PagedModel
from irc.runtime.async_engine import AsyncEngine
from irc.runtime.engine import Engine, EngineOptions
from irc.runtime.requests import Request
from irc.runtime.results import FinishReason
from tests.runtime.serving import Running, compiled, expected


def quiet(engine: Engine) -> bool:
    """Wait until nothing is left to do."""
    for _ in range(600):
        if not engine.has_work:
            return True
        time.sleep(0.05)
    return False


def test_two_hundred_streams_some_of_which_vanish() -> None:
    with Running(max_sequences=16, memory_bytes=60 * compiled().paged_model().block_bytes) as running:

        async def one(client: httpx.AsyncClient, number: int) -> str | None:
            text = ""
            body = {"prompt": "abc"[: 1 + number % 3] + "de", "max_tokens": 10, "temperature": 0, "stream": True}
            async with client.stream("POST", f"{running.url}/v1/completions", json=body) as answer:
                assert answer.status_code == 200
                async for line in answer.aiter_lines():
                    if line.startswith("data: {"):
                        text += json.loads(line[6:])["choices"][0]["text"]
                        if number % 4 == 0 and len(text) >= 2:
                            return None  # gone
            return text

        async def all_of_them() -> list[str | None]:
            limits = httpx.Limits(max_connections=None)
            async with httpx.AsyncClient(timeout=300, limits=limits) as client:
                return await asyncio.gather(*(one(client, n) for n in range(200)))

        texts = asyncio.run(all_of_them())
        whole = {text for n, text in enumerate(texts) if n % 4}
        assert whole == {expected(p + "de", 10) for p in ("a", "ab", "abc")}
        assert quiet(running.engine)
        assert running.engine.blocks.num_used == 0
        running.engine.check()
        assert running.app.state.service.engine.num_open == 0


def test_a_stopping_server_finishes_what_runs() -> None:
    with Running() as running, running.client() as client:
        stream = client.completions.create(model="tiny", prompt="abc", max_tokens=60, temperature=0, stream=True)
        text = next(iter(stream)).choices[0].text
        running.server.should_exit = True
        text += "".join(e.choices[0].text for e in stream)
    assert text == expected("abc", 60)


class Unlucky:
    """The tiny model, whose steps raise when told to."""

    def __init__(self, inner: PagedModel, errors: dict[int, BaseException]) -> None:
        self._inner, self._errors, self._count = inner, errors, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def paged_step(self, pages: Any, inputs: Any) -> torch.Tensor:
        self._count += 1
        if self._count in self._errors:
            raise self._errors[self._count]
        return self._inner.paged_step(pages, inputs)


async def tokens_of(engine: AsyncEngine, request: Request) -> tuple[list[int], FinishReason | None]:
    found, reason = [], None
    async for output in engine.stream(request):
        found += output.token_ids
        reason = output.finish_reason
    return found, reason


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_killed_worker_loses_no_request() -> None:
    model = Unlucky(compiled().paged_model(), {5: SystemExit("killed")})
    engine = AsyncEngine(Engine(model, EngineOptions()))
    requests = [Request(prompt=[1, 2, n], max_new_tokens=12) for n in range(4)]

    async def run() -> list[tuple[list[int], FinishReason | None]]:
        engine.start()
        tasks = [asyncio.create_task(tokens_of(engine, request)) for request in requests]
        made = await asyncio.gather(*tasks)
        await engine.close(timeout=10)
        return list(made)

    made = asyncio.run(run())
    assert engine.num_restarts == 1
    alone = compiled().generate([list(r.prompt) for r in requests], max_new_tokens=12, eos=()).token_ids
    assert made == [(ids, FinishReason.LENGTH) for ids in alone]
    assert engine.engine.blocks.num_used == 0


def test_a_broken_scheduler_is_started_again() -> None:
    engine = AsyncEngine(Engine(compiled().paged_model(), EngineOptions()))
    plan, failures = engine.engine.scheduler.plan, [2]

    def broken() -> Any:
        if failures[0]:
            failures[0] -= 1
            raise RuntimeError("a bug")
        return plan()

    engine.engine.scheduler.plan = broken

    async def run() -> Any:
        engine.start()
        first = await tokens_of(engine, Request(prompt=[1, 2], max_new_tokens=3))
        failures[0] = 3
        second = await tokens_of(engine, Request(prompt=[1, 2], max_new_tokens=3))
        third = await tokens_of(engine, Request(prompt=[1, 2], max_new_tokens=3))
        with contextlib.suppress(OptionError):
            await tokens_of(engine, Request(prompt=[], max_new_tokens=3))
        await engine.close(timeout=10)
        return first, second, third

    first, second, third = asyncio.run(run())
    assert first == third
    assert first[1] == FinishReason.LENGTH
    assert second == ([], FinishReason.ERROR)
    assert engine.num_open == 0
