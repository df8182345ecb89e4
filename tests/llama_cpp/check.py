"""`make llama-cpp`: llama.cpp loads what irc writes, and says the same.

Builds llama-cpp-python (its source package, with llama.cpp inside) into an environment of its own, once; then holds
tiny random models, hand-written modules and the demo model against it: logits, 32 greedy tokens, tokenization, and
perplexity of each type. `--write` puts the tables into docs/accuracy.md. Fails when a figure is outside its bound.

    python -m tests.llama_cpp.check [--folder .llama-cpp] [--write] [--only NAME …]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import venv
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from irc.core import formats
from irc.core.calibration import CalibrationData
from irc.core.errors import IrcError
from irc.core.program import Program
from irc.core.storage import load, save
from irc.lowering.gguf import export_gguf, importance_matrix
from irc.lowering.gguf.importing import build_module
from irc.lowering.gguf.quantizers import quantize_rows
from irc.lowering.gguf.reading import TYPE_NAMES, read_file
from irc.view.sections import write_section
from tests.llama_cpp import models

VERSION = "0.3.36"
ROOT = Path(__file__).parent.parent.parent
GREEDY, F32_BOUND = 32, 1e-3
TYPES = ("f32", "f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q5_1", "q5_0", "q4_k_m", "q4_1", "q4_0", "q3_k_m", "q2_k")
# Largest error of the demo's logits between llama.cpp and irc on the same file, relative to the largest logit.
# llama.cpp rounds activations to 8 bits in front of quantized weights; irc computes in f32.
LOGIT_BOUNDS = {"f32": 1e-3, "f16": 5e-3, "bf16": 2e-2}
QUANTIZED_BOUND, PPL_BOUND = 6e-2, 0.02
TEXTS = ("def main(argv=None):\n    return [i ** 2 for i in range(10)]\n", "x = 'naïve – 日本語 🙂'\t# 3.14159  \n\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=ROOT / ".llama-cpp")
    parser.add_argument("--write", action="store_true", help="put the tables into docs/accuracy.md")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="only these models, and no types")
    parser.add_argument("--windows", type=int, default=12, help="windows of 256 tokens for the perplexities")
    given = parser.parse_args()
    check = Check(given.folder, given.windows)
    tables = [check.architectures(given.only or [*models.ZOO, *models.HAND_WRITTEN, *models.EXTRA])]
    if not given.only:
        tables += [check.types(), check.quantizers()]
    text = "\n\n".join(tables)
    print(text)
    if given.write and not given.only:
        write_section(ROOT / "docs" / "accuracy.md", "gguf", _TITLE + text)
    for problem in check.problems:
        print("FAILED:", problem, file=sys.stderr)
    return 1 if check.problems else 0


class Check:
    def __init__(self, folder: Path, windows: int) -> None:
        self.folder, self.windows = folder, windows
        self.problems: list[str] = []
        (folder / "files").mkdir(parents=True, exist_ok=True)

    # ---------------------------------------------------------------- llama.cpp

    def python(self) -> str:
        """The interpreter with llama-cpp-python; IRC_LLAMA_CPP_PYTHON names one that is there already."""
        named = os.environ.get("IRC_LLAMA_CPP_PYTHON")
        if named:
            return named
        home = self.folder / "venv"
        python = home / "bin" / "python"
        if not (home / "done").exists():
            venv.create(home, with_pip=True)
            environment = os.environ | {"CMAKE_ARGS": "-DLLAVA_BUILD=OFF -DLLAMA_BUILD_TOOLS=OFF"}
            command = [
                python,
                "-m",
                "pip",
                "install",
                "--no-binary",
                "llama-cpp-python",
                f"llama-cpp-python=={VERSION}",
            ]
            subprocess.run([str(part) for part in command], check=True, env=environment)
            (home / "done").touch()
        return str(python)

    def run(self, jobs: dict[str, Any]) -> tuple[dict[str, Any], Path]:
        """Answers of the runner, and the folder with its arrays."""
        file, out = self.folder / "jobs.json", self.folder / "out"
        file.write_text(json.dumps(jobs))
        runner = Path(__file__).parent / "runner.py"
        subprocess.run([self.python(), str(runner), str(file), str(out)], check=True, stderr=subprocess.DEVNULL)
        answers = json.loads((out / "answers.json").read_text())
        for name, answer in answers.items():
            if "error" in answer:
                self.problems.append(f"{name}: {answer['error']}")
        return answers, out

    def program(self, name: str, capture: Callable[[], Program]) -> Program:
        """A captured program, kept on disk."""
        kept = self.folder / "programs" / name
        if not (kept / "graph.irc").is_file():
            kept.parent.mkdir(exist_ok=True)
            save(capture(), kept)
        return load(kept)

    # ---------------------------------------------------------------- architectures

    def architectures(self, names: Sequence[str]) -> str:
        programs = {name: self.program(name, lambda name=name: models.program(name)) for name in names}
        jobs, found = {}, {}
        for name, program in programs.items():
            try:
                path = self.folder / "files" / f"{name}.gguf"
                found[name] = export_gguf(program, path, architecture=models.ASKED.get(name))
            except IrcError as error:
                self.problems.append(f"{name}: {error}")
                continue
            tokens = torch.randint(4, 64, (5,), generator=torch.Generator().manual_seed(0)).tolist()
            jobs[name] = {"path": str(found[name].path), "tokens": tokens, "encoder": name in models.ENCODERS}
            if name not in models.ENCODERS:
                jobs[name]["greedy"] = self.length(found[name].path)
        answers, out = self.run(jobs)
        rows = [
            self.architecture_row(name, found[name].architecture, programs[name], jobs[name], answers[name], out)
            for name in found
        ]
        head = "| model | architecture | largest error of the logits | greedy tokens |\n| --- | --- | --- | --- |\n"
        return _ARCHITECTURES + head + "\n".join(filter(None, rows))

    def architecture_row(
        self, name: str, architecture: str, program: Program, job: dict[str, Any], answer: dict[str, Any], out: Path
    ) -> str:
        if "error" in answer:
            return ""
        tokens = torch.tensor([job["tokens"]])
        error = _relative(program.run(tokens)[0][0], np.load(out / name / "logits.npy"))
        same = "greedy" not in job or _greedy(program, tokens, job["greedy"]) == answer["greedy"]
        if not same or error > F32_BOUND:
            self.problems.append(f"{name}: error {error:.1e}, greedy tokens {'the same' if same else 'differ'}")
        verdict = f"{job['greedy']} {'same' if same else 'DIFFER'}" if "greedy" in job else "–"
        return f"| {name} | {architecture} | {error:.1e} | {verdict} |"

    def length(self, path: Path) -> int:
        """How many tokens to compare: a window that stands for a context length must not be left."""
        values = read_file(path).metadata
        context = int(values[f"{values['general.architecture']}.context_length"])
        return max(1, min(GREEDY, context - 5))

    # ---------------------------------------------------------------- types

    def types(self) -> str:
        from irc.demo.tinypy import load_tokenizer

        tokenizer = load_tokenizer()
        program = self.program("demo", _demo)
        windows = _windows(tokenizer, self.windows)
        matrix = importance_matrix(program, CalibrationData.of(torch.tensor(_windows(tokenizer, 8, "train"))))
        matrix.save(self.folder / "demo.imatrix")
        variants = {kind: (kind, None) for kind in TYPES}
        variants |= {f"{kind} + imatrix": (kind, self.folder / "demo.imatrix") for kind in ("q4_k_m", "q3_k_m", "q2_k")}
        jobs: dict[str, Any] = {}
        files = {}
        for name, (kind, imatrix) in variants.items():
            path = self.folder / "files" / f"demo-{name.replace(' + ', '-')}.gguf"
            files[name] = export_gguf(program, path, type=kind, tokenizer=tokenizer, imatrix=imatrix)
            jobs[name] = {"path": str(path), "tokens": windows[0][:64], "windows": windows, "texts": list(TEXTS)}
            if kind == "f32":
                jobs[name]["greedy"] = GREEDY
        answers, out = self.run(jobs)
        rows = [self.type_row(name, files[name], answers[name], out, program, windows, tokenizer) for name in variants]
        head = (
            "| type | MB | error of the logits | perplexity, llama.cpp | perplexity, irc | ratio |\n"
            "| --- | --- | --- | --- | --- | --- |\n"
        )
        return _TYPES.format(tokens=sum(map(len, windows)), windows=len(windows)) + head + "\n".join(filter(None, rows))

    def type_row(
        self, name: str, file: Any, answer: dict[str, Any], out: Path, program: Program, windows: list[list[int]],
        tokenizer: Any,
    ) -> str:  # fmt: skip
        if "error" in answer:
            return ""
        module = build_module(read_file(file.path))
        with torch.no_grad():
            error = _relative(module(torch.tensor([windows[0][:64]]))[0].float(), np.load(out / name / "logits.npy"))
            ours = float(np.exp(_nll(module, windows)))
        theirs = float(np.exp(answer["nll"]))
        if error > LOGIT_BOUNDS.get(name, QUANTIZED_BOUND) or abs(theirs / ours - 1) > PPL_BOUND:
            self.problems.append(f"demo {name}: error {error:.1e}, perplexity {theirs:.4f} and {ours:.4f}")
        if answer["texts"] != [tokenizer.encode(text).ids for text in TEXTS]:
            self.problems.append(f"demo {name}: llama.cpp splits text into other tokens")
        if "greedy" in answer:
            mine = _greedy(program, torch.tensor([windows[0][:64]]), GREEDY)
            if mine != answer["greedy"]:
                self.problems.append(f"demo {name}: other greedy tokens: {answer['greedy']} and {mine}")
        return (
            f"| {name} | {file.num_bytes / 1e6:.2f} | {error:.1e} | {theirs:.4f} | {ours:.4f} | {theirs / ours:.4f} |"
        )

    # ---------------------------------------------------------------- quantizers

    def quantizers(self) -> str:
        values = torch.randn(64, 1024, generator=torch.Generator().manual_seed(0)) * 0.02
        np.save(self.folder / "values.npy", values.numpy())
        numbers = {kind: number for number, kind in TYPE_NAMES.items() if kind not in ("f32", "f16", "bf16")}
        _, out = self.run({"quantizers": {"quantize": str(self.folder / "values.npy"), "types": numbers}})
        rows = []
        for kind in numbers:
            theirs = torch.from_numpy(np.load(out / "quantizers" / f"{kind}.npy"))
            ours = quantize_rows(values, kind)
            same = (theirs == ours).float().mean()
            errors = [(_dequantized(stored, kind) - values).square().mean().sqrt() / 0.02 for stored in (ours, theirs)]
            if same < 1:
                self.problems.append(f"{kind}: {same:.2%} of the bytes are llama.cpp's")
            rows.append(f"| {kind} | {same:.2%} | {errors[0]:.5f} | {errors[1]:.5f} |")
        head = "| type | equal bytes | error, irc | error, llama.cpp |\n| --- | --- | --- | --- |\n"
        return _QUANTIZERS + head + "\n".join(rows)


_TITLE = "## GGUF files, read by llama.cpp and by irc\n\n`make llama-cpp` computes this section.\n\n"
_ARCHITECTURES = (
    "Tiny random models as f32 files (keys and values kept in f32): logits (an encoder: hidden states) of five tokens"
    " against the program's own,"
    " relative to the largest, and greedy tokens after them (fewer where a window stands for the context length)."
    " GELU in llama.cpp is the tanh form, out of a table of half floats.\n\n"
)
_TYPES = (
    "The demo model in each type, on {tokens} held-out tokens in {windows} windows. Both read the same file; llama.cpp"
    " also rounds activations to 8 bits in front of quantized weights, irc does not.\n\n"
)
_QUANTIZERS = (
    "irc's quantizers against llama.cpp's on 64 × 1024 normal numbers: bytes that are equal, and the root mean square"
    " error over the numbers' own size.\n\n"
)


def _demo() -> Program:
    from irc.cli.models import load_shipped

    return load_shipped("tinypy").program()


def _relative(ours: Tensor, theirs: np.ndarray) -> float:
    expected = ours.detach().numpy()
    return float(np.abs(expected - theirs).max() / np.abs(expected).max())


def _greedy(program: Program, tokens: Tensor, count: int) -> list[int]:
    start = tokens.shape[1]
    for _ in range(count):
        tokens = torch.cat((tokens, program.run(tokens)[0][:, -1:].argmax(-1)), 1)
    return tokens[0, start:].tolist()


def _windows(tokenizer: Any, count: int, split: str = "validation") -> list[list[int]]:
    from irc.demo.corpus import read_documents

    ids: list[int] = []
    for text in read_documents(split):
        ids += tokenizer.encode(text).ids
        if len(ids) >= 256 * count:
            break
    return [ids[256 * index : 256 * (index + 1)] for index in range(count)]


def _nll(module: torch.nn.Module, windows: list[list[int]]) -> float:
    tokens = torch.tensor(windows)
    logits = module(tokens).double()[:, :-1].log_softmax(-1)
    return float(-logits.gather(-1, tokens[:, 1:, None]).mean())


def _dequantized(stored: Tensor, kind: str) -> Tensor:
    return formats.parse(kind).dequantize(stored, None, None, torch.float32)


if __name__ == "__main__":
    sys.exit(main())
