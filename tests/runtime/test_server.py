"""The server, through OpenAI's own client: answers, streams, errors by field, clients that vanish, a graceful end."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
import torch
import uvicorn
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

import irc
from irc.core.errors import OptionError
from irc.core.paged import PagedModel
from irc.demo.tinypy import TinyPy, TinyPyConfig
from irc.runtime.async_engine import AsyncEngine
from irc.runtime.engine import Engine, EngineOptions
from irc.runtime.requests import Request
from irc.runtime.results import FinishReason
from irc.runtime.server.templates import ChatTemplate
from irc.runtime.structured import Grammars
from irc.serving import Serving

CHARACTERS = 'abcdefghijklmnopqrstuvwxyz0123456789 {}[]":,.-_\n'
END = len(CHARACTERS)
JSON = {"Content-Type": "application/json"}


@functools.cache
def tokenizer() -> Tokenizer:
    """A token a character, and one that ends a text."""
    byte_level = {" ": "Ġ", "\n": "Ċ"}
    vocabulary = {byte_level.get(c, c): i for i, c in enumerate(CHARACTERS)}
    made = Tokenizer(models.BPE(vocabulary, [], unk_token=None))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken("<end>", special=True)])
    assert made.token_to_id("<end>") == END
    return made


@functools.cache
def compiled() -> irc.Compiled:
    torch.manual_seed(0)
    config = TinyPyConfig(
        vocab_size=END + 1, hidden_size=32, num_layers=1, num_heads=4, intermediate_size=64, max_positions=256
    )
    model = TinyPy(config).eval()
    model.lm_head.weight = torch.nn.Parameter(torch.randn(END + 1, 32))
    ids = torch.randint(0, END, (2, 9))
    return irc.compile(
        model, "insert-kv-cache{layout=paged,block-size=8,max-length=160}", example_inputs=ids,
        dynamic=({0: "B", 1: "S"},), tokenizer=tokenizer(), verify="off",
    )  # fmt: skip


class Running:
    """A server in a thread."""

    def __init__(self, **options: Any) -> None:
        self.app = Serving(compiled(), name="tiny", **options).app
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        config = uvicorn.Config(self.app, port=self.port, log_level="error", timeout_graceful_shutdown=20)
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.url = f"http://127.0.0.1:{self.port}"

    @property
    def engine(self) -> Engine:
        return self.app.state.service.engine.engine

    def client(self, **options: Any) -> openai.OpenAI:
        return openai.OpenAI(
            base_url=f"{self.url}/v1", api_key=options.pop("api_key", "none"), max_retries=0, **options
        )

    def __enter__(self) -> Running:
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)
        return self

    def __exit__(self, *_: object) -> None:
        self.server.should_exit = True
        self.thread.join(30)
        assert not self.thread.is_alive()


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with Running() as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[openai.OpenAI]:
    with server.client() as made:
        yield made


def expected(prompt: str, count: int) -> str:
    text = compiled().generate(prompt, max_new_tokens=count).text
    assert isinstance(text, str)
    return text


# ---------------------------------------------------------------- answers


def test_models_health_metrics_and_page(server: Running, client: openai.OpenAI) -> None:
    assert [m.id for m in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}
    client.completions.create(model="tiny", prompt="abc", max_tokens=3)
    page = httpx.get(f"{server.url}/metrics").text
    assert re.search(r"irc_tokens_generated_total [1-9]", page)
    assert 'irc_http_requests_total{path="/v1/completions",status="200"}' in page
    assert "<textarea" in httpx.get(server.url).text


def test_completions(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="tiny", prompt="abc", max_tokens=12, temperature=0)
    assert answer.choices[0].text == expected("abc", 12)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (3, 12)
    several = client.completions.create(model="tiny", prompt=["abc", "x y"], max_tokens=5, temperature=0)
    assert [c.text for c in several.choices] == [expected("abc", 5), expected("x y", 5)]
    ids = client.completions.create(model="tiny", prompt=[0, 1, 2], max_tokens=5, temperature=0)
    assert ids.choices[0].text == expected("abc", 5)


def test_streamed_completion_equals_the_whole(client: openai.OpenAI) -> None:
    stream = client.completions.create(
        model="tiny", prompt="abc", max_tokens=12, temperature=0, stream=True, stream_options={"include_usage": True}
    )
    events = list(stream)
    assert "".join(e.choices[0].text for e in events if e.choices) == expected("abc", 12)
    assert events[-2].choices[0].finish_reason == "length"
    assert events[-1].usage is not None
    assert events[-1].usage.total_tokens == 15


def test_stop_texts(client: openai.OpenAI) -> None:
    full = expected("abc", 12)
    stop = full[4:6]
    answer = client.completions.create(model="tiny", prompt="abc", max_tokens=12, temperature=0, stop=[stop, "@@"])
    assert answer.choices[0].text == full[: full.index(stop)]
    assert answer.choices[0].finish_reason == "stop"


def test_samples_and_seeds(client: openai.OpenAI) -> None:
    def texts(seed: int) -> list[str]:
        answer = client.completions.create(model="tiny", prompt="abc", max_tokens=8, temperature=1, n=3, seed=seed)
        return [c.text for c in answer.choices]

    first = texts(1)
    assert len(set(first)) == 3
    assert texts(1) == first
    assert texts(2) != first


def test_logprobs(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="tiny", prompt="abc", max_tokens=3, temperature=0, logprobs=2)
    found = answer.choices[0].logprobs
    assert found is not None
    assert "".join(found.tokens or []) == answer.choices[0].text
    assert found.text_offset == [0, 1, 2]
    for token, logprob, top in zip(
        found.tokens or [], found.token_logprobs or [], found.top_logprobs or [], strict=True
    ):
        assert len(top) == 2
        assert top[token] == logprob == max(top.values()) < 0
    chat = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "abc"}], max_tokens=2, temperature=0, logprobs=True,
        top_logprobs=3,
    )  # fmt: skip
    content = chat.choices[0].logprobs
    assert content is not None
    assert [len(c.top_logprobs) for c in content.content or []] == [3, 3]


def test_chat(client: openai.OpenAI) -> None:
    messages: Any = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "hi"}]},
    ]
    answer = client.chat.completions.create(model="tiny", messages=messages, max_completion_tokens=6, temperature=0)
    assert answer.choices[0].message.content == expected("be brief\nhi\n", 6)
    stream = client.chat.completions.create(model="tiny", messages=messages, max_tokens=6, temperature=0, stream=True)
    parts = list(stream)
    assert parts[0].choices[0].delta.role == "assistant"
    assert "".join(p.choices[0].delta.content or "" for p in parts) == answer.choices[0].message.content


def test_json_schema(client: openai.OpenAI) -> None:
    schema = {
        "type": "object", "additionalProperties": False, "required": ["size", "name"],
        "properties": {"size": {"type": "integer", "minimum": 0, "maximum": 99},
                       "name": {"type": "string", "maxLength": 5}},
    }  # fmt: skip
    for seed in range(3):
        answer = client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "give"}], max_tokens=120, temperature=1, seed=seed,
            response_format={"type": "json_schema", "json_schema": {"name": "thing", "schema": schema}},
        )  # fmt: skip
        assert answer.choices[0].finish_reason == "stop"
        made = json.loads(answer.choices[0].message.content or "")
        assert set(made) == {"size", "name"}
        assert 0 <= made["size"] <= 99
        assert len(made["name"]) <= 5


def test_regex_beyond_the_interface(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model="tiny", prompt="abc", max_tokens=30, temperature=1, seed=4,
        extra_body={"response_format": {"type": "regex", "regex": "[0-9]{4}-[a-c]{2}"}},
    )  # fmt: skip
    assert re.fullmatch(r"[0-9]{4}-[a-c]{2}", answer.choices[0].text)


# ---------------------------------------------------------------- bad input

BAD: dict[str, tuple[dict[str, Any], str | None, str]] = {
    "too long": ({"prompt": "a" * 200}, "prompt", "has 200 tokens, the cache holds at most 160"),
    "empty": ({"prompt": ""}, "prompt", "the prompt is empty"),
    "unknown parameter": ({"prompt": "a", "temprature": 1}, "temprature", "unknown parameter: temprature"),
    "negative": ({"prompt": "a", "max_tokens": -1}, "max_tokens", "greater than or equal to 1"),
    "negative token": ({"prompt": [3, -1]}, "prompt", "greater than or equal to 0"),
    "token too large": ({"prompt": [3, 999]}, "prompt", "has token 999"),
    "no number": ({"prompt": "a", "temperature": "hot"}, "temperature", "valid number"),
    "out of range": ({"prompt": "a", "top_p": 1.5}, "top_p", "less than or equal to 1"),
    "no prompt": ({}, "prompt", "Field required"),
    "bias": ({"prompt": "a", "logit_bias": {"x": 1}}, "logit_bias", "the keys of logit_bias are token ids"),
    "biased token": ({"prompt": "a", "logit_bias": {"999": 1}}, "logit_bias", "logit_bias names token 999"),
    "best_of": ({"prompt": "a", "best_of": 3}, "best_of", "best_of=3 must equal n=1"),
    "stop": ({"prompt": "a", "stop": ""}, "stop", "a stop text must not be empty"),
    "n": ({"prompt": "a", "n": 1000}, "n", "more than 64 samples"),
    "surrogate": ({"prompt": "\ud800"}, "prompt", "no valid Unicode text"),
    "schema": (
        {"prompt": "a", "response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "nonsense"}}}},
        "response_format", "this json_schema cannot be used"),
    "regex": (
        {"prompt": "a", "response_format": {"type": "regex", "regex": "(("}}, "response_format", "cannot be used"),
    "no schema": ({"prompt": "a", "response_format": {"type": "json_schema"}}, "response_format.json_schema", "needs"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_fields_are_named(server: Running, case: str) -> None:
    body, field, message = BAD[case]
    answer = httpx.post(f"{server.url}/v1/completions", content=json.dumps({"model": "tiny", **body}), headers=JSON)
    error = answer.json()["error"]
    assert answer.status_code == 400
    assert error["type"] == "invalid_request_error"
    assert message in error["message"]
    assert error["param"] is not None
    assert error["param"].split(".")[0] == (field or "").split(".")[0]


@pytest.mark.parametrize("body", [b"{", b'{"prompt": "\xff\xfe"}', b"[1]", b"null", b""])
def test_bodies_that_are_no_request(server: Running, body: bytes) -> None:
    answer = httpx.post(f"{server.url}/v1/completions", content=body, headers=JSON)
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"


def test_errors_are_those_of_the_client_library(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="no model is called 'gpt'"):
        client.completions.create(model="gpt", prompt="a")
    with pytest.raises(openai.BadRequestError, match="top_logprobs needs logprobs"):
        client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "a"}], top_logprobs=2)
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model="tiny", input="a")


def test_key_limits_and_body_size() -> None:
    with Running(api_key="secret", max_new_tokens=8, timeout_s=60) as running:
        with running.client(api_key="wrong") as wrong, pytest.raises(openai.AuthenticationError):
            wrong.completions.create(model="tiny", prompt="a")
        assert httpx.get(f"{running.url}/health").status_code == 200
        with running.client(api_key="secret") as right:
            assert right.completions.create(model="tiny", prompt="a", max_tokens=8).choices
            with pytest.raises(openai.BadRequestError, match="max_tokens is 9; this server gives at most 8"):
                right.completions.create(model="tiny", prompt="a", max_tokens=9)
        headers = {"Authorization": "Bearer secret"}
        large = httpx.post(f"{running.url}/v1/completions", content=b" " * (5 << 20), headers=headers)
        assert (large.status_code, large.json()["error"]["type"]) == (413, "request_too_large")


# ---------------------------------------------------------------- many, vanishing, failing


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
    engine = AsyncEngine(Engine(model, EngineOptions()))  # type: ignore[arg-type]
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

    engine.engine.scheduler.plan = broken  # type: ignore[method-assign]

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


# ---------------------------------------------------------------- parts


@pytest.mark.parametrize(
    "template",
    ["{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}", "{% for m in messages %}{{ m.x.y }}{% endfor %}",
     "{{ raise_exception('not like this') }}", "{{ 1 / 0 }}"],
)  # fmt: skip
def test_templates_are_rendered_in_a_sandbox(template: str) -> None:
    with pytest.raises(OptionError, match="cannot be made from these messages"):
        ChatTemplate(template).render([{"role": "user", "content": "x"}])
    with pytest.raises(OptionError, match="cannot be read"):
        ChatTemplate("{% for %}")


def test_grammars_need_an_end_token_and_a_readable_grammar() -> None:
    with pytest.raises(OptionError, match="needs an end token"):
        Grammars(tokenizer(), END + 1, ())
    with pytest.raises(OptionError, match="this grammar cannot be used"):
        Grammars(tokenizer(), END + 1, (END,)).of("grammar", "start: undefined_rule")


def test_encoders_give_embeddings() -> None:
    import transformers

    letters = Tokenizer(models.BPE({c: i for i, c in enumerate("abcdefgh")}, []))
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48
    )
    encoder = irc.compile(transformers.BertModel(config).eval(), [], verify="off", tokenizer=letters)
    app = Serving(encoder, name="encoder").app

    async def ask(body: dict[str, Any]) -> httpx.Response:
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.post("/v1/embeddings", json=body)

    answer = asyncio.run(ask({"model": "encoder", "input": ["abc", "fg", "abc"]})).json()
    vectors = [torch.tensor(entry["embedding"]) for entry in answer["data"]]
    torch.testing.assert_close(vectors[0], vectors[2])
    assert float(vectors[0].norm()) == pytest.approx(1.0, abs=1e-5)
    assert float((vectors[0] - vectors[1]).abs().max()) > 1e-3
    assert answer["usage"]["total_tokens"] == 8
    wrong = asyncio.run(ask({"input": [[1, 10**6]]}))
    assert wrong.status_code == 400
    assert "input 0 has an id outside" in wrong.json()["error"]["message"]
