from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from irc.frontend import capture
from irc.passes import InsertKVCache, MergeQkv, QuantizeWeights
from tests import zoo
from tests.passes.running import assert_same, operations, reasons, run_pass, run_with_findings


class SelfAttention(nn.Module):
    """Four query heads over two KV heads; bias on the query only."""

    def __init__(self, *, biases: tuple[bool, bool, bool] = (True, False, False), width: int = 16) -> None:
        super().__init__()
        torch.manual_seed(0)
        sizes = zip((16, 8, 8), biases, strict=True)
        self.q, self.k, self.v = (nn.Linear(width, size, bias=bias) for size, bias in sizes)

    def heads(self, y: Tensor) -> Tensor:
        return y.view(y.shape[0], y.shape[1], -1, 4).transpose(1, 2)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.q(x), self.k(x), self.v(x)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = map(self.heads, self.project(x))
        return torch.ops.irc.attention(q, k, v, mask="causal", scale=0.5).transpose(1, 2).flatten(2)


def program_of(module: nn.Module) -> zoo.Program:
    width = module.q.in_features if isinstance(module, SelfAttention) else 16
    return capture(module.eval(), (torch.randn(3, 5, width),), dynamic=({0: "B", 1: "S"},), name="attention")


def test_rewrites() -> None:
    before = program_of(SelfAttention())
    result = run_pass(MergeQkv(), before)
    assert result.matches == 1
    assert result.skips == []
    assert operations(before)["linear"] == 3
    counts = operations(result.program)
    assert (counts["linear"], counts["split_with_sizes"]) == (1, 1)
    weights = result.program.weights
    assert weights["q_k_v.weight"].shape == (32, 16)
    assert weights["q_k_v.weight"].requires_grad
    bias = next(w for name, w in weights.items() if "bias" in name)
    assert bool((bias[16:] == 0).all())
    for batch, length in ((1, 1), (2, 7), (5, 3)):
        assert_same(before, result.program, (torch.randn(batch, length, 16),))
    again = run_pass(MergeQkv(), result.program)
    assert again.matches == 0
    assert "already come from one linear layer" in reasons(again)


@pytest.mark.parametrize("name", ["tinypy", "llama", "qwen3", "bert"])
def test_models(name: str) -> None:
    before = zoo.captured(name)
    num_attentions = operations(before)["attention"]
    result = run_pass(MergeQkv(), before)
    assert result.matches == num_attentions > 0
    assert operations(result.program)["linear"] == operations(before)["linear"] - 2 * num_attentions
    assert_same(before, result.program, before.example_inputs or ())


def test_quantized_weights_merge_as_stored() -> None:
    before = run_pass(QuantizeWeights(group_size=8, symmetric=False), program_of(SelfAttention())).program
    result = run_pass(MergeQkv(), before)
    assert result.matches == 1
    assert operations(result.program)["dequantize"] == 1
    assert_same(before, result.program, (torch.randn(2, 7, 16),))


@pytest.mark.parametrize("text", ["f8e4m3.row", "f4e2m1.g16", "mxfp4", "q4_0"])
def test_other_formats_merge_as_stored(text: str) -> None:
    before = run_pass(QuantizeWeights(format=text, indivisible="error"), program_of(SelfAttention(width=32))).program
    result = run_pass(MergeQkv(), before)
    assert result.matches == 1
    assert operations(result.program)["dequantize"] == 1
    x = torch.randn(2, 7, 32)
    assert_same(before, result.program, (x,))


@pytest.mark.parametrize("text", ["nvfp4", "f8e4m3.tensor"])
def test_a_scale_of_the_whole_tensor_keeps_layers_apart(text: str) -> None:
    before = run_pass(QuantizeWeights(format=text), program_of(SelfAttention(width=32))).program
    result = run_pass(MergeQkv(), before)
    assert result.matches == 0
    assert "has one scale for the whole tensor" in reasons(result)


def test_after_kv_cache_insertion() -> None:
    before = run_cache(zoo.captured("llama"))
    result = run_pass(MergeQkv(), before)
    assert result.matches == 2


def run_cache(program: zoo.Program) -> zoo.Program:
    from irc.core.contract import PassContext

    return InsertKVCache(max_length=16).run(program.copy(), PassContext()).program


class CrossAttention(SelfAttention):
    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.q(x), self.k(x + 1), self.v(x + 1)


def test_cross_attention_merges_what_shares_an_input() -> None:
    before = program_of(CrossAttention(biases=(False, False, False)))
    result = run_pass(MergeQkv(), before)
    assert result.matches == 1
    assert list(result.program.weights) == ["q.weight", "k_v.weight"]
    assert_same(before, result.program, (torch.randn(2, 7, 16),))


class AllDifferent(SelfAttention):
    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.q(x), self.k(x + 1), self.v(x + 2)


class SharedKeyValue(SelfAttention):
    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.q(x), self.k(x), nn.functional.linear(x, self.k.weight, self.v.bias)


class ValueResidual(SelfAttention):
    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.q(x), self.k(x), self.v(x) + self.k(x * 2)


class ComputedWeight(SelfAttention):
    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.q(x), self.k(x), nn.functional.linear(x, self.v.weight * x.mean())


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (AllDifferent(), "the projections read different inputs"),
        (SharedKeyValue(biases=(False, False, True)), "weight k.weight is shared by 2 operations"),
        (ValueResidual(), "its value comes from 2 linear layers"),
        (ComputedWeight(), "is computed by aten.mul"),
    ],
)
def test_refuses(module: nn.Module, reason: str) -> None:
    before = program_of(module)
    result = run_pass(MergeQkv(), before)
    assert result.matches == 0
    assert reason in reasons(result)


def test_swapped_rows_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from irc.passes.fuse import _merge_linears

    monkeypatch.setattr(_merge_linears, "_stack", lambda tensors: torch.cat(list(reversed(tensors))).detach())
    _, findings = run_with_findings(MergeQkv(), program_of(SelfAttention()))
    assert any("are not the weight of" in finding.problem for finding in findings)
