"""The main job on the shipped model: what `irc demo` shows, computed step by step."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from rich.table import Column, Table
from tokenizers import Tokenizer
from torch import Tensor

from irc.compiled import Compiled
from irc.compiler import compile as compile_model
from irc.core.program import Program
from irc.core.target import get_target
from irc.demo.evaluation import Quality, evaluate
from irc.view.difference import Difference, diff
from irc.view.picture import draw

_CACHE_LENGTH = 512
_ROUNDS = 5


def pipeline(bits: int | None) -> str:
    """The demo's passes; `bits` None leaves the weights alone.

    Quantized first and merged after, so that the merged copies are small ones.
    """
    quantize = [] if bits is None else [f"quantize-weights{{bits={bits},group-size=32,include-embeddings=true}}"]
    return ",".join([*quantize, "merge-qkv", "merge-gate-up", f"insert-kv-cache{{max-length={_CACHE_LENGTH}}}"])


@dataclass
class Story:
    """State of one demo run.

    Attributes:
        model, tokenizer: the shipped model as a user has it.
        program: the model as captured, in canonical form.
        windows: held-out text, i64[num_windows, length].
        versions: compiled versions by label.
        sample: the prompt and the text that the last measured version went on with.
    """

    model: torch.nn.Module
    tokenizer: Tokenizer
    program: Program
    windows: Tensor
    prompt: str
    max_new_tokens: int
    versions: dict[str, Compiled] = field(default_factory=dict)
    sample: str = ""

    def compile(self, label: str, bits: int | None, *, dump_dir: Path | None = None) -> Compiled:
        """Compile one version; every pass is verified."""
        compiled = compile_model(
            self.program, pipeline(bits), target="reference", verify="each", tokenizer=self.tokenizer, dump_dir=dump_dir
        )
        self.versions[label] = compiled
        return compiled

    def comparison(self) -> Table:
        """Weight bytes, quality on held-out text and generation speed of the model and of every version.

        Speeds are medians over rounds in which each version has its turn, so that a busy moment slows all alike.
        """
        table = Table(Column("", no_wrap=True))
        for title in ("weights", "ppl", "KL", "top-1", "tokens/s", "speed"):
            table.add_column(title, justify="right", no_wrap=True)
        eager = "PyTorch eager, f32"
        runs: dict[str, Callable[[], float]] = {eager: self._eager_tokens_per_second}
        runs |= {name: partial(self._tokens_per_second, version) for name, version in self.versions.items()}
        rounds = [{name: run() for name, run in runs.items()} for _ in range(_ROUNDS)]
        speed = {name: statistics.median(one[name] for one in rounds) for name in runs}

        def row(label: str, num_bytes: int, quality: Quality) -> None:
            table.add_row(
                label,
                f"{num_bytes / 1e6:.1f} MB",
                f"{quality.perplexity:.3f}",
                f"{abs(quality.kl):.4f}",
                f"{quality.top1:.1%}",
                f"{speed[label]:.0f}",
                f"{speed[label] / speed[eager]:.1f}×",
            )

        row(eager, sum(p.numel() * p.element_size() for p in self.model.parameters()), self._quality(self.model))
        for label, compiled in self.versions.items():
            row(label, compiled.program.weight_bytes, self._quality(compiled))
        return table

    def _quality(self, run: Callable[[Tensor], Tensor]) -> Quality:
        return evaluate(run, self.windows, self.model)

    def _tokens_per_second(self, compiled: Compiled) -> float:
        started = time.perf_counter()
        result = compiled.generate(self.prompt, max_new_tokens=self.max_new_tokens, eos=())
        elapsed = time.perf_counter() - started
        self.sample = f"{self.prompt}{result.text}"
        return len(result.token_ids[0]) / elapsed

    @torch.no_grad()
    def _eager_tokens_per_second(self) -> float:
        """What a user has without irc: the plain module, called on the whole text for every token."""
        ids = torch.tensor([self.tokenizer.encode(self.prompt).ids])
        started = time.perf_counter()
        for _ in range(self.max_new_tokens):
            ids = torch.cat((ids, self.model(ids)[:, -1:].argmax(-1)), dim=1)
        return self.max_new_tokens / (time.perf_counter() - started)

    def difference(self, label: str) -> Difference:
        """What the passes of one version did to the captured program, by meaning."""
        stages = self.versions[label].stages
        return diff(stages["capture"], self.versions[label].program, names=("capture", label))

    def export_onnx(self, label: str, path: Path) -> str:
        """Write the version's step program as ONNX and hold it against ONNX Runtime at three lengths."""
        program = self.versions[label].program
        artifact = get_target("onnx").lower(program)
        artifact.save(path)
        return str(artifact.verify(program))

    def draw(self, label: str, folder: Path) -> None:
        """Pictures of one layer before and after the passes."""
        draw(self.versions[label].stages["capture"], folder / "layer-captured.svg", layer="layers.0")
        draw(self.versions[label].program, folder / "layer-compiled.svg", layer="layers.0")
