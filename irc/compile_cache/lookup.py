"""One call of `irc.compile` with a cache: whether it was kept, and keeping it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from irc.compile_cache.entry import Kept, find, keep, secret
from irc.compile_cache.identity import Doubt
from irc.compile_cache.request import request_key
from irc.core.contract import Pass
from irc.core.report import Report
from irc.core.target import Target


@dataclass
class Lookup:
    """What a cache folder holds for a compilation.

    Attributes:
        kept: the entry, if there is one that holds.
        key: of the compilation; None: it cannot be kept.
        reason: why nothing was taken.
    """

    folder: Path
    key: str | None
    kept: Kept | None = None
    reason: str = ""

    def keep(self, captured: Callable[[], str], report: Report, save: Callable[[Path], Any]) -> str:
        """Keep what was compiled; a note for its report."""
        if self.key is None:
            return f"not kept in {self.folder}: {self.reason}"
        try:
            keep(self.folder, self.key, captured=captured(), report=report, save=save)
        except Doubt as doubt:
            return f"not kept in {self.folder}: {doubt}"
        return f"kept in {self.folder} ({self.reason})"


def look_up(
    folder: Path, model: Any, passes: Sequence[Pass] | None, target: Target, options: Mapping[str, Any] | None,
    watched: Mapping[str, Any], **others: Any,
) -> Lookup:  # fmt: skip
    """Look for a compilation.

    Args:
        watched: arguments that must not be given, because they ask for more than a result: what for → the argument.
        others: arguments that decide the result.
    """
    try:
        for what, value in watched.items():
            if value is not None and value is not False and value != () and value != {}:
                raise Doubt(f"{what} is asked for")
        key = request_key(model, passes, target, options, secret(folder), **others)
        found = find(folder, key)
    except Doubt as doubt:
        return Lookup(folder, None, reason=str(doubt))
    return Lookup(folder, key, found) if isinstance(found, Kept) else Lookup(folder, key, reason=found)
