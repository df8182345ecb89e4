"""Size and decode speed of an ONNX model of ours against onnxruntime-genai's own model builder.

The same random Llama (135M shape; `--quick`: a few layers) is written twice as int4 in groups of 32: by the builder
from a Hugging Face folder, and by `irc` as target `onnx-genai`. Both folders are run by onnxruntime-genai in this
process, turn by turn, greedy, batch 1: what differs is the graph.

    python benchmarks/onnx_runtime.py [--quick] [--json] [--peer-python PATH]

Needs onnxruntime-genai here (to generate) and behind `--peer-python` (its builder; default: this Python).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import irc
from irc.core.target import get_target
from irc.demo.tinypy import load_tokenizer

_LENGTH = 512
_PASSES = "quantize-weights{bits=4,group-size=32},merge-qkv,merge-gate-up,insert-kv-cache{max-length=%d}"


def make_model(folder: Path, quick: bool) -> Any:
    """A random Llama, saved as a Hugging Face folder with a tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
                             "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152}  # fmt: skip
    if quick:
        sizes |= {"num_hidden_layers": 3, "vocab_size": 4096}
    config = LlamaConfig(
        **sizes, max_position_embeddings=_LENGTH, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2,
        pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(folder)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=load_tokenizer(), bos_token="<s>", eos_token="</s>")
    tokenizer.save_pretrained(folder)
    return model


def build_ours(model: Any, folder: Path, accuracy_level: int) -> float:
    """Seconds to write our folder."""
    started = time.perf_counter()
    program = irc.capture(model, name="llama")
    program = irc.PassManager(_PASSES % _LENGTH, verify="off").run(program).program
    options = {"accuracy_level": accuracy_level, "eos_token_ids": [2], "threads": torch.get_num_threads()}
    get_target("onnx-genai").lower(program, options).save(folder)
    return time.perf_counter() - started


def build_peers(source: Path, folder: Path, python: str, accuracy_level: int) -> float:
    """Seconds that the builder takes."""
    started = time.perf_counter()
    command = [
        python, "-m", "onnxruntime_genai.models.builder", "-i", str(source), "-o", str(folder), "-p", "int4",
        "-e", "cpu",
        "-c", str(folder.parent / "cache"), "--extra_options", f"int4_accuracy_level={accuracy_level}",
        "int4_block_size=32", "int4_is_symmetric=true",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"the model builder failed:\n{done.stderr[-2000:]}")
    settings = folder / "genai_config.json"
    found = json.loads(settings.read_text())
    found["model"]["decoder"]["session_options"]["intra_op_num_threads"] = torch.get_num_threads()
    settings.write_text(json.dumps(found))
    return time.perf_counter() - started


def size_of(folder: Path) -> int:
    """Bytes of the model's files."""
    return sum(file.stat().st_size for file in folder.iterdir() if ".onnx" in file.name)


def decode(model: Any, prompt: list[int], count: int) -> float:
    """Tokens a second of `count` decode steps behind a prompt."""
    import onnxruntime_genai

    settings = onnxruntime_genai.GeneratorParams(model)
    settings.set_search_options(max_length=len(prompt) + count + 2, min_length=len(prompt) + count, do_sample=False)
    generator = onnxruntime_genai.Generator(model, settings)
    generator.append_tokens(prompt)
    generator.generate_next_token()
    started = time.perf_counter()
    for _ in range(count):
        generator.generate_next_token()
    return count / (time.perf_counter() - started)


def run(quick: bool, python: str, accuracy_level: int) -> dict[str, Any]:
    """Both folders, their sizes, and interleaved speeds."""
    import onnxruntime_genai

    with tempfile.TemporaryDirectory(prefix="irc-bench-") as scratch:
        root = Path(scratch)
        model = make_model(root / "hf", quick)
        seconds = {"irc": build_ours(model, root / "irc", accuracy_level)}
        seconds["builder"] = build_peers(root / "hf", root / "builder", python, accuracy_level)
        del model
        sizes = {name: size_of(root / name) for name in seconds}
        sessions = {name: onnxruntime_genai.Model(str(root / name)) for name in seconds}
        prompt = torch.randint(3, 1000, (32,), generator=torch.Generator().manual_seed(0)).tolist()
        count, rounds = (16, 3) if quick else (64, 9)
        for session in sessions.values():
            decode(session, prompt, 4)
        speeds: dict[str, list[float]] = {name: [] for name in sessions}
        for turn in range(rounds):
            for name in sorted(sessions, reverse=bool(turn % 2)):
                speeds[name].append(decode(sessions[name], prompt, count))
    ratios = sorted(a / b for a, b in zip(speeds["irc"], speeds["builder"], strict=True))
    return {
        "shape": "quick" if quick else "135M", "accuracy_level": accuracy_level, "threads": torch.get_num_threads(),
        "bytes": sizes, "size_ratio": sizes["irc"] / sizes["builder"], "build_seconds": seconds,
        "tokens_per_second": {name: statistics.median(values) for name, values in speeds.items()},
        "speed_ratio": statistics.median(ratios), "speed_ratio_range": [ratios[0], ratios[-1]], "rounds": rounds,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    parser.add_argument("--peer-python", default=sys.executable)
    parser.add_argument("--accuracy-level", type=int, default=4)
    given = parser.parse_args()
    if importlib.util.find_spec("onnxruntime_genai") is None:
        print("onnxruntime-genai is not installed: nothing to compare with (pip install onnxruntime-genai)")
        if given.json:
            print(json.dumps({"skipped": "onnxruntime-genai is not installed"}))
        return
    found = run(given.quick, given.peer_python, given.accuracy_level)
    for name in ("irc", "builder"):
        print(f"{name:8} {found['bytes'][name] / 1e6:8.1f} MB {found['tokens_per_second'][name]:8.1f} tokens/s")
    low, high = found["speed_ratio_range"]
    print(f"irc / builder: size {found['size_ratio']:.2f}, speed {found['speed_ratio']:.2f} ({low:.2f} to {high:.2f})")
    if given.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
