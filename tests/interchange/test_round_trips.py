"""Checkpoints as they are written, read by independent readers and read back."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from irc.core.contract import PassContext
from irc.core.errors import StorageError
from irc.core.formats import Parts
from irc.core.program import Program
from irc.core.verifier import verify
from irc.interchange import load_quantized, save_quantized
from irc.interchange.packing import pack_words, unpack_words
from irc.passes import QuantizeWeights
from irc.passes.quantize._weight_layers import WeightLayer
from tests.interchange.checkpoints import Model, assert_equal_parts, exact, opened, parts_of, quantized
from tests.interchange.unpacking import awq_weight, bits_of, compressed_weight, gptq_weight

READERS: dict[str, Callable[[dict[str, Tensor], str, dict[str, Any]], np.ndarray]] = {
    "gptq": gptq_weight, "gptq_v2": gptq_weight, "awq": awq_weight,
    "compressed-tensors": compressed_weight, "int-quantized": compressed_weight,
}  # fmt: skip


@given(
    st.integers(2, 8).flatmap(
        lambda bits: st.tuples(
            st.just(bits), st.lists(st.integers(0, 2**bits - 1), min_size=1, max_size=100), st.sampled_from([0, 1])
        )
    )
)
def test_words_round_trip(case: tuple[int, list[int], int]) -> None:
    bits, values, axis = case
    tensor = torch.tensor([values], dtype=torch.int16)
    tensor = tensor.t().contiguous() if axis == 0 else tensor
    words = pack_words(tensor, bits, axis=axis)
    assert words.dtype == torch.int32
    assert words.numel() == -(-len(values) * bits // 32)
    assert [bits_of(words.flatten().tolist(), bits, i) for i in range(len(values))] == values
    assert torch.equal(unpack_words(words, bits, len(values), axis=axis), tensor)


CASES: list[tuple[str, dict[str, Any]]] = [
    *(("gptq", {"bits": bits, "group_size": 32}) for bits in (2, 3, 4, 8)),
    ("gptq", {"group_size": None}),
    *(("gptq_v2", {"bits": bits, "group_size": 16, "symmetric": False}) for bits in (2, 3, 4, 8)),
    ("awq", {"group_size": 32, "symmetric": False}),
    ("awq", {"group_size": None, "symmetric": False}),
    ("awq", {"group_size": 32}),
    ("compressed-tensors", {"group_size": 32}),
    ("compressed-tensors", {"group_size": 16, "symmetric": False, "scale_dtype": "f32"}),
    ("compressed-tensors", {"bits": 8, "group_size": None}),
    ("compressed-tensors", {"bits": 8, "group_size": 32, "symmetric": False}),
    ("compressed-tensors", {"format": "f8e4m3.row", "scale_dtype": "f32"}),
    ("compressed-tensors", {"format": "f8e4m3.tensor"}),
    ("int-quantized", {"bits": 8, "group_size": None}),
    ("int-quantized", {"format": "int8.tensor"}),
    ("int-quantized", {"format": "int8.row.asym"}),
]


@pytest.mark.parametrize(("layout", "options"), CASES)
def test_round_trip(layout: str, options: dict[str, Any], plain: Program, blank: Program, tmp_path: Path) -> None:
    program = quantized(plain, **options)
    save_quantized(program, tmp_path / "model", layout, config={"model_type": "mine"}, only=Model().state_dict())
    config, tensors = opened(tmp_path / "model")
    assert config["model_type"] == "mine"
    for module, (text, parts) in parts_of(program).items():
        written = READERS[layout](tensors, module, config["quantization_config"])
        assert np.array_equal(written, exact(text, parts)), module
    assert not [name for name in tensors if name.endswith(("_stored", "_scale_1", "shift"))]
    assert torch.equal(tensors["up.bias"], plain.weight("up.bias"))
    back = load_quantized(tmp_path / "model", blank)
    verify(back)
    assert_equal_parts(program, back)
    ids = torch.randint(12, (2, 7))
    assert torch.equal(back(ids), program(ids))
    assert not torch.equal(blank(ids), back(ids))
    # A second writing gives the same file, byte for byte.
    save_quantized(back, tmp_path / "again", layout, config={"model_type": "mine"})
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "model" / name).read_bytes()


def test_every_layer_may_have_its_own_format(plain: Program, blank: Program, tmp_path: Path) -> None:
    class OnlyUp(QuantizeWeights):
        def _find(self, program: Program) -> Any:
            return (x for x in super()._find(program) if isinstance(x, WeightLayer) and x.name == "up.weight")

    one = OnlyUp(bits=8, group_size=None).run(plain.copy(), PassContext()).program
    program = quantized(one, group_size=32)
    save_quantized(program, tmp_path, "compressed-tensors")
    config, tensors = opened(tmp_path)
    groups = config["quantization_config"]["config_groups"]
    assert [(g["targets"], g["weights"]["num_bits"]) for g in groups.values()] == [(["up"], 8), (["inner.down"], 4)]
    for module, (text, parts) in parts_of(program).items():
        assert np.array_equal(compressed_weight(tensors, module, config["quantization_config"]), exact(text, parts))
    assert_equal_parts(program, load_quantized(tmp_path, blank))
    with pytest.raises(StorageError, match=r"8 bits, group size None; .*4 bits, group size 32; one configuration must"):
        save_quantized(program, tmp_path / "gptq", "gptq")


def test_configuration(plain: Program, tmp_path: Path) -> None:
    program = quantized(plain, group_size=32)
    save_quantized(program, tmp_path / "a", "gptq")
    assert opened(tmp_path / "a")[0] == {
        "quantization_config": {
            "quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False, "static_groups": False,
            "lm_head": False, "checkpoint_format": "gptq", "dynamic": {r"-:head$": {}},
        }
    }  # fmt: skip
    qzeros = opened(tmp_path / "a")[1]["up.qzeros"]
    assert set(qzeros.flatten().tolist()) == {0x77777777}
    save_quantized(program, tmp_path / "b", "compressed-tensors")
    config = opened(tmp_path / "b")[0]["quantization_config"]
    assert (config["format"], config["ignore"]) == ("pack-quantized", ["head"])
    assert config["config_groups"]["group_0"]["targets"] == ["Linear"]
    save_quantized(program, tmp_path / "c", "awq")
    assert opened(tmp_path / "c")[0]["quantization_config"] == {
        "quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm",
        "modules_to_not_convert": ["head"],
    }  # fmt: skip


def test_act_order(blank: Program, tmp_path: Path) -> None:
    """Inputs of a group need not be neighbours: `g_idx` says which group each belongs to."""
    config = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True}
    generator = torch.Generator().manual_seed(5)
    state: dict[str, Tensor] = {"embed.weight": torch.randn(12, 64), "up.bias": torch.randn(96)}
    state |= {"norm.weight": torch.randn(64), "norm.bias": torch.randn(64)}
    for module, (rows, width) in {"up": (96, 64), "inner.down": (64, 96)}.items():
        groups = width // 32
        state[f"{module}.qweight"] = pack_words(torch.randint(16, (width, rows), generator=generator), 4, axis=0)
        state[f"{module}.qzeros"] = pack_words(torch.randint(15, (groups, rows), generator=generator), 4, axis=1)
        state[f"{module}.scales"] = torch.rand(groups, rows, generator=generator).half() + 0.01
        order = torch.randperm(width, generator=generator)
        state[f"{module}.g_idx"] = (order // 32).to(torch.int32)
    program = load_quantized(state, blank, config=config)
    verify(program)
    weights = {}
    for node in program.graph.nodes:
        if "index_select" in str(node.target):
            parts = [None if part is None else program.weight(part) for part in node.args[0].args]
            numbers = exact(node.args[0].kwargs["format"], Parts(*parts))
            name = str(node.args[0].args[0].target).removesuffix(".weight_stored")
            weights[name] = numbers[:, program.weight(node.args[2]).numpy()]
    assert weights.keys() == {"up", "inner.down"}
    for module, numbers in weights.items():
        assert np.array_equal(numbers, gptq_weight(state, module, config | {"checkpoint_format": "gptq"}))
    save_quantized(program, tmp_path, "gptq")
    saved, tensors = opened(tmp_path)
    assert saved["quantization_config"]["desc_act"] is True
    for name, tensor in tensors.items():
        assert torch.equal(tensor, state[name]), name
    with pytest.raises(StorageError, match=r"inner\.down: its inputs are sorted by group") as caught:
        save_quantized(program, tmp_path / "awq", "awq")
    assert "up: its inputs are sorted by group" in str(caught.value)


def test_shards_and_ties(plain: Program, blank: Program, tmp_path: Path) -> None:
    program = quantized(plain, group_size=32)
    save_quantized(program, tmp_path, "gptq")
    _, tensors = opened(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    tensors["head.weight"] = tensors["embed.weight"].clone()  # some writers store both names of a tie
    names = sorted(tensors)
    shards = {name: f"model-{i % 2}.safetensors" for i, name in enumerate(names)}
    for shard in set(shards.values()):
        save_file({name: tensors[name] for name in names if shards[name] == shard}, tmp_path / shard)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    assert_equal_parts(program, load_quantized(tmp_path, blank))
    tensors["head.weight"] += 1
    save_file(
        {name: tensors[name] for name in names if shards[name] == "model-0.safetensors"},
        tmp_path / "model-0.safetensors",
    )
    save_file(
        {name: tensors[name] for name in names if shards[name] == "model-1.safetensors"},
        tmp_path / "model-1.safetensors",
    )
    with pytest.raises(StorageError, match=r"it is tied to embed\.weight in the program, and differs"):
        load_quantized(tmp_path, blank)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../x.safetensors"}}))
    with pytest.raises(StorageError, match="no weight_map of file names beside it"):
        load_quantized(tmp_path, blank)


def test_program_on_the_meta_device(plain: Program, tmp_path: Path) -> None:
    program = quantized(plain, group_size=32)
    save_quantized(program, tmp_path, "awq")
    on_meta = plain.copy(replace_weights={
        name: tensor if name == "shift" else nn.Parameter(tensor.detach().to("meta"), False)
        for name, tensor in plain.weights.items()
    })  # fmt: skip
    assert_equal_parts(program, load_quantized(tmp_path, on_meta))
    with pytest.raises(StorageError, match=r"has no values for \d+ weights \(first: embed\.weight"):
        save_quantized(quantized(on_meta, group_size=32), tmp_path / "x", "awq")
