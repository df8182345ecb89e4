"""Integer weights × activations quantized to int8 a token: decode, verification of drafts and prefill.

Weights of 2 to 4 bits are kept in 4 bits, those of 5 to 8 in 8, with the stored scales and zero points: nothing is
rounded. The result is Σ_g scale_g · (exact integer sum of group g), groups added in f32, times the token's scale.
`irc/qmatmul.h` and `irc/group_sums.h` have the arithmetic and the layout.

`epilogue(m, n0, n1, values)` gets y[m, n0:n1] as f32 with n0 a multiple of 32.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from irc.core import formats
from irc.core.errors import OptionError, ParseError, TargetError
from irc.lowering.cpp.templates.base import (
    C_TYPES,
    PANEL,
    MatmulProblem,
    as_bytes,
    by_panel,
    pad_to,
    wrong_shape,
)

INCLUDES = ("irc/qmatmul.h",)
# GGUF blocks that are integers with an f16 scale, and the format that holds the same numbers.
_PLAIN_BLOCKS = {"q4_0": "int4.g32", "q8_0": "int8.g32"}
# Rows of zeros, at most, that fill the last tile of several tokens (irc/quantize.h: Tiles).
FILLING_ROWS = 11
# Numbers packed at a time: temporaries, a few times as large as the integers, stay in the cache.
_AT_ONCE = 1 << 21


def refuses(problem: MatmulProblem, isa: str) -> str | None:
    """Why the template cannot do the problem, or None. The same on every instruction set."""
    try:
        chosen = _format(problem.weight)
    except (OptionError, ParseError) as error:
        return str(error)
    if chosen is None:
        return f"{problem.weight} is no integer format"
    if problem.scale not in ("f16", "f32"):
        return f"scales in {problem.scale}; f16 and f32 can be packed"
    if problem.activation not in C_TYPES:
        return f"activations in {problem.activation}; known: {', '.join(C_TYPES)}"
    group = chosen.group_size
    if group is not None and group % 8:
        return f"group size {group} is no multiple of 8"
    if group is not None and problem.depth % group:
        return f"group size {group} does not divide rows of {problem.depth}"
    if problem.depth > 1 << 16:
        return f"rows of {problem.depth} could overflow 32-bit sums; at most {1 << 16}"
    return None


def weights_type(problem: MatmulProblem) -> str:
    """The C++ type that describes the packed weights."""
    chosen = _require(problem)
    bits = 4 if chosen.bits <= 4 else 8
    asymmetric = "true" if problem.asymmetric or not chosen.signed else "false"
    return f"irc::Weights<{bits}, {chosen.group_size or 0}, {asymmetric}, {C_TYPES[problem.scale]}>"


def pack(
    problem: MatmulProblem,
    stored: Tensor,
    scale: Tensor | None = None,
    zero_point: Tensor | None = None,
    tensor_scale: Tensor | None = None,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """The parts of a quantized weight (arguments of `irc::dequantize`) as panels; in `out` if it is given.

    Shapes: stored: what the format packs [N, K] to; scale, zero_point [N, K / group]; returns u8[bytes].

    Raises:
        TargetError: the parts do not fit the problem, or a zero point or scale cannot be held exactly.
    """
    chosen = _require(problem)
    if problem.weight in _PLAIN_BLOCKS:
        blocks = formats.parse(problem.weight)
        stored, scale, zero_point, _ = formats.repack(stored, scale, zero_point, blocks, chosen)
    if scale is None:
        raise TargetError(f"weights in {problem.weight} come without scales")
    if (zero_point is not None) != problem.asymmetric:
        has = "no" if zero_point is None else "a"
        raise TargetError(f"weights in {problem.weight} have {has} zero point; asymmetric={problem.asymmetric}")
    shape = chosen.logical_shape(tuple(stored.shape))
    if shape != (problem.columns, problem.depth):
        raise wrong_shape("weight", list(shape), [problem.columns, problem.depth])
    scale = _exact_scale(scale, problem.scale).expand(problem.columns, -1)
    if zero_point is not None:
        zero_point = zero_point.expand(problem.columns, -1)
    packed = torch.empty(packed_bytes(problem), dtype=torch.uint8) if out is None else out
    panels = packed.view(-(-problem.columns // PANEL), _sizes(chosen, problem.depth)[2], -1)
    step = max(1, _AT_ONCE // problem.depth // PANEL) * PANEL
    for start in range(0, problem.columns, step):
        rows = slice(start, start + step)
        zero = None if zero_point is None else zero_point[rows]
        _pack_rows(panels[start // PANEL :], chosen, stored[rows], scale[rows], zero)
    return packed


def packed_bytes(problem: MatmulProblem) -> int:
    """Bytes of `pack`'s result."""
    chosen = _require(problem)
    _depth, group, groups = _sizes(chosen, problem.depth)
    asymmetric = problem.asymmetric or not chosen.signed
    a_group = group * 2 * (4 if chosen.bits <= 4 else 8) + PANEL * (2 if problem.scale == "f16" else 4)
    return -(-problem.columns // PANEL) * groups * (a_group + (PANEL if asymmetric else 0))


def scratch_bytes(problem: MatmulProblem, num_rows: int, num_workers: int) -> int:
    """Bytes for the quantized activations of `num_rows` tokens (irc/quantize.h: QuantizedRows)."""
    depth, group, groups = _sizes(_require(problem), problem.depth)
    segments = groups * -(-group // 32)

    def rounded(size: int) -> int:
        return -(-size // 64) * 64

    if num_rows > 1:
        num_rows += FILLING_ROWS
    one = rounded(num_rows * depth) + rounded(num_rows * segments * 4) + rounded(num_rows * 4)
    return one * (num_workers if num_rows == 1 else 1)


def call(problem: MatmulProblem, args: Mapping[str, str], epilogue: str) -> str:
    """Quantizes x and multiplies.

    Args: worker (irc::Worker&), x and its row `stride` in elements, packed (const uint8_t*), scratch (uint8_t*).
    """
    return (
        f"irc::quantized_matmul<{weights_type(problem)}>({args['worker']}, {args['x']}, {args['stride']},"
        f" {args['packed']}, {problem.rows}, {problem.columns}, {problem.depth}, {args['scratch']}, {epilogue});\n"
    )


def call_quantize(problem: MatmulProblem, args: Mapping[str, str]) -> str:
    """The first half of `call`, for activations that several products of one weights_type and depth share."""
    return (
        f"irc::quantize_activations<{weights_type(problem)}>({args['worker']}, {args['x']}, {args['stride']},"
        f" {problem.rows}, {problem.depth}, {args['scratch']});\n"
    )


def call_product(problem: MatmulProblem, args: Mapping[str, str], epilogue: str) -> str:
    """The second half of `call`: the product of what lies in scratch."""
    return (
        f"irc::quantized_product<{weights_type(problem)}>({args['worker']}, {args['packed']},"
        f" {problem.rows}, {problem.columns}, {problem.depth}, {args['scratch']}, {epilogue});\n"
    )


def _format(text: str) -> formats.QuantFormat | None:
    chosen = formats.parse(_PLAIN_BLOCKS.get(text, text))
    return chosen if isinstance(chosen, formats.QuantFormat) else None


def _require(problem: MatmulProblem) -> formats.QuantFormat:
    reason = refuses(problem, "plain")
    chosen = None if reason else _format(problem.weight)
    if chosen is None:
        raise TargetError(f"quantized_matmul cannot do {problem}: {reason}")
    return chosen


def _sizes(chosen: formats.QuantFormat, depth: int) -> tuple[int, int, int]:
    """Padded depth, group size, groups a row."""
    padded = -(-depth // 8) * 8
    group = chosen.group_size or padded
    return padded, group, padded // group


def _exact_scale(scale: Tensor, wanted: str) -> Tensor:
    packed = scale.to(torch.float16 if wanted == "f16" else torch.float32)
    if not torch.equal(packed.to(scale.dtype), scale):
        raise TargetError(f"scales in {scale.dtype} are not exact in {wanted}; pack them as f32")
    return packed


def _pack_rows(
    panels: Tensor, chosen: formats.QuantFormat, stored: Tensor, scale: Tensor, zero_point: Tensor | None
) -> None:
    """Rows into the first of `panels` [panels, groups, bytes of a group]."""
    groups = scale.shape[1]
    zeros = torch.zeros(scale.shape, dtype=torch.int16) if zero_point is None else zero_point.to(torch.int16)
    if chosen.bits <= 4:
        shift = 8 if chosen.signed else 0
        quads = _nibble_quads(chosen, stored, shift)
        zeros = zeros + shift
        largest = 16
    else:
        # 8 bits are packed signed, their zero points plus 128.
        shift = 0 if chosen.signed else -128
        quads = _byte_quads(chosen, stored)
        zeros = zeros + shift + 128
        largest = 255
    # A line: of 16 rows four bytes each.
    lines = by_panel(quads).unflatten(2, (groups, -1)).permute(0, 2, 3, 1)
    panels = panels[: lines.shape[0]]
    line_bytes = lines.shape[2] * 4 * PANEL
    panels[..., :line_bytes].unflatten(2, (-1, 4 * PANEL)).view(torch.int32).copy_(lines)
    scales = as_bytes(by_panel(scale).transpose(1, 2))
    panels[..., line_bytes : line_bytes + scales.shape[2]] = scales
    if zero_point is not None or not chosen.signed:
        if int(zeros.min()) < 0 or int(zeros.max()) > largest:
            found = f"{int(zeros.min())} to {int(zeros.max())}"
            raise TargetError(
                f"zero points of {chosen} run over {found} (offset {shift}); 0 to {largest} can be packed"
            )
        panels[..., line_bytes + scales.shape[2] :] = by_panel(zeros.to(torch.uint8)).transpose(1, 2)


def _nibble_quads(chosen: formats.QuantFormat, stored: Tensor, shift: int) -> Tensor:
    """i32[N, K / 8]: of 8 neighbours the first four in the low nibbles of 4 bytes, the others in the high ones."""
    if chosen.packs_two and stored.shape[1] % 4 == 0:
        eight = stored.contiguous().view(torch.int32)  # neighbour i in bits 4 i to 4 i + 3
        # 0 1 2 3 4 5 6 7 → 0 1 4 5 2 3 6 7 → 0 4 1 5 2 6 3 7
        return _exchanged(_exchanged(eight, 8, 0x0000FF00), 4, 0x00F000F0)
    values = pad_to((chosen.unpack(stored) + shift).to(torch.uint8), 1, 8, shift).unflatten(1, (-1, 2, 4))
    return (values[:, :, 0] | values[:, :, 1] << 4).contiguous().view(torch.int32).squeeze(-1)


def _exchanged(x: Tensor, distance: int, mask: int) -> Tensor:
    """Each i32 with the bits of the mask exchanged for those `distance` above them."""
    differ = (x >> distance).bitwise_xor_(x).bitwise_and_(mask)
    changed = x ^ differ
    return changed.bitwise_xor_(differ.bitwise_left_shift_(distance))


def _byte_quads(chosen: formats.QuantFormat, stored: Tensor) -> Tensor:
    """i32[N, K / 4]: 4 neighbours, signed."""
    values = stored if chosen.bits == 8 else chosen.unpack(stored).to(torch.int8 if chosen.signed else torch.uint8)
    values = values.view(torch.uint8)
    if not chosen.signed:
        values = values ^ 0x80
    return pad_to(values, 1, 8).contiguous().view(torch.int32)
