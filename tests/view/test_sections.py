"""Marked sections of a page: replaced, appended, and everything around them untouched."""

from __future__ import annotations

from pathlib import Path

import pytest

from irc.view.sections import write_section


def test_replaces_one_section_and_nothing_else(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# Title\n\n<!-- a -->\nold\n<!-- /a -->\n\nwords\n\n<!-- b -->\nkept\n<!-- /b -->\n")
    write_section(page, "a", r"new \1 line")
    assert page.read_text() == (
        "# Title\n\n<!-- a -->\nnew \\1 line\n<!-- /a -->\n\nwords\n\n<!-- b -->\nkept\n<!-- /b -->\n"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["page.md"]


def test_appends_what_is_not_there(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    write_section(page, "a", "one")
    write_section(page, "b", "two")
    assert page.read_text() == "<!-- a -->\none\n<!-- /a -->\n\n<!-- b -->\ntwo\n<!-- /b -->\n"


@pytest.mark.parametrize("text", ["<!-- a -->", "<!-- /a -->\n<!-- a -->", "<!-- a --><!-- a --><!-- /a -->"])
def test_broken_marks_are_an_error_and_lose_nothing(text: str, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(text)
    with pytest.raises(ValueError, match="<!-- a -->"):
        write_section(page, "a", "x")
    assert page.read_text() == text
