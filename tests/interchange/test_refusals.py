"""Programs that a checkpoint cannot hold: nothing is written, and every layer that is in the way is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from irc.core.errors import OptionError, StorageError
from irc.core.program import Program
from irc.interchange import load_quantized, save_quantized
from tests.interchange.checkpoints import Model, assert_equal_parts, opened, quantized


def refused(program: Program, tmp_path: Path, layout: str, **options: Any) -> str:
    folder = tmp_path / "refused"
    with pytest.raises(StorageError) as caught:
        save_quantized(program, folder, layout, **options)
    assert not folder.exists(), "nothing is written after a refusal"
    return str(caught.value)


@pytest.mark.parametrize(
    ("layout", "options", "reason"),
    [
        ("gptq", {"bits": 5}, "GPTQ stores 2, 3, 4, 8 bits, not 5"),
        ("gptq", {"scale_dtype": "f32"}, "scales of type torch.float32 cannot be held as f16"),
        ("gptq", {"format": "nvfp4", "scale_dtype": "f32"}, "nvfp4 is no integer format with scales a group or row"),
        ("awq", {"bits": 8}, "AWQ stores 4 bits, not 8"),
        ("compressed-tensors", {"bits": 3}, "int3.g32: integers must have 4 or 8 bits"),
        ("compressed-tensors", {"format": "q4_0", "scale_dtype": "f32"}, "q4_0 cannot be stored"),
        ("compressed-tensors", {"format": "f8e5m2.row"}, "f8e5m2.row cannot be stored"),
        ("int-quantized", {"bits": 4}, "int4.g32: integers must have 8 bits"),
    ],
)
def test_what_a_layout_cannot_say(
    plain: Program, tmp_path: Path, layout: str, options: dict[str, Any], reason: str
) -> None:
    message = refused(quantized(plain, **options), tmp_path, layout)
    assert reason in message
    if "stores" not in reason:
        assert message.count(reason.partition(" of type")[0].split(":")[0]) >= 2, "both layers are named"


def test_zero_point_zero(plain: Program, tmp_path: Path, blank: Program) -> None:
    positive = {n: w.detach().abs() + 0.1 if n == "up.weight" else w for n, w in plain.weights.items()}
    program = quantized(plain.copy(replace_weights=positive), symmetric=False)
    assert "up: a zero point of 0 cannot be stored: layout 'gptq_v2' can" in refused(program, tmp_path, "gptq")
    save_quantized(program, tmp_path / "v2", "gptq_v2")
    assert_equal_parts(program, load_quantized(tmp_path / "v2", blank))
    config, tensors = opened(tmp_path / "v2")
    tensors["up.qzeros"] = torch.full_like(tensors["up.qzeros"], -1)
    config["quantization_config"]["checkpoint_format"] = "gptq"
    with pytest.raises(StorageError, match="up: qzeros holds a zero point of 0 minus one"):
        load_quantized(tensors, blank, config=config)


def test_other_refusals_of_writing(plain: Program, tmp_path: Path) -> None:
    assert "the program has no quantized linear layer" in refused(plain, tmp_path, "gptq")
    with_table = quantized(plain, group_size=32, include_embeddings=True)
    assert "embed: it is used by embedding, aten.embedding.default, which is no linear layer" in refused(
        with_table, tmp_path, "awq"
    )
    padded = quantized(plain, group_size=40, indivisible="pad")
    message = refused(padded, tmp_path, "compressed-tensors")
    assert "up: it is used by slice" in message
    assert "inner.down: it is used by slice" in message
    names = set(Model().state_dict())
    message = refused(quantized(plain), tmp_path, "gptq", only=names - {"up.weight"} | {"lost.weight"})
    assert "up.weight is no weight of the model" in message
    assert "lost.weight of the model is not in the program" in message
    with pytest.raises(OptionError, match=r"unknown checkpoint layout 'gptp' \(did you mean 'gptq'"):
        save_quantized(plain, tmp_path / "x", "gptp")


def test_quantized_activations_are_refused(plain: Program, tmp_path: Path) -> None:
    program = quantized(plain, group_size=32).copy()
    linear = next(node for node in program.graph.nodes if node.target is torch.ops.aten.linear.default)
    scale = program.weight_node("scale", torch.ones(1, 1, 1), before=linear)
    text = {"format": "int8.tensor"}
    made = program.insert(torch.ops.irc.quantize.default, linear.args[0], scale, None, before=linear, **text)
    back = program.insert(torch.ops.irc.dequantize.default, made, scale, None, before=linear, **text)
    linear.replace_input_with(linear.args[0], back)
    message = refused(program, tmp_path, "compressed-tensors")
    assert f"{made.name} quantizes an activation, which is not written" in message


def test_names_can_be_given(plain: Program, tmp_path: Path) -> None:
    program = quantized(plain, group_size=32)
    names = {"up.weight_stored": "left.weight"}
    save_quantized(program, tmp_path, "gptq", names=names)
    assert "left.qweight" in opened(tmp_path)[1]
    clash = {"up.weight_stored": "inner.down.weight"}
    assert "inner.down: it is stored twice" in refused(program, tmp_path, "gptq", names=clash)
    assert "stands for no weight that is known" in refused(program, tmp_path, "gptq", names={"up.weight_stored": "up"})
