"""Steps called from C in a thread with a small stack: what templates work on lies in the arena."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from irc.core.program import Program
from irc.core.target import get_target
from irc.frontend import capture
from irc.lowering.cpp.build import find_compiler, supported_isas
from tests.lowering import steps
from tests.lowering.test_cpu_int8 import Block, quantized

pytestmark = pytest.mark.skipif(
    find_compiler() is None or shutil.which("cc") is None, reason="needs a C and a C++ compiler"
)
# Of the language model's step: B, S, R.
PROMPT, TOKEN = (1, 40, 40), (1, 1, 1)


def _images() -> Program:
    torch.manual_seed(1)
    return capture(Block().eval(), (torch.randn(2, 3, 37, 30),), name="images", dynamic=({0: "B"},))


PROGRAMS = {
    "floats": (lambda: steps.step("insert-kv-cache{max-length=64}"), PROMPT, TOKEN),
    "8-bit floats": (lambda: steps.step("quantize-weights{format=f8e4m3.row},insert-kv-cache{max-length=64}"), PROMPT),
    "images": (_images, (3,)),
    "integer images": (lambda: quantized()[0], (3,)),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_step_runs_on_a_stack_of_64_kilobytes(name: str, tmp_path: Path) -> None:
    program, *calls = PROGRAMS[name]
    written = get_target("cpu").lower(program(), {"flags": ("-O1",)}).save(tmp_path / "saved.irca")
    source, made = Path(__file__).parent / "small_stack.c", tmp_path / "small_stack"
    built = written / f"program.{supported_isas()[-1]}.so"
    options = ["-O1", "-Wall", "-Werror", "-pthread", "-I", str(written), f"-Wl,-rpath,{written}"]
    subprocess.run(["cc", *options, str(source), str(built), "-o", str(made)], check=True)
    for sizes in calls:
        command = [str(made), str(written / "weights.bin"), *map(str, sizes)]
        assert subprocess.run(command, check=False).returncode == 0
