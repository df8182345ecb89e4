"""A model quantized here, loaded by transformers, computes what the program computes; and the other way round."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from irc.core.program import Program
from irc.frontend import capture
from irc.interchange import load_quantized, save_quantized
from irc.passes import QuantizeWeights
from tests.passes.running import run_pass

pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

# Warnings of these libraries about themselves.
pytestmark = pytest.mark.filterwarnings("default")


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def program(model: Any) -> Program:
    return capture(model, (torch.randint(128, (2, 9)),), dynamic=({0: "B", 1: "S"},))


# The library dequantizes in the scales' type or the model's: with f32 scales these are one.
@pytest.mark.parametrize(
    ("layout", "options"),
    [
        ("compressed-tensors", {"group_size": 32}),
        ("int-quantized", {"bits": 8, "group_size": None}),
        ("compressed-tensors", {"format": "f8e4m3.row"}),
    ],
)
def test_transformers_loads_it(
    model: Any, program: Program, layout: str, options: dict[str, Any], tmp_path: Path
) -> None:
    quantized = run_pass(QuantizeWeights(**options), program).program
    save_quantized(quantized, tmp_path, layout, config=model.config, only=model.state_dict())
    ids = torch.randint(128, (3, 11), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)(ids).logits
        original = model(ids).logits
    ours = logits(quantized(ids))
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)
    assert float((original - ours).abs().max()) > 1e-3
    assert torch.equal(logits(load_quantized(tmp_path, program)(ids)), ours)


def logits(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output.logits if hasattr(output, "logits") else output[0]
