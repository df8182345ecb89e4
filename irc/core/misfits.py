"""Names the inputs that a program cannot take, for errors whose own text is about something deep inside."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from irc.core.program import VAL, Program, dtype_name


def misfits(program: Program, flat: Sequence[Any]) -> list[str]:
    """Inputs whose number of dimensions or element type is not that of the program's."""
    found = []
    for node, value in zip(program.placeholders, flat, strict=False):
        wanted = node.meta[VAL]
        if not isinstance(wanted, Tensor):
            continue
        if not isinstance(value, Tensor):
            found.append(f"{node.target} is {type(value).__name__}, not {program.type_text(node)}")
        elif (value.dim(), value.dtype) != (wanted.dim(), wanted.dtype):
            sizes = ", ".join(map(str, value.shape))
            found.append(f"{node.target} is {dtype_name(value.dtype)}[{sizes}], not {program.type_text(node)}")
    return found
