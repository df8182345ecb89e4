"""The reference target: same numbers, caches written in place, quantized weights folded once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import irc
from irc.core.errors import OptionError, TargetError
from irc.core.target import get_target
from tests.lowering import steps

REFERENCE = get_target("reference")
QUANTIZED = "quantize-weights{bits=4,group-size=16},insert-kv-cache{max-length=32}"


@pytest.mark.parametrize("program", [steps.decoder, steps.step, steps.cnn], ids=["decoder", "step", "cnn"])
def test_same_numbers(program) -> None:
    check = REFERENCE.lower(program()).verify(program())
    assert check.passed, str(check)


def test_run_leaves_its_inputs_and_step_writes_in_place() -> None:
    program = steps.step()
    artifact = REFERENCE.lower(program)
    caches = artifact.new_caches(2)
    tokens = steps.tokens(2, 4)
    positions = torch.arange(4).expand(2, -1).contiguous()
    outputs = artifact.run(tokens, positions, positions, *caches)
    assert all(not cache.any() for cache in caches)
    addresses = [cache.data_ptr() for cache in caches]
    logits = artifact.step(caches, tokens, positions, positions)
    assert [cache.data_ptr() for cache in caches] == addresses
    assert all(cache.any() for cache in caches)
    torch.testing.assert_close(logits, outputs[0])


def test_dequantized_once_or_at_every_step() -> None:
    program = steps.step(QUANTIZED)
    once, every = REFERENCE.lower(program), REFERENCE.lower(program, {"dequantize": "step"})
    assert once.weight_bytes > 2 * every.weight_bytes - 20_000
    assert every.weight_bytes == program.weight_bytes
    assert any("dequantized once" in note for note in once.notes)
    assert not every.notes
    inputs = program.example_inputs
    assert inputs is not None
    torch.testing.assert_close(once.run(*inputs)[0], every.run(*inputs)[0])


def test_the_program_is_left_alone() -> None:
    program = steps.step(QUANTIZED)
    before = [(n.name, n.target) for n in program.graph.nodes]
    REFERENCE.lower(program)
    assert [(n.name, n.target) for n in program.graph.nodes] == before


def test_wrong_options() -> None:
    with pytest.raises(OptionError, match=r"no option 'devise'.*did you mean 'device'"):
        REFERENCE.lower(steps.cnn(), {"devise": "cpu"})
    with pytest.raises(OptionError, match="option 'dequantize': expected load or step, got 'never'"):
        REFERENCE.lower(steps.cnn(), {"dequantize": "never"})
    with pytest.raises(OptionError, match="is no device"):
        REFERENCE.lower(steps.cnn(), {"device": "abacus"})


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a cuda device here")
def test_missing_device() -> None:
    with pytest.raises(TargetError, match="finds no cuda device"):
        REFERENCE.lower(steps.cnn(), {"device": "cuda"})


def test_wrong_number_of_inputs() -> None:
    with pytest.raises(OptionError, match="takes 1 inputs"):
        REFERENCE.lower(steps.cnn()).run()


def test_default_passes_fit_the_program() -> None:
    assert [p.name for p in REFERENCE.default_passes(steps.decoder())] == ["insert-kv-cache"]
    assert [p.name for p in REFERENCE.default_passes(steps.cnn())] == ["fold-conv-batch-norm"]
    assert REFERENCE.default_passes(steps.step()) == []


def test_attention_over_embeddings_gets_no_cache_by_default() -> None:
    class Attention(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            q = x.view(x.shape[0], x.shape[1], 2, 16).transpose(1, 2)
            return nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True).transpose(1, 2).reshape(x.shape)

    x = torch.randn(2, 5, 32)
    compiled = irc.compile(Attention(), example_inputs=x, dynamic=({0: "B", 1: "S"},))
    assert compiled.artifact.kv_cache is None
    torch.testing.assert_close(compiled(x), Attention()(x))


def test_saved_and_loaded(tmp_path) -> None:
    program = steps.step()
    REFERENCE.lower(program, {"dequantize": "step"}).save(tmp_path / "saved")
    loaded = REFERENCE.load(tmp_path / "saved")
    assert loaded.options.dequantize == "step"
    assert loaded.verify(program).relative < 1e-6
