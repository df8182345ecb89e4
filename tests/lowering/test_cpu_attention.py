"""Attention on target cpu: quantized keys and values are read as they lie, and pages take a bias."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import irc
from irc.core.target import get_target
from irc.lowering.cpp.build import find_compiler, supported_isas
from tests.lowering import steps

pytestmark = pytest.mark.skipif(find_compiler() is None, reason="needs a C++ compiler")
CPU = get_target("cpu")
QUICK = {"threads": 2, "flags": ("-O0",)}


# (format, queries, width of keys, width of values): few queries, an odd width, and enough for keys laid out as panels.
CASES = (("int8.row", 3, 24, 40), ("int4.row", 2, 6, 16), ("int4.row", 70, 32, 32))


class Attending(nn.Module):
    """Attention over contiguous rows in several formats."""

    def forward(self, *operands: Tensor) -> tuple[Tensor, ...]:
        made = []
        for number, (form, *_) in enumerate(CASES):
            query, keys, key_scale, values, value_scale = operands[5 * number : 5 * number + 5]
            restored = [
                torch.ops.irc.dequantize(stored, scale, None, format=form)
                for stored, scale in ((keys, key_scale), (values, value_scale))
            ]
            made.append(torch.ops.irc.attention(query, *restored, mask="causal", scale=0.3))
        return tuple(made)


def rows(width: int, count: int, form: str, seed: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(1, 2, count, width, generator=torch.Generator().manual_seed(seed))
    scale = torch.ops.irc.dynamic_scale(x, format=form)
    return torch.ops.irc.quantize(x, scale, None, format=form), scale


def kernels(artifact: Any) -> list[str]:
    """Names of the functions of a program."""
    return re.findall(r"^void (k\d+_\w+)\(.*\{$", artifact.source, re.MULTILINE)


@pytest.mark.parametrize("isa", supported_isas())
def test_attention_over_integers(isa: str) -> None:
    inputs: list[Tensor] = []
    for form, queries, width, value_width in CASES:
        query = torch.randn(1, 4, queries, width, generator=torch.Generator().manual_seed(1))
        inputs += [query, *rows(width, 70, form, 2), *rows(value_width, 70, form, 3)]
    program = irc.capture(Attending(), tuple(inputs))
    artifact = CPU.lower(program, {**QUICK, "isa": isa})
    assert len(kernels(artifact)) == len(CASES)  # nothing but attention
    for found, wanted in zip(artifact.run(*inputs), program.run(*inputs), strict=True):
        torch.testing.assert_close(found, wanted, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("cache", ["layout=paged,block-size=4", "layout=contiguous"])
def test_steps_read_the_cache_as_it_lies(cache: str) -> None:
    form = "int4" if "paged" in cache else "int8"
    program = steps.step(f"insert-kv-cache{{max-length=32,{cache}}},quantize-kv-cache{{format={form}}}")
    artifact = CPU.lower(program, QUICK)
    assert not [name for name in kernels(artifact) if "dequantize" in name]
    check = artifact.verify(program)
    assert check.passed, str(check)


class OverPages(nn.Module):
    """Attention over pages with a bias that knows fewer keys than the pages hold."""

    def forward(self, query: Tensor, keys: Tensor, values: Tensor, table: Tensor, ids: Tensor, at: Tensor,
                bias: Tensor) -> Tensor:  # fmt: skip
        return torch.ops.irc.paged_attention(query, keys, values, table, ids, at, bias=bias, scale=0.3)


def test_a_bias_over_pages() -> None:
    generator = torch.Generator().manual_seed(0)
    query, bias = torch.randn(5, 4, 16, generator=generator), torch.randn(5, 4, 10, generator=generator)
    keys, values = torch.randn(2, 6, 4, 2, 16, generator=generator)
    table, ids, at = torch.tensor([[3, 1, 2], [5, 0, 4]]), torch.tensor([0, 0, 1, 1, 1]), torch.tensor([0, 9, 4, 7, 9])
    inputs = (query, keys, values, table, ids, at, bias)
    program = irc.capture(OverPages(), inputs)
    artifact = CPU.lower(program, QUICK)
    assert kernels(artifact) == ["k0_attention_paged_attention"]
    (found,), (wanted,) = artifact.run(*inputs), program.run(*inputs)
    torch.testing.assert_close(found, wanted, rtol=2e-5, atol=2e-6)
