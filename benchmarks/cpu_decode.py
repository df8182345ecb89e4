"""Target cpu against llama.cpp and OpenVINO at shapes of real Llamas, random weights: decode, prefill, verification.

    python benchmarks/cpu_decode.py --shape 135M --format q4_0
    python benchmarks/cpu_decode.py --shape 1.1B --format q4_0 q8_0 bf16      # needs about 10 GB
    python benchmarks/cpu_decode.py --shape 1.1B-half --format q4_0           # the same layers, half as many

All run in turns on the same threads; medians and the spread (10th to 90th percentile) of the ratios are printed.
llama.cpp is built by `benchmarks/llama_cpp.py` the first time, OpenVINO installed by `benchmarks/openvino_peer.py`; it
gets the same weights, in the form that its own tools write (`benchmarks/workers/openvino_llama.py`), and its logits are
compared. Activations are int8 a token here and in llama.cpp for integer weights, what the plugin chooses in OpenVINO.
The read bandwidth is measured between the tokens, medians of both are compared. `--without` leaves peers out.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent))

import llama_cpp
import openvino_peer
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
IDS = [5, 9, 77, 300, 12, 4, 8]


@dataclass
class Built:
    """A compiled model and what it cost."""

    artifact: Artifact
    compile_s: float
    token_bytes: int  # read from memory for one token: all weights but the table of embeddings
    position_bytes: int  # of the cache, for each position before the token
    report: Report


def random_llama(shape: str, dtype: torch.dtype) -> nn.Module:
    """A Llama with random weights, the same each time."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.initialization import no_init_weights

    sizes = llama_cpp.SHAPES[shape]
    config = LlamaConfig(
        hidden_size=sizes.width, num_hidden_layers=sizes.layers, num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.kv_heads, intermediate_size=sizes.mlp, vocab_size=sizes.vocabulary,
        max_position_embeddings=CONTEXT, tie_word_embeddings=False,
    )  # fmt: skip
    with no_init_weights():
        model: nn.Module = LlamaForCausalLM(config).to(dtype).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.fill_(1.0) if "norm" in name else weight.uniform_(-0.03, 0.03, generator=generator)
    return model


def build(shape: str, kind: str, threads: int, cache: str | None = None) -> Built:
    """A random Llama compiled for the processor, or taken from a cache of compilations."""
    sizes = llama_cpp.SHAPES[shape]
    model = random_llama(shape, torch.bfloat16 if kind == "bf16" else torch.float32)
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
        return self.timed(torch.randint(0, 1000, (1, count)))[0]

    def timed(self, tokens: Tensor) -> tuple[float, Tensor]:
        """Seconds of a step of these tokens, [1, S], and its logits."""
        count = tokens.shape[1]
        positions = torch.arange(self.length, self.length + count).unsqueeze(0)
        wanted = torch.arange(count).unsqueeze(0) if count <= DRAFT else torch.tensor([[count - 1]])
        started = time.perf_counter()
        logits = self.artifact.step(self.caches, tokens, positions, wanted)
        spent = time.perf_counter() - started
        self.length += count
        return spent, logits


class LlamaCpp:
    """Tokens a second of llama.cpp."""

    def __init__(self, shape: str, kind: str, args: argparse.Namespace) -> None:
        self.run = partial(llama_cpp.run, shape, kind, threads=args.threads)

    def decode(self, count: int) -> float:
        return self.run(generate=count)

    def prefill(self, count: int) -> float:
        return self.run(prompt=count)

    def close(self) -> None:
        """Nothing stays open."""


class OpenVino:
    """Tokens a second of OpenVINO on the same weights, in a process of its own."""

    def __init__(self, shape: str, kind: str, args: argparse.Namespace) -> None:
        with tempfile.TemporaryDirectory(prefix="irc-openvino-") as folder:
            weights, sizes = Path(folder) / "weights.safetensors", Path(folder) / "sizes.json"
            safetensors.torch.save_file(random_llama(shape, torch.float16).state_dict(), str(weights))
            sizes.write_text(json.dumps(asdict(llama_cpp.SHAPES[shape])))
            interpreter = args.openvino_python or openvino_peer.python()
            options = (weights, sizes, args.openvino_format or kind, args.threads, args.openvino_group)
            self.worker = openvino_peer.Worker(interpreter, "openvino_llama.py", *options)

    def decode(self, count: int) -> float:
        return 1 / statistics.median(self.worker.ask(["decode", count]))

    def prefill(self, count: int) -> float:
        return count / float(self.worker.ask(["prefill", count])[0])

    def logits(self, ids: list[int]) -> Tensor:
        """Behind the last token, which is a step of its own."""
        return torch.tensor(self.worker.ask(["logits", ids]))

    def close(self) -> None:
        self.worker.close()


PEERS = {"llama_cpp": LlamaCpp, "openvino": OpenVino}


def measure(built: Built, shape: str, kind: str, args: argparse.Namespace) -> dict[str, Any]:
    """Rounds in turns with the peers."""
    decode, prefill = Session(built.artifact), Session(built.artifact)
    ours: dict[str, list[float]] = {"decode": [], "prefill": [], "verify": []}
    peers = {name: make(shape, kind, args) for name, make in PEERS.items() if name not in args.without}
    theirs: dict[str, list[float]] = {f"{what}_{name}": [] for name in peers for what in ("decode", "prefill")}
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
        for name, peer in peers.items():
            theirs[f"decode_{name}"].append(peer.decode(args.tokens))
            theirs[f"prefill_{name}"].append(peer.prefill(PROMPT))
    result: dict[str, Any] = {"shape": shape, "format": kind, "threads": args.threads, "compile_s": built.compile_s}
    for what in ("decode", "prefill"):
        result[f"{what}_tokens_s"] = statistics.median(ours[what])
        for name in peers:
            values = theirs[f"{what}_{name}"]
            result[f"{what}_{name}"] = statistics.median(values)
            result[f"{what}_ratio_{name}"] = spread([a / b for a, b in zip(ours[what], values, strict=True)])
    if isinstance(peers.get("openvino"), OpenVino):
        result["openvino_difference"] = difference(decode, peers["openvino"].logits(IDS))
    for peer in peers.values():
        peer.close()
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


def difference(session: Session, theirs: Tensor) -> float:
    """Relative distance of our logits behind the same tokens: they must come from the same model."""
    session.length = 0
    session.timed(torch.tensor([IDS[:-1]]))
    ours = session.timed(torch.tensor([IDS[-1:]]))[1].flatten().float()
    return float((ours - theirs).norm() / theirs.norm())


def show(result: dict[str, Any]) -> None:
    for what in ("decode", "prefill"):
        text = f"  {what:7} {result[f'{what}_tokens_s']:8.1f} tok/s"
        for name in PEERS:
            if f"{what}_{name}" in result:
                text += f"  {name} {result[f'{what}_{name}']:8.1f}, ratio {result[f'{what}_ratio_{name}']}"
        print(text)
    print(f"  of read bandwidth {result['of_bandwidth']} ({result['bandwidth_gb_s'][0]} GB/s)")
    print(f"  verify of {DRAFT} tokens costs {result['verify_8_steps']} decode steps")
    if "openvino_difference" in result:
        print(f"  logits differ from OpenVINO's by {result['openvino_difference']:.3f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=llama_cpp.SHAPES, default="135M")
    parser.add_argument("--format", choices=PASSES, nargs="+", default=["q4_0"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--without", choices=PEERS, nargs="+", default=[], help="peers that are left out")
    parser.add_argument("--openvino-python", help="a Python that has openvino; default: installed once")
    parser.add_argument("--openvino-format", choices=(*PASSES, "f32"), help="of its weights; default: as ours")
    parser.add_argument("--openvino-group", type=int, default=32, help="weights that share a scale in its int4")
    parser.add_argument("--quick", action="store_true", help="two short rounds, without peers")
    parser.add_argument("--json", action="store_true", help="last line: one JSON object")
    args = parser.parse_args()
    if args.quick:
        args.rounds, args.tokens, args.without = 2, 8, list(PEERS)
    results = []
    for kind in args.format:
        results.append(measure(build(args.shape, kind, args.threads), args.shape, kind, args))
        show(results[-1])
    if args.json:
        print(json.dumps({"results": results}))


if __name__ == "__main__":
    main()
