"""A fuzzer: random clusters, printed, built and compared with the reference; `make fuzz` runs many more."""

from __future__ import annotations

import os

import pytest
import torch

from irc.core.errors import CaptureError, VerificationError
from irc.core.target import get_target
from irc.lowering.cpp.build import find_compiler
from tests.lowering.clusters import random_program

CPU = get_target("cpu")
pytestmark = pytest.mark.skipif(find_compiler() is None, reason="needs a C++ compiler (g++ or clang++)")
FLAGS = ("-O1", *os.environ.get("IRC_FUZZ_FLAGS", "").split())
FIRST, COUNT = int(os.environ.get("IRC_FUZZ_FIRST", "0")), int(os.environ.get("IRC_FUZZ_COUNT", "6"))


@pytest.mark.parametrize("seed", range(FIRST, FIRST + COUNT))
def test_random_clusters(seed: int) -> None:
    try:
        program, (x, y) = random_program(seed, dynamic=seed % 3 > 0)
    except (CaptureError, VerificationError) as error:
        pytest.skip(f"cannot be captured: {str(error).splitlines()[0]}")
    coverage = CPU.check(program)
    assert coverage.complete, str(coverage)
    artifact = CPU.lower(program, {"threads": 2, "flags": FLAGS})
    batches = (x.shape[0], 1, 4) if program.dims else (x.shape[0],)
    for batch in batches:
        inputs = [torch.randn(batch, *v.shape[1:], generator=torch.Generator().manual_seed(seed)) for v in (x, y)]
        expected, found = program.run(*inputs), artifact.run(*inputs)
        for number, (a, b) in enumerate(zip(expected, found, strict=True)):
            told = f"seed {seed}, output {number}\n{program}"
            torch.testing.assert_close(
                b, a, rtol=2e-5, atol=2e-5, equal_nan=True, msg=lambda text, t=told: f"{text}\n{t}"
            )
