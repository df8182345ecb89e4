"""Requests that the server refuses: the field is named, limits hold, templates and grammars cannot do harm."""

from __future__ import annotations

import json
from typing import Any

import httpx
import openai
import pytest

from irc.core.errors import OptionError
from irc.runtime.server.templates import ChatTemplate
from irc.runtime.structured import Grammars
from tests.runtime.serving import END, Running, tokenizer

JSON = {"Content-Type": "application/json"}

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
