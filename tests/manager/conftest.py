"""Fixtures of the pass manager's tests."""

from __future__ import annotations

import pytest

from irc.core import contract, pipeline
from irc.core.program import Program
from tests.manager import toys


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the toy passes have names, for the time of a test."""
    pipeline.load_providers()  # a first import inside the test would register the real passes in the wrong table
    monkeypatch.setattr(contract, "_PASSES", {cls.name: cls for cls in toys.ALL})
    monkeypatch.setattr(pipeline, "load_providers", lambda: None)


@pytest.fixture
def program() -> Program:
    return toys.toy_program()
