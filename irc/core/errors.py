"""Every error that irc raises on purpose. One small tree, so that a caller can catch `IrcError`."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class IrcError(Exception):
    """Base of all errors that irc raises on purpose: the message says what happened and what to do.

    `pass_name` and `node` repeat, for programs, what the message says to people.
    """

    def __init__(self, *args: object, pass_name: str | None = None, node: str | None = None) -> None:
        super().__init__(*args)
        self.pass_name = pass_name
        self.node = node


class CaptureError(IrcError):
    """A model could not be captured as a graph."""


class ParseError(IrcError):
    """Text (a program, a pipeline, a format) could not be read."""


class StorageError(IrcError):
    """A file or folder is missing, damaged or lies about its content."""


class VerificationError(IrcError):
    """A program breaks a rule of the IR."""


class NumericError(VerificationError):
    """A program computes something else than it should."""


class PassError(IrcError):
    """A pass could not do what it was asked to do."""


class OptionError(IrcError):
    """An unknown name or an option value that cannot be used."""


class TargetError(IrcError):
    """A target cannot take a program, or is missing what it needs."""


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint such as " (did you mean 'fuse-linear'?)", or the list of what is known if nothing is near."""
    options = sorted(known)
    close = difflib.get_close_matches(name, options, n=3, cutoff=0.5)
    if close:
        return " (did you mean " + " or ".join(repr(c) for c in close) + "?)"
    if not options:
        return ""
    return f" (known: {', '.join(options)})"
