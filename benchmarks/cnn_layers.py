"""Where a CNN on target cpu spends its time: each kind of layer as the model runs it, and the rest.

    python benchmarks/cnn_layers.py --format int8               # ResNet-50, threads 1, batch 1
    python benchmarks/cnn_layers.py --model mobilenet
    python benchmarks/cnn_layers.py --format f32 --batch 8 --threads 2
    python benchmarks/cnn_layers.py --quick                     # a small ResNet, one run

Kernels are timed inside the step (`options={"profile": True}`), at the price of a barrier behind each; layers of one
shape are one row: the least of their mean times over the rounds. GOP/s counts a product and a sum as two, as if no
filtering saved any. "lost" is the time beyond what the best row's pace would take.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
import torch.fx as fx

sys.path.insert(0, str(Path(__file__).resolve().parent))

from cpu_models import INT8, MODELS, make_input, make_model
from rich.console import Console
from rich.table import Table

import irc
from irc.compiled import Compiled
from irc.core.target import op_name


def compiled_model(name: str, kind: str, batch: int, threads: int, quick: bool) -> tuple[Compiled, torch.Tensor]:
    """A model that measures its kernels, and its input."""
    model, x = make_model(name, quick), make_input(name, batch, quick)
    if kind == "bf16":
        model, x = copy.deepcopy(model).to(torch.bfloat16), x.bfloat16()
    compiled = irc.compile(
        model, f"fold-conv-batch-norm,{INT8}" if kind == "int8" else None, target="cpu", example_inputs=(x,),
        verify="off", options={"threads": threads, "profile": True},
        **({"calibration": [(x,)]} if kind == "int8" else {}),
    )  # fmt: skip
    return compiled, x


def layer_of(node: fx.Node) -> tuple[str, float]:
    """A convolution in words, and the operations of one image and run."""
    weight, out = node.args[1], node.meta["val"]
    assert isinstance(weight, fx.Node)
    channels, inputs, height, width = (int(size) for size in weight.meta["val"].shape)
    summed = any(op_name(user).startswith("aten.add") for user in node.users)
    kind = f"{channels} each by itself" if inputs == 1 else f"{inputs} → {channels}"
    name = f"{height} × {width}, {kind} at {int(out.shape[2])}{', with a sum' if summed else ''}"
    return name, 2.0 * inputs * height * width * channels * int(out.shape[2]) * int(out.shape[3])


def measure(compiled: Compiled, x: torch.Tensor, rounds: int) -> list[dict[str, Any]]:
    """A row for each kind of convolution, and one for each other kernel."""
    nodes = {node.name: node for node in compiled.program.graph_module.graph.nodes}
    least: dict[str, float] = {}
    for _ in range(rounds):
        sums: dict[str, list[float]] = defaultdict(list)
        for part, spent in compiled.artifact.kernel_times(x, runs=3):
            sums[part.split(":", 1)[0]].append(spent)
        for name, times in sums.items():
            least[name] = min(least.get(name, float("inf")), sum(times) / len(times))
        counts = {name: len(times) for name, times in sums.items()}
    rows = []
    for name, spent in least.items():
        # A kernel of layers is named after the first: k20_conv2d_conv2d_81.
        node = next((nodes[end] for end in tails(name) if end in nodes and "conv2d" in end), None)
        layer, operations = layer_of(node) if node is not None else (name, 0.0)
        gops = operations * x.shape[0] / spent / 1e6 if operations else None
        rows.append({"layer": layer, "times": counts[name], "ms": spent, "gops": gops})
    return rows


def tails(name: str) -> list[str]:
    """All ends of a name behind an underscore, the longest first."""
    parts = name.split("_")
    return ["_".join(parts[i:]) for i in range(1, len(parts))]


def show(rows: list[dict[str, Any]], title: str) -> None:
    best = max(row["gops"] or 0.0 for row in rows)
    table = Table("layer", "times", "ms each", "GOP/s", "lost, ms each", "ms", title=title)
    for row in rows:
        lost = "" if row["gops"] is None else f"{row['ms'] * (1 - row['gops'] / best):.2f}"
        table.add_row(
            row["layer"], str(row["times"]), f"{row['ms']:.3f}", "" if row["gops"] is None else f"{row['gops']:.0f}",
            lost, f"{row['ms'] * row['times']:.2f}",
        )  # fmt: skip
    table.add_row("all", "", "", "", "", f"{sum(row['ms'] * row['times'] for row in rows):.2f}")
    Console(width=110).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=[name for name in MODELS if name != "bert"], default="resnet50")
    parser.add_argument("--format", choices=("f32", "bf16", "int8"), default="int8")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--quick", action="store_true", help="a small ResNet, one round")
    parser.add_argument("--json", action="store_true", help="last line: one JSON object")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    compiled, x = compiled_model(args.model, args.format, args.batch, args.threads, args.quick)
    rows = measure(compiled, x, 1 if args.quick else args.rounds)
    show(rows, f"{args.model} {args.format}, batch {args.batch}, {args.threads} threads")
    if args.json:
        print(
            json.dumps(
                {"model": args.model, "format": args.format, "batch": args.batch, "threads": args.threads, "rows": rows}
            )
        )


if __name__ == "__main__":
    main()
