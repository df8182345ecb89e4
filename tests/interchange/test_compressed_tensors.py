"""What is written as compressed-tensors, against that library."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from irc.core import formats
from irc.core.program import Program
from irc.interchange import save_quantized
from tests.interchange.checkpoints import opened, parts_of, quantized

pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(
    ("layout", "options"),
    [
        ("compressed-tensors", {"group_size": 32}),
        ("compressed-tensors", {"group_size": 32, "symmetric": False}),
        ("compressed-tensors", {"bits": 8, "group_size": None}),
        ("compressed-tensors", {"format": "f8e4m3.row", "scale_dtype": "f32"}),
        ("int-quantized", {"bits": 8, "group_size": None}),
    ],
)
def test_against_compressed_tensors(layout: str, options: dict[str, Any], plain: Program, tmp_path: Path) -> None:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    program = quantized(plain, **options)
    save_quantized(program, tmp_path, layout)
    config, tensors = opened(tmp_path)
    theirs = QuantizationConfig.model_validate(config["quantization_config"])
    scheme = theirs.config_groups["group_0"]
    compressor = BaseCompressor.load_from_registry(theirs.format)
    for module, (text, parts) in parts_of(program).items():
        local = {
            name.removeprefix(module + "."): tensor
            for name, tensor in tensors.items()
            if name.startswith(module + ".weight")
        }
        restored = compressor.decompress(local, scheme)["weight"]
        assert parts.scale is not None
        ours = formats.dequantize_tensor(parts, formats.parse(text), restored.dtype)
        assert torch.equal(restored, ours), module
        given = {"weight": restored, "weight_scale": local["weight_scale"]}
        if parts.zero_point is not None:
            given["weight_zero_point"] = (parts.zero_point.to(torch.int16) - 8).to(torch.int8)
        again = compressor.compress(given, scheme)
        assert again.keys() == local.keys()
        for name, tensor in again.items():
            assert tensor.dtype == local[name].dtype
            assert torch.equal(tensor.view(torch.uint8), local[name].view(torch.uint8)), (module, name)
