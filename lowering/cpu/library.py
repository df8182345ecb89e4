"""A built program in this process: the shared object, its thread pool, its arena, and calls by ctypes."""

from __future__ import annotations

import ctypes
import os
import weakref
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from irc.core.errors import TargetError
from irc.core.memory import large_memory


def default_threads() -> int:
    """PyTorch's number of threads, but never more than processors that this process may use."""
    return max(1, min(torch.get_num_threads(), len(os.sched_getaffinity(0))))


class Library:
    """A loaded shared object."""

    def __init__(self, path: Path, weights: Tensor, threads: int) -> None:
        try:
            self._object = ctypes.CDLL(str(path))
        except OSError as error:
            raise TargetError(f"{path} cannot be loaded: {error}") from None
        self._object.irc_pool_create.restype = ctypes.c_void_p
        self._object.irc_arena_bytes.restype = ctypes.c_int64
        self._object.irc_run.restype = None
        # Plain addresses: converting each argument would cost more than a small step takes.
        self._object.irc_arena_bytes.argtypes = [ctypes.c_void_p, ctypes.c_int]
        self._object.irc_run.argtypes = [ctypes.c_void_p] * 6
        self._object.irc_pool_destroy.argtypes = [ctypes.c_void_p]
        self.threads = threads
        self._weights = weights
        self._weights_at = weights.data_ptr()
        self._pool = self._object.irc_pool_create(threads)
        self._arena = torch.empty(0, dtype=torch.uint8)
        self._arena_sizes: tuple[int, ...] | None = None
        weakref.finalize(self, self._object.irc_pool_destroy, self._pool)

    def run(self, sizes: Sequence[int], inputs: Sequence[Tensor], outputs: Sequence[Tensor | None]) -> None:
        """One step. Inputs are dense; outputs that continue an input are None."""
        values = (ctypes.c_int64 * max(1, len(sizes)))(*sizes)
        given = (ctypes.c_void_p * max(1, len(inputs)))(*[x.data_ptr() for x in inputs])
        made = (ctypes.c_void_p * max(1, len(outputs)))(*[None if x is None else x.data_ptr() for x in outputs])
        self.call(tuple(sizes), ctypes.addressof(values), ctypes.addressof(given), ctypes.addressof(made))

    def call(self, sizes: tuple[int, ...], values: int, given: int, made: int) -> None:
        """One step from the addresses of three arrays: the sizes, and addresses of the inputs and of the outputs."""
        if self._arena_sizes != sizes:
            self._reserve(values, sizes)
        self._object.irc_run(self._pool, values, given, made, self._weights_at, self._arena_at)

    def _reserve(self, values: int, sizes: tuple[int, ...]) -> None:
        """An arena that is large enough for the sizes, in huge pages: activations of a batch are many small ones."""
        needed = int(self._object.irc_arena_bytes(values, self.threads)) + 64
        if self._arena.numel() < needed:
            self._arena = large_memory(needed)
        self._arena_at = (self._arena.data_ptr() + 63) // 64 * 64
        self._arena_sizes = sizes

    def part_times(self, count: int) -> list[int]:
        """Nanoseconds by part since the last call of this, of a program built with `profile`."""
        self._object.irc_part_times.restype = ctypes.POINTER(ctypes.c_int64)
        totals = self._object.irc_part_times()
        found = totals[:count]
        ctypes.memset(totals, 0, 8 * count)
        return list(found)

    @property
    def arena_bytes(self) -> int:
        """Bytes of the arena as it is now."""
        return self._arena.numel()
