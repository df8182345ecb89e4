"""Every row of docs/coverage.md is recomputed; the page must say what is so."""

from __future__ import annotations

import pytest

from tests import coverage, zoo


@pytest.mark.parametrize("name", list(zoo.ZOO))
def test_row(name: str) -> None:
    row = coverage.compute(name)
    page = coverage.recorded()
    assert name in page, "not on the page: run python -m tests.coverage"
    assert set(row.failures) == page[name], row.verdict


def test_page_lists_the_zoo() -> None:
    assert list(coverage.recorded()) == list(zoo.ZOO)
