"""The vocabulary that printer and parser of the text form share: literals, reserved words, names, types."""

from __future__ import annotations

import json
import re
from typing import Any

import torch
from torch import Tensor

from irc.core.dtypes import dtype_name
from irc.core.errors import IrcError
from irc.core.listing.expressions import expr_text
from irc.core.typed_graph import TypedGraph

FORMAT_VERSION = 1

DTYPES = {
    dtype_name(dtype): dtype
    for dtype in (
        torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
        torch.int64, torch.int32, torch.int16, torch.int8, torch.uint64, torch.uint32, torch.uint16, torch.uint8,
        torch.bool, torch.complex64, torch.complex128,
    )
}  # fmt: skip
CONSTANTS: dict[str, Any] = {
    "True": True,
    "False": False,
    "None": None,
    "inf": float("inf"),
    "nan": float("nan"),
    "strided": torch.strided,
    "contiguous_format": torch.contiguous_format,
    "preserve_format": torch.preserve_format,
    "channels_last": torch.channels_last,
    "channels_last_3d": torch.channels_last_3d,
}
FUNCTIONS = ("max", "min", "float", "trunc", "floor", "ceil", "round", "sqrt", "where")
RESERVED = frozenset((*DTYPES, *CONSTANTS, *FUNCTIONS, "and", "or", "not"))

_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_WEIGHT_NAME = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*")
_NAMED_CONSTANTS = {
    torch.strided: "strided",
    torch.contiguous_format: "contiguous_format",
    torch.preserve_format: "preserve_format",
    torch.channels_last: "channels_last",
    torch.channels_last_3d: "channels_last_3d",
}


def is_dim_name(name: str) -> bool:
    """Whether a dimension may be called that in the text form."""
    return _IDENTIFIER.fullmatch(name) is not None and name not in RESERVED


def quoted(text: str) -> str:
    """A JSON string, ASCII only."""
    return json.dumps(text)


def bare_or_quoted(name: str) -> str:
    """A dotted name as it is, anything else as a JSON string."""
    return name if _WEIGHT_NAME.fullmatch(name) else quoted(name)


def literal(value: Any) -> str:
    """A constant argument as text."""
    if value is None or isinstance(value, (bool, int)):
        return str(value)
    if isinstance(value, float):
        return repr(value)
    if isinstance(value, str):
        return quoted(value)
    if isinstance(value, torch.dtype):
        return dtype_name(value)
    if isinstance(value, torch.device):
        return quoted(str(value))
    if isinstance(value, (torch.memory_format, torch.layout)) and value in _NAMED_CONSTANTS:
        return _NAMED_CONSTANTS[value]
    raise IrcError(f"a {type(value).__name__} ({value!r}) cannot be an argument in the text form")


def size_text(program: TypedGraph, size: Any) -> str:
    """A size (number or symbolic) over the program's dimension names."""
    if isinstance(size, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return expr_text(program.expr(size))
    return literal(size)


def type_text(program: TypedGraph, value: Any) -> str:
    """Type of a value: `f32[B, S, 8]`, `(f32[2], i64[2])`, `size(2*S)`, `None`."""
    if isinstance(value, Tensor):
        return f"{dtype_name(value.dtype)}[{', '.join(size_text(program, s) for s in value.shape)}]"
    if isinstance(value, (tuple, list)):
        inner = ", ".join(type_text(program, v) for v in value)
        return f"({inner},)" if len(value) == 1 else f"({inner})"
    if value is None:
        return "None"
    return f"size({size_text(program, value)})"


def placement_text(program: TypedGraph, tensor: Tensor) -> str:
    """What a type leaves out of a tensor, where it is not the usual: strides and device."""
    text = ""
    if not _is_plain(tensor):
        text += f" strides [{', '.join(size_text(program, s) for s in tensor.stride())}]"
    if tensor.device.type not in ("cpu", "meta"):
        text += f" on {quoted(str(tensor.device))}"
    return text


def _is_plain(tensor: Tensor) -> bool:
    strides, expected = tensor.stride(), 1
    for size, stride in zip(reversed(tensor.shape), reversed(strides), strict=True):
        if str(stride) != str(expected):
            return False
        expected = size * expected
    return True
