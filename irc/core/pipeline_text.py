"""Reads the text of a pipeline: `name{option=value,…},…` to names and raw option values.

Nothing is looked up here: `irc.core.pipeline` makes passes of what was read.
"""

from __future__ import annotations

import dataclasses
import json
import re
from typing import Any

from irc.core import options

MAX_DEPTH = 16
"""Of lists in lists."""
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


@dataclasses.dataclass
class PassSpec:
    """A pass as written: its name and raw option values, not looked up yet."""

    name: str
    options: dict[str, options.Raw] = dataclasses.field(default_factory=dict)


class PipelineSyntaxError(ValueError):
    """One thing wrong in the text of a pipeline."""


def parse_text(text: str, problems: list[str]) -> list[PassSpec]:
    """Read `name{option=value,…},…`; syntax errors are added to `problems`, each with its place."""
    specs: list[PassSpec] = []
    reader = _Reader(text)
    if not text.strip():
        return specs
    while True:
        start = reader.at
        try:
            specs.append(reader.read_pass())
            reader.expect_end_or_comma()
        except PipelineSyntaxError as error:
            problems.append(f"{error} at column {reader.at + 1} of {text!r}")
            reader.skip_pass(start)
        if reader.at >= len(text):
            return specs
        reader.at += 1  # the comma


class _Reader:
    """A cursor over the text of a pipeline."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0

    def peek(self) -> str:
        while self.at < len(self.text) and self.text[self.at].isspace():
            self.at += 1
        return self.text[self.at : self.at + 1]

    def expect(self, char: str) -> None:
        if self.peek() != char:
            raise PipelineSyntaxError(f"expected {char!r}")
        self.at += 1

    def expect_end_or_comma(self) -> None:
        if self.peek() not in ("", ","):
            raise PipelineSyntaxError("expected ',' or '{' after the name of a pass")

    def match(self, pattern: re.Pattern[str], what: str) -> str:
        self.peek()
        found = pattern.match(self.text, self.at)
        if found is None:
            raise PipelineSyntaxError(f"expected {what}")
        self.at = found.end()
        return found[0]

    def read_pass(self) -> PassSpec:
        spec = PassSpec(self.match(_NAME, "the name of a pass"))
        if self.peek() != "{":
            return spec
        self.at += 1
        while self.peek() != "}":
            key = self.match(_NAME, "the name of an option, or '}'")
            if key in spec.options:
                raise PipelineSyntaxError(f"option {key!r} is given twice")
            self.expect("=")
            spec.options[key] = self.read_value()
            if self.peek() != ",":
                break
            self.at += 1
        self.expect("}")
        return spec

    def read_value(self, depth: int = 0) -> options.Raw:
        start = self.peek()
        if start == '"':
            try:
                value, self.at = json.JSONDecoder().raw_decode(self.text, self.at)
            except json.JSONDecodeError as error:
                raise PipelineSyntaxError(f"bad quoted text ({error.msg})") from None
            return options.Quoted(value)
        if start != "[":
            pattern = options.BARE_ITEM if depth else options.BARE
            return self.match(pattern, "a value (text with other characters needs double quotes)")
        if depth >= MAX_DEPTH:
            raise PipelineSyntaxError("lists are nested too deep")
        self.at += 1
        items: list[Any] = []
        while self.peek() != "]":
            items.append(self.read_value(depth + 1))
            if self.peek() != ",":
                break
            self.at += 1
        self.expect("]")
        return items

    def skip_pass(self, start: int) -> None:
        """Move to the comma that ends the pass begun at `start`, so that the next ones are still checked."""
        depth, self.at = 0, start
        while self.at < len(self.text):
            char = self.text[self.at]
            if char == "," and depth <= 0:
                return
            depth += (char in "{[") - (char in "}]")
            self.at += 1
