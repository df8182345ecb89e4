"""Options of target `triton`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from irc.core.errors import OptionError


@dataclass(frozen=True, kw_only=True)
class TritonOptions:
    """How a program is lowered and run.

    Attributes:
        device: where it runs; None: the current GPU, or the processor in Triton's interpreter.
        float32: how products of f32 are computed: `tf32x3` splits each factor in two and is near f32, `tf32` is faster
            and has 10 bits, `ieee` is f32 without tensor cores.
        graphs: replay steps of a language model as CUDA graphs.
        templates: use the hand-written kernels; without, products are PyTorch's.
        printed: kinds of templates that are not used, their operations printed from the kernel IR instead.
    """

    device: str | None = None
    float32: Literal["tf32x3", "tf32", "ieee"] = "tf32x3"
    graphs: bool = True
    templates: bool = True
    printed: Sequence[str] = ()

    def __post_init__(self) -> None:
        if self.float32 not in ("tf32x3", "tf32", "ieee"):
            raise OptionError(f"float32 must be tf32x3, tf32 or ieee, not {self.float32!r}")
