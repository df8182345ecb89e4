"""Readers of the published layouts, one number at a time: they share nothing with `irc.interchange`."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


def bits_of(words: list[int], bits: int, index: int) -> int:
    """Integer `index` of a stream of 32-bit words, lowest bits first."""
    stream = sum((word & 0xFFFFFFFF) << (32 * i) for i, word in enumerate(words))
    return (stream >> (bits * index)) & ((1 << bits) - 1)


def gptq_weight(tensors: dict[str, Tensor], module: str, config: dict[str, Any]) -> np.ndarray:
    bits, minus_one = config["bits"], config["checkpoint_format"] == "gptq"
    qweight, qzeros = tensors[f"{module}.qweight"].numpy(), tensors[f"{module}.qzeros"].numpy()
    scales, g_idx = tensors[f"{module}.scales"].double().numpy(), tensors[f"{module}.g_idx"].numpy()
    result = np.zeros((qweight.shape[1], len(g_idx)))
    zeros = np.array(
        [[bits_of(row.tolist(), bits, n) + minus_one for n in range(result.shape[0])] for row in qzeros], dtype=float
    )
    for n in range(result.shape[0]):
        column = qweight[:, n].tolist()
        for k in range(result.shape[1]):
            g = g_idx[k]
            result[n, k] = scales[g, n] * (bits_of(column, bits, k) - zeros[g, n])
    return result


def awq_weight(tensors: dict[str, Tensor], module: str, config: dict[str, Any]) -> np.ndarray:
    qweight, qzeros = tensors[f"{module}.qweight"].numpy(), tensors[f"{module}.qzeros"].numpy()
    scales = tensors[f"{module}.scales"].double().numpy()
    width, rows = qweight.shape[0], scales.shape[1]
    size = width if config["group_size"] == -1 else config["group_size"]

    def code(words: np.ndarray, i: int, n: int) -> int:
        return (int(words[i, n // 8]) >> (4 * AWQ_ORDER.index(n % 8))) & 15

    result = np.zeros((rows, width))
    for n in range(rows):
        for k in range(width):
            g = k // size
            result[n, k] = scales[g, n] * (code(qweight, k, n) - code(qzeros, g, n))
    return result


def compressed_weight(tensors: dict[str, Tensor], module: str, config: dict[str, Any]) -> np.ndarray:
    groups = list(config["config_groups"].values())
    group = next((g for g in groups if module in g["targets"]), groups[0])
    scheme = group["weights"]
    scale = tensors[f"{module}.weight_scale"].double().numpy().reshape(-1)
    if group["format"] != "pack-quantized":
        values = tensors[f"{module}.weight"].double().numpy()
        zero = tensors.get(f"{module}.weight_zero_point")
        zeros = np.zeros_like(scale) if zero is None else zero.double().numpy().reshape(-1)
    else:
        bits = scheme["num_bits"]
        rows, width = tensors[f"{module}.weight_shape"].tolist()
        packed = tensors[f"{module}.weight_packed"].numpy()
        middle = 1 << (bits - 1)
        values = np.array([[bits_of(row.tolist(), bits, k) - middle for k in range(width)] for row in packed], float)
        zeros = np.zeros_like(scale)
        if not scheme["symmetric"]:
            words = tensors[f"{module}.weight_zero_point"].numpy()
            num_groups = words.shape[1]
            zeros = np.array(
                [bits_of(words[:, g].tolist(), bits, n) - middle for n in range(rows) for g in range(num_groups)], float
            )
    rows, width = values.shape
    per_row = len(scale) // rows
    if scheme["strategy"] == "tensor":
        return (values - zeros[0]) * scale[0]
    grouped = values.reshape(rows, per_row, -1) - zeros.reshape(rows, per_row, 1)
    return (grouped * scale.reshape(rows, per_row, 1)).reshape(rows, width)
