"""Types by rule: the table against places in a model, and every type written and read back."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from irc.lowering.gguf import export_gguf
from irc.lowering.gguf.mixes import MIXES, Place, choose_type, fitting, mix_name
from irc.lowering.gguf.reading import read_file
from tests.lowering.gguf.models import program


def place(role: str, layer: int = 0, *, layers: int = 32, group: int = 1, tied: bool = False) -> Place:
    return Place(role, layer, layers, group, 0, "llama", tied)


def test_q4_k_m_gives_six_bits_to_values_and_down_where_it_pays() -> None:
    chosen = [choose_type("q4_k_m", place("ffn_down", layer), (512, 1024)) for layer in range(32)]
    assert chosen == ["q6_k" if i < 4 or i >= 28 or (i - 4) % 3 == 2 else "q4_k" for i in range(32)]
    assert choose_type("q4_k_m", place("attn_q"), (512, 1024)) == "q4_k"
    assert choose_type("q4_k_m", place("output"), (512, 1024)) == "q6_k"
    assert choose_type("q4_k_m", place("embedding"), (512, 1024)) == "q4_k"
    assert choose_type("q4_k_m", place("embedding", tied=True), (512, 1024)) == "q6_k"
    assert choose_type("q4_k_m", place("norm"), (1024,)) == "f32"


def test_other_mixes_have_their_own_rules() -> None:
    assert choose_type("q2_k", place("attn_v", group=4), (512, 1024)) == "q4_k"
    assert choose_type("q2_k", place("attn_v", group=1), (512, 1024)) == "q3_k"
    assert [choose_type("q3_k_m", place("attn_v", layer), (512, 1024)) for layer in (1, 2)] == ["q5_k", "q4_k"]
    assert choose_type("q5_k_m", place("attn_qkv"), (512, 1024)) == "q6_k"
    assert mix_name("Q4_K") == "q4_k_m"


def test_rows_that_no_block_divides_get_a_larger_type() -> None:
    assert fitting("q4_k", 96) == "q5_0"
    assert fitting("q6_k", 96) == "q8_0"
    assert fitting("q4_0", 40) == "f16"


@pytest.mark.parametrize("kind", [name for name in MIXES if name not in ("q3_k_s", "q4_k_s", "q5_k_s", "q2_k_s")])
def test_every_type_is_written_and_both_readers_agree(kind: str, tmp_path: Path) -> None:
    written = export_gguf(program("odd"), tmp_path / "model.gguf", type=kind)
    ours, numbers = read_file(written.path), {}
    for theirs in gguf.GGUFReader(written.path).tensors:
        mine = ours.tensors[theirs.name]
        assert theirs.tensor_type.name.lower() == mine.kind == written.types[theirs.name]
        raw = mine.data.contiguous().reshape(-1).view(torch.uint8).numpy()
        np.testing.assert_array_equal(theirs.data.reshape(-1).view(np.uint8), raw)
        numbers[theirs.name] = gguf.dequantize(theirs.data, theirs.tensor_type)
    weight = program("odd").weights["steps.0.home.weight"].numpy()
    worst = {"f32": 0, "f16": 1e-3, "bf16": 8e-3, "q8_0": 8e-3}.get(written.types["blk.0.ffn_down.weight"], 0.2)
    assert np.abs(numbers["blk.0.ffn_down.weight"] - weight).max() <= worst * np.abs(weight).max()
