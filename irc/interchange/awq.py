"""AWQ checkpoints in the GEMM packing: `qweight`, `qzeros`, `scales` for each layer, 4 bits.

    qweight [K, N / 8], qzeros [groups, N / 8]   eight outputs a word, output ORDER[i] in bits 4 i to 4 i + 3
    scales  [groups, N] f16                      weight[n, k] = scales[g, n] * (q[k, n] - zero[g, n])

Does not take: the packings `gemv`, `marlin` and others.

Source: AutoAWQ `awq/modules/linear/gemm.py` and `awq/utils/packing_utils.py`.
"""

from __future__ import annotations

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

BITS = 4
PER_WORD = 8
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True)
class Awq(Layout):
    method: ClassVar[str] = "awq"
    group_size: int | None

    @property
    def marks(self) -> tuple[str, ...]:
        return ("qweight", "qzeros")

    @property
    def tensors(self) -> tuple[str, ...]:
        return ("qweight", "qzeros", "scales")

    def unpack(self, module: str, tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> QuantizedWeight:
        rows, width = shape
        _check_rows(rows)
        groups = groups_in(width, self.group_size)
        codes = _unpack(need(tensors, "qweight", (torch.int32,), (width, rows // PER_WORD)))
        zero = _unpack(need(tensors, "qzeros", (torch.int32,), (groups, rows // PER_WORD)))
        scale = need_scale(tensors, "scales", (groups, rows))
        return from_codes(codes.t(), zero.t(), scale.t(), BITS, self.group_size)

    def pack(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        _check_rows(weight.shape[0])
        if weight.order is not None:
            raise Refusal("its inputs are sorted by group, and AWQ has no group index")
        codes, zero = weight.codes(BITS)
        assert weight.parts.scale is not None
        if bool((zero < 0).any()) or bool((zero > 15).any()):
            raise Refusal("its zero points leave the range 0 to 15")
        scale = as_half(weight.parts.scale).t().contiguous()
        return {"qweight": _pack(codes.t()), "qzeros": _pack(zero.t()), "scales": scale}


def _pack(values: Tensor) -> Tensor:
    return pack_words(values.unflatten(-1, (-1, PER_WORD))[..., list(ORDER)].flatten(-2), BITS, axis=1)


def _unpack(words: Tensor) -> Tensor:
    values = unpack_words(words, BITS, words.shape[1] * PER_WORD, axis=1).unflatten(-1, (-1, PER_WORD))
    return values[..., [ORDER.index(i) for i in range(PER_WORD)]].flatten(-2)


def _check_rows(rows: int) -> None:
    if rows % PER_WORD:
        raise Refusal(f"its {rows} outputs are no multiple of {PER_WORD}")


def read(config: Mapping[str, Any], weights_only: bool) -> Awq:
    bits = number(config, "bits", "w_bit")
    if bits != BITS:
        raise Refusal(f"AWQ has {BITS} bits, not {bits}")
    version = config.get("version", "gemm")
    if not isinstance(version, str) or version.lower() != "gemm":
        raise Refusal(f"the packing (version) must be gemm, not {version!r}")
    return Awq(group_of(config, "group_size", "q_group_size"))


def plan(weights: Mapping[str, QuantizedWeight], kept: list[str]) -> tuple[Awq, dict[str, Any]]:
    bits, group_size, _ = one_shape(weights)
    if bits != BITS:
        raise Refusal(f"AWQ stores {BITS} bits, not {bits}")
    config = {
        "quant_method": "awq",
        "bits": BITS,
        "group_size": -1 if group_size is None else group_size,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": kept,
    }
    return Awq(group_size), config
