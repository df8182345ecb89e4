"""llama.cpp's block formats as formats like any other: `q4_0`, …, `q6_k`. The scales lie inside the blocks.

Stored is u8[rows, blocks * bytes], byte for byte what a GGUF file holds, so that a file can be read into a program and
a program written to a file without touching a number. There is no separate scale.

Each layout says how a block falls apart into integers, scales and offsets, so that number = scale * integer + offset
computed in f32 in this order, which is bit for bit what llama.cpp's own dequantizers give.

Source: llama.cpp, `ggml/src/ggml-common.h` (block structs) and `ggml-quants.c` (dequantize_row_*); the
package `gguf`, `gguf/quants.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from irc.core.errors import OptionError
from irc.core.formats.base import Format, Scales
from irc.core.formats.gguf_k import (
    Split,
    join_q2_k,
    join_q3_k,
    join_q4_k,
    join_q5_k,
    join_q6_k,
    split_q2_k,
    split_q3_k,
    split_q4_k,
    split_q5_k,
    split_q6_k,
)
from irc.core.formats.gguf_search import (
    search_q2_k,
    search_q3_k,
    search_q4_k,
    search_q5_k,
    search_q6_k,
)
from irc.core.formats.gguf_simple import (
    SIMPLE,
    Simple,
    join_simple,
    round_simple,
    split_simple,
)


class Layout(NamedTuple):
    """A block layout.

    Attributes:
        block: numbers in a block.
        num_bytes: bytes of a block.
        bits: bits of an integer.
        precision: see `Format`.
        error: largest error of a number, as a share of the largest magnitude in its block.
        split: bytes [..., blocks, num_bytes] → integers [..., blocks, groups, n], scales and offsets [..., groups, 1].
        encode: f32 [..., blocks, block] → bytes.
        simple: parameters of the layouts without super-blocks.
    """

    block: int
    num_bytes: int
    bits: int
    precision: int
    error: float
    split: Callable[[Tensor], Split]
    encode: Callable[[Tensor], Tensor]
    simple: Simple | None = None


def _simple(name: str, error: float) -> Layout:
    form = SIMPLE[name]
    return Layout(
        32, form.num_bytes, form.bits, form.bits, error,
        lambda blocks: split_simple(form, blocks), lambda x: join_simple(form, *round_simple(form, x)), form,
    )  # fmt: skip


# The errors of the super-block layouts have no bound as strict as half a step: scales are rounded to a few bits of the
# largest scale in the block, and the search trades large errors for many small ones.
LAYOUTS: dict[str, Layout] = {
    "q4_0": _simple("q4_0", 1 / 8),
    "q4_1": _simple("q4_1", 1 / 15),
    "q5_0": _simple("q5_0", 1 / 16),
    "q5_1": _simple("q5_1", 1 / 31),
    "q8_0": _simple("q8_0", 0.5 / 127),
    "q2_k": Layout(256, 84, 2, 2, 0.5, split_q2_k, lambda x: join_q2_k(*search_q2_k(x))),
    "q3_k": Layout(256, 110, 3, 3, 0.3, split_q3_k, lambda x: join_q3_k(*search_q3_k(x))),
    "q4_k": Layout(256, 144, 4, 4, 0.15, split_q4_k, lambda x: join_q4_k(*search_q4_k(x))),
    "q5_k": Layout(256, 176, 5, 5, 0.1, split_q5_k, lambda x: join_q5_k(*search_q5_k(x))),
    "q6_k": Layout(256, 210, 6, 6, 0.05, split_q6_k, lambda x: join_q6_k(*search_q6_k(x))),
}


@dataclass(frozen=True)
class GgufFormat(Format):
    """Blocks of llama.cpp, scales included; `name` in lower case: `q4_k`."""

    name: str
    symmetric: bool = field(default=True, init=False, repr=False)
    per_tensor: bool = field(default=False, init=False, repr=False)
    group_size: int | None = field(init=False, repr=False)
    bits: int = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.name not in LAYOUTS:
            raise OptionError(f"{self.name!r} is no GGUF block format; known: {', '.join(LAYOUTS)}")
        object.__setattr__(self, "group_size", self.layout.block)
        object.__setattr__(self, "bits", self.layout.bits)

    def __str__(self) -> str:
        return self.name

    @property
    def layout(self) -> Layout:
        return LAYOUTS[self.name]

    @property
    def precision(self) -> int:
        return self.layout.precision

    @property
    def takes_scale_dtype(self) -> bool:
        return False

    def stored_shape(self, shape: tuple[Any, ...]) -> tuple[Any, ...]:
        return (*shape[:-1], shape[-1] // self.layout.block * self.layout.num_bytes)

    def logical_shape(self, stored: tuple[Any, ...]) -> tuple[Any, ...]:
        return (*stored[:-1], stored[-1] // self.layout.num_bytes * self.layout.block)

    def scale_shape(self, shape: tuple[int, ...]) -> None:
        return None

    def why_not_rows_of(self, width: int) -> str | None:
        block = self.layout.block
        return f"blocks of {block} do not divide its rows of {width}" if width % block else None

    def compute_scales(self, x: Tensor, scale_dtype: torch.dtype = torch.float32) -> Scales:
        return Scales()

    def split(self, stored: Tensor) -> Split:
        """Integers, scales and offsets of the blocks."""
        return self.layout.split(stored.unflatten(-1, (-1, self.layout.num_bytes)))

    def quantize(
        self,
        x: Tensor,
        scale: Tensor | None = None,
        zero_point: Tensor | None = None,
        tensor_scale: Tensor | None = None,
    ) -> Tensor:
        """Simple layouts: as llama.cpp's reference rounds. Super-blocks: by search (`gguf_search`)."""
        why = self.why_not_rows_of(x.shape[-1])
        if why is not None:
            raise OptionError(f"{self}: {why}")
        return self.layout.encode(x.float().unflatten(-1, (-1, self.layout.block))).flatten(-2)

    def dequantize(
        self,
        stored: Tensor,
        scale: Tensor | None,
        zero_point: Tensor | None,
        dtype: torch.dtype,
        tensor_scale: Tensor | None = None,
    ) -> Tensor:
        integers, scales, offsets = self.split(stored)
        values = scales * integers.float()
        return (values if offsets is None else values + offsets).flatten(-3).to(dtype)

    def worst_errors(self, groups: Tensor) -> Tensor:
        size = groups.abs().amax(-1)
        # Scales and offsets are rounded to f16, which has a smallest step of 2^-24.
        slack = size * 2**-10 + (1 << self.bits) * 2.0**-24
        if self.layout.simple is not None and self.layout.simple.has_offset:
            return (groups.amax(-1) - groups.amin(-1)) * (self.layout.error / 2) + slack
        return size * self.layout.error + slack


def read_gguf(text: str) -> GgufFormat | None:
    """`q4_0` … `q6_k`."""
    return GgufFormat(text) if text in LAYOUTS else None
