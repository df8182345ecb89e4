"""AVX-512 units are at least compiled everywhere; where the machine has it, the other files run it.

`make kernels-emulated` runs all kernel tests with the AVX-512 intrinsics computed by SIMDe.
"""

from __future__ import annotations

import shutil
import subprocess

import pytest

from irc.lowering.cpp.templates.base import COMMON_FLAGS, ISA_FLAGS
from tests.kernels.building import COMPILER, EMULATED, needs_compiler

_UNIT = """
#include "irc/qmatmul.h"
using Four = irc::Weights<4, 32, false, irc::f16>;
using Zeros = irc::Weights<4, 0, true, float>;
using Eight = irc::Weights<8, 32, true, float>;
template <class W>
static void run(irc::Worker& worker, const float* x, const uint8_t* packed, int64_t rows, uint8_t* scratch, float* y) {
    irc::quantized_matmul<W>(worker, x, 64, packed, rows, 32, 64, scratch,
                             [&](int64_t m, int64_t n0, int64_t, const float* v) { y[32 * m + n0] = *v; });
}
void all(irc::Worker& worker, const float* x, const uint8_t* packed, int64_t rows, uint8_t* scratch, float* y) {
    run<Four>(worker, x, packed, rows, scratch, y);
    run<Zeros>(worker, x, packed, rows, scratch, y);
    run<Eight>(worker, x, packed, rows, scratch, y);
}
"""


@needs_compiler
@pytest.mark.skipif(EMULATED, reason="emulated: the whole suite compiles it")
@pytest.mark.skipif(shutil.which("objdump") is None, reason="needs objdump to look at the instructions")
def test_the_unit_uses_vnni(tmp_path) -> None:
    assert COMPILER is not None
    source, made = tmp_path / "unit.cpp", tmp_path / "unit.o"
    source.write_text(_UNIT)
    flags = [*COMMON_FLAGS, *ISA_FLAGS["avx512"], "-O1", "-Wall", "-Wextra", "-Werror", "-c"]
    # GCC 12 warns of its own headers.
    flags += ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]
    done = subprocess.run([COMPILER, *flags, str(source), "-o", str(made)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    listing = subprocess.run(["objdump", "-d", str(made)], capture_output=True, text=True, check=True).stdout
    assert "vpdpbusd" in listing
    assert "zmm" in listing
