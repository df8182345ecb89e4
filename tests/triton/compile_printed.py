"""Compiles printed kernels for GPUs that need not be here, and prints what each needs, as JSON.

Run by test_ahead.py in a process of its own: one that interprets kernels cannot compile them.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from triton.backends.nvidia.compiler import get_ptxas

from irc.core.program import Program
from irc.core.target import get_target
from irc.frontend import capture
from irc.lowering.triton.ahead import CompiledKernel, compile_ahead
from tests.lowering import steps
from tests.lowering.clusters import random_program
from tests.triton import test_operations as table
from tests.triton.operations import Function, Table

FEW = ("exp", "expm1", "atan", "sinh", "rsqrt", "clamp", "where", "pow", "atan2", "fmod")
"""Functions that are compiled by default: of those that branch on types, or whose numbers have one."""


def programs(every: bool) -> Iterator[tuple[str, Program, int]]:
    """(name, program, compute capability)."""
    one = table.EXACT | {name: function for name, (function, _) in table.ROUNDED.items()}
    two = table.BINARY_EXACT | {name: function for name, (function, _) in table.BINARY_ROUNDED.items()}
    for dtype in (torch.float64, torch.float32, torch.bfloat16)[: 3 if every else 1]:
        numbers = table.edges(dtype)
        yield f"functions of {dtype}", of([f for n, f in one.items() if every or n in FEW], numbers), 80
        yield (
            f"functions of two {dtype}",
            of([f for n, f in two.items() if every or n in FEW], *table.pairs(numbers)),
            90,
        )
    yield "rounding", of([*table.HALVES.values()], table.edges(torch.bfloat16)), 90
    for seed in range(12) if every else (0, 2):
        yield f"cluster {seed}", random_program(seed)[0], 80 if seed % 4 else 90
    if every:
        yield "step", steps.step("insert-kv-cache{max-length=32}"), 90


def of(functions: list[Function], *inputs: torch.Tensor) -> Program:
    return capture(Table(functions), inputs, dynamic=(tuple({0: "N"} for _ in inputs),), name="functions")


def spilled(kernel: CompiledKernel, capability: int) -> int:
    """Bytes of registers that a thread keeps in memory."""
    assembler, architecture = get_ptxas(capability).path, f"sm_{capability}" + ("a" if capability >= 90 else "")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(kernel.ptx)
        told = subprocess.run(
            [assembler, "-v", f"--gpu-name={architecture}", path, "-o", path.with_suffix(".cubin")],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
    return sum(map(int, re.findall(r"(\d+) bytes spill", told.stderr)))


def main() -> None:
    found = {}
    for name, program, capability in programs("IRC_AHEAD_ALL" in os.environ):
        artifact = get_target("triton").lower(program, {"printed": ("matmul", "attention")} if name == "step" else None)
        sizes = [dim.hint for dim in program.dims.values()]
        for kernel in compile_ahead(artifact.source, artifact.signature, artifact.weights, sizes, capability):
            # Sines of large numbers need a table in local memory.
            measured = "functions" not in name
            found[f"{name}: {kernel.name} on sm_{capability}"] = spilled(kernel, capability) if measured else 0
    print(json.dumps(found))


if __name__ == "__main__":
    main()
