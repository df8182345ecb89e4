"""Perplexity of the demo model after weight quantization, method by method, and what the methods cost in time.

    python benchmarks/quantization_accuracy.py            # 64 windows held out; rewrites docs/accuracy.md
    python benchmarks/quantization_accuracy.py --windows 1000000          # all held-out text, an hour
    python benchmarks/quantization_accuracy.py --method RTN --method AWQ  # renews these rows only
    python benchmarks/quantization_accuracy.py --quick    # a few windows, two formats; writes nothing

All methods get the same format, the same calibration windows (from the training files) and the same held-out files.
`recovered` is the share of what rounding to nearest loses over full precision that a method takes back.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

import irc
from irc.core.calibration import CALIBRATION_KEY
from irc.core.contract import Pass
from irc.core.program import Program
from irc.demo.corpus import read_documents
from irc.demo.evaluation import END_OF_TEXT, held_out_windows
from irc.demo.tinypy import load_model, load_tokenizer
from irc.passes import (
    QuantizeClipped,
    QuantizeGptq,
    QuantizeWeights,
    RotateResidual,
    ScaleSalientChannels,
    SmoothActivations,
)
from irc.passes.quantize._scale_groups import ScaleGroup, find_scale_groups
from irc.view.sections import write_section

PAGE = Path(__file__).parent.parent / "docs" / "accuracy.md"
LENGTH = 512
METHODS: dict[str, Callable[..., list[Pass]]] = {
    "RTN": lambda **f: [QuantizeWeights(**f)],
    "AWQ": lambda **f: [ScaleSalientChannels(**f), QuantizeClipped(**f)],
    "GPTQ": lambda **f: [QuantizeGptq(**f)],
    "GPTQ, negative scales": lambda **f: [QuantizeGptq(**f, negative_scales=True)],
    "rotation + RTN": lambda **f: [RotateResidual(), QuantizeWeights(**f)],
    "rotation + GPTQ": lambda **f: [RotateResidual(), QuantizeGptq(**f)],
}
FORMATS = {"4 bits, group 32": (4, 32), "4 bits, per channel": (4, None), "3 bits, group 32": (3, 32),
           "3 bits, per channel": (3, None), "2 bits, group 32": (2, 32)}  # fmt: skip
OUTLIER_METHODS = {
    "RTN": METHODS["RTN"],
    "SmoothQuant + RTN": lambda **f: [SmoothActivations(), QuantizeWeights(**f)],
    "AWQ": METHODS["AWQ"],
    "rotation + RTN": METHODS["rotation + RTN"],
    "GPTQ": METHODS["GPTQ"],
}


def perplexity(program: Program, windows: Tensor) -> float:
    """exp of the mean negative log-likelihood over the windows, each on its own."""
    total = 0.0
    for part in windows.split(8):
        logits = program.run(part)[0][:, :-1].float()
        total += F.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten(), reduction="sum").item()
    return math.exp(total / (windows.shape[0] * (windows.shape[1] - 1)))


def with_outliers(program: Program, factor: float = 40.0) -> Program:
    """The same function with channels that stand out: norms scaled up in four channels, their readers down."""
    changed = {}
    for group in find_scale_groups(program):
        if isinstance(group, ScaleGroup) and "rms_norm" in str(group.value.target):
            spread = torch.ones(group.num_channels)
            spread[:: group.num_channels // 4] = factor
            for node in (group.value, *group.consumers):
                weight = program.weight(node.args[1])
                changed[str(node.args[1].target)] = (
                    weight * spread if node is group.value else weight / spread
                ).detach()
    return program.copy(replace_weights=changed)


def measure(
    program: Program, passes: Sequence[Pass], data: irc.CalibrationData, held_out: Tensor
) -> tuple[float, float]:
    """Perplexity and seconds in passes."""
    ctx = irc.PassContext(options={CALIBRATION_KEY: data})
    started = time.perf_counter()
    result = irc.PassManager(list(passes), verify="off", ctx=ctx).run(program)
    seconds = time.perf_counter() - started
    return perplexity(result.program, held_out), seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="8 held-out windows, 8 to calibrate, 4 bits only")
    parser.add_argument("--windows", type=int, default=64, help="held-out windows, taken evenly over the files")
    names = list(dict.fromkeys([*METHODS, *OUTLIER_METHODS]))
    parser.add_argument("--method", choices=names, action="append", help="only this one; may be given several times")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    args = parser.parse_args()
    tokenizer = load_tokenizer()
    num_held_out, num_calibration = (8, 8) if args.quick else (args.windows, 64)
    held_out = held_out_windows(tokenizer, length=LENGTH, count=num_held_out)
    data = irc.CalibrationData.from_text(
        (text + END_OF_TEXT for text in read_documents("train")), tokenizer=tokenizer, length=LENGTH,
        count=num_calibration, description="training files",
    )  # fmt: skip
    program = irc.capture(load_model(), (held_out[:2, :16].clone(),), dynamic=({0: "B", 1: "S"},))
    formats = dict(list(FORMATS.items())[:2]) if args.quick else FORMATS
    outliers = with_outliers(program)
    jobs = [("", label, name, program, METHODS[name]) for label in formats for name in METHODS]
    jobs += [("outliers", "4 bits, group 32", name, outliers, make) for name, make in OUTLIER_METHODS.items()]
    jobs = [job for job in jobs if args.method is None or job[2] in args.method]

    full = perplexity(program, held_out)
    found = {} if args.method is None else rows_of_page(PAGE.read_text(encoding="utf-8"))
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("measuring", total=len(jobs))
        for kind, label, name, start, make in jobs:
            bits, group_size = FORMATS[label]
            progress.update(task, description=f"{label}: {name}")
            value, seconds = measure(start, make(bits=bits, group_size=group_size), data, held_out)
            found.setdefault(f"{label}, outliers injected" if kind else label, {})[name] = {
                "perplexity": value, "seconds": seconds,
            }  # fmt: skip
            progress.advance(task)
    for rows in found.values():
        lost = rows["RTN"]["perplexity"] - full
        for row in rows.values():
            row["recovered"] = 1 - (row["perplexity"] - full) / lost

    table = Table("format", "method", "perplexity", "recovered", "s", title=f"full precision: {full:.4f}")
    for label, rows in found.items():
        for name, row in rows.items():
            seconds = f"{row['seconds']:.0f}" if "seconds" in row else "–"
            table.add_row(label, name, f"{row['perplexity']:.4f}", f"{row['recovered']:.0%}", seconds)
        table.add_section()
    Console().print(table)
    if not args.quick:
        write_section(PAGE, "weights", section(full, found, len(held_out), data.num_samples))
        print(f"→ {PAGE}", file=sys.stderr)
    if args.json:
        print(json.dumps({"full_precision": full, "formats": found}))


def rows_of_page(text: str) -> dict[str, dict[str, dict[str, float]]]:
    """What an earlier run wrote into the section, in its order."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    part = text.partition("<!-- weights -->")[2].partition("<!-- /weights -->")[0]
    for label, name, value in re.findall(
        r"^\| (.+?) \| (.+?) \| ([\d.]+) \| -?[\d.]+ \| -?\d+% \|$", part, re.MULTILINE
    ):
        found.setdefault(label, {})[name] = {"perplexity": float(value)}
    return found


def section(full: float, found: dict[str, dict[str, dict[str, float]]], num_held_out: int, num_calibration: int) -> str:
    """The part of docs/accuracy.md that this script is about."""
    lines = [
        "## Weights: method by method\n",
        f"The demo model, {num_held_out} held-out windows of {LENGTH} tokens; {num_calibration} calibration windows"
        " from its training files, the same for all methods. Embedding and head stay in full precision. Made by"
        " `python benchmarks/quantization_accuracy.py`.\n",
        f"Full precision: perplexity {full:.4f}. *Recovered* is the share of what rounding to nearest (RTN) loses"
        " that a method takes back.\n",
        "Outliers are injected without changing the function: four channels of each norm times 40, the columns of the"
        " layers behind it divided by that.\n",
        "| format | method | perplexity | loss | recovered |",
        "| --- | --- | --- | --- | --- |",
    ]
    for label, rows in found.items():
        lines += [
            f"| {label} | {name} | {row['perplexity']:.4f} | {row['perplexity'] - full:.4f} | {row['recovered']:.0%} |"
            for name, row in rows.items()
        ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
