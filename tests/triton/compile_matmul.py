"""Compiles products of matrices for GPUs that need not be here, and prints what their code consists of, as JSON.

    python tests/triton/compile_matmul.py            # a few kinds and configurations
    python tests/triton/compile_matmul.py --all      # every candidate of every kind: minutes

Run by test_matmul_library.py in a process of its own: one that interprets kernels cannot compile them.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

from irc.lowering.triton.ahead import Launch
from irc.lowering.triton.module import import_module
from irc.lowering.triton.templates import matmul as template
from irc.lowering.triton.templates.matmul import Config, MatmulProblem

DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16, "int4": torch.uint8, "int8": torch.int8}


def launch_of(problem: MatmulProblem, config: Config, rows: int) -> Launch:
    def pointer(name: str) -> torch.Tensor:
        return torch.empty(1, dtype=DTYPES[name], device="meta")

    arguments: dict[str, Any] = {"out": pointer(problem.activation), "x": pointer(problem.activation)}
    arguments["weight"] = pointer(problem.weight)
    if problem.bits is not None:
        arguments["scale"] = pointer(problem.scale)
    if problem.asymmetric:
        arguments["zero"] = pointer("int8")
    module = import_module(template.printed_module(problem))
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    return Launch(config.kind, getattr(module, config.kind), {**arguments, "M": rows, **config.constants}, options)


def compiled(problem: MatmulProblem, config: Config, rows: int, capability: int) -> dict[str, int]:
    made = launch_of(problem, config, rows).compile(GPUTarget("cuda", capability, 32))
    counts = {name: made.ptx.count(name) for name in ("wgmma.mma_async", "mma.sync", "ld.global", "cvt.rn.f32.")}
    copies = len(re.findall(r"cp\.async\.c[ga]\S* .*, 0x10", made.ptx))
    return {**counts, "cp.async, 16 bytes": copies, "shared": made.shared_bytes, **usage(made.ptx, capability)}


def usage(ptx: str, capability: int) -> dict[str, int]:
    """Registers of a thread, and bytes of them that are spilled."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
    architecture = f"sm_{capability}{'a' if capability == 90 else ''}"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        command = [tool, "-v", f"-arch={architecture}", source, "-o", f"{folder}/kernel.cubin"]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    found = {"registers": r"Used (\d+) registers", "spilled": r"(\d+) bytes spill stores"}
    return {name: int(re.search(pattern, text).group(1)) for name, pattern in found.items()}  # type: ignore[union-attr]


def few() -> Iterator[tuple[str, MatmulProblem, Config, int, int]]:
    """(name, problem, configuration, rows, capability): each kernel, and each way to read a weight."""
    shape = {"columns": 2048, "depth": 2048}
    half = MatmulProblem(**shape, activation="bf16", weight="bf16")
    int4 = MatmulProblem(**shape, activation="bf16", weight="int4", group=32, scale="f16")
    int8 = MatmulProblem(**shape, activation="f16", weight="int8", group=128, asymmetric=True)
    wide = MatmulProblem(**shape, activation="f32", weight="f32")
    odd = MatmulProblem(columns=50, depth=51, activation="bf16", weight="int8")
    for name, problem, rows, capability in (
        ("bf16", half, 1, 90), ("bf16", half, 8, 80), ("bf16", half, 512, 90), ("f32", wide, 512, 80),
        ("int4", int4, 1, 90), ("int4", int4, 8, 90), ("int4", int4, 512, 90), ("int4", int4, 1, 80),
        ("int8", int8, 1, 90), ("int8", int8, 512, 80), ("odd", odd, 1, 90), ("odd", odd, 33, 80),
    ):  # fmt: skip
        yield name, problem, template.choose(problem, rows), rows, capability


def every() -> Iterator[tuple[str, MatmulProblem, Config, int, int]]:
    for activation in ("bf16", "f32"):
        for weight, group in ((activation, None), ("int8", None), ("int8", 64), ("int4", 32), ("int4", 128)):
            for rows in (1, 8, 64, 512):
                problem = MatmulProblem(columns=4096, depth=4096, activation=activation, weight=weight, group=group)
                for config in template.candidates(problem, rows):
                    for capability in (80, 90):
                        name = " ".join(f"{k}={v}" for k, v in config.constants.items())
                        yield (
                            f"{activation} x {weight} {group} {name} {config.num_warps}",
                            problem,
                            config,
                            rows,
                            capability,
                        )


def main() -> None:
    found = {}
    for name, problem, config, rows, capability in every() if "--all" in sys.argv else few():
        key = f"{name} {config.kind} {rows} sm_{capability}"
        found[key] = compiled(problem, config, rows, capability)
        if "--all" in sys.argv:
            print(key, found[key], flush=True)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
