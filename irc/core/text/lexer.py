"""Tokens of the text form, made on demand in one pass over the text."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

from irc.core.errors import ParseError

MAX_TEXT = 1 << 26
MAX_LINE = 1 << 20
MAX_DIGITS = 19

_TOKEN = re.compile(
    r"""
    (?P<space>[ \t\r]+)
  | (?P<newline>\n)
  | (?P<comment>\#[^\n]*)
  | (?P<node>%[A-Za-z_]\w*)
  | (?P<weight>@(?:\w+(?:\.\w+)*|"(?:[^"\\\n]|\\.)*"))
  | (?P<number>\d+(?:\.\d+)?(?:[eE][+-]?\d+)?)
  | (?P<word>[A-Za-z_]\w*(?:\.\w+)*)
  | (?P<string>"(?:[^"\\\n]|\\.)*")
  | (?P<mark>->|\.\.|//|\*\*|<=|>=|==|!=|[-+*/%<>=()\[\]{},:])
    """,
    re.VERBOSE | re.ASCII,
)


@dataclass(frozen=True, slots=True)
class Token:
    """`kind`: node, weight, number, word, string, mark, comment or end; `start`, `stop`: offsets in the text."""

    kind: str
    text: str
    start: int
    stop: int
    line: int


class Lexer:
    """A token at a time; comments come as tokens, spaces and line ends do not."""

    def __init__(self, text: str) -> None:
        self.text = text
        self._position = 0
        self._line = 1
        if len(text) > MAX_TEXT:
            raise ParseError(f"the text has {len(text)} characters; at most {MAX_TEXT} are read")

    def next(self) -> Token:
        """The next token; of kind `end` after the last."""
        text = self.text
        while self._position < len(text):
            start = self._position
            found = _TOKEN.match(text, start)
            if found is None:
                raise self.error(f"unexpected character {text[start]!r}", start)
            self._position = found.end()
            kind = str(found.lastgroup)
            if kind == "newline":
                self._line += 1
            elif kind != "space":
                return Token(kind, found.group(), start, found.end(), self._line)
            if found.end() - start > MAX_LINE:
                raise self.error(f"a line of more than {MAX_LINE} characters", start)
        return Token("end", "", len(text), len(text), self._line)

    def rest_of_line(self, after: Token) -> str:
        """The text from the end of a token to the end of its line; the next token is that of the next line."""
        stop = self.text.find("\n", after.stop)
        self._position = len(self.text) if stop < 0 else stop
        self._line = after.line
        rest = self.text[after.stop : self._position]
        if len(rest) > MAX_LINE:
            raise self.error(f"a line of more than {MAX_LINE} characters", after.start)
        return rest

    def error(self, message: str, start: int, stop: int | None = None) -> ParseError:
        """`message` with line and column, the line itself and a marker under the place."""
        first = self.text.rfind("\n", 0, start) + 1
        last = self.text.find("\n", start)
        line = self.text[first : len(self.text) if last < 0 else last]
        column = start - first
        width = max(1, min((stop or start + 1), first + len(line)) - start)
        number = self.text.count("\n", 0, start) + 1
        begin = max(0, column - 60)
        shown = "".join(c if c.isprintable() else " " for c in line[begin : column + 60])
        marker = " " * (column - begin) + "^" * min(width, 60)
        return ParseError(f"line {number}:{column + 1}: {message}\n  {shown}\n  {marker}")


def unquoted(text: str) -> str | None:
    """The value of a JSON string token, or None when it is not one (bad escape, half a surrogate pair)."""
    try:
        value = json.loads(text)
        value.encode("utf-8")
    except (ValueError, AttributeError):
        return None
    return str(value)
