"""Numbers of the file's tensors, some rows at a time: floats narrowed, quantized, or stored blocks passed through."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from irc.core import formats
from irc.core.errors import OptionError, TargetError
from irc.core.formats import Format, GgufFormat, Parts
from irc.core.program import Program
from irc.lowering.gguf.description import weight_name
from irc.lowering.gguf.mixes import BLOCKS, FLOATS
from irc.lowering.gguf.pieces import FileTensor, Piece
from irc.lowering.gguf.quantizers import quantize_rows
from irc.lowering.gguf.stored import quantized_parts, rows_of, select_rows

_CHUNK = 1 << 21  # numbers: what is widened to f32 at a time
_DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
# In the order of their size: the first that holds a tensor's numbers exactly is taken.
_HOLDERS = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0")


def num_bytes(shape: tuple[int, ...], kind: str) -> int:
    """Bytes of a tensor of that shape as stored."""
    count = int(np.prod(shape))
    if kind in FLOATS:
        return count * _DTYPES[kind].itemsize
    layout = formats.gguf.LAYOUTS[kind]
    return count // layout.block * layout.num_bytes


def stored_kind(program: Program, tensor: FileTensor) -> str | None:
    """The type that holds a quantized tensor's numbers exactly; None for one of floats.

    Raises:
        TargetError: no GGUF type can; says why not.
    """
    found = tensor.formats(program)
    if all(one is None for one in found):
        return None
    if any(one is None for one in found) or len({str(one) for one in found}) > 1:
        raise TargetError(
            f"{tensor.name} is put together from weights in different formats"
            f" ({', '.join(str(one or 'float') for one in found)}); GGUF has one type a tensor"
        )
    chosen = found[0]
    if isinstance(chosen, GgufFormat):
        return chosen.name
    reasons: list[str] = []
    for kind in _HOLDERS:
        try:
            for piece in tensor.pieces:
                _repacked(program, piece, kind)
            return kind
        except OptionError as error:
            reasons.append(str(error))
    raise TargetError(
        f"{tensor.name} ({weight_name(tensor.pieces[0].node)}, {chosen}) fits no GGUF type without loss:\n    "
        + "\n    ".join(reasons)
        + "\n  quantize with f16 scales and groups of 32 or more, or give a type to quantize again"
    )


def encode(program: Program, tensor: FileTensor, kind: str, importance: Tensor | None = None) -> Iterator[np.ndarray]:
    """Bytes of a tensor in order, a chunk of rows at a time."""
    for expert in _experts(tensor):
        for piece in tensor.pieces:
            weights = importance if importance is None or importance.ndim == 1 else importance[expert or 0]
            yield from _encode_piece(program, piece, expert, kind, weights)


def _experts(tensor: FileTensor) -> list[int | None]:
    return list(range(tensor.shape[0])) if len(tensor.shape) == 3 else [None]


def _encode_piece(
    program: Program, piece: Piece, expert: int | None, kind: str, importance: Tensor | None
) -> Iterator[np.ndarray]:
    parts = None if piece.node is None else quantized_parts(program, piece.node)
    if parts is not None and kind not in FLOATS and parts[0] is not None:
        same = isinstance(parts[0], GgufFormat) and parts[0].name == kind
        if same or _holds(program, piece, kind):
            stored = _repacked(program, piece, kind).stored if not same else select_rows(parts[1], piece.rows).stored
            yield (stored if expert is None else stored[expert]).contiguous().numpy()
            return
    for values in _float_rows(program, piece, parts, expert):
        yield _as_bytes(values, kind, importance)


def _holds(program: Program, piece: Piece, kind: str) -> bool:
    if kind not in _HOLDERS:
        return False
    try:
        _repacked(program, piece, kind)
    except OptionError:
        return False
    return True


def _repacked(program: Program, piece: Piece, kind: str) -> Parts:
    assert piece.node is not None
    found = quantized_parts(program, piece.node)
    assert found is not None
    chosen, parts = found
    parts = select_rows(parts, piece.rows)
    return formats.repack(
        parts.stored, parts.scale, parts.zero_point, chosen, formats.parse(kind), tensor_scale=parts.tensor_scale
    )


def _float_rows(
    program: Program, piece: Piece, parts: tuple[Format, Parts] | None, expert: int | None
) -> Iterator[Tensor]:
    """Rows in f32, some at a time; a whole vector at once."""
    whole = piece.literal if piece.node is None else None
    if whole is None and parts is None:
        whole = program.weight(piece.node).detach()
    if whole is not None and expert is not None:
        whole = whole[expert]
    if whole is not None and whole.device.type == "meta":
        raise TargetError(f"{weight_name(piece.node)} is on the meta device and has no values: load it first")
    count = int(piece.rows.numel()) if piece.rows is not None else piece.shape[0 if expert is None else 1]
    width = piece.shape[-1] if len(piece.shape) > 1 else 1
    step = max(1, _CHUNK // width)
    for start in range(0, count, step):
        if piece.rows is None:
            rows: Tensor | slice = slice(start, min(start + step, count))
        else:
            rows = piece.rows[start : start + step]
        if whole is not None:
            block = whole[rows] if isinstance(rows, slice) else rows_of(whole, rows)
        else:
            assert parts is not None
            index = torch.arange(rows.start, rows.stop) if isinstance(rows, slice) else rows
            block = formats.dequantize_tensor(select_rows(parts[1], index), parts[0])
        block = block.float()
        yield block if piece.factor == 1 else block * piece.factor


def _as_bytes(values: Tensor, kind: str, importance: Tensor | None) -> np.ndarray:
    if kind in FLOATS:
        narrowed = values.to(_DTYPES[kind]).contiguous()
        return narrowed.view(torch.uint8).numpy() if kind != "f32" else narrowed.numpy()
    return quantize_rows(values, kind, importance).contiguous().numpy()


__all__ = ["BLOCKS", "encode", "num_bytes", "stored_kind"]
