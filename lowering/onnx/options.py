"""Options of the target `onnx`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from irc.core.errors import OptionError
from irc.lowering.onnx.installed import NEWEST_OPSET, OLDEST_OPSET

FLAVOURS = ("portable", "ort")


@dataclass(frozen=True, kw_only=True)
class OnnxOptions:
    """Options of the target.

    Attributes:
        flavour: `portable`, operators of the ONNX standard only; `ort`, also ONNX Runtime's own.
        opset: None: the newest one that was tested and that ONNX Runtime has kernels for.
        accuracy_level: in what `MatMulNBits` (flavour `ort`) multiplies: None, f32; 4, 8-bit integers, about twice as
            fast, for half a percent of error.
        integers: how layers over quantized values are written in the flavour `ort`: `qdq`, as float layers between
            DequantizeLinear, which ONNX Runtime fuses; `qoperator`, as products of integers.
        providers: execution providers of ONNX Runtime, in order of preference: `cpu`, `cuda`, `tensorrt`, `openvino`,
            `coreml`, … or their full names. Chosen when a model is run: a file serves all of them.
        threads: of ONNX Runtime; None: its own choice.
    """

    flavour: str = "portable"
    opset: int | None = None
    accuracy_level: int | None = None
    integers: str = "qdq"
    providers: Sequence[str] = ("cpu",)
    threads: int | None = None

    def __post_init__(self) -> None:
        problems = []
        if self.flavour not in FLAVOURS:
            problems.append(f"flavour must be one of {', '.join(FLAVOURS)}, not {self.flavour!r}")
        if self.opset is not None and not OLDEST_OPSET <= self.opset <= NEWEST_OPSET:
            problems.append(f"opset must be {OLDEST_OPSET} to {NEWEST_OPSET}, not {self.opset!r}")
        if self.accuracy_level not in (None, 0, 1, 2, 3, 4):
            problems.append(f"accuracy_level must be 0 to 4 or None, not {self.accuracy_level!r}")
        if self.integers not in ("qdq", "qoperator"):
            problems.append(f"integers must be qdq or qoperator, not {self.integers!r}")
        if isinstance(self.providers, str) or not self.providers:
            problems.append(f"providers is a list of names, not {self.providers!r}")
        if problems:
            raise OptionError("target onnx: " + "; ".join(problems))
