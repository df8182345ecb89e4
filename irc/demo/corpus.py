"""The demo corpus: the source of Python's standard library in the running interpreter.

Whole files are held out. Membership depends only on a file's relative path, so every
interpreter version holds out the same files, and no held-out line was ever trained on.
"""

from __future__ import annotations

import hashlib
import sysconfig
from pathlib import Path
from typing import Literal

Split = Literal["train", "validation"]

_EXCLUDED_DIRS = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"})
_HELD_OUT_ONE_IN = 20


def stdlib_root() -> Path:
    """The folder that holds the running interpreter's standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def is_held_out(relative_path: str) -> bool:
    """True for about one file in twenty, decided by a hash of its path alone."""
    digest = hashlib.sha256(relative_path.encode()).digest()
    return int.from_bytes(digest[:4], "big") % _HELD_OUT_ONE_IN == 0


def stdlib_files(split: Split, root: Path | None = None) -> list[Path]:
    """Source files of one split, sorted by path.

    Raises:
        FileNotFoundError: the interpreter ships no library source.
    """
    base = root or stdlib_root()
    chosen = []
    for path in sorted(base.rglob("*.py")):
        relative = path.relative_to(base)
        if _EXCLUDED_DIRS.intersection(relative.parts[:-1]):
            continue
        if is_held_out(relative.as_posix()) == (split == "validation"):
            chosen.append(path)
    if not chosen:
        raise FileNotFoundError(f"no Python source files under {base}: is the standard library installed as source?")
    return chosen


def read_documents(split: Split, root: Path | None = None) -> list[str]:
    """Texts of one split; files that are not UTF-8 or are empty are left out."""
    documents = []
    for path in stdlib_files(split, root):
        try:
            text = path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue
        if text.strip():
            documents.append(text)
    return documents
