"""A model, its quantized programs, and what a checkpoint of them holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from irc.core import formats
from irc.core.formats import Parts
from irc.core.program import Program
from irc.frontend import capture
from irc.passes import QuantizeWeights
from tests.passes.running import run_pass


class Model(nn.Module):
    """A table tied to the head, two linear layers (one with a bias), a norm and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(12, 64)
        self.up = nn.Linear(64, 96)
        self.inner = nn.ModuleDict({"down": nn.Linear(96, 64, bias=False)})
        self.norm = nn.LayerNorm(64)
        self.head = nn.Linear(64, 12, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("shift", torch.ones(64), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.inner["down"](torch.relu(self.up(self.embed(ids)))) + self.shift
        return self.head(self.norm(x))


def program_of(model: nn.Module) -> Program:
    ids = torch.randint(12, (3, 5), generator=torch.Generator().manual_seed(0))
    return capture(model.eval(), (ids,), dynamic=({0: "B", 1: "S"},), canonicalize=False)


def quantized(program: Program, **options: Any) -> Program:
    return run_pass(QuantizeWeights(**{"scale_dtype": "f16"} | options), program).program


def opened(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    return json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")


def parts_of(program: Program) -> dict[str, tuple[str, Parts]]:
    found = {}
    for node in program.graph.nodes:
        if "dequantize" in str(node.target):
            parts = [None if part is None else program.weight(part) for part in node.args]
            found[str(node.args[0].target).removesuffix(".weight_stored")] = (node.kwargs["format"], Parts(*parts))
    return found


def exact(text: str, parts: Parts) -> np.ndarray:
    """The numbers held, in f64."""
    chosen = formats.parse(text)
    assert parts.scale is not None
    values = parts.stored.double() if text.startswith("f8") else chosen.unpack(parts.stored).double()
    values = values.unflatten(-1, (parts.scale.shape[-1], -1))
    if parts.zero_point is not None:
        values = values - parts.zero_point.double().unsqueeze(-1)
    return (values * parts.scale.double().unsqueeze(-1)).flatten(-2).numpy()


def assert_equal_parts(a: Program, b: Program) -> None:
    first, second = parts_of(a), parts_of(b)
    assert first.keys() == second.keys()
    for module, (text, parts) in first.items():
        assert second[module][0] == text
        for x, y in zip(parts, second[module][1], strict=True):
            assert (x is None) == (y is None)
            if x is not None and y is not None:
                assert x.dtype == y.dtype
                assert torch.equal(x.view(torch.uint8), y.view(torch.uint8))
