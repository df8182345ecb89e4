"""The server that most tests of it share: they leave it as they found it."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest

from tests.runtime.serving import Running


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with Running() as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[openai.OpenAI]:
    with server.client() as made:
        yield made
