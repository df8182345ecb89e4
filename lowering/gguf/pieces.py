"""Tensors of the file before they have numbers: which weights, which of their rows, in which order, times what."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.fx as fx
from torch import Tensor

from irc.core.errors import TargetError
from irc.core.formats import Format
from irc.core.program import VAL, Program
from irc.lowering.gguf.description import Linear, weight_name
from irc.lowering.gguf.stored import quantized_parts


@dataclass(frozen=True)
class Piece:
    """Some rows of one weight, or numbers of its own.

    Attributes:
        node: holds [N, K] or [N], of experts [X, N, K].
        literal: instead of a node.
        rows: i64 [n] rows (within each expert), None: all.
        factor: on every number.
    """

    node: fx.Node | None = None
    literal: Tensor | None = None
    rows: Tensor | None = None
    factor: float = 1.0

    @property
    def shape(self) -> tuple[int, ...]:
        full = tuple(int(size) for size in self._whole().shape)
        if self.rows is None:
            return full
        axis = 1 if len(full) == 3 else 0
        return (*full[:axis], self.rows.numel(), *full[axis + 1 :])

    def _whole(self) -> Tensor:
        """What the rows are of: the literal, or the weight's type."""
        if self.node is not None:
            return self.node.meta[VAL]
        assert self.literal is not None
        return self.literal


@dataclass(frozen=True)
class FileTensor:
    """A tensor of the file: its pieces one below the other.

    Attributes:
        role: what the rule tables go by: `embedding`, `output`, `attn_q`, …, `norm`.
        layer: number of the layer, or None.
    """

    name: str
    role: str
    pieces: tuple[Piece, ...]
    layer: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        shapes = [piece.shape for piece in self.pieces]
        axis = 1 if len(shapes[0]) == 3 else 0
        total = sum(shape[axis] for shape in shapes)
        return (*shapes[0][:axis], total, *shapes[0][axis + 1 :])

    def formats(self, program: Program) -> list[Format | None]:
        """The formats that its pieces are stored in; None: floats."""
        found = []
        for piece in self.pieces:
            parts = None if piece.node is None else quantized_parts(program, piece.node)
            found.append(None if parts is None else parts[0])
        return found


def weight_piece(linear: Linear, factor: float = 1.0) -> Piece:
    return Piece(linear.weight, None, linear.rows, factor)


def bias_piece(linear: Linear, factor: float = 1.0) -> Piece | None:
    """The bias in the order of the layer's rows, or None."""
    return None if linear.bias is None else Piece(linear.bias, None, linear.rows, factor)


def zeros(count: int) -> Piece:
    return Piece(literal=torch.zeros(count))


def check_factor(program: Program, piece: Piece, why: str) -> Piece:
    """A piece that may be multiplied by its factor.

    Raises:
        TargetError: its numbers are quantized: they would not be the same numbers any more.
    """
    if piece.factor != 1 and piece.node is not None and quantized_parts(program, piece.node) is not None:
        raise TargetError(
            f"{weight_name(piece.node)} would have to be multiplied by {piece.factor:g} ({why}), and it is quantized:"
            " scale the model before it is quantized"
        )
    return piece
