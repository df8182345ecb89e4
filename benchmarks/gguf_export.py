"""Time and memory of exporting a 1B-shaped model to GGUF Q4_K_M, against llama.cpp's converter and quantizer.

    python benchmarks/gguf_export.py [--quick] [--json] [--reference PYTHON --converter convert_hf_to_gguf.py]

Each run is a process of its own; peak memory is what it held beyond the start, in multiples of the bf16 weights. The
reference writes bf16 with the converter and quantizes that file with llama-cpp-python (PYTHON has both installed). Runs
alternate. `--quick` takes a model a hundredth of the size and leaves the reference out unless it is named.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

SHAPES = {
    "1b": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32,
           "num_key_value_heads": 4, "vocab_size": 32000},
    "quick": {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 8,
              "num_key_value_heads": 2, "vocab_size": 4096},
}  # fmt: skip

MAKE = """
import sys, json, torch
from transformers import LlamaConfig, LlamaForCausalLM
torch.manual_seed(0)
torch.set_default_dtype(torch.bfloat16)
model = LlamaForCausalLM(LlamaConfig(**json.loads(sys.argv[1]), max_position_embeddings=2048))
model.save_pretrained(sys.argv[2])
import irc
irc.capture(model, dynamic={"input_ids": {0: "B", 1: "S"}}).save(sys.argv[2] + "/program")
"""
OURS = """
import sys, irc
program = irc.load(sys.argv[1] + "/program")
print("ready", flush=True)
irc.export_gguf(program, sys.argv[2], type="q4_k_m")
"""
QUANTIZE = """
import sys, llama_cpp
params = llama_cpp.llama_model_quantize_default_params()
params.ftype, params.nthread = 15, int(sys.argv[3])
assert llama_cpp.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), params) == 0
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--reference", help="a Python with llama-cpp-python and what the converter imports")
    parser.add_argument("--converter", help="llama.cpp's convert_hf_to_gguf.py")
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    shape = SHAPES["quick" if given.quick else "1b"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        subprocess.run([sys.executable, "-W", "ignore", "-c", MAKE, json.dumps(shape), name], check=True)
        bf16 = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        ours, reference = [], []
        for _ in range(1 if given.quick else given.rounds):
            command = [sys.executable, "-W", "ignore", "-c", OURS, name, str(folder / "ours.gguf")]
            ours.append(measured(command, wait_for="ready"))
            if given.reference and given.converter:
                reference.append(run_reference(given, folder))
        report(given, bf16, ours, reference, (folder / "ours.gguf").stat().st_size)


def run_reference(given: argparse.Namespace, folder: Path) -> tuple[float, int]:
    bf16, small = folder / "reference-bf16.gguf", folder / "reference.gguf"
    convert = [given.reference, given.converter, str(folder), "--outtype", "bf16", "--outfile", str(bf16)]
    first = measured(convert)
    second = measured([given.reference, "-c", QUANTIZE, str(bf16), str(small), str(given.threads)])
    bf16.unlink()
    return first[0] + second[0], max(first[1], second[1])


def measured(command: list[str], wait_for: str | None = None) -> tuple[float, int]:
    """(seconds, peak bytes): of anonymous memory, since mapped files are the system's to drop."""
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    peaks, base = [0], [0]

    def watch() -> None:
        status = Path(f"/proc/{process.pid}/status")
        while process.poll() is None:
            try:
                text = status.read_text()
            except OSError:
                return
            found = [int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith("RssAnon")]
            peaks[0] = max(peaks[0], *found, 0)
            time.sleep(0.02)

    thread = threading.Thread(target=watch)
    thread.start()
    assert process.stdout is not None
    if wait_for is not None:
        while (line := process.stdout.readline()) and line.strip() != wait_for:
            pass
        base[0] = 0
        started = time.perf_counter()
    process.stdout.read()
    if process.wait() != 0:
        raise SystemExit(f"{command[:3]} failed with {process.returncode}")
    seconds = time.perf_counter() - started
    thread.join()
    return seconds, peaks[0]


def report(
    given: argparse.Namespace, bf16: int, ours: list[tuple[float, int]], reference: list[tuple[float, int]], size: int
) -> None:
    figures = {
        "bf16_bytes": bf16, "file_bytes": size,
        "seconds": statistics.median(one[0] for one in ours), "spread": _spread([one[0] for one in ours]),
        "peak_over_bf16": max(one[1] for one in ours) / bf16,
    }  # fmt: skip
    if reference:
        figures |= {
            "reference_seconds": statistics.median(one[0] for one in reference),
            "reference_peak_over_bf16": max(one[1] for one in reference) / bf16,
            "speed": statistics.median(theirs[0] / mine[0] for mine, theirs in zip(ours, reference, strict=True)),
        }
    for name, value in figures.items():
        print(f"{name:<26} {value:,.3f}")
    if given.json:
        print(json.dumps(figures))


def _spread(values: list[float]) -> float:
    return (max(values) - min(values)) / statistics.median(values)


if __name__ == "__main__":
    main()
