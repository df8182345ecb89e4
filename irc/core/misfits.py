"""Names the inputs that a program cannot take, for errors whose own text is about something deep inside."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from irc.core.dtypes import describe
from irc.core.errors import IrcError
from irc.core.typed_graph import VAL, TypedGraph


def misfits(program: TypedGraph, flat: Sequence[Any]) -> list[str]:
    """Inputs whose number of dimensions, element type or fixed sizes are not those of the program's."""
    found = []
    for node, value in zip(program.placeholders, flat, strict=False):
        wanted = node.meta[VAL]
        if not isinstance(wanted, Tensor):
            continue
        if not isinstance(value, Tensor):
            found.append(f"{node.target} is {type(value).__name__}, not {program.type_text(node)}")
        elif not _fits(value, wanted):
            found.append(f"{node.target} is {describe(value)}, not {program.type_text(node)}")
    return found


def misfit_error(program: TypedGraph, problems: Sequence[str]) -> IrcError:
    """What to raise about them."""
    return IrcError(f"program {program.name} cannot take these inputs:\n  - " + "\n  - ".join(problems))


def _fits(value: Tensor, wanted: Tensor) -> bool:
    if (value.dim(), value.dtype) != (wanted.dim(), wanted.dtype):
        return False
    sizes = zip(value.shape, wanted.shape, strict=True)
    return all(given == size for given, size in sizes if isinstance(size, int))  # the others are symbols: any size
