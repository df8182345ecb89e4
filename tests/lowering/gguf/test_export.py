"""What a program is written as: architecture, tensors, types, and what is refused."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from irc.core.errors import OptionError, TargetError
from irc.lowering.gguf import export_gguf
from irc.lowering.gguf.reading import read_file
from tests.lowering.gguf.models import VOCABULARY, program


def tensors_of(path: Path) -> dict[str, np.ndarray]:
    return {tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type) for tensor in gguf.GGUFReader(path).tensors}


def interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of half-split heads in the order of neighbouring pairs, written down a second time on its own."""
    pairs = weight.shape[0] // heads // 2
    return weight.view(heads, 2, pairs, -1).swapaxes(1, 2).reshape(weight.shape)


def test_merged_projections_come_apart_and_are_reordered_for_neighbouring_pairs(tmp_path: Path) -> None:
    odd = program("odd")
    written = export_gguf(odd, tmp_path / "model.gguf")
    found, weights = tensors_of(written.path), odd.weights
    assert written.architecture == "llama"
    assert not written.lossy
    merged = weights["steps.1.everything.weight"]
    for name, rows, heads in (("attn_q", slice(32, 96), 4), ("attn_k", slice(96, 128), 2)):
        np.testing.assert_array_equal(found[f"blk.1.{name}.weight"], interleaved(merged[rows], heads).numpy())
    np.testing.assert_array_equal(found["blk.1.attn_v.weight"], merged[:32].numpy())
    np.testing.assert_array_equal(found["blk.0.ffn_up.weight"], weights["steps.0.both.weight"][:96].numpy())
    np.testing.assert_array_equal(found["blk.0.ffn_gate.weight"], weights["steps.0.both.weight"][96:].numpy())
    np.testing.assert_array_equal(found["output.weight"], weights["speak.weight"].numpy())


def test_metadata_is_read_off_the_graph(tmp_path: Path) -> None:
    reader = gguf.GGUFReader(export_gguf(program("odd"), tmp_path / "model.gguf", context_length=128).path)
    values = {key: field.contents() for key, field in reader.fields.items()}
    assert values["llama.context_length"] == 128
    assert (values["llama.attention.head_count"], values["llama.attention.head_count_kv"]) == (4, 2)
    assert values["llama.rope.freq_base"] == pytest.approx(5000.0)
    assert values["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-6)
    assert (values["llama.feed_forward_length"], values["llama.vocab_size"]) == (96, VOCABULARY)


@pytest.mark.parametrize(("name", "architecture"), [("plain", "gpt2"), ("pruned", "deci"), ("biased", "llama")])
def test_architecture_is_found_by_structure(name: str, architecture: str, tmp_path: Path) -> None:
    assert export_gguf(program(name), tmp_path / "model.gguf").architecture == architecture


def test_refusal_names_the_nearest_architecture_and_the_difference(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="matches no GGUF architecture; it is like llama, but") as caught:
        export_gguf(program("late"), tmp_path / "model.gguf")
    assert "layer 1 has a norm after the MLP (steps.1.late.gain)" in str(caught.value)
    with pytest.raises(TargetError, match="is not qwen2; it is like qwen2, but") as caught:
        export_gguf(program("biased"), tmp_path / "model.gguf", architecture="qwen2")
    assert "layer 1 has a bias on the attention's output (steps.1.back.weight)" in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_unknown_type_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="q4_k_m"):
        export_gguf(program("odd"), tmp_path / "model.gguf", type="q4_km")


def test_a_failed_export_leaves_nothing_and_keeps_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from irc.lowering.gguf import writing

    path = tmp_path / "model.gguf"
    path.write_text("before")

    def broken(*_: object) -> object:
        raise KeyboardInterrupt

    monkeypatch.setattr(writing, "encode", broken)
    with pytest.raises(KeyboardInterrupt):
        export_gguf(program("odd"), path)
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("model.gguf", "before")]


def test_rotary_tables_that_a_bf16_program_rounds_are_read_before(tmp_path: Path) -> None:
    written = export_gguf(program("half"), tmp_path / "half.gguf")
    found, plain = read_file(written.path), export_gguf(program("odd"), tmp_path / "odd.gguf")
    expected = read_file(plain.path)
    key = "irc.rope.frequencies"
    assert found.metadata[key] == expected.metadata[key]
    assert found.metadata["llama.rope.freq_base"] == expected.metadata["llama.rope.freq_base"]
    assert written.types["blk.0.attn_q.weight"] == "bf16"
