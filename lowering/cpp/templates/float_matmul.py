"""Weights stored as floats (f32, bf16, f16, 8-bit floats with scales) × activations in f32 or halves, f32 sums.

`irc/fmatmul.h` has the layout, the order of the sums and the bound on their error; `irc/linear.h` chooses a kernel. On
AVX-512 bf16 activations meet bf16 weights in vdpbf16ps; everywhere else both are widened to f32 first.
`irc/linear_scaled.h` has all of that for 8-bit floats.

`epilogue(m, n0, n1, values)` gets y[m, n0:n1] as f32, at most 128 columns, with n0 a multiple of 32.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from irc.core import formats
from irc.core.errors import OptionError, ParseError, TargetError
from irc.lowering.cpp.templates.base import C_TYPES, PANEL, MatmulProblem, as_bytes, by_panel, pad_to, wrong_shape

INCLUDES = ("irc/linear.h", "irc/linear_scaled.h")
# Rows between two calls of the epilogue for the same columns: a tile, as C++ text.
ROWS_AHEAD = "irc::gemm_height"
# Neighbours along the depth whose bytes lie together.
_TOGETHER = 4
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
    if chosen.group_size is not None and problem.depth % chosen.group_size:
        return f"{problem.weight}: groups of {chosen.group_size} do not divide {problem.depth}"
    return None


def pack(problem: MatmulProblem, weight: Tensor, scale: Tensor | None = None) -> Tensor:
    """A weight [N, K] (with its scales [N, groups], [N, 1] or [1, 1], if 8-bit) as panels.

    Raises:
        TargetError: the weight does not fit the problem, or holds an infinity or a NaN in 8 bits.
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
    if not bool(weight.float().isfinite().all()):
        raise TargetError(f"a weight in {problem.weight} is infinite or NaN, which the packed layout cannot hold")
    if not torch.equal(scale.float().to(scale.dtype), scale):
        raise TargetError(f"scales in {scale.dtype} are not exact in f32")
    group = _group(problem)
    grouped = pad_to(by_panel(weight.view(torch.uint8)).unflatten(2, (-1, group)), 3, _TOGETHER)
    lines = grouped.unflatten(3, (-1, _TOGETHER)).permute(0, 2, 3, 1, 4).flatten(2)
    scales = by_panel(scale.float().expand(problem.columns, problem.depth // group)).transpose(1, 2)
    return torch.cat([as_bytes(scales.contiguous()).view(*lines.shape[:2], -1), lines], 2).flatten()


def _group(problem: MatmulProblem) -> int:
    """Neighbours along the depth that share a scale."""
    return getattr(formats.parse(problem.weight), "group_size", None) or problem.depth


def packed_bytes(problem: MatmulProblem) -> int:
    """Bytes of `pack`'s result."""
    panels = -(-problem.columns // PANEL)
    if problem.weight == "bf16":
        return panels * PANEL * (problem.depth + problem.depth % 2) * 2
    if problem.weight in _PLAIN:
        return panels * PANEL * problem.depth * _PLAIN[problem.weight].itemsize
    group = _group(problem)
    return panels * PANEL * (problem.depth // group) * (-(-group // _TOGETHER) * _TOGETHER + 4)


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
    operands = f"{args['worker']}, {args['x']}, {args['stride']}, {args['packed']}"
    sizes = f"{problem.rows}, {problem.columns}, {problem.depth}"
    if problem.weight in _PLAIN:
        function = f"float_linear<{C_TYPES[problem.weight]}>"
    else:
        function, sizes = f"scaled_linear<irc::{problem.weight.split('.', 1)[0]}>", f"{sizes}, {_group(problem)}"
    return f"irc::{function}({operands}, {sizes}, {args['scratch']}, {epilogue});\n"
