"""Printed kernels compile for GPUs: the interpreter lets types pass that a compiler refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from irc.core.errors import TargetError
from irc.core.target import get_target
from irc.lowering.triton.ahead import compile_ahead
from irc.lowering.triton.module import interpreting
from tests.lowering import steps

ROOT = Path(__file__).parents[2]


def test_printed_kernels_compile_for_gpus_that_are_not_here() -> None:
    """For an A100 and an H100, without a register spilled. IRC_AHEAD_ALL=1 compiles every function."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.triton.compile_printed"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    spilled = json.loads(done.stdout)
    assert len(spilled) > 10
    assert not {name: size for name, size in spilled.items() if size}


@pytest.mark.skipif(not interpreting(), reason="nothing is refused where kernels compile")
def test_the_interpreter_compiles_nothing() -> None:
    artifact = get_target("triton").lower(steps.cnn())
    with pytest.raises(TargetError, match="cannot be compiled where TRITON_INTERPRET is set"):
        compile_ahead(artifact.source, artifact.signature, artifact.weights, [2])
