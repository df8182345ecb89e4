"""Norms, rotations, gates, fused activations and cache writes against plain formulas."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from irc.core.ops import all_ops
from irc.core.ops.fused import ACTIVATIONS
from tests.core.op_examples import EXAMPLES, close, rand


def test_rms_norm_formula() -> None:
    x, weight = rand(3, 5, 8), rand(8)
    close(torch.ops.irc.rms_norm(x, weight, 0.1), F.rms_norm(x, (8,), weight, eps=0.1))
    close(torch.ops.irc.rms_norm(x, None, 0.1), x / (x.pow(2).mean(-1, keepdim=True) + 0.1).sqrt())


def test_rms_norm_rounds_where_it_says() -> None:
    x, weight = rand(3, 64, dtype=torch.float16), rand(64)
    after = torch.ops.irc.rms_norm(x, weight.half(), 1e-5, weight_in_f32=True)
    normed = F.rms_norm(x.float(), (64,), eps=1e-5)
    assert torch.equal(after, (normed * weight.half().float()).half())
    assert torch.equal(torch.ops.irc.rms_norm(x, weight.half(), 1e-5), normed.half() * weight.half())


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("width", [8, 10])
def test_rope_is_a_rotation_of_pairs(interleaved: bool, width: int) -> None:
    x, angles = rand(3, 2, 5, width), rand(5, 4)
    made = torch.ops.irc.rope(x, angles.cos(), angles.sin(), interleaved=interleaved)
    pairs = [(2 * i, 2 * i + 1) if interleaved else (i, i + 4) for i in range(4)]
    expected = x.clone()
    for i, (a, b) in enumerate(pairs):
        turned = torch.complex(x[..., a], x[..., b]) * torch.polar(torch.ones(5), angles[:, i])
        expected[..., a], expected[..., b] = turned.real, turned.imag
    close(made, expected)


GATES: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": lambda x: x * torch.sigmoid(x),
    "gelu": lambda x: x * 0.5 * (1 + torch.erf(x / math.sqrt(2))),
    "gelu_tanh": lambda x: x * 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "relu": lambda x: x.clamp(min=0),
    "quick_gelu": lambda x: x / (1 + torch.exp(-1.702 * x)),
    "sigmoid": lambda x: 1 / (1 + torch.exp(-x)),
}
OTHERS: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": lambda x: 2 / (1 + torch.exp(-2 * x)) - 1,
    "relu6": lambda x: x.clamp(0, 6),
    "leaky_relu": lambda x: torch.where(x > 0, x, 0.01 * x),
    "hardswish": lambda x: x * (x + 3).clamp(0, 6) / 6,
    "hardsigmoid": lambda x: ((x + 3) / 6).clamp(0, 1),
    "mish": lambda x: x * torch.tanh(torch.log1p(torch.exp(x))),
}


@pytest.mark.parametrize("name", GATES)
def test_glu_formula(name: str) -> None:
    gate, up = 3 * rand(3, 5, 8), rand(3, 5, 8)
    close(torch.ops.irc.glu(gate, up, activation=name), GATES[name](gate) * up)


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_activation_formulas(name: str) -> None:
    formula = {**GATES, **OTHERS}[name]
    x, weight, bias = 4 * rand(5, 8), rand(6, 8), rand(6)
    close(torch.ops.irc.linear_activation(x, weight, bias, activation=name), formula(x @ weight.T + bias))
    image, kernel = rand(3, 4, 7, 7), rand(6, 2, 2, 2)
    made = torch.ops.irc.conv_activation(image, kernel, bias, [2, 1], [1, 0], [1, 2], False, [0, 0], 2, activation=name)
    close(made, formula(F.conv2d(image, kernel, bias, (2, 1), (1, 0), (1, 2), 2)))


def test_transposed_convolution() -> None:
    x, kernel = rand(3, 4, 7), rand(4, 6, 4)
    made = torch.ops.irc.conv_activation(x, kernel, None, [2], [1], [1], True, [1], 1, activation="relu")
    close(made, F.conv_transpose1d(x, kernel, None, 2, 1, 1).relu())


@pytest.mark.parametrize("op", ["linear_activation", "conv_activation"])
def test_unknown_activation_is_refused(op: str) -> None:
    example = EXAMPLES[op][0]
    for function in (all_ops()[op].overload, all_ops()[op].fake):
        with pytest.raises(ValueError, match="unknown activation 'swish'; known: gelu, "):
            function(*example.args, activation="swish")


def test_cache_write_formula() -> None:
    cache, value, positions = EXAMPLES["cache_write"][0].args
    expected = cache.clone()
    for b, s in itertools.product(range(3), range(5)):
        expected[b, :, positions[b, s]] = value[b, :, s]
    assert torch.equal(torch.ops.irc.cache_write(cache, value, positions), expected)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_cache_write_moves_float8(dtype: torch.dtype) -> None:
    cache, value, positions = EXAMPLES["cache_write"][0].args
    made = torch.ops.irc.cache_write(cache.to(dtype), value, positions)
    assert torch.equal(
        made.float(), torch.ops.irc.cache_write(cache.to(dtype).float(), value.to(dtype).float(), positions)
    )
