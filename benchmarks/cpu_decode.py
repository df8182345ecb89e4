"""Target cpu against llama.cpp at the shapes of real Llamas, random weights: decode, prefill, verification.

    python benchmarks/cpu_decode.py --shape 135M --format q4_0
    python benchmarks/cpu_decode.py --shape 1.1B --format q4_0 q8_0 bf16      # needs about 10 GB
    python benchmarks/cpu_decode.py --shape 1.1B-half --format q4_0           # the same layers, half as many

Both sides run in turns on the same threads; medians and the spread (10th to 90th percentile) of the ratios are printed.
llama.cpp is built by `benchmarks/llama_cpp.py` the first time. Activations are int8 a token on both sides for integer
weights. The read bandwidth is measured between the tokens, medians of both are compared. `--no-peer` leaves llama.cpp out.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

import llama_cpp
from bandwidth import Meter

import irc
from irc.core.report import Report
from irc.core.target import Artifact

# llama.cpp's format → pipeline that stores the same number of bits.
PASSES = {
    "q4_0": "quantize-weights{bits=4,group-size=32,scale-dtype=f16}",
    "q8_0": "quantize-weights{bits=8,group-size=32,scale-dtype=f16}",
    "bf16": "",
}
# The types of llama.cpp's cache (f16), and of the model where that is bf16.
CACHES = {"q4_0": "f16", "q8_0": "f16", "bf16": "bf16"}
PROMPT, DRAFT, CONTEXT = 512, 8, 1024


@dataclass
class Built:
    """A compiled model and what it cost."""

    artifact: Artifact
    compile_s: float
    token_bytes: int  # read from memory for one token: all weights but the table of embeddings
    position_bytes: int  # of the cache, for each position before the token
    report: Report


def build(shape: str, kind: str, threads: int, cache: str | None = None) -> Built:
    """A random Llama compiled for the processor, or taken from a cache of compilations."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.initialization import no_init_weights

    sizes = llama_cpp.SHAPES[shape]
    config = LlamaConfig(
        hidden_size=sizes.width, num_hidden_layers=sizes.layers, num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.kv_heads, intermediate_size=sizes.mlp, vocab_size=sizes.vocabulary,
        max_position_embeddings=CONTEXT, tie_word_embeddings=False,
    )  # fmt: skip
    with no_init_weights():
        model = LlamaForCausalLM(config).to(torch.bfloat16 if kind == "bf16" else torch.float32).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.fill_(1.0) if "norm" in name else weight.uniform_(-0.03, 0.03, generator=generator)
    # Quantized before they are merged: then an eighth of the bytes is merged.
    passes = [
        PASSES[kind],
        "merge-qkv",
        "merge-gate-up",
        f"insert-kv-cache{{max-length={CONTEXT},cache-dtype={CACHES[kind]}}}",
    ]
    started = time.perf_counter()
    compiled = irc.compile(
        model, ",".join(p for p in passes if p), target="cpu", verify="off",
        example_inputs=torch.arange(8).unsqueeze(0), dynamic=({0: "B", 1: "S"},),
        options={"threads": threads, "activations": "program" if kind == "bf16" else "int8"}, cache=cache,
    )  # fmt: skip
    spent = time.perf_counter() - started
    artifact = compiled.artifact
    print(f"{shape} {kind}: compiled in {spent:.1f} s; " + "; ".join(artifact.notes), flush=True)
    table = sizes.vocabulary * sizes.width * (2 if kind == "bf16" else 4)
    position = 2 * sizes.layers * sizes.kv_heads * (sizes.width // sizes.heads) * 2
    return Built(artifact, spent, artifact.weight_bytes - table, position, compiled.report)


class Session:
    """Steps of one sequence."""

    def __init__(self, artifact: Artifact) -> None:
        self.artifact, self.caches, self.length = artifact, artifact.new_caches(1), 0

    def step(self, count: int) -> float:
        """Seconds of a step of `count` tokens, logits of all of them if few, else of the last."""
        if self.length + count > CONTEXT:
            self.length = 0
        tokens = torch.randint(0, 1000, (1, count))
        positions = torch.arange(self.length, self.length + count).unsqueeze(0)
        wanted = torch.arange(count).unsqueeze(0) if count <= DRAFT else torch.tensor([[count - 1]])
        started = time.perf_counter()
        self.artifact.step(self.caches, tokens, positions, wanted)
        self.length += count
        return time.perf_counter() - started


def measure(built: Built, shape: str, kind: str, args: argparse.Namespace) -> dict[str, Any]:
    """Rounds in turns with llama.cpp."""
    decode, prefill = Session(built.artifact), Session(built.artifact)
    ours: dict[str, list[float]] = {"decode": [], "prefill": [], "verify": []}
    theirs: dict[str, list[float]] = {"decode": [], "prefill": []}
    bandwidth: list[float] = []
    meter = Meter(args.threads)
    streams = meter.best_streams()
    for _ in range(args.rounds):
        decode.length = 0  # as llama-bench: tokens behind an empty cache
        times, reads = [], []
        for token in range(args.tokens):
            times.append(decode.step(1))
            if token % 4 == 3:  # the machine changes its pace: read between the tokens
                reads.append(meter.once(streams))
        ours["decode"].append(1 / statistics.median(times))
        ours["verify"].append(statistics.median([decode.step(DRAFT) for _ in range(5)]) * ours["decode"][-1])
        prefill.length = 0
        ours["prefill"].append(PROMPT / prefill.step(PROMPT))
        bandwidth.append(statistics.median(reads))
        if not args.no_peer:
            theirs["decode"].append(llama_cpp.run(shape, kind, generate=args.tokens, threads=args.threads))
            theirs["prefill"].append(llama_cpp.run(shape, kind, prompt=PROMPT, threads=args.threads))
    result: dict[str, Any] = {"shape": shape, "format": kind, "threads": args.threads, "compile_s": built.compile_s}
    for what in ("decode", "prefill"):
        result[f"{what}_tokens_s"] = statistics.median(ours[what])
        if theirs[what]:
            result[f"{what}_llama_cpp"] = statistics.median(theirs[what])
            result[f"{what}_ratio"] = spread([a / b for a, b in zip(ours[what], theirs[what], strict=True)])
    result["verify_8_steps"] = spread(ours["verify"])
    result["bandwidth_gb_s"] = spread([b / 1e9 for b in bandwidth])
    step_bytes = built.token_bytes + built.position_bytes * args.tokens // 2
    read = [step_bytes * d / b for d, b in zip(ours["decode"], bandwidth, strict=True)]
    result["of_bandwidth"] = spread(read)
    return result


def spread(values: list[float]) -> list[float]:
    """[median, 10th, 90th percentile]."""
    ordered = sorted(values)
    low, high = (ordered[min(len(ordered) - 1, int(share * len(ordered)))] for share in (0.1, 0.9))
    return [round(statistics.median(values), 3), round(low, 3), round(high, 3)]


def show(result: dict[str, Any]) -> None:
    print(f"  decode  {result['decode_tokens_s']:8.1f} tok/s  llama.cpp {result.get('decode_llama_cpp', 0):8.1f}"
          f"  ratio {result.get('decode_ratio')}  of read bandwidth {result['of_bandwidth']}"
          f" ({result['bandwidth_gb_s'][0]} GB/s)")  # fmt: skip
    print(f"  prefill {result['prefill_tokens_s']:8.1f} tok/s  llama.cpp {result.get('prefill_llama_cpp', 0):8.1f}"
          f"  ratio {result.get('prefill_ratio')}")  # fmt: skip
    print(f"  verify of {DRAFT} tokens costs {result['verify_8_steps']} decode steps", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=llama_cpp.SHAPES, default="135M")
    parser.add_argument("--format", choices=PASSES, nargs="+", default=["q4_0"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--no-peer", action="store_true", help="leave llama.cpp out")
    parser.add_argument("--quick", action="store_true", help="two short rounds, without llama.cpp")
    parser.add_argument("--json", action="store_true", help="last line: one JSON object")
    args = parser.parse_args()
    if args.quick:
        args.rounds, args.tokens, args.no_peer = 2, 8, True
    results = []
    for kind in args.format:
        results.append(measure(build(args.shape, kind, args.threads), args.shape, kind, args))
        show(results[-1])
    if args.json:
        print(json.dumps({"results": results}))


if __name__ == "__main__":
    main()
