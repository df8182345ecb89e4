"""Target triton against PyTorch at shapes of real Llamas, random weights, on a GPU: decode and prefill, one sequence.

    python benchmarks/triton_decode.py --shape 1.1B --format bf16 q4_0
    python benchmarks/triton_decode.py --shape 135M --format bf16 --without compile    # torch.compile takes minutes

Both run in turns: target triton as it serves (steps replayed as CUDA graphs), and a Llama in plain PyTorch in bf16
(workers/torch_llama.py), as it is and by torch.compile(mode="reduce-overhead"), which replays CUDA graphs as well.
Medians and the spread of ratios are printed, and the read bandwidth: bytes of weights and cache for a token over its
time, as a part of what a copy on the device moves in the same minute.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent))

import llama_cpp
from cpu_decode import PASSES, random_llama
from workers.torch_llama import TorchLlama

import irc

PROMPT, CONTEXT = 512, 1024


class Ours:
    """A compiled model with the cache of one sequence."""

    def __init__(self, shape: str, kind: str, device: torch.device) -> None:
        model = random_llama(shape, torch.bfloat16)
        passes = [PASSES[kind], "merge-qkv", "merge-gate-up", f"insert-kv-cache{{max-length={CONTEXT}}}"]
        started = time.perf_counter()
        self.artifact: Any = irc.compile(
            model, ",".join(p for p in passes if p), target="triton", verify="off",
            example_inputs=torch.arange(8).unsqueeze(0), dynamic=({0: "B", 1: "S"},),
        ).artifact  # fmt: skip
        self.compile_s = time.perf_counter() - started
        sizes = llama_cpp.SHAPES[shape]
        self.token_bytes = self.artifact.weight_bytes - sizes.vocabulary * sizes.width * 2
        self.position_bytes = 2 * sizes.layers * sizes.kv_heads * (sizes.width // sizes.heads) * 2
        self.caches, self.device = self.artifact.new_caches(1), device

    def step(self, tokens: Tensor, start: int) -> Tensor:
        positions = torch.arange(start, start + tokens.shape[1], device=self.device).unsqueeze(0)
        wanted = torch.tensor([[tokens.shape[1] - 1]], device=self.device)
        logits: Tensor = self.artifact.step(self.caches, tokens, positions, wanted)
        return logits


class Theirs:
    """PyTorch with a static cache; compiled, a graph for a token and one for the prompt."""

    def __init__(self, shape: str, device: torch.device, *, compiled: bool) -> None:
        self.model = TorchLlama(random_llama(shape, torch.bfloat16), CONTEXT, device)
        self.device = device
        self.call = (
            torch.compile(self.model, mode="reduce-overhead", fullgraph=True, dynamic=False) if compiled else self.model
        )

    def step(self, tokens: Tensor, start: int) -> Tensor:
        positions = torch.arange(start, start + tokens.shape[1], device=self.device)
        logits: Tensor = self.call(tokens, positions)
        return logits.clone()


def seconds(run: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    started = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - started


def decode(model: Ours | Theirs, count: int) -> float:
    """Seconds a token, at positions from PROMPT on."""
    token = torch.full((1, 1), 7, device=model.device)

    def steps() -> None:
        for i in range(count):
            model.step(token, PROMPT + i)

    return seconds(steps) / count


def prefill(model: Ours | Theirs, tokens: Tensor) -> float:
    return seconds(lambda: model.step(tokens, 0))


def copy_bandwidth(device: torch.device) -> float:
    """Bytes read and written a second by a copy of 1 GB, medians of ten."""
    source = torch.randn(1 << 28, device=device)
    target = torch.empty_like(source)
    times = [seconds(lambda: target.copy_(source)) for _ in range(10)]
    return 2 * source.numel() * 4 / statistics.median(times)


def compare(shape: str, kind: str, args: argparse.Namespace, peers: dict[str, Theirs]) -> dict[str, Any]:
    device = torch.device("cuda")
    ours = Ours(shape, kind, device)
    print(f"{shape} {kind}: compiled in {ours.compile_s:.1f} s; {'; '.join(ours.artifact.notes)}", flush=True)
    tokens = torch.arange(PROMPT, device=device).unsqueeze(0) % 1000
    everyone: dict[str, Ours | Theirs] = {"ours": ours, **peers}
    logits = {name: model.step(tokens, 0).float().cpu() for name, model in everyone.items()}
    for model in everyone.values():
        prefill(model, tokens)
        decode(model, 3)
    found: dict[str, dict[str, list[float]]] = {n: {"decode": [], "prefill": []} for n in everyone}
    copies = []
    for _ in range(args.rounds):
        copies.append(copy_bandwidth(device))
        for name, model in everyone.items():
            found[name]["prefill"].append(prefill(model, tokens))
            found[name]["decode"].append(decode(model, args.tokens))
    return report(shape, kind, ours, found, statistics.median(copies), logits)


def report(shape: str, kind: str, ours: Ours, found: dict[str, dict[str, list[float]]], copied: float,
           logits: dict[str, Tensor]) -> dict[str, Any]:  # fmt: skip
    result: dict[str, Any] = {"shape": shape, "format": kind, "device": torch.cuda.get_device_name(),
                              "compile_s": ours.compile_s, "copy_GBps": copied / 1e9}  # fmt: skip
    moved = ours.token_bytes + PROMPT * ours.position_bytes
    for what, per in (("decode", 1), ("prefill", PROMPT)):
        own = found["ours"][what]
        result[f"{what}_tok_s"] = per / statistics.median(own)
        line = f"  {what:8} {result[f'{what}_tok_s']:9.1f} tok/s"
        for name, times in found.items():
            if name != "ours":
                ratios = sorted(a / b for a, b in zip(times[what], own, strict=True))
                result[f"{what}_over_{name}"] = [statistics.median(ratios), ratios[0], ratios[-1]]
                line += f"  {name} {per / statistics.median(times[what]):9.1f}, ratio {statistics.median(ratios):.2f}"
        print(line)
    result["of_copy"] = moved / statistics.median(found["ours"]["decode"]) / copied
    print(f"  decoding reads {moved / 1e6:.0f} MB a token: {result['of_copy']:.2f} of a copy's {copied / 1e9:.0f} GB/s")
    for name, theirs in logits.items():
        if name != "ours":
            error = ((logits["ours"] - theirs).norm() / theirs.norm()).item()
            result[f"error_to_{name}"] = error
            print(f"  logits differ from {name} in bf16 by {error:.1e}" + (" (quantized)" if kind != "bf16" else ""))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="1.1B", choices=list(llama_cpp.SHAPES))
    parser.add_argument("--format", nargs="+", default=["bf16", "q4_0"], choices=list(PASSES))
    parser.add_argument("--without", nargs="*", default=[], choices=["eager", "compile"], help="peers to leave out")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--quick", action="store_true", help="135M, two rounds, without torch.compile")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    args = parser.parse_args()
    if args.quick:
        args.shape, args.rounds, args.tokens, args.without = "135M", 2, 16, ["compile"]
    results: list[dict[str, Any]] = []
    if not torch.cuda.is_available():
        print("no GPU here: nothing was measured")
    else:
        device = torch.device("cuda")
        with torch.no_grad():  # not inference mode: capture looks at versions of weights
            peers = {name: Theirs(args.shape, device, compiled=name == "compile")
                     for name in ("eager", "compile") if name not in args.without}  # fmt: skip
            results = [compare(args.shape, kind, args, peers) for kind in args.format]
    if args.json:
        print(json.dumps({"benchmark": "triton_decode", "gpu": torch.cuda.is_available(), "results": results}))


if __name__ == "__main__":
    main()
