"""Time and memory of exporting a 1B-shaped model to GGUF Q4_K_M, against llama.cpp's converter and quantizer.

    python benchmarks/gguf_export.py [--quick] [--json] [--llama-cpp SOURCES] [--quantizer-python PYTHON]

Every step is a process of its own, imports included. irc maps a program folder and writes the file at once; the
reference writes a bf16 file with `convert_hf_to_gguf.py` (SOURCES is the folder it lies in) and quantizes that with
llama-cpp-python (PYTHON has it installed); turns alternate, both use the same number of threads. Peaks are of resident
memory: whole, with the pages of mapped files, and anonymous alone, in multiples of the bf16 weights. `--quick`: a model
a hundredth of the size, one round. Weights that both wrote are compared byte for byte.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SHAPES = {
    "1.1B": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32,
             "num_key_value_heads": 4, "vocab_size": 32000},
    "0.3B": {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 24, "num_attention_heads": 16,
             "num_key_value_heads": 4, "vocab_size": 32000},
    "quick": {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 8,
              "num_key_value_heads": 2, "vocab_size": 4096},
}  # fmt: skip
_STEPS = str(Path(__file__).parent / "workers" / "gguf_steps.py")


@dataclass(frozen=True)
class Step:
    """seconds; peak bytes of resident memory, whole and anonymous alone."""

    seconds: float
    whole: int
    anonymous: int


def step(*command: str, python: str = sys.executable) -> tuple[Step, str]:
    """A step's figures and what it printed."""
    started = time.perf_counter()
    process = subprocess.Popen(
        [python, "-W", "ignore", _STEPS, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    peaks = {"VmHWM": 0, "RssAnon": 0}

    def watch() -> None:
        status = Path(f"/proc/{process.pid}/status")
        while process.poll() is None:
            try:
                lines = status.read_text().splitlines()
            except OSError:
                return
            for line in lines:
                name, _, value = line.partition(":")
                if name in peaks:
                    peaks[name] = max(peaks[name], int(value.split()[0]) * 1024)
            time.sleep(0.01)

    thread = threading.Thread(target=watch)
    thread.start()
    out, errors = process.communicate()
    seconds = time.perf_counter() - started
    thread.join()
    if process.returncode:
        raise SystemExit(f"{command[0]} failed:\n{errors[-2000:]}")
    return Step(seconds, peaks["VmHWM"], peaks["RssAnon"]), out


def reference(given: argparse.Namespace, folder: Path, out: Path) -> list[Step]:
    """Both steps of llama.cpp's way."""
    large = folder / "reference-bf16.gguf"
    steps = [
        step("convert", given.llama_cpp, str(folder), str(large))[0],
        step("quantize", str(large), str(out), str(given.threads), python=given.quantizer_python)[0],
    ]
    large.unlink()
    return steps


def equal_tensors(ours: Path, theirs: Path) -> str:
    """How many tensors of two files are the same, type and bytes."""
    import gguf

    files = [{t.name: t for t in gguf.GGUFReader(path).tensors} for path in (ours, theirs)]
    names = files[0].keys() & files[1].keys()
    same = sum(
        files[0][name].tensor_type == files[1][name].tensor_type
        and bool((files[0][name].data == files[1][name].data).all())
        for name in names
    )
    return f"{same} of {len(files[1])}"


def run(given: argparse.Namespace) -> dict[str, Any]:
    name = "quick" if given.quick else given.shape
    with contextlib.ExitStack() as stack:
        scratch = given.folder or stack.enter_context(tempfile.TemporaryDirectory(prefix="irc-bench-"))
        folder = Path(scratch)
        folder.mkdir(exist_ok=True)
        if not (folder / "made.json").exists():
            (folder / "made.json").write_text(step("make", json.dumps(SHAPES[name]), scratch)[1].splitlines()[-1])
        made = json.loads((folder / "made.json").read_text())
        weights = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        mine: list[Step] = []
        theirs: list[list[Step]] = []
        rounds = 1 if given.quick else given.rounds
        for turn in range(rounds):
            turns = ["irc", *(["llama.cpp"] if given.llama_cpp else [])]
            for who in reversed(turns) if turn % 2 else turns:
                if who == "irc":
                    mine.append(step("export", scratch, str(folder / "ours.gguf"))[0])
                else:
                    theirs.append(reference(given, folder, folder / "theirs.gguf"))
        found: dict[str, Any] = {
            "shape": name, "threads": given.threads, "rounds": rounds, "bf16_bytes": weights,
            "file_bytes": (folder / "ours.gguf").stat().st_size, **made,
            "irc": figures([[one] for one in mine], weights),
        }  # fmt: skip
        if theirs:
            ratios = sorted(
                sum(part.seconds for part in steps) / one.seconds for one, steps in zip(mine, theirs, strict=True)
            )
            found |= {
                "llama.cpp": figures(theirs, weights), "speed_ratio": statistics.median(ratios),
                "speed_ratio_range": [ratios[0], ratios[-1]],
                "equal_tensors": equal_tensors(folder / "ours.gguf", folder / "theirs.gguf"),
            }  # fmt: skip
    return found


def figures(runs: list[list[Step]], weights: int) -> dict[str, Any]:
    """Median seconds of each step, and the largest peaks over the weights' bytes."""
    steps = list(zip(*runs, strict=True))
    return {
        "seconds": statistics.median(sum(part.seconds for part in parts) for parts in runs),
        "seconds_of_steps": [statistics.median(part.seconds for part in parts) for parts in steps],
        "peak_over_bf16": max(part.whole for parts in runs for part in parts) / weights,
        "anonymous_peak_over_bf16": max(part.anonymous for parts in runs for part in parts) / weights,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    parser.add_argument("--shape", choices=SHAPES, default="1.1B")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--llama-cpp", help="llama.cpp's sources, with convert_hf_to_gguf.py; default: irc alone")
    parser.add_argument("--quantizer-python", default=sys.executable, help="a Python with llama-cpp-python")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument(
        "--folder", help="where the model (8 GB) is made, and kept for further runs; default: a temporary"
    )
    given = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(given.threads)
    found = run(given)
    for who in ("irc", "llama.cpp"):
        if who in found:
            row = found[who]
            parts = " + ".join(f"{seconds:.1f}" for seconds in row["seconds_of_steps"])
            print(
                f"{who:10} {parts} s, peak {row['peak_over_bf16']:.2f} × the bf16 weights,"
                f" {row['anonymous_peak_over_bf16']:.2f} × without mapped files"
            )
    if "speed_ratio" in found:
        low, high = found["speed_ratio_range"]
        print(
            f"irc is {found['speed_ratio']:.2f} × as fast ({low:.2f} to {high:.2f});"
            f" tensors equal: {found['equal_tensors']}"
        )
    if given.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
