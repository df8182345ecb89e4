"""Buffers: memory that kernels read and write, with symbolic shape and strides."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import sympy

from irc.lowering.kernels.indexing import remembered

Kind = Literal["input", "weight", "temporary", "output"]
ITEM_BYTES = {
    "f64": 8, "f32": 4, "bf16": 2, "f16": 2, "f8e4m3": 1, "f8e5m2": 1,
    "i64": 8, "i32": 4, "i16": 2, "i8": 1, "u8": 1, "bool": 1,
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Buffer:
    """A tensor in memory.

    Attributes:
        name: unique in a program.
        dtype: storage type, as the IR's text form names it.
        shape, strides: in elements, over the program's named dimensions.
        kind: who owns the memory.
        origin: name of the graph node whose value it holds.
    """

    name: str
    dtype: str
    shape: tuple[sympy.Expr, ...]
    strides: tuple[sympy.Expr, ...]
    kind: Kind
    origin: str = ""

    @property
    def numel(self) -> sympy.Expr:
        return sympy.Mul(*self.shape)

    @property
    def num_bytes(self) -> sympy.Expr:
        return self.numel * ITEM_BYTES[self.dtype]

    def offset(self, index: Sequence[sympy.Expr]) -> sympy.Expr:
        """Elements from the start to the element at an index."""
        return _offset(tuple(index), self.strides)

    def __str__(self) -> str:
        return f"{self.name}: {self.dtype}[{', '.join(map(str, self.shape))}]"


@remembered
def _offset(index: tuple[sympy.Expr, ...], strides: tuple[sympy.Expr, ...]) -> sympy.Expr:
    return sympy.Add(*(i * s for i, s in zip(index, strides, strict=True)))


def row_major(shape: Sequence[sympy.Expr], order: Sequence[int] | None = None) -> tuple[sympy.Expr, ...]:
    """Strides of a dense tensor; `order` lists the axes from the slowest to the fastest (default: as they are)."""
    strides: dict[int, sympy.Expr] = {}
    step: sympy.Expr = sympy.Integer(1)
    for axis in reversed(list(order) if order is not None else range(len(shape))):
        strides[axis] = step
        step = step * shape[axis]
    return tuple(strides[axis] for axis in range(len(shape)))
