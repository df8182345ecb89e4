"""The page at `/`: what it says of the model, and that it asks for no more than is needed."""

from __future__ import annotations

from pathlib import Path

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
