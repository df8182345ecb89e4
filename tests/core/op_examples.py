"""Arguments of every `irc::` operator, and random tensors to make more."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from irc.core import formats

# Sizes that become dynamic dimensions wherever a tensor of an example has them; examples use no others like them.
DYNAMIC = {3: "B", 5: "S"}


def rand(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(math.prod(shape) + len(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def integers(high: int, *shape: int) -> Tensor:
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(high))


def stored(text: str, *shape: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Packed integers, scale and zero point of a random tensor."""
    chosen = formats.parse(text)
    assert isinstance(chosen, formats.QuantFormat)
    scale = rand(*chosen.scale_shape(shape)).abs() + 0.1
    zero = None if chosen.symmetric else torch.full_like(scale, (chosen.low + chosen.high + 1) // 2, dtype=torch.int16)
    return chosen.quantize(rand(*shape), scale, zero), scale, zero


def parts(text: str, *shape: int) -> tuple[Tensor | None, ...]:
    """A random tensor in a format: the arguments of dequantize."""
    return tuple(formats.quantize_tensor(rand(*shape), formats.parse(text)))


@dataclass
class Example:
    """Arguments of one call; `flops`: counted by hand; `only_weights`: whose sizes are never dynamic."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    flops: int | None = None
    differentiable: bool = True
    only_weights: bool = False


def heads(*, queries: int = 5, keys: int = 7, kv: int = 2, width: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    return rand(3, 4, queries, width), rand(3, kv, keys, width), rand(3, kv, keys, 6)


def attention_examples() -> list[Example]:
    # 3·4 heads, 5 × 7 scores: 2·4 for q·k, 2·6 for p·v, 5 for the softmax.
    count = 3 * 4 * 5 * 7 * (2 * 4 + 2 * 6 + 5)
    half = tuple(x.to(torch.bfloat16) for x in heads())
    return [
        Example(heads(), flops=count),
        Example(heads(kv=4), {"mask": "causal", "scale": 0.5}, flops=count),
        Example(heads(), {"bias": rand(1, 4, 5, 7), "sinks": rand(4), "softcap": 2.0}),
        Example(heads(), {"mask": "sliding", "window": 2, "positions": integers(7, 3, 5)}),
        Example(half, {"mask": "chunked", "window": 4}, differentiable=False),
        Example((*heads()[:2], half[2]), differentiable=False),  # the result has the values' type
    ]


def paged_arguments() -> tuple[Tensor, ...]:
    pages = rand(8, 4, 2, 4), rand(8, 4, 2, 6)
    tables = torch.tensor([[6, 1, 2], [0, 7, 4]])
    return rand(5, 4, 4), *pages, tables, torch.tensor([0, 1, 1, 0, 1]), torch.tensor([9, 0, 5, 10, 11])


EXAMPLES: dict[str, list[Example]] = {
    "attention": attention_examples(),
    "flash_attention": attention_examples(),
    "cache_write": [
        Example((rand(3, 2, 8, 4), rand(3, 2, 5, 4), torch.arange(5) + torch.tensor([[0], [2], [3]])), flops=0),
        Example((rand(3, 2, 8, 4, dtype=torch.bfloat16), rand(3, 2, 1, 4), integers(8, 3, 1)), differentiable=False),
    ],
    "paged_cache_write": [
        Example((rand(4, 4, 2, 6), rand(5, 2, 6), torch.tensor([0, -1, 13, 7, -1])), flops=0),
        Example((rand(4, 4, 2, 6), rand(5, 2, 6), torch.full((5,), -1))),
    ],
    "paged_attention": [
        # 5 tokens × 4 heads see 2 tables' worth of 3 pages of 4 keys; widths 4 and 6.
        Example(paged_arguments(), flops=5 * 4 * (3 * 4) * (2 * 4 + 2 * 6 + 5)),
        Example(paged_arguments(), {"mask": "sliding", "window": 3, "sinks": rand(4), "softcap": 3.0, "scale": 0.3}),
        Example(paged_arguments(), {"bias": rand(5, 4, 10)}),
        Example(paged_arguments(), {"bias": rand(1, 1, 20)}),
    ],
    "linear_activation": [
        # [15, 8] · [8, 6]: 2·8 a number, one for the bias, one for relu.
        Example((rand(3, 5, 8), rand(6, 8), rand(6)), {"activation": "relu"}, flops=15 * 6 * (16 + 1 + 1)),
        Example((rand(5, 8), rand(6, 8)), {"activation": "gelu"}, flops=5 * 6 * (16 + 6)),
    ],
    "conv_activation": [
        # [3, 4, 9, 9] with 3 × 3 taps, stride 2, padding 1: 25 places, 6 channels, 36 products each.
        Example(
            (rand(3, 4, 9, 9), rand(6, 4, 2, 2), rand(6), [2, 2], [0, 0], [1, 1], False, [0, 0], 1),
            {"activation": "relu"},
            flops=3 * 6 * 4 * 4 * (2 * 16 + 1 + 1),
        ),
        Example(
            (rand(3, 4, 5), rand(6, 2, 2), None, [1], [1], [1], False, [0], 2),
            {"activation": "silu"},
            flops=3 * 6 * 6 * (2 * 4 + 6),
        ),
        Example(
            (rand(3, 4, 8), rand(4, 6, 4), rand(6), [2], [1], [1], True, [0], 1),
            {"activation": "tanh"},
            flops=2 * 3 * 4 * 8 * 6 * 4 + 3 * 6 * 16 * (1 + 6),
        ),
    ],
    "glu": [
        Example((rand(3, 5, 8), rand(3, 5, 8)), flops=6 * 120),
        Example((rand(5, 8), rand(5, 8)), {"activation": "quick_gelu"}),
        Example((rand(5, 8, dtype=torch.bfloat16), rand(5, 8)), differentiable=False),
    ],
    "rms_norm": [
        Example((rand(3, 5, 8), rand(8), 1e-5), flops=4 * 120),
        Example((rand(3, 8), None, 1e-5), flops=3 * 24),
        Example((rand(3, 8, dtype=torch.bfloat16), rand(8), 1e-5), differentiable=False),
        Example((rand(3, 8, dtype=torch.float16), rand(8), 1e-5), {"weight_in_f32": True}, differentiable=False),
    ],
    "rope": [
        Example((rand(3, 2, 5, 8), rand(5, 4), rand(5, 4)), flops=6 * 3 * 2 * 5 * 4),
        Example((rand(3, 2, 5, 8), rand(3, 1, 5, 2), rand(3, 1, 5, 2)), {"interleaved": True}, flops=6 * 30 * 2),
        Example((rand(3, 2, 5, 8, dtype=torch.float16), rand(5, 2), rand(5, 2)), differentiable=False),
    ],
    "quantize": [
        Example((rand(3, 8), torch.full((3, 2), 0.2), None), {"format": "int4.g4"}, flops=72, differentiable=False),
        Example((rand(3, 8), rand(3, 1).abs(), torch.ones(3, 1)), {"format": "uint8.row.asym"}, differentiable=False),
        # Scales of tokens, computed at run time.
        Example((rand(3, 5, 8), rand(3, 5, 1).abs(), None), {"format": "f8e4m3.row"}, flops=360, differentiable=False),
        Example((rand(3, 8), torch.full((1, 1), 0.2), None), {"format": "f8e5m2.tensor"}, differentiable=False),
        Example((rand(5, 8), torch.full((5, 2), 0.2), None), {"format": "f4e2m1.g4"}, differentiable=False),
        Example((rand(3, 64), integers(200, 3, 2).to(torch.uint8), None), {"format": "mxfp4"}, differentiable=False),
        Example((rand(3, 32), *parts("nvfp4", 3, 32)[1:]), {"format": "nvfp4"}, differentiable=False),
        *(
            Example(
                (rand(3, 5, 256), None, None), {"format": text}, flops=3 * 3840, differentiable=False,
                only_weights=True,
            )
            for text in ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k")
        ),
    ],
    "dynamic_scale": [
        Example((rand(3, 5, 8),), {"format": "int8.row"}, flops=240),
        Example((rand(3, 8),), {"format": "int4.g4"}),
        Example((rand(3, 5, 8),), {"format": "int8.tensor"}),
        Example((rand(3, 8),), {"format": "f8e4m3.row"}),
        Example((rand(3, 5, 8, dtype=torch.bfloat16),), {"format": "int8.row"}, differentiable=False),
    ],
    "fake_quantize": [  # its gradients are not those of its value: tested by formula
        Example((rand(3, 8), torch.full((3, 2), 0.2), None), {"format": "int4.g4"}, flops=120, differentiable=False),
        Example(
            (rand(3, 5, 8, dtype=torch.float16), torch.full((1, 1, 1), 0.01), torch.ones(1, 1, 1, dtype=torch.uint8)),
            {"format": "uint8.tensor.asym", "learned": True},
            differentiable=False,
        ),
    ],
    "dequantize": [
        Example(stored("int4.g4", 3, 8), {"format": "int4.g4"}, flops=48),
        Example(stored("uint3.tensor.asym", 3, 8), {"format": "uint3.tensor.asym"}, flops=48),
        Example(stored("int8.row", 3, 8), {"format": "int8.row", "dtype": torch.float16}, differentiable=False),
        Example(parts("f8e4m3.row", 3, 8), {"format": "f8e4m3.row"}, flops=48, differentiable=False),
        Example(
            parts("f8e5m2.tensor", 3, 8), {"format": "f8e5m2.tensor", "dtype": torch.bfloat16}, differentiable=False
        ),
        Example(parts("f4e2m1.g4", 3, 8)[:3], {"format": "f4e2m1.g4"}, flops=48),
        Example(parts("mxfp4", 3, 64), {"format": "mxfp4"}, flops=384, differentiable=False),
        Example(parts("nvfp4", 3, 32), {"format": "nvfp4"}, flops=192, differentiable=False),
        *(
            Example(parts(text, 3, 256), {"format": text}, flops=1536, differentiable=False)
            for text in ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k")
        ),
    ],
}  # fmt: skip


def close(made: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(made, expected, rtol=1e-5, atol=1e-5)
