"""Time of compiling a Llama for target cpu: anew, with objects of g++ kept, with the compilation kept, and of loading.

    python benchmarks/cpu_compile.py                        # 1.1B, int4: about 10 GB of memory
    python benchmarks/cpu_compile.py --shape 135M --format q8_0
    python benchmarks/cpu_compile.py --quick                # 135M

Each compilation runs in a process of its own; imports and the making of random weights are not counted. Passes are not
verified by numbers (`verify="off"`; that time is the model's own), types, rules and the passes' own promises are.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

PROMPT = 512


def compile_once(shape: str, kind: str, threads: int, folder: str, *, cached: bool) -> dict[str, float]:
    """Seconds of a compilation by part; the artifact is saved into the folder.

    With `cached` it goes through a cache of compilations: the first puts itself there, the next is taken from there.
    """
    import cpu_decode

    built = cpu_decode.build(shape, kind, threads, str(Path(folder) / "compilations") if cached else None)
    rows = built.report.rows
    if any("was compiled before" in note for note in rows[0].notes):
        return {"total_s": built.compile_s}
    if not cached:
        built.artifact.save(Path(folder) / "model.irca")
    return {
        "total_s": built.compile_s,
        "capture_s": rows[0].ms / 1e3,
        "passes_s": sum(row.ms for row in rows[1:-1]) / 1e3,
        "checks_s": sum(row.verify_ms for row in rows) / 1e3,
        "lowering_s": rows[-1].ms / 1e3,
    }


def load_once(threads: int, folder: str) -> dict[str, float]:
    """Seconds until a saved artifact is ready, and of its first token; what it takes of memory.

    `memory_share`: the most memory above that of Python and PyTorch, with prompts as long as the cache having passed,
    of the bytes of weights and cache (mapped weights count as far as they were touched).
    """
    import torch

    import irc
    import irc.lowering

    load = irc.load  # imports what it needs
    before = memory("VmRSS")
    started = time.perf_counter()
    artifact = load(Path(folder) / "model.irca", options={"threads": threads})
    loaded = time.perf_counter()
    caches = artifact.new_caches(1)
    artifact.step(caches, torch.tensor([[1]]), torch.tensor([[0]]), torch.tensor([[0]]))
    first_token = time.perf_counter() - loaded
    length = caches[0].shape[2]
    for start in range(0, length, PROMPT):
        positions = torch.arange(start, min(length, start + PROMPT)).unsqueeze(0)
        artifact.step(caches, positions % 1000, positions, torch.tensor([[positions.shape[1] - 1]]))
    cache_bytes = sum(cache.nbytes for cache in caches)
    share = (memory("VmHWM") - before) / (artifact.weight_bytes + cache_bytes)
    return {"total_s": loaded - started, "first_token_s": first_token, "memory_share": share}


def memory(line: str) -> int:
    """Bytes that Linux counts for this process."""
    text = Path("/proc/self/status").read_text().split(f"{line}:", 1)[1]
    return int(text.split()[0]) << 10


def in_process(what: str, args: argparse.Namespace, folder: str) -> dict[str, float]:
    """The same in a process of its own, over the cache in the folder."""
    command = [sys.executable, __file__, "--shape", args.shape, "--format", args.format,
               "--threads", str(args.threads), "--in-process", what, "--folder", folder]  # fmt: skip
    environment = {**os.environ, "IRC_CACHE": str(Path(folder) / "cache")}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # imports of passes are counted: as from an installed package
    answer = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, float] = json.loads(answer.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="1.1B", help="as in cpu_decode.py")
    parser.add_argument("--format", default="q4_0", help="as in cpu_decode.py")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="the 135M shape")
    parser.add_argument("--json", action="store_true", help="last line: one JSON object")
    parser.add_argument("--in-process", choices=("compile", "cached", "load"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.quick:
        args.shape = "135M"
    if args.in_process:
        import torch

        torch.set_num_threads(args.threads)
        if args.in_process == "load":
            print(json.dumps(load_once(args.threads, args.folder)))
        else:
            cached = args.in_process == "cached"
            print(json.dumps(compile_once(args.shape, args.format, args.threads, args.folder, cached=cached)))
        return
    results: dict[str, Any] = {"shape": args.shape, "format": args.format, "threads": args.threads}
    with tempfile.TemporaryDirectory() as folder:
        for name, what in (("anew", "compile"), ("g++ kept", "compile"), ("keeping it", "cached"), ("kept", "cached"),
                           ("load", "load")):  # fmt: skip
            results[name] = in_process(what, args, folder)
            print(f"{name:10s} " + "  ".join(f"{key} {value:6.2f}" for key, value in results[name].items()), flush=True)
    if args.json:
        print(json.dumps(results))


if __name__ == "__main__":
    main()
