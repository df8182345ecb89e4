"""Compiles attention kernels for GPUs that need not be here, and prints what their code consists of, as JSON.

Run by test_attention_library.py in a process of its own: one that interprets kernels cannot compile them.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from irc.lowering.triton.library import attention as library
from irc.lowering.triton.templates import attention as template
from irc.lowering.triton.templates.attention import AttentionProblem

TYPES = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
    torch.bool: "*i1",
}
DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16, "bool": torch.bool}
MULTIPROCESSORS = {80: 108, 90: 132}


class Recorder:
    """Takes a kernel's place in the library, and keeps what it was launched with."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.launches: list[tuple[dict[str, Any], dict[str, int]]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Recorder:
        return self

    def __call__(self, *args: Any, num_warps: int = 4, num_stages: int = 3, **constants: Any) -> None:
        arguments = dict(zip(self.kernel.arg_names, args, strict=False)) | constants
        self.launches.append((arguments, {"num_warps": num_warps, "num_stages": num_stages}))


def compiled(kernel: Any, arguments: dict[str, Any], options: dict[str, int], capability: int) -> dict[str, int]:
    """What the code of a kernel consists of, specialised as a launch with these arguments specialises it."""
    constant = {p.name for p in kernel.params if p.is_constexpr}
    general = {p.name for p in kernel.params if p.do_not_specialize}
    kinds: dict[str, Any] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}

    def kind(value: Any, path: tuple[int, ...]) -> Any:
        if isinstance(value, tuple):
            return tuple(kind(x, (*path, i)) for i, x in enumerate(value))
        if isinstance(value, torch.Tensor) or value % 16 == 0:
            attributes[path] = [["tt.divisibility", 16]]
        elif value == 1:
            constants[path] = value
            return "constexpr"
        return TYPES[value.dtype] if isinstance(value, torch.Tensor) else "i32"

    for place, name in enumerate(kernel.arg_names):
        if name in constant or arguments[name] is None:
            kinds[name], constants[(place,)] = "constexpr", arguments[name]
        else:
            kinds[name] = "i32" if name in general else kind(arguments[name], (place,))
    made = triton.compile(
        ASTSource(kernel, kinds, constants, attributes), target=GPUTarget("cuda", capability, 32), options=options
    )
    ptx = made.asm["ptx"]
    counts = {name: len(re.findall(name.replace(".", r"\."), ptx)) for name in ("wgmma.mma_async", "mma.sync")}
    copies = len(re.findall(r"cp\.async\.c[ga]\S* .*, 0x10", ptx))
    return {**counts, "cp.async, 16 bytes": copies, "shared": made.metadata.shared, **usage(made.asm["cubin"])}


def usage(cubin: bytes) -> dict[str, int]:
    """Registers and bytes of stack of a thread, and how many products of Hopper there are, and waits for them."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text, code = (
            subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout
            for option in ("-res-usage", "-sass")
        )
    used = {name.lower(): int(number) for name, number in re.findall(r"(REG|STACK):(\d+)", text)}
    return {**used, "products": code.count("HGMMA."), "waits": code.count("WARPGROUP.DEPBAR")}


def launches(
    problem: AttentionProblem, capability: int, sizes: tuple[int, int, int, int, int], page: int | None = None
) -> dict[str, tuple[Any, dict[str, Any], dict[str, int]]]:
    """Kernels with their arguments: batch, heads, kv_heads, queries, length; for pages batch counts the sequences."""
    batch, heads, kv_heads, queries, length = sizes
    config = template.choose(problem, *sizes, MULTIPROCESSORS[capability], capability=capability, page_size=page)
    memory = {name: torch.empty(1, dtype=kind, device="meta") for name, kind in
              {**DTYPES, "i64": torch.int64}.items()}  # fmt: skip
    recorders = {name: Recorder(getattr(library, name)) for name in ("attend", "combine")}
    for name, recorder in recorders.items():
        setattr(library, name, recorder)
    try:
        cache = memory[problem.cache]
        row = (heads * problem.width * queries, problem.width, heads * problem.width)
        rows = (kv_heads * problem.width * length, problem.width * length, problem.width)
        indices = memory["i64"] if page else None
        template.launch(
            problem, config, cache, memory[problem.query], cache, cache, batch=1 if page else batch, heads=heads,
            kv_heads=kv_heads, queries=queries, length=length, out_strides=row, query_strides=row, key_strides=rows,
            value_strides=rows, bias=memory[problem.bias] if problem.bias else None, bias_keys=length, tables=indices,
            table_stride=length // (page or 1), sequence_ids=indices, page_size=page, positions=memory["i64"],
            scratch=memory["f32"], sinks=memory["f32"] if page else None,
        )  # fmt: skip
    finally:
        for name, recorder in recorders.items():
            setattr(library, name, recorder.kernel)
    return {name: (r.kernel, *r.launches[0]) for name, r in recorders.items() if r.launches}


def main() -> None:
    half = AttentionProblem(width=128, value_width=128, query="bf16", cache="bf16", mask="causal", scale=0.1)
    narrow = replace(half, width=64, value_width=64)
    prompt, token, pages = (1, 32, 4, 2048, 2048), (1, 8, 1, 1, 4096), (8, 32, 4, 8, 4096)
    cases: list[tuple[str, int, AttentionProblem, tuple[int, int, int, int, int], int | None]] = [
        ("prefill 64", 80, narrow, prompt, None),
        ("prefill 128", 90, half, prompt, None),
        ("prefill 64, bias", 90, replace(narrow, bias="bool", mask="full"), prompt, None),
        ("decode 128", 90, half, token, None),
        ("pages 64, queries in f32", 80, replace(narrow, query="f32"), pages, 16),
    ]
    found = {}
    for name, capability, problem, sizes, page in cases:
        for kernel, launch in launches(problem, capability, sizes, page).items():
            if kernel == "attend" or name == "decode 128":
                found[f"{name} {kernel} sm_{capability}"] = compiled(*launch, capability)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
