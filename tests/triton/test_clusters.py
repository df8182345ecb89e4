"""A fuzzer: random clusters, printed as Triton and compared with the reference; `make fuzz-triton` runs many more."""

from __future__ import annotations

import os

import pytest
import torch

from irc.core.errors import CaptureError, VerificationError
from irc.core.target import get_target
from tests.lowering.clusters import random_program

TRITON = get_target("triton")
FIRST, COUNT = int(os.environ.get("IRC_FUZZ_FIRST", "0")), int(os.environ.get("IRC_FUZZ_COUNT", "6"))


@pytest.mark.parametrize("seed", range(FIRST, FIRST + COUNT))
def test_random_clusters(seed: int) -> None:
    try:
        program, (x, y) = random_program(seed, dynamic=seed % 3 > 0)
    except (CaptureError, VerificationError) as error:
        pytest.skip(f"cannot be captured: {str(error).splitlines()[0]}")
    coverage = TRITON.check(program)
    assert coverage.complete, str(coverage)
    artifact = TRITON.lower(program)
    batches = {x.shape[0], *(max(dim.minimum, size) for dim in program.dims.values() for size in (1, 4))}
    for batch in sorted(batches):
        inputs = [torch.randn(batch, *v.shape[1:], generator=torch.Generator().manual_seed(seed)) for v in (x, y)]
        expected, found = program.run(*inputs), artifact.run(*inputs)
        for number, (a, b) in enumerate(zip(expected, found, strict=True)):
            told = f"seed {seed}, output {number}\n{program}\n{artifact.source}"
            torch.testing.assert_close(
                b, a, rtol=2e-5, atol=2e-5, equal_nan=True, msg=lambda text, t=told: f"{text}\n{t}"
            )
