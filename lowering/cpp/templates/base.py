"""What the templates share: instruction sets, the matmul problem, panels of rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from irc.core.errors import TargetError

INCLUDE_DIRECTORY = Path(__file__).resolve().parent.parent / "include"
# Rows of a packed panel: the width of the kernels' vectors.
PANEL = 16

# Compiler flags of each instruction set that the headers know; the most capable comes first.
ISA_FLAGS: Mapping[str, tuple[str, ...]] = {
    "avx512": (
        "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni", "-mavx512bf16", "-mavx2", "-mfma",
        "-mf16c",
    ),
    "avx2": ("-mavx2", "-mfma", "-mf16c"),
    "plain": (),
}  # fmt: skip
COMMON_FLAGS = ("-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", f"-I{INCLUDE_DIRECTORY}")

# Types of numbers in memory: name in problems → type in C++.
C_TYPES: Mapping[str, str] = {"f32": "float", "bf16": "irc::bf16", "f16": "irc::f16"}


@dataclass(frozen=True, kw_only=True)
class MatmulProblem:
    """y[M, N] = x[M, K] · w[N, K]ᵀ.

    Attributes:
        rows: M, or the name of the C++ variable that holds it.
        columns: N.
        depth: K.
        weight: number format of w: `int4.g32`, `int8.row`, `f8e4m3.row`, … or `f32`, `bf16`, `f16`.
        scale: type of w's scales as packed: `f16` or `f32`.
        asymmetric: w comes with zero points.
        activation: type of x in memory: `f32`, `bf16` or `f16`.
    """

    rows: int | str
    columns: int
    depth: int
    weight: str
    scale: str = "f32"
    asymmetric: bool = False
    activation: str = "f32"


def detect_isa() -> str:
    """The most capable instruction set of this machine."""
    try:
        flags = set(Path("/proc/cpuinfo").read_text().split("flags", 1)[1].split("\n", 1)[0].split())
    except (OSError, IndexError):
        return "plain"
    if {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni", "avx512_bf16"} <= flags:
        return "avx512"
    return "avx2" if {"avx2", "fma", "f16c"} <= flags else "plain"


def pad_to(x: Tensor, dim: int, multiple: int, value: int = 0) -> Tensor:
    """x with `dim` padded at its end to a multiple."""
    missing = -x.shape[dim] % multiple
    if missing == 0:
        return x
    shape = list(x.shape)
    shape[dim] = missing
    return torch.cat([x, x.new_full(shape, value)], dim)


def by_panel(x: Tensor) -> Tensor:
    """[N, …] → [N / 16, 16, …], the last panel padded with zeros."""
    return pad_to(x, 0, PANEL).unflatten(0, (-1, PANEL))


def as_bytes(x: Tensor) -> Tensor:
    """The bytes of a tensor, last axis multiplied by the size of an element."""
    return x.contiguous().view(torch.uint8)


def wrong_shape(what: str, found: object, wanted: object) -> TargetError:
    return TargetError(f"{what} is {found}, but the problem says {wanted}")
