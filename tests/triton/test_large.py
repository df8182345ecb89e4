"""Tensors of 2^31 elements and more: indices become 64 bits wide. The tensors here are small, the indices are wide."""

from __future__ import annotations

import pytest
import torch

from irc.core.target import get_target
from irc.lowering.triton.artifact import TritonArtifact
from tests.lowering import steps
from tests.lowering.clusters import random_program

pytest.importorskip("triton", reason="triton is not installed")
TRITON = get_target("triton")


def widened(artifact: TritonArtifact) -> TritonArtifact:
    """The artifact with indices of 64 bits at all sizes."""
    source = artifact.source.replace("1 << 31", "0")
    assert source != artifact.source
    return TritonArtifact(artifact.manifest, source, artifact.weights, artifact.options, program=artifact.program)


@pytest.mark.parametrize("seed", [1, 4, 7])
def test_clusters_with_wide_indices(seed: int) -> None:
    program, inputs = random_program(seed, dynamic=True)
    found = widened(TRITON.lower(program)).run(*inputs)
    for a, b in zip(program.run(*inputs), found, strict=True):
        torch.testing.assert_close(b, a, rtol=2e-5, atol=2e-5, equal_nan=True)


def test_a_decoder_with_wide_indices() -> None:
    program, tokens = steps.decoder(), steps.tokens(2, 5)
    (found,) = widened(TRITON.lower(program)).run(tokens)
    torch.testing.assert_close(found, program.run(tokens)[0], rtol=2e-5, atol=2e-5)


def test_the_width_follows_the_sizes() -> None:
    from irc.lowering.triton.module import import_module

    program, _ = random_program(1, dynamic=True)
    index_type = import_module(TRITON.lower(program).source).index_type
    assert str(index_type(3)) == "int32"
    assert str(index_type(1 << 31)) == "int64"
