"""The largest value under each window of an image, channels last. `irc/window.h` has the loops; the result is exact.

There is no constant operand, so nothing is packed. `epilogue(m, n0, n1, values)` gets channels n0 to n1 of pixel m (of
all images) as f32.
"""

from __future__ import annotations

from collections.abc import Mapping

from irc.core.errors import TargetError
from irc.lowering.cpp.templates.base import C_TYPES
from irc.lowering.cpp.templates.conv2d import ConvProblem, shape_text

INCLUDES = ("irc/window.h",)
_KNOWN = (*C_TYPES, "u8", "i8")


def refuses(problem: ConvProblem, isa: str) -> str | None:
    """Why the template cannot do the problem, or None. The same on every instruction set."""
    if problem.activation not in _KNOWN:
        return f"the largest of {problem.activation}; known: {', '.join(_KNOWN)}"
    if not problem.depthwise:
        return "a window over several channels"
    return None


def scratch_bytes(problem: ConvProblem, num_rows: int, num_workers: int) -> int:
    """None."""
    return 0


def call(problem: ConvProblem, args: Mapping[str, str], epilogue: str) -> str:
    """Takes the largest values.

    Args: worker, x (dense, channels last), batch, height, width, out_height, out_width.
    """
    reason = refuses(problem, "plain")
    if reason:
        raise TargetError(f"max_pool2d cannot do {problem}: {reason}")
    return f"irc::max_pool2d({args['worker']}, {shape_text(problem, args)}, {args['x']}, {epilogue});\n"
