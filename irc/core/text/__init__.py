"""The text form of a program: `print_program` writes it, `parse` reads it back to an equal program."""

from __future__ import annotations

from irc.core.text.parser import parse
from irc.core.text.printer import print_program

__all__ = ["parse", "print_program"]
