"""What lies beside an artifact in a saved `Compiled`: which target, how sequences end, the tokenizer.

compiled.json    target, name, end-of-sequence tokens
tokenizer.json   the tokenizer in the form of the `tokenizers` library, where it has that form
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from irc.core.errors import StorageError

_SETTINGS, _TOKENIZER = "compiled.json", "tokenizer.json"


@dataclass(frozen=True)
class Settings:
    """What a folder says of a compiled model: its target, its name, the tokens that end a sequence."""

    target: str
    name: str
    eos: frozenset[int] | None


def write_settings(folder: Path, settings: Settings, tokenizer: Any) -> None:
    """Write settings, and the tokenizer if it can be written, into the folder of an artifact."""
    eos = sorted(settings.eos) if settings.eos is not None else None
    entry = {"target": settings.target, "name": settings.name, "eos": eos}
    (folder / _SETTINGS).write_text(json.dumps(entry) + "\n")
    text = _tokenizer_json(tokenizer)
    if text is not None:
        (folder / _TOKENIZER).write_text(text)


def holds_settings(folder: Path) -> bool:
    """Whether a compiled model was saved in the folder."""
    return (folder / _SETTINGS).is_file()


def read_settings(folder: Path) -> Settings:
    """What a folder says.

    Raises:
        StorageError: it holds no compiled model, or is damaged.
    """
    path = folder / _SETTINGS
    try:
        entry = json.loads(path.read_text())
    except FileNotFoundError:
        reason = f"it has no {_SETTINGS}, which Compiled.save writes" if folder.is_dir() else "there is no such folder"
        raise StorageError(f"{folder} is no compiled model: {reason}") from None
    except (OSError, ValueError) as error:
        raise StorageError(f"{path} is damaged: {error}") from None
    eos = entry.get("eos") if isinstance(entry, dict) else 0
    if not isinstance(entry, dict) or not isinstance(entry.get("target"), str) or not isinstance(eos, list | None):
        raise StorageError(f"{path} is damaged")
    if any(not isinstance(token, int) for token in eos or ()):
        raise StorageError(f"{path} is damaged: end tokens are integers, not {eos!r}")
    return Settings(entry["target"], str(entry.get("name", folder.name)), frozenset(eos) if eos is not None else None)


def read_tokenizer(folder: Path) -> Any:
    """The tokenizer in a folder, or None."""
    if not (folder / _TOKENIZER).is_file():
        return None
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(folder / _TOKENIZER))


def _tokenizer_json(tokenizer: Any) -> str | None:
    """The tokenizer as the JSON of the `tokenizers` library, where it has that form."""
    inner = getattr(tokenizer, "backend_tokenizer", tokenizer)
    to_str = getattr(inner, "to_str", None)
    return to_str() if callable(to_str) else None
