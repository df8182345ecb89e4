"""Large blocks of memory for weights, which a thread can have found before they are needed.

The first touch of a page makes the system look for it and clear it: 0.2 seconds for each GB of huge pages, 0.7 for
small ones, and 4 on a virtual machine that has to ask its host. A compilation of a large model needs GBs for what it
makes of the weights, most of it while compilers have the processors; and it starts with the capture, which keeps one
processor busy. Then a thread asks for pages.
"""

from __future__ import annotations

import contextlib
import contextvars
import ctypes
import functools
import math
import mmap
import os
import sys
import threading
import weakref
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

# From <linux/mman.h>: room may be larger than memory, as most of it is never touched.
_MAP_NORESERVE = 0x4000
_HUGE_PAGE = 1 << 21
# Touched at a time: between two such pieces the thread needs Python's lock.
_AT_ONCE = 16 << 20
# Of the memory that is free, at most this much is touched for expectations that may be wrong.
_SHARE = 0.25
# Room beyond what was expected, which costs nothing before it is taken: expectations are rough.
_ROOM = 2
# An address behind all others.
_NOWHERE = 1 << 64
# Smaller tensors are not worth pages of their own.
_LARGE = 1 << 18


def large_memory(num_bytes: int) -> Tensor:
    """u8[num_bytes] of zeros, in huge pages where the system has them, and touched before if that was arranged.

    A step reads all weights, and what it keeps between layers: with small pages, finding each page takes a tenth to a
    third of the time (measured under virtualization, where a page is looked up twice).
    """
    reserve = _reserve.get()
    taken = reserve.take(num_bytes) if reserve is not None else None
    if taken is not None:
        return taken
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without huge pages: small ones do, slower
            memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """As `torch.empty`, contiguous; large tensors on the CPU lie in memory that was touched before, if there is any."""
    num_bytes = math.prod(shape) * dtype.itemsize
    reserve = _reserve.get()
    if reserve is not None and num_bytes >= _LARGE and torch.device(device).type == "cpu":
        taken = reserve.take(num_bytes)
        if taken is not None:
            return taken.view(dtype).view(tuple(shape))
    return torch.empty(tuple(shape), dtype=dtype, device=device)


def expect(num_bytes: int) -> None:
    """Say that so many bytes of large tensors will be made, inside of `ahead` and before its `start`."""
    reserve = _reserve.get()
    if reserve is not None:
        reserve.expected += num_bytes


@contextlib.contextmanager
def ahead() -> Iterator[Reserve]:
    """A reserve for the body: `expect` adds to it, `start` has it touched, `empty` and `large_memory` take from it."""
    reserve = Reserve()
    token = _reserve.set(reserve)
    try:
        yield reserve
    finally:
        _reserve.reset(token)
        reserve.close()


class Reserve:
    """Memory whose pages a thread asks for in the order in which they will be taken.

    Each block taken is given back by itself, when the last tensor in it is gone; what was not taken, by `close`.
    """

    def __init__(self) -> None:
        self.expected = 0
        self._changed = threading.Condition()
        self._next = self._end = self._last = 0
        self._touching = _NOWHERE
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Map what is expected, and begin to touch it. Without a system that can, or too little of it, nothing."""
        libc = _libc()
        if libc is None or self.expected < _HUGE_PAGE or self._thread is not None:
            return
        size = -(-self.expected * _ROOM // _HUGE_PAGE) * _HUGE_PAGE
        start = libc.mmap(None, size + _HUGE_PAGE, mmap.PROT_READ | mmap.PROT_WRITE,
                          mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE, -1, 0)  # fmt: skip
        if start in (None, ctypes.c_void_p(-1).value):
            return
        # Huge pages have addresses that their size divides.
        self._next, self._end = -(-start // _HUGE_PAGE) * _HUGE_PAGE, start + size + _HUGE_PAGE
        if self._next > start:
            libc.munmap(start, self._next - start)
        libc.madvise(self._next, self._end - self._next, mmap.MADV_HUGEPAGE)
        free = os.sysconf("SC_AVPHYS_PAGES") * mmap.PAGESIZE
        self._last = self._next + min(self.expected, int(free * _SHARE))
        self._thread = threading.Thread(target=self._touch, name="irc-memory", daemon=True)
        self._thread.start()

    def take(self, num_bytes: int) -> Tensor | None:
        """u8[num_bytes] of zeros, or None where so much is not left."""
        size = -(-num_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        with self._changed:
            libc = _libc()
            if libc is None or not num_bytes or size > self._end - self._next:
                return None
            start = self._next
            self._next += size
            self._changed.wait_for(lambda: self._touching >= start + size or self._touching + _AT_ONCE <= start)
        block = (ctypes.c_uint8 * num_bytes).from_address(start)
        # Not when Python ends: tensors may be in use until the very last.
        weakref.finalize(block, libc.munmap, start, size).atexit = False
        return torch.frombuffer(block, dtype=torch.uint8)

    def close(self) -> None:
        """Give back what was not taken."""
        with self._changed:
            libc, start, size = _libc(), self._next, self._end - self._next
            self._next = self._last = self._end
        if self._thread is not None:
            self._thread.join()
        if libc is not None and size:
            libc.munmap(start, size)

    def _touch(self) -> None:
        """Write zeros to all that was not taken yet: pages are found, and nobody reads them before they are taken.

        (Linux can be asked to do so at once, but lets nobody else map memory meanwhile.)
        """
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)
        position = 0
        while True:
            with self._changed:
                position = max(position, self._next)
                size = min(_AT_ONCE, self._last - position)
                self._touching = position if size > 0 else _NOWHERE
                self._changed.notify_all()
            if size <= 0:
                return
            ctypes.memset(position, 0, size)  # leaves Python's lock alone
            position += size


_reserve: contextvars.ContextVar[Reserve | None] = contextvars.ContextVar("irc_memory_reserve", default=None)


@functools.cache
def _libc() -> ctypes.CDLL | None:
    """The C library, its functions typed; None where memory works otherwise."""
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None)
    pointer, size, number = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    libc.mmap.argtypes, libc.mmap.restype = [pointer, size, number, number, number, ctypes.c_long], pointer
    libc.munmap.argtypes, libc.madvise.argtypes = [pointer, size], [pointer, size, number]
    return libc
