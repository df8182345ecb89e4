"""What a program is written as: architecture, tensors, types, and what is refused."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from irc.core.errors import OptionError, TargetError
from irc.lowering.gguf import export_gguf
from tests.zoo import captured


def tensors_of(path: Path) -> dict[str, np.ndarray]:
    return {tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type) for tensor in gguf.GGUFReader(path).tensors}


def interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of half-split heads in the order of neighbouring pairs, written down a second time on its own."""
    pairs = weight.shape[0] // heads // 2
    return weight.view(heads, 2, pairs, -1).swapaxes(1, 2).reshape(weight.shape)


def test_llama_rows_are_reordered_for_neighbouring_pairs(tmp_path: Path) -> None:
    program = captured("llama")
    written = export_gguf(program, tmp_path / "model.gguf")
    weights = {name: tensor.detach() for name, tensor in program.weights.items()}
    found = tensors_of(written.path)
    assert written.architecture == "llama"
    assert not written.lossy
    prefix = "model.layers.1.self_attn"
    for ours, theirs, heads in (("q_proj", "attn_q", 4), ("k_proj", "attn_k", 2)):
        expected = interleaved(weights[f"{prefix}.{ours}.weight"], heads)
        np.testing.assert_array_equal(found[f"blk.1.{theirs}.weight"], expected.numpy())
        bias = interleaved(weights[f"{prefix}.{ours}.bias"].unsqueeze(1), heads).squeeze(1)
        np.testing.assert_array_equal(found[f"blk.1.{theirs}.bias"], bias.numpy())
    np.testing.assert_array_equal(
        found["blk.0.ffn_down.weight"], weights["model.layers.0.mlp.down_proj.weight"].numpy()
    )
    np.testing.assert_array_equal(found["output.weight"], weights["lm_head.weight"].numpy())


def test_refusal_names_the_nearest_architecture_and_the_difference(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="is not qwen2; it is like qwen2, but") as caught:
        export_gguf(captured("llama"), tmp_path / "model.gguf", architecture="qwen2")
    assert "layer 1 has a bias on the attention's output (model.layers.1.self_attn.o_proj.weight)" in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_unknown_type_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="q4_k_m"):
        export_gguf(captured("llama"), tmp_path / "model.gguf", type="q4_km")
