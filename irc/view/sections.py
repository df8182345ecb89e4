"""Sections of a Markdown page that a program writes, each between two marks; the rest of the page is people's.

<!-- weights -->
… replaced as a whole …
<!-- /weights -->
"""

from __future__ import annotations

import os
import re
from pathlib import Path


def write_section(page: str | Path, name: str, text: str) -> None:
    """Replace the section `name` of a page, or append it; the file is written aside and renamed.

    Raises:
        ValueError: the page has the section's first mark without the last, or several of them.
    """
    page = Path(page)
    before = page.read_text(encoding="utf-8") if page.exists() else ""
    first, last = f"<!-- {name} -->", f"<!-- /{name} -->"
    section = f"{first}\n{text.strip()}\n{last}"
    if (before.count(first), before.count(last)) not in ((0, 0), (1, 1)):
        raise ValueError(f"{page} must have {first} and {last} once each, or not at all")
    if first in before:
        marks = re.compile(re.escape(first) + r".*" + re.escape(last), re.DOTALL)
        if marks.search(before) is None:
            raise ValueError(f"{page} has {last} before {first}")
        after = marks.sub(lambda _: section, before)
    else:
        after = f"{before.rstrip()}\n\n{section}\n".lstrip()
    aside = page.with_name(f".{page.name}.part")
    aside.write_text(after, encoding="utf-8")
    os.replace(aside, page)
