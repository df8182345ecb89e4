"""Time of every pass against the time of capture, and peak memory, on a Llama of 1.1 billion parameters.

    python benchmarks/compile_time.py              # 22 layers, bf16 weights, about 7 GB of memory
    python benchmarks/compile_time.py --quick      # 4 layers

The aim: passes without calibration take less than a tenth of the capture each; peak memory stays below
twice the weight bytes. Each pass is timed twice: on weights without data (meta device), which is the work on the
graph, and on random weights, where quantizing and merging move gigabytes besides. Peak memory is the process's own
high-water mark less what it was before the model was built, so Python and PyTorch themselves are not in it.
"""

from __future__ import annotations

import argparse
import json
import resource
import time

import torch
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

import irc
from irc.core.pipeline import parse_pipeline
from irc.passes.canonicalize import canonical_passes

PIPELINE = "quantize-weights{bits=4,group-size=32},merge-qkv,merge-gate-up,insert-kv-cache{max-length=512}"


def peak_bytes() -> int:
    """High-water mark of the process's resident memory."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def build(num_layers: int) -> LlamaForCausalLM:
    """The 1.1B shape, random bf16 weights made in place (no f32 copy)."""
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=2048,
        num_hidden_layers=num_layers,
        num_attention_heads=32,
        num_key_value_heads=4,
        intermediate_size=5632,
        max_position_embeddings=2048,
        dtype="bfloat16",
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.fill_(1.0)
            else:
                parameter.normal_(std=0.02, generator=generator)
    # Buffers have no values on the meta device; this is how transformers computes the rotary frequencies.
    rotary = model.model.rotary_emb
    rotary.inv_freq = 1.0 / (10000.0 ** (torch.arange(0, 64, 2).float() / 64))
    rotary.original_inv_freq = rotary.inv_freq
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="4 layers instead of 22")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    args = parser.parse_args()
    torch.manual_seed(0)
    base = peak_bytes()
    model = build(4 if args.quick else 22)
    weight_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    capture_s, rows = compile_once(model)
    peak = peak_bytes() - base
    without_data = to_meta(model)
    del model
    meta_capture_s, meta_rows = compile_once(without_data)

    layers = without_data.config.num_hidden_layers
    title = f"{layers} layers, capture {meta_capture_s:.2f} s without data, {capture_s:.2f} s with"
    table = Table("pass", "graph ms", "of capture", "weights ms", "of capture", title=title)
    for name, ms in rows.items():
        meta_ms = meta_rows[name]
        table.add_row(
            name, f"{meta_ms:.0f}", f"{meta_ms / 1e3 / meta_capture_s:.1%}", f"{ms:.0f}", f"{ms / 1e3 / capture_s:.1%}"
        )
    console = Console()
    console.print(table)
    console.print(
        f"weights {weight_bytes / 1e9:.2f} GB, peak {peak / 1e9:.2f} GB = {peak / weight_bytes:.2f} × weights"
    )
    if args.json:
        figures = {
            "capture_s": capture_s,
            "capture_meta_s": meta_capture_s,
            "pass_ms": rows,
            "pass_meta_ms": meta_rows,
            "worst_pass_of_capture": max(rows.values()) / 1e3 / capture_s,
            "worst_pass_of_capture_meta": max(meta_rows.values()) / 1e3 / meta_capture_s,
            "peak_of_weights": peak / weight_bytes,
        }
        print(json.dumps(figures))


def to_meta(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """The model without the data of its parameters; buffers (the rotary frequencies) keep theirs."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, torch.nn.Parameter(parameter.to("meta"), requires_grad=False))
    return model


def compile_once(model: LlamaForCausalLM) -> tuple[float, dict[str, float]]:
    """Seconds of the capture and milliseconds of each pass, in order."""
    started = time.perf_counter()
    captured = irc.capture(model, canonicalize=False)
    capture_s = time.perf_counter() - started
    result = irc.PassManager([*canonical_passes(), *parse_pipeline(PIPELINE)], verify="off").run(captured)
    return capture_s, {row.name: row.ms for row in result.report.rows[1:]}


if __name__ == "__main__":
    main()
