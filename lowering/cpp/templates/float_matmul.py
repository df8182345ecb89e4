"""Weights stored as floats (f32, bf16, f16, 8-bit floats with a scale a row) × activations in f32 or halves, f32 sums.

`irc/fmatmul.h` has the layout, the order of the sums and the bound on their error; `irc/linear.h` chooses a kernel. On
AVX-512 bf16 activations meet bf16 weights in vdpbf16ps; everywhere else both are widened to f32 first.

`epilogue(m, n0, n1, values)` gets y[m, n0:n1] as f32, at most 128 columns, with n0 a multiple of 32.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from irc.core import formats
from irc.core.errors import OptionError, ParseError, TargetError
from irc.lowering.cpp.templates.base import C_TYPES, PANEL, MatmulProblem, as_bytes, by_panel, pad_to, wrong_shape

INCLUDES = ("irc/linear.h",)
# Rows between two calls of the epilogue for the same columns: a tile, as C++ text.
ROWS_AHEAD = "irc::gemm_height"
_PLAIN = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}


def refuses(problem: MatmulProblem, isa: str) -> str | None:
    """Why the template cannot do the problem, or None. The same on every instruction set."""
    if problem.activation not in C_TYPES:
        return f"activations in {problem.activation}; known: {', '.join(C_TYPES)}"
    if problem.weight in _PLAIN:
        return None
    try:
        chosen = formats.parse(problem.weight)
    except (OptionError, ParseError) as error:
        return str(error)
    if not isinstance(chosen, formats.Float8Format):
        return f"{problem.weight} is no float format; known: {', '.join(_PLAIN)}, f8e4m3, f8e5m2"
    if chosen.group_size is not None:
        return f"{problem.weight}: 8-bit floats are packed with one scale a row or for the tensor"
    return None


def pack(problem: MatmulProblem, weight: Tensor, scale: Tensor | None = None) -> Tensor:
    """A weight [N, K] (with its scales [N, 1] or [1, 1], if 8-bit) as panels.

    Raises:
        TargetError: the weight does not fit the problem, or holds a NaN in 8 bits.
    """
    reason = refuses(problem, "plain")
    if reason:
        raise TargetError(f"float_matmul cannot do {problem}: {reason}")
    if tuple(weight.shape) != (problem.columns, problem.depth):
        raise wrong_shape("weight", list(weight.shape), [problem.columns, problem.depth])
    if problem.weight in _PLAIN:
        if weight.dtype != _PLAIN[problem.weight]:
            raise TargetError(f"weight is {weight.dtype}, but the problem says {problem.weight}")
        if problem.weight == "bf16":
            pairs = by_panel(pad_to(weight, 1, 2)).unflatten(2, (-1, 2))
            return as_bytes(pairs.permute(0, 2, 1, 3).flatten())
        return as_bytes(by_panel(weight).transpose(1, 2).flatten())
    if scale is None:
        raise TargetError(f"weights in {problem.weight} come without scales")
    if bool(weight.float().isnan().any()):
        raise TargetError(f"a weight in {problem.weight} is NaN, which the packed layout cannot hold")
    bits = by_panel(weight.view(torch.uint8)).transpose(1, 2).flatten(1)
    scales = scale.float().expand(problem.columns, 1).squeeze(1)
    if not torch.equal(scale.float().to(scale.dtype), scale):
        raise TargetError(f"scales in {scale.dtype} are not exact in f32")
    return torch.cat([bits, as_bytes(by_panel(scales))], 1).flatten()


def packed_bytes(problem: MatmulProblem) -> int:
    """Bytes of `pack`'s result."""
    panels = -(-problem.columns // PANEL)
    if problem.weight == "bf16":
        return panels * PANEL * (problem.depth + problem.depth % 2) * 2
    if problem.weight in _PLAIN:
        return panels * PANEL * problem.depth * _PLAIN[problem.weight].itemsize
    return panels * (PANEL * problem.depth + PANEL * 4)


def scratch_bytes(problem: MatmulProblem, num_rows: int, num_workers: int) -> int:
    """Bytes for the activations widened to f32; none where they are f32."""
    if problem.activation == "f32":
        return 0
    if num_rows == 1:
        return num_workers * -(-problem.depth // 16) * 64
    return num_rows * problem.depth * 4


def call(problem: MatmulProblem, args: Mapping[str, str], epilogue: str) -> str:
    """Multiplies.

    Args: worker (irc::Worker&), x and its row `stride` in elements, packed (const uint8_t*), scratch (uint8_t*,
        may be nullptr for f32 activations).
    """
    stored = problem.weight.split(".", 1)[0]
    weight_type = C_TYPES.get(stored) or f"irc::{stored}"
    return (
        f"irc::float_linear<{weight_type}>({args['worker']}, {args['x']}, {args['stride']}, {args['packed']},"
        f" {problem.rows}, {problem.columns}, {problem.depth}, {args['scratch']}, {epilogue});\n"
    )
