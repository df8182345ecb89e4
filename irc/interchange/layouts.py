"""The checkpoint layouts by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from irc.core.errors import OptionError, nearest
from irc.interchange import awq, compressed_tensors, gptq
from irc.interchange.layout import Layout, QuantizedWeight


@dataclass(frozen=True)
class LayoutKind:
    """What the name of a layout stands for.

    Attributes:
        read: `quantization_config`, weights_only → layout; raises `Refusal`.
        plan: weights by module, names of linear layers left in full precision → layout, `quantization_config`.
    """

    read: Callable[[Mapping[str, Any], bool], Layout]
    plan: Callable[[Mapping[str, QuantizedWeight], list[str]], tuple[Layout, dict[str, Any]]]


_KINDS = {
    "compressed-tensors": LayoutKind(compressed_tensors.read, compressed_tensors.plan),
    "int-quantized": LayoutKind(compressed_tensors.read, compressed_tensors.plan_plain),
    "gptq": LayoutKind(gptq.read, gptq.plan),
    "gptq_v2": LayoutKind(gptq.read, gptq.plan_v2),
    "awq": LayoutKind(awq.read, awq.plan),
}
LAYOUTS = tuple(_KINDS)


def find_layout(name: str) -> LayoutKind:
    """The layout of that name; raises `OptionError` with the nearest names."""
    if name not in _KINDS:
        raise OptionError(f"unknown checkpoint layout {name!r}{nearest(name, _KINDS)}")
    return _KINDS[name]
