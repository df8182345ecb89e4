"""The coverage table: every model of the zoo, from capture to decoding with a cache.

`python -m tests.coverage [models]` recomputes rows (all of them) and writes docs/coverage.md; `tests/test_coverage.py`
recomputes each row and compares it with that page.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from irc.core.contract import PassContext
from irc.core.kv_cache import KVCache
from irc.core.program import Program
from irc.passes.attention.insert_kv_cache import InsertKVCache
from tests import zoo

PAGE = Path(__file__).parent.parent / "docs" / "coverage.md"
PROMPTS = (7, 4, 5)
NUM_STEPS = 12
TOLERANCE = 1e-4
STAGES = ("capture", "canonicalize", "text", "folder", "cache")
_INTRODUCTION = """# Coverage

To look up whether a model like yours works, how far, and if not why. Each row is a tiny model of that architecture
with random weights (from transformers, or written here), captured with dynamic batch and sequence. Made by
`python -m tests.coverage`; the tests recompute every row.

- **capture**: the largest difference of the captured graph's output from the model's own, relative to the largest
  value.
- **canonicalize**: the same of the canonical program, also at another batch size and length. In brackets: operations
  before → after; then how many attentions, norms and rotary embeddings were recognised as one operation each.
- **text**, **folder**: printed and parsed, saved and loaded, the program is the same and computes the same.
- **cache**: with a KV cache inserted, a batch of three prompts of 7, 4 and 5 tokens is prefilled at once and decoded
  for 12 steps; shown is the largest difference of any logit from the model's full recomputation, relative to the
  largest logit. At most 1e-4 passes.

A dash: does not apply. A row that fails says why. What ONNX makes of the same models is in
[onnx.md](onnx.md#coverage).

"""


@dataclass
class Row:
    """One model: what each stage gave, and why stages failed."""

    name: str
    kind: str
    cells: dict[str, str] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)

    @property
    def verdict(self) -> str:
        if not self.failures:
            return "pass"
        return "**fails**: " + "; ".join(f"{stage}: {reason}" for stage, reason in self.failures.items())


def compute(name: str) -> Row:
    """Run one model through all stages; a failure of one does not hide the others."""
    entry = zoo.ZOO[name]
    row = Row(name, entry.kind)
    stages: dict[str, Callable[[str], str]] = {
        "capture": _capture, "canonicalize": _canonicalize, "text": _text, "folder": _folder, "cache": _cache,
    }  # fmt: skip
    for stage, run in stages.items():
        if "capture" in row.failures or (stage == "cache" and not entry.causal):
            row.cells[stage] = "–"
            continue
        try:
            row.cells[stage] = run(name)
        except Exception as error:  # a table of what fails must not stop at a failure of whatever kind
            row.cells[stage] = "fails"
            row.failures[stage] = f"{type(error).__name__}: {_first_lines(error)}"
    return row


def _capture(name: str) -> str:
    return _against_model(name, zoo.captured(name, canonicalize=False))


def _canonicalize(name: str) -> str:
    before, program = zoo.captured(name, canonicalize=False), zoo.captured(name)
    error = _against_model(name, program)
    counts = [
        sum(str(n.target) == f"irc.{op}.default" for n in program.operations())
        for op in ("attention", "rms_norm", "rope")
    ]
    counts[1] += sum(str(n.target) == "aten.layer_norm.default" for n in program.operations())
    return f"{error} [{before.num_nodes} → {program.num_nodes}; {counts[0]}, {counts[1]}, {counts[2]}]"


def _against_model(name: str, program: Program) -> str:
    """Largest relative difference from the model on its own inputs and, for decoders, other sizes."""
    entry, model = zoo.ZOO[name], zoo.built(name)
    cases = [entry.inputs(model)]
    if entry.kind == "decoder":
        for batch, length in ((1, 1), (2, 17)):
            ids = zoo.token_ids(batch, length, seed=length)
            cases.append((ids,) if isinstance(cases[0], tuple) else {"input_ids": ids})
    worst = 0.0
    for inputs in cases:
        flat = list(inputs) if isinstance(inputs, tuple) else list(inputs.values())
        result = program.run(*flat)[0]
        worst = max(worst, relative_error(result, _tensor(zoo.reference(model, inputs))))
    return _checked(worst)


def _text(name: str) -> str:
    from irc.core.text import parse

    program = zoo.captured(name)
    text = str(program)
    return _same_program(program, parse(text, weights=program.weights), text)


def _folder(name: str) -> str:
    from irc.core.storage import load, save

    program = zoo.captured(name)
    with tempfile.TemporaryDirectory() as folder:
        save(program, Path(folder) / "program")
        return _same_program(program, load(Path(folder) / "program"), str(program))


def _same_program(program: Program, other: Program, text: str) -> str:
    from irc.core.hashing import structural_hash

    if str(other) != text or structural_hash(other) != structural_hash(program):
        raise AssertionError("came back as another program")
    inputs = program.example_inputs
    assert inputs is not None
    for a, b in zip(program.run(*inputs), other.run(*inputs), strict=True):
        if isinstance(a, Tensor) and not torch.equal(a, b):
            raise AssertionError("came back with other results")
    return "same"


def _cache(name: str) -> str:
    program = zoo.captured(name)
    insertion = InsertKVCache()
    step = insertion.run(program.copy(), PassContext()).program
    return _checked(decoding_error(step, zoo.built(name), zoo.ZOO[name].inputs(zoo.built(name))))


def decoding_error(step: Program, model: torch.nn.Module, example: object, *, shift: int = 0) -> float:
    """Largest relative difference between ragged prefill and decode, and full recomputation.

    `shift` displaces the positions of the decode steps: a control that must fail.
    """
    total = max(PROMPTS) + NUM_STEPS
    ids = zoo.token_ids(len(PROMPTS), total, seed=3)
    expected = _tensor(zoo.reference(model, (ids,) if isinstance(example, tuple) else {"input_ids": ids}))
    lengths, rows = torch.tensor(PROMPTS), torch.arange(len(PROMPTS))
    width = max(PROMPTS)
    padded = ids[:, :width].masked_fill(torch.arange(width) >= lengths[:, None], 5)
    positions = torch.arange(width).expand(len(PROMPTS), -1).contiguous()
    cache = KVCache.of(step)
    assert cache is not None
    caches = cache.empty(len(PROMPTS))
    logits, *caches = step.run(padded, positions, (lengths - 1)[:, None], *caches)
    pairs = [(logits[:, 0], expected[rows, lengths - 1])]
    for index in range(NUM_STEPS):
        at = lengths + index
        logits, *caches = step.run(
            ids[rows, at][:, None], at[:, None] + shift, torch.zeros(len(PROMPTS), 1, dtype=torch.int64), *caches
        )
        pairs.append((logits[:, 0], expected[rows, at]))
    return max(relative_error(got, wanted) for got, wanted in pairs)


def relative_error(got: Tensor, wanted: Tensor) -> float:
    """max |got - wanted| / max |wanted|."""
    if got.shape != wanted.shape:
        raise AssertionError(f"shape {list(got.shape)} instead of {list(wanted.shape)}")
    return float((got - wanted).abs().max() / wanted.abs().max())


def _checked(error: float) -> str:
    if not error <= TOLERANCE:
        raise AssertionError(f"differs by {error:.1e}")
    return _scale(error)


def _scale(error: float) -> str:
    """Only the order of magnitude, rounded up: the page should not change with the machine."""
    for bound in (1e-6, 1e-5, 1e-4):
        if error <= bound:
            return f"≤ {bound:.0e}".replace("e-0", "e-")
    return f"{error:.0e}"


def _tensor(result: object) -> Tensor:
    found = result if isinstance(result, Tensor) else torch.utils._pytree.tree_leaves(result)[0]
    assert isinstance(found, Tensor)
    return found


def _first_lines(error: Exception) -> str:
    text = " ".join(str(error).split())
    return (text[:237] + "…" if len(text) > 240 else text).replace("|", "\\|")


def line(row: Row) -> str:
    """The row as the page shows it."""
    cells = [row.cells[stage] for stage in STAGES]
    return f"| {row.name} | {row.kind} | " + " | ".join(cells) + f" | {row.verdict} |"


def render(lines: Mapping[str, str]) -> str:
    """The page, from the lines of the models that there are."""
    head = "| model | kind | " + " | ".join(STAGES) + " | |\n|" + " --- |" * (len(STAGES) + 3)
    listed = [lines[name] for name in zoo.ZOO if name in lines]
    passed = sum(text.endswith("| pass |") for text in listed)
    return _INTRODUCTION + "\n".join([head, *listed]) + f"\n\n{passed} of {len(listed)} pass.\n"


def page_lines() -> dict[str, str]:
    """Lines of the models on the page."""
    found = {}
    for text in PAGE.read_text().splitlines() if PAGE.is_file() else []:
        name = text.strip("|").partition("|")[0].strip()
        if text.startswith("|") and name in zoo.ZOO:
            found[name] = text
    return found


def recorded() -> dict[str, set[str]]:
    """Stages that fail, of every model on the page."""
    cells = {name: [cell.strip() for cell in text.split("|")[3:]] for name, text in page_lines().items()}
    return {
        name: {stage for stage, cell in zip(STAGES, of_model, strict=False) if cell == "fails"}
        for name, of_model in cells.items()
    }


def main(names: Sequence[str]) -> None:
    """Recompute the given models' rows (all, if none is given) and rewrite the page after each."""
    lines = page_lines()
    for name in names or zoo.ZOO:
        row = compute(name)
        lines[name] = line(row)
        PAGE.write_text(render(lines))
        print(f"{name:16} {row.verdict}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
