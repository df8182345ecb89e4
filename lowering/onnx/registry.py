"""How a canonical operation becomes an ONNX operator: one registration an operation and flavour.

A registration has a capability test (`why_not`) and a builder. The builder is traced by `torch.export` like any
PyTorch code; it may call ATen operations beside `emit`, which puts an ONNX operator into the graph. An operation that
no registration takes is decomposed to ATen by its reference, and the reason is reported.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor

from irc.core.ops.registry import find_op
from irc.core.program import Program
from irc.lowering.onnx import installed

WhyNot = Callable[["Setting", Program, fx.Node], "str | None"]
Builder = Callable[..., Any]


@dataclass(frozen=True)
class Setting:
    """What a program is lowered for.

    Attributes:
        flavour, opset: see `OnnxOptions`.
        accuracy_level, integers: see `OnnxOptions`.
    """

    flavour: str
    opset: int
    accuracy_level: int | None = None
    integers: str = "qdq"


@dataclass(frozen=True)
class Translation:
    """One registration.

    Attributes:
        op: the canonical operation, `rms_norm`.
        onnx_op: the operator that it becomes.
        domain: empty for the ONNX standard.
        opset: oldest operator set that has it.
        flavours: that it is for.
        why_not: why a node cannot become the operator, or None.
        build: called with a setting and the operation's arguments.
    """

    op: str
    onnx_op: str
    domain: str
    opset: int
    flavours: tuple[str, ...]
    why_not: WhyNot
    build: Builder

    def refusal(self, setting: Setting, program: Program, node: fx.Node) -> str | None:
        """Why this node is not translated so, or None."""
        if setting.flavour not in self.flavours:
            return f"{self.onnx_op} is not in the flavour {setting.flavour}"
        if setting.opset < self.opset:
            return f"{self.onnx_op} needs opset {self.opset}, this is {setting.opset}"
        version = 1 if self.domain else setting.opset
        if not installed.has_kernel(self.onnx_op, self.domain, version):
            return f"this ONNX Runtime has no kernel for {self.onnx_op} of opset {version}"
        return self.why_not(setting, program, node)


_TRANSLATIONS: dict[tuple[str, str, str], Translation] = {}


def translates(
    op: str,
    onnx_op: str,
    *,
    why_not: WhyNot,
    domain: str = "",
    opset: int = 18,
    flavours: tuple[str, ...] = ("portable", "ort"),
) -> Callable[[Builder], Builder]:
    """Decorator on the builder: registers a translation."""

    def register(build: Builder) -> Builder:
        key = (op, domain, onnx_op)
        if key in _TRANSLATIONS:
            raise ValueError(f"irc::{op} is translated to {onnx_op} twice")
        _TRANSLATIONS[key] = Translation(op, onnx_op, domain, opset, flavours, why_not, build)
        return build

    return register


def find_translation(setting: Setting, program: Program, node: fx.Node) -> tuple[Translation | None, str]:
    """The translation of a canonical operation, or None with the reason (empty: there is none for that operation)."""
    definition = find_op(node.target)
    reasons = []
    for translation in _TRANSLATIONS.values():
        if definition is None or translation.op != definition.name:
            continue
        refusal = translation.refusal(setting, program, node)
        if refusal is None:
            return translation, ""
        reasons.append(refusal)
    return None, "; ".join(reasons)


def translate(setting: Setting, program: Program) -> None:
    """Edits the program: every operation that a registration takes calls its builder."""
    for node in list(program.operations()):
        translation, _ = find_translation(setting, program, node)
        if translation is not None:
            node.target = bound(setting, translation.build)


def bound(setting: Setting, build: Builder) -> Builder:
    """The builder with its setting, as a graph node can call it."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return build(setting, *args, **kwargs)

    call.__name__ = call.__qualname__ = build.__name__
    call.__module__ = build.__module__
    return call


def emit(
    op: str,
    inputs: Sequence[Tensor | None],
    attributes: dict[str, Any] | None = None,
    *,
    dtype: torch.dtype,
    shape: Sequence[int | torch.SymInt],
    version: int,
) -> Tensor:
    """An ONNX operator (`RMSNormalization`, `com.microsoft::MatMulNBits`) in the graph under export."""
    return torch.onnx.ops.symbolic(op, inputs, attributes or {}, dtype=dtype, shape=shape, version=version)
