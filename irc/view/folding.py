"""Lines of names and types broken where a reader would break them.

`layers.3.attn.q_proj.weight f32[256, 256] ×5` breaks before its type, then behind a dot, then behind an underscore:
never inside a shape, and not before a count, as long as there is room for more than that.
"""

from __future__ import annotations

import re

_WORD = re.compile(r"\S+?\[[^\]]*\](?: ×\d+)?,?|\S+(?: ×\d+)?,?")


def fold(text: str, width: int) -> str:
    """The text in lines of at most `width` characters."""
    lines = [""]
    for word in _WORD.findall(text):
        joined = f"{lines[-1]} {word}" if lines[-1] else word
        if len(joined) <= width:
            lines[-1] = joined
            continue
        *whole, rest = _pieces(word, width)
        lines = [*(line for line in lines if line), *whole, rest]
    return "\n".join(lines)


def _pieces(word: str, width: int) -> list[str]:
    """A word in parts that fit: behind dots, else behind underscores, commas and spaces, else anywhere."""
    pieces = []
    while len(word) > width:
        start = word[:width]
        cut = start.rfind(".") + 1 or max(map(start.rfind, "_, ")) + 1 or width
        pieces.append(word[:cut].rstrip())
        word = word[cut:].lstrip()
    return [*pieces, word]
