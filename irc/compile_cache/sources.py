"""The files that the code of a process came from, and whether they are what they were.

A compilation depends on the code that it ran. Every Python module that is loaded when it ends is noted by file, size
and time of change; files that belong to no installed library, by content.
"""

from __future__ import annotations

import hashlib
import os
import sys
from typing import Any

from irc.compile_cache.identity import Doubt, is_installed


def loaded() -> dict[str, Any]:
    """What is loaded now: installed files, own files, and top-level names.

    Raises:
        Doubt: the program that runs has no file.
    """
    main = getattr(sys.modules.get("__main__"), "__file__", None)
    if main is None:
        raise Doubt("the program that runs has no file (a prompt or a notebook), so its code cannot be compared")
    installed: dict[str, list[int]] = {}
    own: dict[str, str] = {}
    for module in list(sys.modules.values()):
        path = getattr(module, "__file__", None)
        if not isinstance(path, str) or path in installed or path in own or not os.path.isfile(path):
            continue
        if is_installed(path):
            installed[path] = _stamp(path)
        else:
            own[path] = _content(path)
    names = sorted({name.partition(".")[0] for name in list(sys.modules)})
    return {"main": os.path.abspath(main), "installed": installed, "own": own, "names": names}


def why_changed(noted: dict[str, Any]) -> str | None:
    """The first difference between what was loaded then and the files and modules now; None without one.

    Less may be loaded than then (a compilation loads what it needs), but nothing that was not.
    """
    now = loaded()
    if now["main"] != noted["main"]:
        return f"it was made by {noted['main']}"
    more = sorted(set(now["names"]) - set(noted["names"]))
    if more:
        return f"{more[0]} is loaded, which was not"
    more = sorted(now["own"].keys() - noted["own"].keys())
    if more:
        return f"{more[0]} is loaded, which was not"
    for path, content in noted["own"].items():
        if _content(path) != content:
            return f"{path} has changed"
    for path, stamp in noted["installed"].items():
        if _stamp(path) != stamp:
            return f"{path} has changed"
    return None


def _stamp(path: str) -> list[int]:
    try:
        found = os.stat(path)
    except OSError:
        return []
    return [found.st_mtime_ns, found.st_size]


def _content(path: str) -> str:
    try:
        with open(path, "rb") as file:
            return hashlib.sha256(file.read()).hexdigest()
    except OSError:
        return ""
