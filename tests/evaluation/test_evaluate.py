"""`evaluate`: figures against the formulas written out, in every form that a model can have."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

import irc
from irc.core.errors import IrcError, OptionError
from irc.core.manager import PassManager
from irc.core.program import Program
from irc.evaluation import EvaluationData, compare, evaluate
from irc.evaluation import metrics as metrics_module
from irc.evaluation.data import Kind
from irc.evaluation.metrics import METRICS, rank_correlation
from irc.evaluation.subjects import weight_size
from tests.lowering import steps


def quantized(bits: int = 3) -> Program:
    return PassManager(f"quantize-weights{{bits={bits},group-size=16}}", verify="off").run(steps.decoder()).program


def expected(model: Program, reference: Program, windows: Tensor) -> dict[str, float]:
    """In f64, all at once."""
    q = model.run(windows)[0][:, :-1].double().log_softmax(-1)
    p = reference.run(windows)[0][:, :-1].double().log_softmax(-1)
    return {
        "perplexity": math.exp(F.nll_loss(q.flatten(0, 1), windows[:, 1:].flatten()).item()),
        "kl": float((p.exp() * (p - q)).sum(-1).mean()),
        "top1": float((p.argmax(-1) == q.argmax(-1)).double().mean()),
    }


@pytest.mark.parametrize("batch_size", [1, 2, 7])
def test_text_against_the_formulas(batch_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("irc.evaluation.subjects.vocabulary_rows", lambda width, limit=0: 5)  # logits in pieces
    windows = steps.tokens(5, 11)
    found = irc.evaluate(quantized(), windows, reference=steps.decoder(), batch_size=batch_size)
    wanted = expected(quantized(), steps.decoder(), windows)
    assert list(found.metrics) == ["perplexity", "kl", "top1"]
    assert dict(found.metrics) == pytest.approx(wanted, rel=1e-4)
    assert wanted["kl"] > 1e-3
    assert found.perplexity == found["perplexity"]


def test_every_form_of_a_model_gives_the_same() -> None:
    windows = steps.tokens(3, 9)
    program = steps.decoder()
    compiled = irc.compile(program, "insert-kv-cache{max-length=16}", verify="off")
    assert compiled.artifact.kv_cache is not None
    forms = {
        "program": program,
        "step program": steps.step("insert-kv-cache{max-length=16}"),
        "compiled": compiled,
        "module": steps.language_model(),
        "function": lambda ids: {"logits": steps.language_model()(ids)},
    }
    found = compare(forms, windows, reference="program")
    first = found["program"]
    assert (first.kl, first.top1) == (0.0, 1.0)
    for one in found:
        assert one.perplexity == pytest.approx(first.perplexity, rel=1e-5)
        assert one.kl == pytest.approx(0, abs=1e-6)
        assert one.top1 == 1.0
    assert found["function"].weight_bytes is None
    assert found["module"].weight_bytes == program.weight_bytes


def test_a_window_that_does_not_fit_the_cache() -> None:
    with pytest.raises(OptionError, match=r"17 tokens do not fit into a key-value cache of 16"):
        evaluate(steps.step("insert-kv-cache{max-length=16}"), steps.tokens(1, 17))


def test_training_mode_comes_back() -> None:
    model = nn.Sequential(nn.Embedding(9, 4), nn.Dropout(0.5), nn.Linear(4, 9)).train()
    model[0].eval()
    ids = torch.randint(9, (2, 5))
    assert evaluate(model, ids).perplexity == evaluate(model, ids).perplexity  # no dropout
    assert [m.training for m in model] == [False, True, True]


def test_classes() -> None:
    torch.manual_seed(0)
    images, classes = torch.randn(11, 3, 8, 8), torch.randint(5, (11,))
    program = steps.cnn()
    logits = program.run(images)[0]
    found = irc.evaluate(program, (images, classes), reference=lambda x: -program.run(x)[0], batch_size=4)
    assert list(found.metrics) == ["accuracy", "kl", "top1"]
    assert found.accuracy == pytest.approx(float((logits.argmax(-1) == classes).double().mean()))
    assert found.top1 == pytest.approx(float((logits.argmax(-1) == logits.argmin(-1)).double().mean()))
    assert found.num_samples == 11


def test_pairs() -> None:
    torch.manual_seed(0)
    embeddings, others = torch.randn(10, 7), torch.randn(10, 7)
    grades = torch.tensor([3.0, 1.0, 1.0, 0.0, 2.0])
    data = EvaluationData(Kind.PAIRS, (torch.arange(10),), grades)
    found = irc.evaluate(lambda i: embeddings[i], data, reference=lambda i: others[i], batch_size=3)
    cosines = F.cosine_similarity(embeddings[::2], embeddings[1::2])
    base = F.cosine_similarity(others[::2], others[1::2])
    assert found.drift == pytest.approx(float((cosines - base).abs().mean()), rel=1e-5)
    assert found.rank == pytest.approx(rank_correlation(cosines, base), rel=1e-6)
    assert found.spearman == pytest.approx(rank_correlation(cosines, grades), rel=1e-6)


def test_rank_correlation() -> None:
    a = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert rank_correlation(a, a.exp()) == pytest.approx(1.0)
    assert rank_correlation(a, -a) == pytest.approx(-1.0)
    # Ties share ranks: 1, 2.5, 2.5, 4 against 1, 2, 3, 4.
    assert rank_correlation(torch.tensor([1.0, 5.0, 5.0, 9.0]), a) == pytest.approx(4.5 / math.sqrt(4.5 * 5))
    assert math.isnan(rank_correlation(torch.ones(4), a))


def test_the_reference_runs_once_for_all() -> None:
    calls = []

    def reference(ids: Tensor) -> Tensor:
        calls.append(len(ids))
        return torch.zeros(*ids.shape, 4).index_fill(-1, torch.tensor([1]), 2.0)

    compare({"a": reference, "b": lambda i: -reference(i)}, torch.ones(5, 3).long(), reference="a", batch_size=2)
    assert calls == [2, 2, 2, 2, 1, 1]  # b calls it too


def test_size_of_weights() -> None:
    program = steps.decoder()
    total = sum(w.numel() for w in program.weights.values())
    assert weight_size(program) == (32 * total, total)
    layers = {n: w.numel() for n, w in program.weights.items() if "proj" in n or n == "lm_head.weight"}
    for bits in (3, 4):
        size, numbers = weight_size(quantized(bits))
        assert numbers == total
        assert size == 32 * (total - sum(layers.values())) + sum((bits * n + 32 * n // 16) for n in layers.values())
    found = evaluate(quantized(4), steps.tokens())
    assert found.bits_per_weight == pytest.approx(size / total)
    assert found.weight_bytes == quantized(4).weight_bytes == found.size_bytes
    stored = evaluate(quantized(3), steps.tokens())
    assert stored.size_bytes < stored.weight_bytes  # three bits are stored in a byte


def test_progress_is_told() -> None:
    seen = []
    evaluate(steps.decoder(), steps.tokens(5), batch_size=2, progress=lambda *what: seen.append(what))
    assert seen == [("evaluating", n, 5) for n in (0, 2, 4, 5)]


def test_long_names_leave_room_for_the_figures() -> None:
    name = "demo, merge-qkv,merge-gate-up,quantize-weights{bits=8,group-size=32}"
    found = compare({"f32": steps.decoder(), name: quantized()}, steps.tokens(), reference="f32")
    console = Console(width=80, color_system=None)
    with console.capture() as captured:
        console.print(found)
    assert "…" not in captured.get()
    lines = captured.get().splitlines()
    assert max(map(len, lines)) <= 80
    figures = str(compare({"f32": steps.decoder(), "int3": quantized()}, steps.tokens(), reference="f32"))
    assert lines[4].split()[1:-2] == figures.splitlines()[-1].split()[1:-2]  # all but the time
    assert name.replace(" ", "") in "".join(line[:11].strip() for line in lines[4:])


def test_results_as_text_and_values() -> None:
    found = compare({"f32": steps.decoder(), "int3": quantized()}, steps.tokens(), reference="f32")
    text = str(found)
    for word in ("f32", "int3", "bits/weight", "ppl", "KL", "top-1", "100.00%"):
        assert word in text
    assert "int3" in str(found["int3"]) or "ppl" in str(found["int3"])
    values = found.to_json()
    assert values["results"][1]["metrics"] == dict(found["int3"].metrics)
    with pytest.raises(AttributeError, match="measured: perplexity, kl, top1"):
        _ = found["int3"].accuracy
    with pytest.raises(KeyError, match="f32, int3"):
        found["int4"]


def test_a_broken_model_is_seen() -> None:
    found = compare(
        {"ok": steps.decoder(), "broken": lambda ids: steps.decoder().run(ids)[0] * torch.nan}, steps.tokens(),
        reference="ok",
    )  # fmt: skip
    assert math.isnan(found["broken"].perplexity)
    assert math.isnan(found["broken"].kl)
    assert "nan" in str(found)
    assert found.to_json()["results"][1]["metrics"]["perplexity"] is None


@pytest.mark.parametrize(
    ("data", "options", "words"),
    [
        (torch.zeros(0, 4).long(), {}, ["empty"]),
        (torch.zeros(3, 1).long(), {}, ["token ids [N, L ≥ 2]", "int64[3, 1]"]),
        (torch.zeros(3, 4), {}, ["float32[3, 4]"]),
        ((torch.zeros(3, 4), torch.zeros(2).long()), {}, ["3 inputs need as many classes"]),
        ("text", {}, ["not on a str"]),
        (torch.zeros(3, 4).long(), {"metrics": ["perplexty", "kl", "accuracy"]},
         ["'perplexity'", "'kl' needs a reference", "'accuracy' makes no sense for text"]),
        (torch.zeros(3, 4).long(), {"metrics": []}, ["no metric"]),
        (torch.zeros(3, 4).long(), {"batch_size": 0}, ["at least 1"]),
    ],
)  # fmt: skip
def test_bad_input(data: object, options: dict[str, object], words: list[str]) -> None:
    with pytest.raises(OptionError) as caught:
        evaluate(steps.decoder(), data, **options)
    for word in words:
        assert word in str(caught.value)


def test_outputs_of_another_shape() -> None:
    with pytest.raises(IrcError, match=r"gave \[2, 9\]; evaluating text needs logits of every token, \[2, 9, …\]"):
        evaluate(lambda ids: ids.float(), steps.tokens())
    with pytest.raises(IrcError, match=r"gave \[2, 9, 3\], the reference \[2, 9, 4\]"):
        evaluate(lambda i: torch.zeros(*i.shape, 3), steps.tokens() % 3, reference=lambda i: torch.zeros(*i.shape, 4))
    with pytest.raises(OptionError, match="did you mean 'first'"):
        compare({"first": steps.decoder()}, steps.tokens(), reference="frist")


def test_every_metric_is_listed() -> None:
    classes = {
        value
        for value in vars(metrics_module).values()
        if isinstance(value, type) and issubclass(value, metrics_module.Metric) and value.name
    }
    assert set(METRICS.values()) == classes
