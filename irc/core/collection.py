"""Garbage collection during long work that makes many objects."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def walking_once() -> Iterator[None]:
    """Full collections walk only what is new since the last one; the first still walks all there is.

    A compilation makes a few hundred thousand objects, nearly all of which stay, beside half a million of the modules
    that are loaded: Python's collector would walk all of them four or five times. What a full collection leaves is put
    aside (`gc.freeze`) until the body ends. Does nothing where somebody has put objects aside already.
    """
    if gc.get_freeze_count():
        yield
        return
    gc.callbacks.append(_put_aside)
    try:
        yield
    finally:
        gc.callbacks.remove(_put_aside)
        gc.unfreeze()


@contextlib.contextmanager
def not_collecting() -> Iterator[None]:
    """No collection during work of less than a second, which one walk of all that PyTorch loads would double."""
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _put_aside(phase: str, info: dict[str, Any]) -> None:
    if phase == "stop" and info["generation"] == 2:
        gc.freeze()
