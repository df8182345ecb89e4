"""Checkpoints that do not fit, are damaged or say what is not read: errors that name the layer, and all of them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from irc.core.errors import StorageError
from irc.core.program import Program
from irc.interchange import load_quantized, save_quantized
from tests.interchange.checkpoints import assert_equal_parts, opened, quantized

Checkpoint = tuple[dict[str, Any], dict[str, Tensor]]


def _config(path: str, value: Any) -> Callable[[Checkpoint], None]:
    def change(checkpoint: Checkpoint) -> None:
        *steps, last = path.split("/")
        place: Any = checkpoint[0]["quantization_config"]
        for step in steps:
            place = place[step]
        place[last] = value

    return change


def _tensor(name: str, change: Callable[[Tensor], Tensor | None]) -> Callable[[Checkpoint], None]:
    def apply(checkpoint: Checkpoint) -> None:
        made = change(checkpoint[1].pop(name))
        if made is not None:
            checkpoint[1][name] = made.contiguous()

    return apply


def _nan(scale: Tensor) -> Tensor:
    scale[0, 0] = torch.nan
    return scale


GROUP = "config_groups/group_0"
HOSTILE = [
    ("gptq", _tensor("up.scales", lambda t: None), "up: scales is missing"),
    ("gptq", _tensor("up.qweight", lambda t: None), "up: qweight is missing"),
    ("gptq", _tensor("up.qweight", lambda t: t[1:]), "up: qweight has shape [7, 96], not [8, 96]"),
    ("gptq", _tensor("up.qweight", lambda t: t.float()), "up: qweight has type torch.float32, not torch.int32"),
    ("gptq", _tensor("up.scales", _nan), "up: scales holds numbers that are not finite"),
    ("gptq", _tensor("up.g_idx", lambda t: t + 7), "up: g_idx names groups outside of 0 to 1"),
    ("gptq", _tensor("up.g_idx", lambda t: t * 0), "up: g_idx gives groups of 0 to 64 inputs, not 32"),
    ("gptq", _config("bits", 8), "up: qweight has shape [8, 96], not [16, 96]"),
    ("gptq", _config("bits", "four"), "bits must be a whole number, not 'four'"),
    ("gptq", _config("bits", 7), "bits must be one of 2, 3, 4, 8, not 7"),
    ("gptq", _config("group_size", 0), "group_size must be positive or -1, not 0"),
    ("gptq", _config("group_size", 48), "up: group size 48 does not divide its 64 inputs"),
    ("gptq", _config("checkpoint_format", "marlin"), "checkpoint_format must be gptq or gptq_v2, not 'marlin'"),
    ("gptq", _config("dynamic", {"+:up": {"bits": 8}}), "settings per layer (dynamic"),
    ("gptq", _config("quant_method", "gptk"), "has quant_method 'gptk' (did you mean 'gptq'?)"),
    ("gptq", _config("quant_method", 3), "has quant_method 3"),
    ("gptq", _tensor("up.bias", lambda t: None), "up.bias: the program has it, the checkpoint does not"),
    ("gptq", _tensor("up.bias", lambda t: t[:5]), "up.bias: it has shape [5], the program's [96]"),
    ("gptq", _tensor("up.bias", lambda t: t.double()), "up.bias: torch.float64 cannot become the program's"),
    ("awq", _config("version", "gemv"), "the packing (version) must be gemm, not 'gemv'"),
    ("awq", _config("bits", 8), "AWQ has 4 bits, not 8"),
    ("awq", _tensor("up.qzeros", lambda t: t.t()), "up: qzeros has shape [12, 2], not [2, 12]"),
    ("compressed-tensors", _config("config_groups", {}), "config_groups is missing or empty"),
    ("compressed-tensors", _config(GROUP, 5), "group_0: it has no weights"),
    ("compressed-tensors", _config(f"{GROUP}/targets", "Linear"), "targets must be a list of names"),
    ("compressed-tensors", _config(f"{GROUP}/targets", ["re:("]), "up: '(' is no regular expression"),
    ("compressed-tensors", _config(f"{GROUP}/targets", ["other"]), "up: no group of the configuration is about it"),
    ("compressed-tensors", _config(f"{GROUP}/weights/num_bits", 8), "up: weight_packed has shape [96, 8], not [96,"),
    ("compressed-tensors", _config(f"{GROUP}/weights/group_size", 16), "up: weight_scale has shape [96, 2], not [96,"),
    ("compressed-tensors", _config(f"{GROUP}/weights/symmetric", False), "up: weight_zero_point is missing"),
    ("compressed-tensors", _config(f"{GROUP}/weights/strategy", "block"), "strategy 'block' with group_size 32"),
    ("compressed-tensors", _config(f"{GROUP}/weights/actorder", "group"), "a group index (actorder) is not read"),
    ("compressed-tensors", _config(f"{GROUP}/input_activations", {"num_bits": 8}), "weights_only=True reads"),
    ("compressed-tensors", _config(f"{GROUP}/format", "naive-quantized"), "int weights of 4 bits are not read"),
    ("compressed-tensors", _config("ignore", ["re:u.*"]), "up: the configuration lists it under ignore"),
    ("compressed-tensors", _config("kv_cache_scheme", {}), "a quantized cache (kv_cache_scheme) is not read"),
    ("compressed-tensors", _tensor("up.weight_shape", lambda t: t + 1), "up: weight_shape says [97, 65], the"),
]  # fmt: skip


@pytest.mark.parametrize(("layout", "damage", "reason"), HOSTILE)
def test_hostile_checkpoint(
    layout: str, damage: Callable[[Checkpoint], None], reason: str, plain: Program, blank: Program, tmp_path: Path
) -> None:
    save_quantized(quantized(plain, group_size=32), tmp_path, layout)
    checkpoint = opened(tmp_path)
    damage(checkpoint)
    (tmp_path / "config.json").write_text(json.dumps(checkpoint[0]))
    save_file(checkpoint[1], tmp_path / "model.safetensors")
    with pytest.raises(StorageError, match=re.escape(reason)):
        load_quantized(tmp_path, blank)


def test_all_offenders_are_listed(plain: Program, blank: Program, tmp_path: Path) -> None:
    save_quantized(quantized(plain, group_size=32), tmp_path, "gptq")
    config, state = opened(tmp_path)
    del state["up.scales"], state["norm.bias"]
    state["inner.down.qweight"] = state["inner.down.qweight"][1:]
    state["strange.inv_freq"] = torch.ones(3)
    state["what.qweight"] = torch.ones(3)
    with pytest.raises(StorageError) as caught:
        load_quantized(state, blank, config=config)
    for text in (
        "the state dict does not fit program", "up: scales is missing", "norm.bias: the program has it",
        "inner.down: qweight has shape [11, 64], not [12, 64]", "strange.inv_freq: the checkpoint has it",
        "what: what.weight is not in the program",
    ):  # fmt: skip
        assert text in str(caught.value)


def test_ignored_tensors_and_weights_only(plain: Program, blank: Program, tmp_path: Path) -> None:
    program = quantized(plain, group_size=32)
    save_quantized(program, tmp_path, "compressed-tensors")
    config, state = opened(tmp_path)
    state["layer.inv_freq"] = torch.ones(3)
    config["quantization_config"]["config_groups"]["group_0"]["input_activations"] = {"num_bits": 8}
    back = load_quantized(state, blank, config=config, ignore=["*.inv_freq"], weights_only=True)
    assert_equal_parts(program, back)


@pytest.mark.parametrize("options", [{"bits": 8, "group_size": None}, {"format": "f8e4m3.row"}])
def test_naive_quantized(plain: Program, blank: Program, tmp_path: Path, options: dict[str, Any]) -> None:
    program = quantized(plain, **options)
    save_quantized(program, tmp_path, "int-quantized")
    config, state = opened(tmp_path)
    settings = config["quantization_config"]
    settings["format"] = settings["config_groups"]["group_0"]["format"] = "naive-quantized"
    assert_equal_parts(program, load_quantized(state, blank, config=settings))


def test_damaged_folders(blank: Program, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="cannot read"):
        load_quantized(tmp_path / "missing", blank)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(StorageError, match="cannot read"):
        load_quantized(tmp_path, blank)
    (tmp_path / "config.json").write_text("[" * 100000)
    with pytest.raises(StorageError, match="cannot read"):
        load_quantized(tmp_path, blank)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(StorageError, match="holds no JSON object"):
        load_quantized(tmp_path, blank)
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "gptq"}}')
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(StorageError, match="cannot read"):
        load_quantized(tmp_path, blank)
    with pytest.raises(StorageError, match="has no quantization_config with a quant_method"):
        load_quantized({}, blank)
    with pytest.raises(StorageError, match="1 entries that are no tensors"):
        load_quantized({"a": 3}, blank, config={"quant_method": "awq"})
