"""The server, through OpenAI's own client: models, completions, streams, chats, structured answers, embeddings."""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any

import httpx
import openai
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models

import irc
from irc.serving import Serving
from tests.runtime.serving import Running, expected


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


def test_encoders_give_embeddings() -> None:
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
