"""The page at `/`: what it says of the model, and that it asks for no more than is needed."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import httpx
import pytest

from irc.runtime.server.page import render_page
from tests.runtime.serving import Running


def test_it_continues_texts_unless_the_model_was_taught_a_chat(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "{{ messages[0].content }}"}')
    with Running() as plain, Running(folder=tmp_path) as taught:
        pages = [httpx.get(running.url).text for running in (plain, taught)]
    assert ['name="chat" checked' in page for page in pages] == [False, True]
    assert all("<title>tiny · irc</title>" in page and 'type="password"' not in page for page in pages)


def test_it_asks_for_the_key_where_there_is_one() -> None:
    with Running(api_key="secret") as running:
        answer = httpx.get(running.url)
    assert answer.status_code == 200
    assert 'name="key"' in answer.text
    assert "secret" not in answer.text


def test_an_encoder_has_nothing_to_type_into() -> None:
    page = render_page("minilm", generates=False, chat=False, key=False)
    assert "/v1/embeddings" in page
    assert "<form" not in page
    assert "<script" not in page


@pytest.mark.parametrize("name", ["<b>bold</b>", '"><script>alert(1)</script>'])
def test_names_are_text(name: str) -> None:
    page = render_page(name, generates=True, chat=True, key=True)
    assert name not in page
    assert "&lt;" in page


SCRIPT = render_page("tiny", generates=True, chat=True, key=True).partition("<script>")[2]
SENT: dict[str, Any] = {
    "stream": True, "stream_options": {"include_usage": True}, "max_tokens": 5, "temperature": 0,
    "messages": [{"role": "user", "content": "abc"}], "prompt": "abc",
}  # fmt: skip
ROUTES = {"/v1/chat/completions": ("prompt", "text"), "/v1/completions": ("messages", "delta")}
"""What the script leaves out and does not read when it asks there."""


@pytest.mark.parametrize("route", ROUTES)
def test_the_script_sends_and_reads_what_the_server_has(server: Running, route: str) -> None:
    assert set(re.findall(r"'(/v1/[^']*)'", SCRIPT)) == set(ROUTES)
    other_field, other_choice = ROUTES[route]
    literal = re.search(r"const body = \{(.*?)\n  \};", SCRIPT, re.DOTALL)
    assert literal is not None
    fields = set(re.findall(r"(\w+):", literal[1])) - {"include_usage", other_field}  # the last is within an option
    with httpx.stream("POST", server.url + route, json={name: SENT[name] for name in fields}) as answer:
        assert answer.status_code == 200
        *events, end = "".join(answer.iter_text()).split("\n\n")
    assert end == ""
    assert events.pop() == "data: [DONE]"
    pieces = [json.loads(event.removeprefix("data: ")) for event in events]

    read = set(re.findall(r"\b((?:piece|choice)(?:\.\w+)+)", SCRIPT))
    assert {"piece.choices", "piece.usage.completion_tokens", "choice.finish_reason"} < read
    choices = [choice for piece in pieces for choice in piece["choices"]]
    for path in read:
        start, *names = path.split(".")
        if names[0] != other_choice:
            assert any(has(value, names) for value in (pieces if start == "piece" else choices)), path


def has(value: Any, names: list[str]) -> bool:
    return not names or (isinstance(value, dict) and names[0] in value and has(value[names[0]], names[1:]))


def test_what_is_refused_says_why_where_the_script_looks(server: Running) -> None:
    assert "said?.error?.message" in SCRIPT
    answer = httpx.post(f"{server.url}/v1/completions", json={"prompt": "a", "max_tokens": 0})
    assert answer.status_code == 400
    assert "max_tokens" in answer.json()["error"]["message"]
