"""The text form of a program: `print_program` writes it, `parse` reads it back to an equal program."""

from __future__ import annotations

from irc.core.listing.printer import print_program
from irc.core.text.parser import parse

__all__ = ["parse", "print_program"]
