from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

from benchmarks import flash_memory
from irc.core.ops.attention import MASKS
from irc.frontend import capture
from irc.passes import SubstituteFlashAttention
from tests import zoo
from tests.passes.running import assert_same, operations, reasons, run_pass, run_with_findings


@pytest.mark.parametrize("name", ["tinypy", "llama", "gemma2", "nanogpt"])
def test_models(name: str) -> None:
    before = zoo.captured(name)
    result = run_pass(SubstituteFlashAttention(), before)
    assert result.matches == operations(before)["attention"] > 0
    assert operations(result.program)["flash_attention"] == result.matches
    assert_same(before, result.program, before.example_inputs or ())
    assert run_pass(SubstituteFlashAttention(), result.program).matches == 0


def test_refuses_what_is_not_canonical() -> None:
    class Raw(nn.Module):
        def forward(self, q: Tensor) -> Tensor:
            eager = torch.softmax(q @ q.transpose(-1, -2), -1) @ q
            return nn.functional.scaled_dot_product_attention(q, q, q) + eager

    before = capture(Raw(), (torch.randn(3, 2, 5, 8),), canonicalize=False)
    result = run_pass(SubstituteFlashAttention(), before)
    assert result.matches == 0
    assert len(result.skips) == 2
    assert "was not raised to irc.attention" in reasons(result)


def test_other_window_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from irc.core.program import Program

    right = Program.insert
    monkeypatch.setattr(Program, "insert", lambda *args, **kw: right(*args, **kw | {"window": 3}))
    _, findings = run_with_findings(SubstituteFlashAttention(), zoo.captured("tinypy"))
    assert "'window', 3" in findings[0].problem


SIZES = [(1, 1), (7, 7), (140, 140), (5, 300), (130, 270), (1, 300), (30, 7)]


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(("num_queries", "num_keys"), SIZES)
def test_reference_agrees_with_attention(mask: str, num_queries: int, num_keys: int) -> None:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    features = itertools.product((4, 2), (False, True), (None, "added", "kept"), (False, True), (None, 5.0))
    for kv_heads, positions, bias, sinks, softcap in features:
        q, k = random(2, 4, num_queries, 8), random(2, kv_heads, num_keys, 8)
        v = random(2, kv_heads, num_keys, 6 if sinks else 8)
        added = random(2, 1, num_queries, num_keys)
        options = {
            "mask": mask,
            "window": 9 if mask in ("sliding", "chunked") else None,
            "scale": 0.3,
            "softcap": softcap,
            "positions": torch.randint(num_keys, (2, num_queries), generator=generator) if positions else None,
            "bias": {None: None, "added": added, "kept": added > 0}[bias],
            "sinks": random(4) if sinks else None,
        }
        expected = torch.ops.irc.attention(q, k, v, **options)
        torch.testing.assert_close(torch.ops.irc.flash_attention(q, k, v, **options), expected, rtol=0, atol=1e-5)


def test_gradients() -> None:
    q = torch.randn(1, 2, 150, 8, requires_grad=True)
    gradients = [
        torch.autograd.grad(op(q, q, q, mask="sliding", window=50).sin().sum(), q)[0]
        for op in (torch.ops.irc.attention, torch.ops.irc.flash_attention)
    ]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-5)


def test_peak_memory_grows_linearly() -> None:
    exponents = flash_memory.measure((512, 1024, 2048), resident=False)["exponents"]
    assert exponents.pop("attention") > 1.9
    assert len(exponents) == 2
    assert all(value <= 1.05 for value in exponents.values())


def test_live_bytes_are_counted() -> None:
    def work() -> Tensor:
        x = torch.ones(1000)
        x = x + 1  # two alive
        return x.view(10, 100) * 2  # two alive

    assert flash_memory.counted_peak(work) == 8000
