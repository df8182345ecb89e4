"""A whole step under the thread sanitizer: `make sanitize`."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from irc.core.target import get_target
from irc.lowering.cpp.build import COMMON, INCLUDE, require_compiler
from tests.lowering import steps

pytestmark = pytest.mark.skipif("IRC_STEP_THREADS" not in os.environ, reason="slow: make sanitize")
FLAGS = [flag for flag in COMMON if flag not in ("-O3", "-fvisibility=hidden", "-fPIC")]
QUANTIZED = "quantize-weights{bits=4,group-size=32},insert-kv-cache{max-length=32}"


@pytest.mark.parametrize("passes", ["insert-kv-cache{max-length=32}", QUANTIZED])
def test_workers_of_a_step_share_no_memory_without_a_barrier(passes: str, tmp_path: Path) -> None:
    options = {"isa": "plain", "flags": ("-O1",), "activations": "int8" if passes == QUANTIZED else "program"}
    saved = get_target("cpu").lower(steps.step(passes), options).save(tmp_path / "step.irca")
    source = shutil.copy(Path(__file__).parent / "step_threads.cpp", saved)
    made = tmp_path / "step"
    command = [require_compiler(), *FLAGS, "-O1", "-g", "-fsanitize=thread", f"-I{INCLUDE}", "-o", str(made)]
    subprocess.run([*command, str(source), str(saved / "program.cpp")], check=True)
    done = subprocess.run([str(made), str(saved / "weights.bin")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[:4000]
