"""Every model of the zoo captures, and computes what the model computes at sizes it was not captured at."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from irc.core import provenance
from tests.zoo import LENGTH, ZOO, built, captured, reference, token_ids

# Tracing unrolls the scan over the sequence: that size is fixed, and metadata["capture"] says so.
FIXED_LENGTH = {"mamba"}
# Both have a different summation order than the model: batched_mm against the grouped kernel.
EXPERTS = {"mixtral", "qwen3-moe", "deepseek-v2", "deepseek-v3", "gpt-oss"}


def resized(inputs: Any, batch: int, length: int) -> Any:
    def resize(value: Tensor) -> Tensor:
        return (
            token_ids(batch, length)
            if value.dtype == torch.int64
            else value[:1].expand(batch, *value.shape[1:]).clone()
        )

    return {k: resize(v) for k, v in inputs.items()} if isinstance(inputs, dict) else tuple(map(resize, inputs))


@pytest.mark.parametrize("name", ZOO)
def test_capture_computes_what_the_model_computes(name: str) -> None:
    program, model, entry = captured(name, canonicalize=False), built(name), ZOO[name]
    tolerance = 2e-6 if name in EXPERTS else 0.0
    for batch, length in ((3, LENGTH), (1, 1), (2, 15)):
        if name in FIXED_LENGTH:
            length = LENGTH
        inputs = resized(entry.inputs(model), batch, length)
        expected = reference(model, inputs)
        result = program(**inputs) if isinstance(inputs, dict) else program(*inputs)
        torch.testing.assert_close(result, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", ZOO)
def test_capture_names_dimensions_and_origins(name: str) -> None:
    program, entry = captured(name, canonicalize=False), ZOO[name]
    expected = {"B"} if entry.kind == "vision" or name in FIXED_LENGTH | {"whisper"} else {"B", "S"}
    assert expected <= set(program.dims)
    if name in FIXED_LENGTH:
        assert "is fixed at 11" in program.metadata["capture"]["static"][0]
    modules = {path for path, _ in built(name).named_modules()}
    for node in program.operations():
        (source,) = provenance.sources_of(node)
        assert source.module in modules, source
        assert source.location.rpartition(":")[0].endswith(".py"), (node, source)
        assert not source.location.startswith("/")
    assert set(program.weights) <= set(dict(built(name).state_dict())) | {n for n, _ in built(name).named_buffers()} | {
        n for n in program.weights if "lifted_tensor" in n
    }
