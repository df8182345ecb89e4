"""The matrix products of target triton on a GPU, against PyTorch's in bf16 (cuBLAS), at layer shapes of the 1.1B Llama.

    python benchmarks/triton_matmul.py --quick          # a minute on an H100
    python benchmarks/triton_matmul.py --sweep          # further configurations: is `choose` right? minutes
    python benchmarks/triton_matmul.py --quick --json   # one JSON object as the last line

Weights in bf16, in int8 with a scale a row, and in int4 with an f16 scale for 32. Times are medians over replays of a
CUDA graph that multiplies by copies of the weight in turn, together more than the L2 cache holds, as a model does; so
they contain no launches by Python. One and 8 rows are given as a share of what a copy on the device moves in a second,
counting the weight and its scales once, 512 rows in TFLOP/s. Every result is compared with the product in f32.

Only the kernels and their templates are imported, so it runs where the rest of irc cannot: torch 2.6, triton 3.6.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SHAPES = ((2048, 2048), (256, 2048), (5632, 2048), (2048, 5632), (32000, 2048))  # (N, K)
ROWS = (1, 8, 512)
WEIGHTS = ("bf16", "int8", "int4")
_BEYOND_L2 = 160 << 20
_REPLAYS = 9


def import_parts() -> tuple[Any, Any]:
    """(template, module) of target triton without the packages around them, which need all that irc needs."""
    root = Path(__file__).resolve().parent.parent
    folders = {
        "irc": "irc",
        "irc.core": "irc/core",
        "irc.lowering": "lowering",
        "irc.lowering.triton": "lowering/triton",
    }
    for name, folder in folders.items():
        if name not in sys.modules:
            package = types.ModuleType(name)
            package.__path__ = [str(root / folder)]
            sys.modules[name] = package
    from irc.lowering.triton import module
    from irc.lowering.triton.templates import matmul

    return matmul, module


class Ours:
    """The kernels for one kind of weight and one shape."""

    def __init__(self, template: Any, module: Any, weight: str, columns: int, depth: int) -> None:
        self.template = template
        self.problem = template.MatmulProblem(
            columns=columns, depth=depth, activation="bf16", weight=weight,
            group=32 if weight == "int4" else None, scale="f16" if weight == "int4" else "f32",
        )  # fmt: skip
        printed = module.import_module(template.printed_module(self.problem))
        self.kernels = {kind: getattr(printed, kind) for kind in template.KINDS}

    def operands(self) -> tuple[Tensor, ...]:
        """A weight with random numbers, about 1 / √K each, and its scales."""
        n, k = self.problem.columns, self.problem.depth
        if self.problem.bits is None:
            return ((torch.randn(n, k, device="cuda") * k**-0.5).bfloat16(),)
        if self.problem.bits == 8:
            scale = torch.rand(n, 1, device="cuda") * k**-0.5 / 64
            return torch.randint(-127, 128, (n, k), device="cuda", dtype=torch.int8), scale
        scale = (torch.rand(n, k // 32, device="cuda") * k**-0.5 / 4).half()
        return torch.randint(0, 256, (n, k // 2), device="cuda", dtype=torch.uint8), scale

    def dequantized(self, operands: tuple[Tensor, ...]) -> Tensor:
        """f32[N, K], with numbers rounded to bf16, as the program has them."""
        if self.problem.bits is None:
            return operands[0].float()
        integers, scale = operands
        if self.problem.bits == 4:
            integers = torch.stack([(integers & 15), integers >> 4], -1).flatten(1).int() - 8
        wide = scale.float().repeat_interleave(self.problem.depth // scale.shape[1], 1)
        return (integers.float() * wide).bfloat16().float()

    def call(self, config: Any, x: Tensor, operands: tuple[Tensor, ...], out: Tensor) -> None:
        self.template.launch(self.problem, config, self.kernels, len(x), (out, x, *operands, len(x)))


def graph_time(calls: list[Callable[[], Any]]) -> float:
    """Median seconds of a call, over replays of a graph of all of them."""
    calls[0]()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    times = []
    for _ in range(_REPLAYS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / len(calls))
    return statistics.median(times)


def copy_bandwidth() -> float:
    """Bytes a second, read and written, of a copy on the device."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / graph_time([lambda: target.copy_(source)] * 4)


def copies_of(ours: Ours) -> list[tuple[Tensor, ...]]:
    first = ours.operands()
    size = sum(x.numel() * x.element_size() for x in first)
    count = min(max(-(-_BEYOND_L2 // size), 2), 400)
    return [first, *(tuple(x.clone() for x in first) for _ in range(count - 1))]


def measure(sweep: bool, quick: bool) -> Iterator[dict[str, Any]]:
    template, module = import_parts()
    torch.manual_seed(0)
    multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count
    bandwidth = copy_bandwidth()
    yield {"copy_gb_s": round(bandwidth / 1e9), "gpu": torch.cuda.get_device_name(), "torch": torch.__version__}
    for columns, depth in (SHAPES[0], SHAPES[2]) if sweep and quick else SHAPES:
        for weight in WEIGHTS:
            ours = Ours(template, module, weight, columns, depth)
            sets = copies_of(ours)
            for rows in ROWS:
                configs = [template.choose(ours.problem, rows, multiprocessors)]
                if sweep:
                    configs = template.candidates(ours.problem, rows, multiprocessors)
                for found in measure_rows(ours, sets, rows, configs):
                    yield found | figures(found, ours.problem, sets[0], bandwidth)


def measure_rows(ours: Ours, sets: list[tuple[Tensor, ...]], rows: int, configs: list[Any]) -> Iterator[dict[str, Any]]:
    """Seconds and error of each configuration, and first of PyTorch for a weight in bf16."""
    # Many rows take longer, and reading the weight hardly counts.
    used = sets if rows <= 16 else sets[:8]
    x = torch.randn(rows, ours.problem.depth, device="cuda", dtype=torch.bfloat16)
    out = torch.empty(rows, ours.problem.columns, device="cuda", dtype=torch.bfloat16)
    if ours.problem.bits is None:
        seconds = graph_time([partial(torch.mm, x, operands[0].T, out=out) for operands in used])
        yield {"M": rows, "what": "torch", "seconds": seconds}
    wanted = x.float() @ ours.dequantized(sets[0]).T
    for config in configs:
        found = {"M": rows, "what": ours.problem.weight, "config": asdict(config)}
        try:
            out.fill_(float("nan"))
            found["seconds"] = graph_time([partial(ours.call, config, x, operands, out) for operands in used])
            found["error"] = round(float((out.float() - wanted).norm() / wanted.norm()), 5)
        except Exception as failure:  # of a candidate: too much shared memory, say
            found["failed"] = f"{type(failure).__name__}: {failure}"[:200]
        yield found


def figures(found: dict[str, Any], problem: Any, operands: tuple[Tensor, ...], bandwidth: float) -> dict[str, Any]:
    shape = {"N": problem.columns, "K": problem.depth}
    if "seconds" not in found:
        return shape
    seconds = found["seconds"]
    size = sum(x.numel() * x.element_size() for x in operands)
    return {
        **shape,
        "of_copy": round(size / seconds / bandwidth, 3),
        "tflops": round(2e-12 * found["M"] * problem.columns * problem.depth / seconds, 1),
    }


def line_of(found: dict[str, Any]) -> str:
    if "copy_gb_s" in found:
        return f"{found['gpu']}, torch {found['torch']}: a copy moves {found['copy_gb_s']} GB/s\n"
    head = f"{found['N']:>6} x {found['K']:<5} M={found['M']:<4} {found['what']:<6}"
    if "failed" in found:
        return f"{head} failed: {found['failed']}"
    speed = f"{found['tflops']:7.1f} TFLOP/s" if found["M"] > 16 else f"{found['of_copy']:7.1%} of a copy"
    config = found.get("config")
    tail = f"  error {found['error']:.1e}  {' '.join(str(v) for v in config.values())}" if config else ""
    return f"{head} {found['seconds'] * 1e6:9.2f} µs {speed}{tail}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="with --sweep: two shapes only")
    parser.add_argument("--sweep", action="store_true", help="all candidates, not only the chosen configuration")
    parser.add_argument("--json", action="store_true", help="the results as JSON in the last line")
    chosen = parser.parse_args()
    if not torch.cuda.is_available():
        print("no GPU: nothing is measured")
        if chosen.json:
            print(json.dumps({"error": "no GPU", "results": []}))
        return
    results = []
    for found in measure(chosen.sweep, chosen.quick):
        results.append(found)
        print(line_of(found), flush=True)
    # bf16 results are off by 0.2 %. A candidate that does not fit the device only counts in a sweep's list.
    wrong = [r for r in results if not r.get("error", 0.0) < 0.01 or ("failed" in r and not chosen.sweep)]
    if chosen.json:
        print(json.dumps({"results": results, "wrong": wrong}))
    if wrong:
        sys.exit(f"{len(wrong)} results are wrong")


if __name__ == "__main__":
    main()
