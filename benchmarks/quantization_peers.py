"""irc's quantizers beside llmcompressor's and torchao's: same model, calibration, format and held-out text.

    python benchmarks/quantization_peers.py             # 64 windows; writes a section of docs/accuracy.md
    python benchmarks/quantization_peers.py --quick     # 8 windows, 4 bits in groups of 32
    python benchmarks/quantization_peers.py --environment FOLDER    # keep the peers' environment there
    python benchmarks/quantization_peers.py --format '3 bits, group 32' --method GPTQ    # renew these rows only

The demo model is handed over as a transformers Llama, which computes the same. Every run is a process of its own; the
peers' have an environment of their own, which is made if it is not there. Their weights come back as what the layers
compute with, and all perplexities are computed by one program. Peak memory is what the quantizer adds to the model.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from quantization_accuracy import LENGTH, METHODS, PAGE, perplexity
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from safetensors.torch import load_file, save_file
from torch import Tensor
from workers.peer_quantizers import forget_peak, memory_bytes

import irc
from irc.core.calibration import CALIBRATION_KEY
from irc.core.program import Program
from irc.demo.corpus import read_documents
from irc.demo.evaluation import END_OF_TEXT, held_out_windows
from irc.demo.tinypy import load_model, load_tokenizer, model_dir
from irc.view.sections import write_section

WORKER = Path(__file__).parent / "workers" / "peer_quantizers.py"
REQUIREMENTS = ("torch==2.13.0", "llmcompressor", "torchao", "transformers", "datasets")
FORMATS = {"4 bits, group 32": (4, 32), "8 bits, per channel": (8, None), "3 bits, group 32": (3, 32),
           "4 bits, per channel": (4, None)}  # fmt: skip
# Beside each of ours stands the peer's method of the same name.
PAIRS = {
    "RTN": ("irc-RTN", "torchao-rtn", "llmcompressor-rtn"),
    "AWQ": ("irc-AWQ", "llmcompressor-awq"),
    "GPTQ": ("irc-GPTQ", "llmcompressor-gptq"),
}
Found = dict[str, dict[str, dict[str, float]]]
_LAYER_NAMES = {"norm1": "input_layernorm", "norm2": "post_attention_layernorm", "attn": "self_attn"}


def llama_name(name: str) -> str:
    """The transformers name of a weight: `layers.0.attn.q_proj.weight` → `model.layers.0.self_attn.q_proj.weight`."""
    parts = [_LAYER_NAMES.get(part, part) for part in name.split(".")]
    return ".".join(["model", "embed_tokens" if parts[0] == "embed" else parts[0], *parts[1:]])


def write_llama(folder: Path) -> None:
    """The demo model as a folder that transformers loads."""
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    model = load_model()
    config = model.config
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size, hidden_size=config.hidden_size, num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads, num_key_value_heads=config.num_heads,
            intermediate_size=config.intermediate_size, max_position_embeddings=config.max_positions,
            rope_theta=config.rope_theta, rms_norm_eps=config.norm_eps, tie_word_embeddings=True,
        )
    ).eval()  # fmt: skip
    weights = {llama_name(name): t.float() for name, t in model.state_dict().items() if name != "lm_head.weight"}
    missing = set(llama.load_state_dict(weights, strict=False).unexpected_keys)
    tokens = torch.arange(40).view(1, 40)
    with torch.no_grad():
        difference = float((llama(tokens).logits - model.float()(tokens)).abs().max())
    if missing or difference > 1e-3:
        raise SystemExit(f"the Llama is not the demo model: {missing} left over, logits differ by {difference}")
    llama.save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_file=str(model_dir() / "tokenizer.json")).save_pretrained(folder)


def capture() -> Program:
    tokens = torch.zeros(2, 16, dtype=torch.int64)
    return irc.capture(load_model().float(), (tokens,), dynamic=({0: "B", 1: "S"},))


def run_irc(method: str, tokens_file: Path, bits: int, group: int | None, out: Path) -> None:
    """One of our pipelines, in a process of its own; leaves the program and figures.json in `out`."""
    program = capture()
    data = irc.CalibrationData.of(load_file(tokens_file)["tokens"], batch_size=1)
    ctx = irc.PassContext(options={CALIBRATION_KEY: data})
    base, started = forget_peak(), time.perf_counter()
    passes = METHODS[method](bits=bits, group_size=group)
    result = irc.PassManager(passes, verify="off", ctx=ctx, keep_stages=False).run(program)
    figures = {"seconds": time.perf_counter() - started, "peak_bytes": memory_bytes("VmHWM") - base}
    result.program.save(out / "program")
    (out / "figures.json").write_text(json.dumps(figures))


def in_own_process(work: Callable[..., None], *args: Any) -> None:
    job = multiprocessing.get_context("spawn").Process(target=work, args=args)
    job.start()
    job.join()
    if job.exitcode:
        raise SystemExit(f"{args[0]}: exit code {job.exitcode}")


def run_peer(python: Path, method: str, model: Path, tokens: Path, bits: int, group: int | None, out: Path) -> None:
    command = [python, WORKER, method, model, tokens, str(bits), str(group or 0), out]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(list(map(str, command)), env=environment, cwd=out, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{method} failed:\n{done.stderr[-3000:]}")


def make_environment(folder: Path) -> Path:
    """Python of an environment with the peers, which is made where it is missing."""
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
        for wanted in REQUIREMENTS:  # torch first: the others must not choose it
            subprocess.run([str(python), "-m", "pip", "install", "-q", wanted, REQUIREMENTS[0]], check=True)
    return python


def measure(
    methods: Sequence[str], label: str, python: Path, folder: Path, program: Program, held_out: Tensor
) -> dict[str, dict[str, float]]:
    """Perplexity, seconds and peak bytes of each method in one format."""
    bits, group = FORMATS[label]
    found = {}
    for method in methods:
        with tempfile.TemporaryDirectory() as temporary:
            out = Path(temporary)
            tool, _, kind = method.partition("-")
            if tool == "irc":
                in_own_process(run_irc, kind, folder / "tokens.safetensors", bits, group, out)
                quantized = irc.load(out / "program")
            else:
                run_peer(python, method, folder / "llama", folder / "tokens.safetensors", bits, group, out)
                weights = load_file(out / "weights.safetensors")
                names = {name: llama_name(name) for name in program.weights if llama_name(name) in weights}
                quantized = program.copy(replace_weights={ours: weights[theirs] for ours, theirs in names.items()})
            found[method] = {"perplexity": perplexity(quantized, held_out)}
            found[method] |= json.loads((out / "figures.json").read_text())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="8 held-out windows, 8 to calibrate, one format")
    parser.add_argument("--format", choices=FORMATS, action="append", help="only this one; may be given several times")
    parser.add_argument("--method", choices=PAIRS, action="append", help="only this one; may be given several times")
    parser.add_argument("--environment", type=Path, default=None, help="folder of the peers' environment")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    args = parser.parse_args()
    tokenizer = load_tokenizer()
    count = 8 if args.quick else 64
    held_out = held_out_windows(tokenizer, length=LENGTH, count=count)
    data = irc.CalibrationData.from_text(
        (text + END_OF_TEXT for text in read_documents("train")), tokenizer=tokenizer, length=LENGTH, count=count
    )
    program = capture()
    full = perplexity(program, held_out)
    found: Found = {} if args.quick else rows_of_page(PAGE.read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        python = make_environment(args.environment or folder / "environment")
        save_file({"tokens": torch.cat([batch[0] for batch in data.batches])}, folder / "tokens.safetensors")
        write_llama(folder / "llama")
        labels = args.format or list(FORMATS)[: 1 if args.quick else None]
        with Progress(console=Console(stderr=True), transient=True) as progress:
            for label in progress.track(labels, description="formats"):
                for name in args.method or [n for n in PAIRS if n == "RTN" or FORMATS[label][0] < 8]:
                    measured = measure(PAIRS[name], label, python, folder, program, held_out)
                    found.setdefault(label, {}).update(measured)
                    if not args.quick:  # as they come: the peers' AWQ takes minutes a format
                        write_section(PAGE, "peers", section(full, found, count))
    table = Table("format", "method", "perplexity", "loss", "s", "peak MB", title=f"full precision: {full:.4f}")
    for label, rows in found.items():
        for method, row in rows.items():
            cells = (f"{row['perplexity']:.4f}", f"{row['perplexity'] - full:.4f}", f"{row['seconds']:.0f}")
            table.add_row(label, method, *cells, f"{row['peak_bytes'] / 1e6:.0f}")
        table.add_section()
    Console().print(table)
    if not args.quick:
        print(f"→ {PAGE}", file=sys.stderr)
    if args.json:
        print(json.dumps({"full_precision": full, "formats": found}))


def rows_of_page(text: str) -> Found:
    """What earlier runs wrote into the section."""
    found: Found = {}
    row = re.compile(r"^\| (.+?) \| (\w+ \w+) \| ([\d.]+) \| -?[\d.]+ \| (\d+) \| (\d+) \|$", re.MULTILINE)
    for label, method, quality, seconds, megabytes in row.findall(text.partition("<!-- peers -->")[2]):
        figures = {"perplexity": float(quality), "seconds": float(seconds), "peak_bytes": float(megabytes) * 1e6}
        if label in FORMATS:
            found.setdefault(label, {})[method.replace(" ", "-")] = figures
    return found


def section(full: float, found: Found, count: int) -> str:
    """The part of docs/accuracy.md that this script is about."""
    lines = [
        "## Beside llmcompressor and torchao\n",
        f"The same model (as a transformers Llama), {count} calibration and {count} held-out windows, same symmetric"
        " formats; head and embedding in full precision; each method with its tool's own defaults. Seconds and peak"
        " memory (over the loaded model) are of one run each, in a process of its own. Made by"
        " `python benchmarks/quantization_peers.py`.\n",
        f"Full precision: perplexity {full:.4f}.\n",
        "| format | method | perplexity | loss | s | peak MB |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    order = [method for pair in PAIRS.values() for method in pair]
    for label in (one for one in FORMATS if one in found):
        lines += [
            f"| {label} | {name.replace('-', ' ')} | {row['perplexity']:.4f} | {row['perplexity'] - full:.4f} |"
            f" {row['seconds']:.0f} | {row['peak_bytes'] / 1e6:.0f} |"
            for name, row in sorted(found[label].items(), key=lambda item: order.index(item[0]))
        ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
