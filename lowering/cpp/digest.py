"""A digest of a tensor's bytes at the speed of memory, by compiled code: see `include/irc/digest.h`.

It is keyed: two tensors that do not depend on the key have equal digests with a probability below 2^-100. Without a
compiler it is sha256, which takes ten times as long.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from irc.lowering.cpp.build import build, find_compiler, supported_isas

_SOURCE = """#include "irc/digest.h"
extern "C" __attribute__((visibility("default")))
void irc_digest(const uint8_t* data, int64_t size, const uint64_t* keys, uint64_t* out) {
    irc::digest(data, size, keys, out);
}
"""
_KEY_BYTES = 8 * (512 + 8)
_PIECE = 1 << 26


def digests(tensors: Sequence[Tensor], key: bytes) -> list[str]:
    """A digest of each tensor's values in row-major order; type and shape are not part of it.

    Args:
        key: secret bytes; digests under different keys have nothing to do with each other.
    """
    plain = [tensor.detach().contiguous().reshape(-1).view(torch.uint8) for tensor in tensors]
    pieces = [(index, piece) for index, data in enumerate(plain) for piece in data.split(_PIECE)]
    one = _Fast(key) if find_compiler() is not None else functools.partial(_sha256, key)
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        made = list(pool.map(one, [piece for _, piece in pieces]))
    found: list[list[bytes]] = [[] for _ in plain]
    for (index, _), digest in zip(pieces, made, strict=True):
        found[index].append(digest)
    return [hashlib.sha256(b"".join(parts)).hexdigest() for parts in found]


class _Fast:
    """The compiled digest under a key."""

    def __init__(self, key: bytes) -> None:
        expanded = hashlib.shake_256(b"irc digest" + key).digest(_KEY_BYTES)
        self._keys = (ctypes.c_uint64 * (_KEY_BYTES // 8)).from_buffer_copy(expanded)
        self._function = _library().irc_digest

    def __call__(self, data: Tensor) -> bytes:
        out = (ctypes.c_uint64 * 4)()
        self._function(data.data_ptr(), data.numel(), self._keys, out)
        return bytes(out)


def _sha256(key: bytes, data: Tensor) -> bytes:
    return hashlib.sha256(key + data.numpy().tobytes()).digest()


@functools.cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(build(_SOURCE, isa=supported_isas()[-1], name="digest")))
    library.irc_digest.restype = None
    library.irc_digest.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_void_p]
    return library
