"""Kernels as functions: C++ around the text that a template prints, compiled and called through ctypes."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from irc.lowering.cpp.templates.base import COMMON_FLAGS, ISA_FLAGS, detect_isa

COMPILER = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
# Extra flags of the heavy checks: sanitizers, or AVX-512 computed by SIMDe.
EXTRA_FLAGS = tuple(os.environ.get("IRC_KERNEL_FLAGS", "").split())
EMULATED = "-DIRC_EMULATE_AVX512" in EXTRA_FLAGS

needs_compiler = pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler (g++ or clang++)")


def runnable_isas() -> list[str]:
    """Instruction sets whose kernels can run here, the most capable first."""
    if EMULATED:
        return ["avx512"]
    names = list(ISA_FLAGS)
    return names[names.index(detect_isa()) :]


def isa_flags(isa: str) -> tuple[str, ...]:
    """Compiler flags: an emulated set is compiled for the machine as it is."""
    return ISA_FLAGS[detect_isa() if EMULATED else isa]


def adding_rows(width: int | str) -> str:
    """An epilogue in C++ that adds each row of results to the rows of `width` numbers at `out`."""
    return (
        "[&](int64_t m, int64_t n0, int64_t n1, const float* values) {"
        f" for (int64_t n = n0; n < n1; ++n) out[m * {width} + n] += values[n - n0]; }}"
    )


def workers_function(name: str, parameters: str, call: str) -> str:
    """A C function of `threads` and the parameters, in which every worker of a pool runs the call of a kernel."""
    return (
        f'extern "C" void {name}(int threads, {parameters}) {{\n'
        f"    auto body = [&](irc::Worker& worker) {{\n        give_memory(worker);\n"
        f"{call}    }};\n    pool(threads).run(body);\n}}"
    )


@functools.cache
def _folder() -> Path:
    folder = Path(tempfile.gettempdir()) / f"irc-kernel-tests-{os.getuid()}"
    folder.mkdir(exist_ok=True)
    return folder


@functools.cache
def _headers() -> bytes:
    include = Path(COMMON_FLAGS[-1][2:])
    return b"".join(path.read_bytes() for path in sorted(include.rglob("*.h")))


def compile_library(source: str, isa: str) -> Path:
    """A shared object of one translation unit; compiled once for the same text, headers and flags."""
    assert COMPILER is not None
    # -O1: the same instructions as -O3 in a third of the compile time.
    flags = [
        *COMMON_FLAGS,
        "-O1",
        *isa_flags(isa),
        *EXTRA_FLAGS,
        "-Wall",
        "-Wextra",
        "-Werror",
        "-fPIC",
        "-shared",
        "-pthread",
    ]
    key = hashlib.sha256(_headers() + source.encode() + " ".join([COMPILER, *flags]).encode()).hexdigest()[:24]
    library = _folder() / f"{key}.so"
    if not library.exists():
        code, made = _folder() / f"{key}.cpp", _folder() / f"{key}.{os.getpid()}.so"
        code.write_text(source)
        done = subprocess.run([COMPILER, *flags, str(code), "-o", str(made)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        made.replace(library)
    return library


def build(includes: Sequence[str], functions: Sequence[str], isa: str) -> ctypes.CDLL:
    """Compiles `extern "C"` functions that find a pool of threads in `pool(threads)`."""
    lines = [f'#include "{name}"' for name in ("irc/pool_impl.h", *includes)]
    lines.append("static irc::Pool& pool(int threads) {")
    lines.append("    static irc::Pool one(1), two(2), three(3);")
    lines.append("    return threads == 1 ? one : threads == 2 ? two : three;\n}")
    lines.append("[[maybe_unused]] static void give_memory(irc::Worker& worker) {")
    lines.append("    alignas(64) static std::uint8_t memory[3][irc::worker_bytes];")
    lines.append("    worker.memory = memory[worker.index];\n}")
    lines += functions
    return ctypes.CDLL(str(compile_library("\n".join(lines) + "\n", isa)))


def pointer(tensor: torch.Tensor) -> ctypes.c_void_p:
    """Address of a contiguous tensor's first element."""
    assert tensor.is_contiguous()
    return ctypes.c_void_p(tensor.data_ptr())


def aligned(num_bytes: int) -> torch.Tensor:
    """Bytes on a 64-byte boundary, filled with garbage."""
    memory = torch.full((num_bytes + 64,), 0xA5, dtype=torch.uint8)
    start = -memory.data_ptr() % 64
    return memory[start : start + num_bytes]
