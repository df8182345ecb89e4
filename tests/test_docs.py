"""The pages tell the truth: every Python block of a page runs, in order, in one namespace.

A block that starts with `# raises: Name` must raise that error.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [p for p in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))) if "```python" in p.read_text()]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_code_on_the_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = page.read_text()
    namespace: dict[str, object] = {"__name__": f"page_{page.stem}"}
    for found in BLOCK.finditer(text):
        line = text[: found.start()].count("\n") + 2
        # The padding makes tracebacks show the page's own line numbers.
        code = compile("\n" * (line - 1) + found[1], str(page), "exec", dont_inherit=True)
        expected = re.match(r"# raises: (\w+)", found[1])
        if expected is None:
            exec(code, namespace)
            continue
        with pytest.raises(Exception) as caught:  # noqa: PT011 - the page names the type
            exec(code, namespace)
        assert type(caught.value).__name__ == expected[1], f"{page.name}:{line}"


def test_pages_were_found() -> None:
    assert {p.name for p in PAGES} >= {"README.md", "tutorial.md"}


def test_local_links_lead_somewhere() -> None:
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")):
        for link in re.findall(r"\]\((?!http)([^)]+)\)", page.read_text()):
            file, _, heading = link.partition("#")
            target = page.parent / file if file else page
            assert target.exists(), f"{page.name} links to {link}, which does not exist"
            assert not heading or heading in headings(target), f"{page.name} links to {link}: no such heading"


def headings(page: Path) -> set[str]:
    """The anchors of a page: headings in small letters, blanks as hyphens, other signs left out."""
    found = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in found}
