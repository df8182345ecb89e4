"""Reads where an exported node came from: the module path and the user's file:line.

Paths are shortened to what is the same on every machine: relative to the working directory or to the
import path that the file was found on.
"""

from __future__ import annotations

import functools
import os
import re
import sys
from pathlib import Path

import torch
import torch.fx as fx

_FRAME = re.compile(r'^\s*File "(?P<file>[^"]+)", line (?P<line>\d+)', re.MULTILINE)
# Export gives this path to the size nodes that it adds itself.
_NO_MODULE = "_empty_nn_module_stack_from_metadata_hook"
_LIBRARIES = tuple(str(Path(p).resolve()) + os.sep for p in (Path(torch.__file__).parent, Path(__file__).parent))


def module_of(node: fx.Node) -> str:
    """Dotted path of the innermost module whose forward made the node; "" for the model itself."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    path = str(list(stack.values())[-1][0])
    if path == _NO_MODULE:
        return ""
    return path.removeprefix("L['self']").lstrip(".")


def location_of(node: fx.Node) -> str:
    """`file.py:123` of the deepest frame that is not PyTorch's or irc's own; "" if unknown."""
    trace = node.meta.get("stack_trace")
    if not trace:
        return ""
    for match in reversed(list(_FRAME.finditer(trace))):
        if is_user_file(match["file"]):
            return f"{short_path(match['file'])}:{match['line']}"
    return ""


@functools.lru_cache(maxsize=4096)
def is_user_file(file: str) -> bool:
    """False for files of PyTorch and of the capture itself, and for generated code."""
    return os.path.isabs(file) and not str(Path(file).resolve()).startswith(_LIBRARIES)


@functools.lru_cache(maxsize=4096)
def short_path(file: str) -> str:
    """The path relative to the working directory or to the import path; else the last two parts."""
    path = Path(file).resolve()
    if path.is_relative_to(Path.cwd()) and Path.cwd() != Path(path.anchor):
        return path.relative_to(Path.cwd()).as_posix()
    roots = [Path(entry).resolve() for entry in sys.path if entry]
    inside = [root for root in roots if root != Path(root.anchor) and path.is_relative_to(root)]
    if inside:
        return path.relative_to(max(inside, key=lambda root: len(root.parts))).as_posix()
    return Path(*path.parts[-2:]).as_posix()
