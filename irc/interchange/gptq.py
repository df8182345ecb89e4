"""GPTQ checkpoints (AutoGPTQ, GPTQModel): `qweight`, `qzeros`, `scales`, `g_idx` for each layer.

    qweight [K * bits / 32, N]      integers packed along the inputs
    qzeros  [groups, N * bits / 32] zero points packed along the outputs; format `gptq` stores them minus one,
                                    `gptq_v2` as they are
    scales  [groups, N] f16         weight[n, k] = scales[g, n] * (q[k, n] - zero[g, n]),  g = g_idx[k]
    g_idx   [K] i32                 the group of each input; sorted unless quantized with act-order

Does not take: other settings for some layers (`dynamic`, but for unquantized ones); in format `gptq` a zero point of 0,
whose minus one wraps around and is read differently by different kernels.

Source: AutoGPTQ `nn_modules/qlinear`, GPTQModel `utils/model.py` (convert_gptq_v1_to_v2_format).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from irc.interchange.layout import (
    Layout,
    QuantizedWeight,
    Refusal,
    as_half,
    from_codes,
    group_of,
    groups_in,
    need,
    need_scale,
    number,
    one_shape,
)
from irc.interchange.packing import pack_words, unpack_words

_BITS = (2, 3, 4, 8)
_FORMATS = ("gptq", "gptq_v2")


@dataclass(frozen=True)
class Gptq(Layout):
    """Attributes: minus_one: zero points are stored minus one (format `gptq`)."""

    method: ClassVar[str] = "gptq"
    bits: int
    group_size: int | None
    minus_one: bool

    @property
    def marks(self) -> tuple[str, ...]:
        return ("qweight", "qzeros", "g_idx")

    @property
    def tensors(self) -> tuple[str, ...]:
        return ("qweight", "qzeros", "scales", "g_idx")

    def unpack(self, module: str, tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> QuantizedWeight:
        rows, width = shape
        self._check_shape(rows, width)
        groups = groups_in(width, self.group_size)
        words = need(tensors, "qweight", (torch.int32,), (width * self.bits // 32, rows))
        zero_words = need(tensors, "qzeros", (torch.int32,), (groups, rows * self.bits // 32))
        scale = need_scale(tensors, "scales", (groups, rows)).t()
        zero = unpack_words(zero_words, self.bits, rows, axis=1).t()
        if self.minus_one:
            if bool((zero == (1 << self.bits) - 1).any()):
                raise Refusal("qzeros holds a zero point of 0 minus one, which tools read differently")
            zero = zero + 1
        codes = unpack_words(words, self.bits, width, axis=0).t()
        order = None
        if "g_idx" in tensors:
            order = self._order(need(tensors, "g_idx", (torch.int32, torch.int64), (width,)).long(), groups)
        if order is not None:
            codes = codes[:, torch.argsort(order)]
        return from_codes(codes, zero, scale, self.bits, self.group_size, order=order)

    def _order(self, group_index: Tensor, groups: int) -> Tensor | None:
        """Where each input lies when inputs are sorted by group; None if they are sorted."""
        size = len(group_index) // groups
        if bool((group_index < 0).any()) or bool((group_index >= groups).any()):
            raise Refusal(f"g_idx names groups outside of 0 to {groups - 1}")
        counts = torch.bincount(group_index, minlength=groups)
        if bool((counts != size).any()):
            raise Refusal(f"g_idx gives groups of {int(counts.min())} to {int(counts.max())} inputs, not {size}")
        if torch.equal(group_index, torch.arange(len(group_index)) // size):
            return None
        return torch.argsort(torch.argsort(group_index, stable=True))

    def pack(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        rows, width = weight.shape
        self._check_shape(rows, width)
        codes, zero = weight.codes(self.bits)
        assert weight.parts.scale is not None
        size = width // groups_in(width, self.group_size)
        place = torch.arange(width)
        if weight.order is not None:
            codes, place = codes[:, weight.order], weight.order
        if self.minus_one:
            zero = zero - 1
        top = (1 << self.bits) - 1
        if bool((zero < 0).any()) or bool((zero > top).any()):
            hint = ": layout 'gptq_v2' can" if self.minus_one else ""
            raise Refusal(f"a zero point of {int(zero.min()) + self.minus_one} cannot be stored{hint}")
        return {
            "qweight": pack_words(codes.t(), self.bits, axis=0),
            "qzeros": pack_words(zero.t(), self.bits, axis=1),
            "scales": as_half(weight.parts.scale).t().contiguous(),
            "g_idx": (place // size).to(torch.int32),
        }

    def _check_shape(self, rows: int, width: int) -> None:
        if rows * self.bits % 32 or width * self.bits % 32:
            raise Refusal(f"its sizes {rows} and {width} at {self.bits} bits do not fill 32-bit words")


def read(config: Mapping[str, Any], weights_only: bool) -> Gptq:
    bits, group_size = number(config, "bits"), group_of(config, "group_size")
    if bits not in _BITS:
        raise Refusal(f"bits must be one of {', '.join(map(str, _BITS))}, not {bits}")
    dynamic = config.get("dynamic") or {}
    if not isinstance(dynamic, Mapping) or any(not str(key).startswith("-:") for key in dynamic):
        raise Refusal("settings per layer (dynamic, other than '-:' for unquantized layers) are not read")
    form = config.get("checkpoint_format", "gptq")
    if form not in _FORMATS:
        raise Refusal(f"checkpoint_format must be {' or '.join(_FORMATS)}, not {form!r}")
    return Gptq(bits, group_size, form == "gptq")


def plan(weights: Mapping[str, QuantizedWeight], kept: list[str]) -> tuple[Gptq, dict[str, Any]]:
    return _plan(weights, kept, "gptq")


def plan_v2(weights: Mapping[str, QuantizedWeight], kept: list[str]) -> tuple[Gptq, dict[str, Any]]:
    return _plan(weights, kept, "gptq_v2")


def _plan(weights: Mapping[str, QuantizedWeight], kept: list[str], form: str) -> tuple[Gptq, dict[str, Any]]:
    bits, group_size, symmetric = one_shape(weights)
    if bits not in _BITS:
        raise Refusal(f"GPTQ stores {', '.join(map(str, _BITS))} bits, not {bits}")
    config: dict[str, Any] = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": -1 if group_size is None else group_size,
        "sym": symmetric,
        "desc_act": any(w.order is not None for w in weights.values()),
        "static_groups": False,
        "lm_head": "lm_head" in weights,
        "checkpoint_format": form,
    }
    # The way to say that a layer of a block is not quantized; the head has its own entry.
    excluded: dict[str, Any] = {f"-:{re.escape(name)}$": {} for name in kept if name != "lm_head"}
    if excluded:
        config["dynamic"] = excluded
    return Gptq(bits, group_size, form == "gptq"), config
