"""Super-blocks made by compiled code: the same bytes as `irc.core.formats.gguf_search`, some forty times as fast.

The source is `cpp/*.h`, built with the system's compiler when first needed and kept. It holds on to the order of every
sum, so products and sums must not be contracted.
"""

from __future__ import annotations

import ctypes
import functools
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from irc.core.formats.gguf import LAYOUTS
from irc.lowering.cpp.build import build, find_compiler, supported_isas

KINDS = ("q2_k", "q3_k", "q4_k", "q5_k", "q6_k")
_PARTS = ("search.h", "centred.h", "blocks.h", "types.h")
_BLOCK = 256
_FLAGS = ("-ffp-contract=off",)


def available() -> bool:
    """Whether this machine has a compiler."""
    return find_compiler() is not None


def quantize(values: Tensor, kind: str, importance: Tensor | None = None) -> Tensor:
    """u8 [n, bytes] of f32 [n, K], K a multiple of 256; `importance`: f32 [K].

    Raises:
        TargetError: the compiler is missing or fails.
    """
    function, size = getattr(_library(), kind), LAYOUTS[kind].num_bytes
    numbers = values.float().contiguous()
    weights = None if importance is None else importance.float().contiguous()
    blocks, row = numbers.numel() // _BLOCK, numbers.shape[-1] // _BLOCK
    out = torch.empty(len(numbers), row * size, dtype=torch.uint8)

    def part(start: int, stop: int) -> None:
        function(
            numbers.data_ptr() + start * _BLOCK * 4, None if weights is None else weights.data_ptr(),
            out.data_ptr() + start * size, stop - start, row,
        )  # fmt: skip

    threads = min(torch.get_num_threads(), len(numbers))
    if threads <= 1:
        part(0, blocks)
        return out
    # Whole rows each, so that columns keep their importance.
    bounds = [len(numbers) * index // threads * row for index in range(threads + 1)]
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(part, bounds[:-1], bounds[1:]))
    return out


@functools.cache
def _library() -> ctypes.CDLL:
    source = "\n".join((Path(__file__).parent / "cpp" / name).read_text() for name in _PARTS)
    library = ctypes.CDLL(str(build(source, isa=supported_isas()[-1], flags=_FLAGS, name="super_blocks")))
    for kind in KINDS:
        function = getattr(library, kind)
        function.restype = None
        function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64]
    return library
