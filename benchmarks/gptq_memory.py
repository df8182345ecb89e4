"""Peak memory and time of GPTQ on a Llama of 1.1 billion parameters, whose weights come from a program folder.

    python benchmarks/gptq_memory.py              # 22 layers, 4096 calibration tokens: about half an hour
    python benchmarks/gptq_memory.py --quick      # 2 layers

The aim: peak memory below 1.3 times the bytes of the bf16 weights, which are read from the mapped file layer by
layer. Peak memory is the high-water mark of a process that does nothing else, less what Python and PyTorch need
themselves. Random weights, so accuracy is not looked at.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import tempfile
import time
from pathlib import Path

import torch
from compile_time import build, peak_bytes
from rich.console import Console
from rich.progress import Progress

import irc
from irc.core.calibration import CALIBRATION_KEY
from irc.passes import QuantizeGptq

NUM_WINDOWS, LENGTH = 16, 256


def write_program(folder: Path, num_layers: int) -> None:
    """Capture the model and save it, in a process of its own."""
    irc.capture(build(num_layers)).save(folder)


def quantize(folder: Path, results: multiprocessing.Queue[dict[str, object]]) -> None:
    """Quantize the program in a folder and say what that took."""
    torch.manual_seed(0)
    (torch.randn(64, 64) @ torch.randn(64, 64)).sum().item()  # what PyTorch allocates once is not the pass's
    base = peak_bytes()
    program = irc.load(folder)
    weight_bytes = sum(t.numel() * t.element_size() for t in program.weights.values())
    tokens = torch.randint(0, 32000, (NUM_WINDOWS, LENGTH))
    marks: list[float] = []
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("layers", total=None)

        def told(_: str, done: int, total: int) -> None:
            marks.append(time.perf_counter())
            progress.update(task, completed=done, total=total)

        ctx = irc.PassContext(options={CALIBRATION_KEY: irc.CalibrationData.of(tokens, batch_size=1)}, progress=told)
        started = time.perf_counter()
        manager = irc.PassManager([QuantizeGptq(bits=4, group_size=32)], verify="off", ctx=ctx, keep_stages=False)
        result = manager.run(program)
        seconds = time.perf_counter() - started
    times = sorted(b - a for a, b in itertools.pairwise(marks))
    results.put(
        {
            "weight_bytes": weight_bytes,
            "peak_bytes": peak_bytes() - base,
            "peak_of_weights": (peak_bytes() - base) / weight_bytes,
            "seconds": seconds,
            "layers": result.report.rows[-1].matches,
            "median_layer_s": times[len(times) // 2],
            "slowest_layer_s": times[-1],
        }
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="2 layers instead of 22")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    args = parser.parse_args()
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "program"
        results: multiprocessing.Queue[dict[str, object]] = spawn.Queue()
        jobs = (
            spawn.Process(target=write_program, args=(folder, 2 if args.quick else 22)),
            spawn.Process(target=quantize, args=(folder, results)),
        )
        for job in jobs:
            job.start()
            job.join()
            if job.exitcode:
                raise SystemExit(f"a process of the benchmark ended with exit code {job.exitcode}")
        found = results.get()
    Console().print(
        f"{found['layers']} weights, {found['weight_bytes'] / 1e9:.2f} GB: peak {found['peak_bytes'] / 1e9:.2f} GB ="
        f" {found['peak_of_weights']:.2f} × weights; {found['seconds']:.0f} s, a weight {found['median_layer_s']:.1f} s"
        f" (slowest {found['slowest_layer_s']:.1f} s)"
    )
    if args.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
