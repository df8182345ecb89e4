"""GGUF super-blocks of 256 numbers: Q2_K to Q6_K, from bytes to integers and back.

A super-block holds groups of 16 or 32 numbers; their scales (and minima) are small integers in units of one
f16 scale (and one f16 minimum) for all. Bits of the numbers are spread over planes, so that a vector register of
llama.cpp reads 32 numbers at once: plane p of a byte string belongs to numbers 32 p to 32 p + 31.

| type | groups | number = | bytes in order |
| --- | --- | --- | --- |
| Q2_K | 16 of 16 | d * sc * q - dmin * m | 16 of sc and m (4 bits each), 64 of q, d, dmin |
| Q3_K | 16 of 16 | d * (sc - 32) * (q - 4) | 32 of top bits, 64 of low bits, 12 of sc (6 bits), d |
| Q4_K | 8 of 32 | d * sc * q - dmin * m | d, dmin, 12 of sc and m (6 bits), 128 of q |
| Q5_K | 8 of 32 | d * sc * q - dmin * m | d, dmin, 12 of sc and m, 32 of top bits, 128 of low nibbles |
| Q6_K | 16 of 16 | d * sc * (q - 32) | 128 of low nibbles, 64 of top bits, 16 of sc (int8), d |

Source: llama.cpp, `ggml/src/ggml-common.h`, structs block_q2_K to block_q6_K.
"""

from __future__ import annotations

import torch
from torch import Tensor

from irc.core.formats.gguf_simple import Split, half_bytes, halves

BLOCK = 256


def _planes(data: Tensor, width: int, bits: int) -> Tensor:
    """Bytes [..., n] → numbers [..., 8 / bits * n]: for each `width` bytes, their lowest bits first."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=data.device).unsqueeze(-1)
    spread = torch.bitwise_right_shift(data.unflatten(-1, (-1, 1, width)), shifts)
    return (spread & ((1 << bits) - 1)).flatten(-3)


def _to_planes(values: Tensor, width: int, bits: int) -> Tensor:
    """The inverse of `_planes`."""
    shifts = torch.arange(0, 8, bits, dtype=torch.int32, device=values.device).unsqueeze(-1)
    spread = torch.bitwise_left_shift(values.to(torch.int32).unflatten(-1, (-1, 8 // bits, width)), shifts)
    return spread.sum(-2).to(torch.uint8).flatten(-2)


def _affine(codes: Tensor, num_groups: int, d: Tensor, scales: Tensor, dmin: Tensor, minima: Tensor) -> Split:
    offsets = -(dmin * minima.float())
    return Split(
        codes.to(torch.int16).unflatten(-1, (num_groups, -1)),
        (d * scales.float()).unsqueeze(-1),
        offsets.unsqueeze(-1),
    )


# ------------------------------------------------------------------ Q2_K


def split_q2_k(blocks: Tensor) -> Split:
    scales, codes = blocks[..., :16], _planes(blocks[..., 16:80], 32, 2)
    d, dmin = halves(blocks[..., 80:82]), halves(blocks[..., 82:84])
    return _affine(codes, 16, d, scales & 0xF, dmin, scales >> 4)


def join_q2_k(codes: Tensor, scales: Tensor, minima: Tensor, d: Tensor, dmin: Tensor) -> Tensor:
    """Codes [..., 256], scales and minima [..., 16], d and dmin [..., 1] → bytes [..., 84]."""
    both = scales.to(torch.uint8) | (minima.to(torch.uint8) << 4)
    return torch.cat((both, _to_planes(codes, 32, 2), half_bytes(d), half_bytes(dmin)), dim=-1)


# ------------------------------------------------------------------ Q3_K


def split_q3_k(blocks: Tensor) -> Split:
    top, low = _planes(blocks[..., :32], 32, 1), _planes(blocks[..., 32:96], 32, 2)
    # Low nibbles of the 16 scales in 8 bytes, their two top bits in 4 bytes.
    scales = _planes(blocks[..., 96:104], 8, 4) | (_planes(blocks[..., 104:108], 4, 2) << 4)
    d = halves(blocks[..., 108:110])
    integers = (low | (top << 2)).to(torch.int16) - 4
    factors = d * (scales.to(torch.int16) - 32).float()
    return Split(integers.unflatten(-1, (16, 16)), factors.unsqueeze(-1), None)


def join_q3_k(integers: Tensor, scales: Tensor, d: Tensor) -> Tensor:
    """Integers -4 to 3 [..., 256], scales -32 to 31 [..., 16], d [..., 1] → bytes [..., 110]."""
    codes, raised = (integers + 4).to(torch.int32), (scales + 32).to(torch.int32)
    top, low = _to_planes(codes >> 2, 32, 1), _to_planes(codes & 3, 32, 2)
    packed = torch.cat((_to_planes(raised & 0xF, 8, 4), _to_planes(raised >> 4, 4, 2)), dim=-1)
    return torch.cat((top, low, packed, half_bytes(d)), dim=-1)


# ------------------------------------------------------------------ Q4_K, Q5_K


def _split_scales(data: Tensor) -> tuple[Tensor, Tensor]:
    """12 bytes → 8 scales and 8 minima of 6 bits.

    Bytes 0–3 and 4–7: scales and minima 0–3, and in the two top bits those of 4–7. Bytes 8–11: the low nibbles of
    scales and minima 4–7.
    """
    first, second, rest = data[..., 0:4], data[..., 4:8], data[..., 8:12]
    scales = torch.cat((first & 0x3F, (rest & 0xF) | ((first >> 6) << 4)), dim=-1)
    minima = torch.cat((second & 0x3F, (rest >> 4) | ((second >> 6) << 4)), dim=-1)
    return scales, minima


def _join_scales(scales: Tensor, minima: Tensor) -> Tensor:
    scales, minima = scales.to(torch.uint8), minima.to(torch.uint8)
    first = scales[..., :4] | ((scales[..., 4:] >> 4) << 6)
    second = minima[..., :4] | ((minima[..., 4:] >> 4) << 6)
    rest = (scales[..., 4:] & 0xF) | ((minima[..., 4:] & 0xF) << 4)
    return torch.cat((first, second, rest), dim=-1)


def split_q4_k(blocks: Tensor) -> Split:
    d, dmin = halves(blocks[..., 0:2]), halves(blocks[..., 2:4])
    scales, minima = _split_scales(blocks[..., 4:16])
    return _affine(_planes(blocks[..., 16:144], 32, 4), 8, d, scales, dmin, minima)


def join_q4_k(codes: Tensor, scales: Tensor, minima: Tensor, d: Tensor, dmin: Tensor) -> Tensor:
    """Codes [..., 256], scales and minima [..., 8], d and dmin [..., 1] → bytes [..., 144]."""
    head = (half_bytes(d), half_bytes(dmin), _join_scales(scales, minima))
    return torch.cat((*head, _to_planes(codes, 32, 4)), dim=-1)


def split_q5_k(blocks: Tensor) -> Split:
    d, dmin = halves(blocks[..., 0:2]), halves(blocks[..., 2:4])
    scales, minima = _split_scales(blocks[..., 4:16])
    codes = _planes(blocks[..., 48:176], 32, 4) | (_planes(blocks[..., 16:48], 32, 1) << 4)
    return _affine(codes, 8, d, scales, dmin, minima)


def join_q5_k(codes: Tensor, scales: Tensor, minima: Tensor, d: Tensor, dmin: Tensor) -> Tensor:
    """Codes [..., 256], scales and minima [..., 8], d and dmin [..., 1] → bytes [..., 176]."""
    codes = codes.to(torch.int32)
    head = (half_bytes(d), half_bytes(dmin), _join_scales(scales, minima))
    return torch.cat((*head, _to_planes(codes >> 4, 32, 1), _to_planes(codes & 0xF, 32, 4)), dim=-1)


# ------------------------------------------------------------------ Q6_K


def split_q6_k(blocks: Tensor) -> Split:
    low, top = _planes(blocks[..., :128], 64, 4), _planes(blocks[..., 128:192], 32, 2)
    scales = blocks[..., 192:208].contiguous().view(torch.int8)
    d = halves(blocks[..., 208:210])
    integers = (low | (top << 4)).to(torch.int16) - 32
    return Split(integers.unflatten(-1, (16, 16)), (d * scales.float()).unsqueeze(-1), None)


def join_q6_k(integers: Tensor, scales: Tensor, d: Tensor) -> Tensor:
    """Integers -32 to 31 [..., 256], scales [..., 16] int8, d [..., 1] → bytes [..., 210]."""
    codes = (integers + 32).to(torch.int32)
    low, top = _to_planes(codes & 0xF, 64, 4), _to_planes(codes >> 4, 32, 2)
    return torch.cat((low, top, scales.to(torch.int8).contiguous().view(torch.uint8), half_bytes(d)), dim=-1)
