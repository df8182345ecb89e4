"""Short names of element types, as the text form and error messages write them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_DTYPE_NAMES = {
    torch.float64: "f64", torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16",
    torch.float8_e4m3fn: "f8e4m3", torch.float8_e5m2: "f8e5m2",
    torch.int64: "i64", torch.int32: "i32", torch.int16: "i16", torch.int8: "i8",
    torch.uint64: "u64", torch.uint32: "u32", torch.uint16: "u16", torch.uint8: "u8",
    torch.bool: "bool", torch.complex64: "c64", torch.complex128: "c128",
}  # fmt: skip


def dtype_name(dtype: torch.dtype) -> str:
    """Short name of a type, as the text form writes it."""
    return _DTYPE_NAMES[dtype]


def dtype_text(dtype: torch.dtype) -> str:
    """As `dtype_name`, and PyTorch's own name for a type that programs do not have (error texts must show it)."""
    return _DTYPE_NAMES.get(dtype, str(dtype))


def dtype_from_name(name: str) -> torch.dtype:
    """Inverse of `dtype_name`; KeyError if unknown."""
    return {short: dtype for dtype, short in _DTYPE_NAMES.items()}[name]


def describe(value: Any) -> str:
    """`f32[3, 16]` for a tensor, the value itself for anything else."""
    if isinstance(value, Tensor):
        return f"{dtype_text(value.dtype)}[{', '.join(str(s) for s in value.shape)}]"
    return repr(value)
