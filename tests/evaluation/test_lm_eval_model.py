"""The adapter's three kinds of requests, by simple request objects; and inside lm-eval, where that is installed."""

from __future__ import annotations

import json
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import irc
from irc.core.errors import OptionError
from irc.evaluation.lm_eval_model import LanguageModelAdapter, lm_eval_model
from tests.lowering import steps


@dataclass
class Request:
    """What lm-eval's `Instance` has and the adapter needs."""

    args: tuple[Any, ...]


class Letters:
    """A tokenizer of one token a character, over 63 of them; 0 ends a text."""

    eos_token_id = 0

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [1 + (ord(char) - 32) % 63 for char in text]

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return "".join(chr(31 + i) for i in ids)


def adapter(**options: Any) -> LanguageModelAdapter:
    return LanguageModelAdapter(steps.decoder(), Letters(), **options)


def log_likelihood(ids: list[int], first: int) -> tuple[float, bool]:
    """Of ids[first:], after all ids before."""
    log_p = steps.decoder().run(torch.tensor([ids[:-1]]))[0][0].double().log_softmax(-1)
    wanted = ids[first:]
    rows = log_p[first - 1 :]
    return sum(float(row[i]) for row, i in zip(rows, wanted, strict=True)), rows.argmax(-1).tolist() == wanted


def ids(text: str) -> list[int]:
    return Letters().encode(text)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_loglikelihood(batch_size: int) -> None:
    pairs = [("AB", "CDE"), ("", "XYZ"), ("LONGER CONTEXT", "!"), ("A ", "B"), ("A", "")]
    found = adapter(batch_size=batch_size).loglikelihood([Request(pair) for pair in pairs])
    wanted = [log_likelihood(ids("ABCDE"), 2), log_likelihood([0, *ids("XYZ")], 1),
              log_likelihood(ids("LONGER CONTEXT!"), 14), log_likelihood(ids("A B"), 1), (0.0, True)]  # fmt: skip
    assert [value for value, _ in found] == pytest.approx([value for value, _ in wanted], abs=1e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in wanted]


def test_greedy_continuation_is_seen() -> None:
    start = ids("AB")
    best = int(steps.decoder().run(torch.tensor([start]))[0][0, -1].argmax())
    text = Letters().decode([best])
    ((_, greedy), (_, other)) = adapter().loglikelihood([Request(("AB", text)), Request(("AB", chr(ord(text) ^ 1)))])
    assert greedy
    assert not other


def test_context_that_is_too_long_loses_its_start() -> None:
    found = adapter(max_length=4).loglikelihood([Request(("ABCDEFG", "HI"))])
    assert found[0][0] == pytest.approx(log_likelihood(ids("EFGHI"), 3)[0], abs=1e-4)


def test_rolling_predicts_every_token_once() -> None:
    text = "ABCDEFGHIJ"
    short = adapter().loglikelihood_rolling([Request((text,)), Request(("",)), Request(("Q",))])
    assert short == pytest.approx(
        [log_likelihood([0, *ids(text)], 1)[0], 0.0, log_likelihood([0, *ids("Q")], 1)[0]], abs=1e-4
    )
    # Windows of four: (0 A B C → A B C D), (D E F G → E F G H), and the rest from a full one (F G H I → I J).
    pieces = [([0, *ids("ABCD")], 1), (ids("DEFGH"), 1), (ids("FGHIJ"), 3)]
    (found,) = adapter(max_length=4).loglikelihood_rolling([Request((text,))])
    assert found == pytest.approx(sum(log_likelihood(*piece)[0] for piece in pieces), abs=1e-4)


def test_generate_until() -> None:
    compiled = irc.compile(steps.decoder(), "insert-kv-cache{max-length=32}", verify="off")
    for model in (steps.decoder(), compiled):
        one = LanguageModelAdapter(model, Letters())
        (whole,) = one.generate_until([Request(("AB", {"until": [], "max_gen_toks": 8}))])
        wanted = ids("AB")
        for _ in range(8):
            wanted.append(int(steps.decoder().run(torch.tensor([wanted]))[0][0, -1].argmax()))
        assert whole == Letters().decode(wanted[2:])
        assert len(set(whole)) > 1
        stop = whole[4]
        (cut,) = one.generate_until([Request(("AB", {"until": [stop], "max_gen_toks": 8, "do_sample": False}))])
        assert cut == whole[: whole.index(stop)]
    assert compiled.artifact.kv_cache is not None
    assert LanguageModelAdapter(compiled, Letters()).max_length == 32


def test_step_programs_score_the_same() -> None:
    request = [Request(("AB", "CDE"))]
    cached = LanguageModelAdapter(steps.step("insert-kv-cache{max-length=16}"), Letters())
    assert cached.loglikelihood(request)[0][0] == pytest.approx(adapter().loglikelihood(request)[0][0], abs=1e-4)


def test_progress_and_bad_input(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    adapter(batch_size=2, progress=lambda *what: seen.append(what)).loglikelihood([Request(("A", "B"))] * 3)
    assert seen == [("loglikelihood", n, 3) for n in (0, 2, 3)]
    with pytest.raises(OptionError, match="give a tokenizer"):
        LanguageModelAdapter(steps.decoder())
    with pytest.raises(OptionError, match="not a TinyPy"):
        LanguageModelAdapter(steps.language_model(), Letters())
    monkeypatch.setattr(Letters, "eos_token_id", None)
    with pytest.raises(OptionError, match="prefix"):
        adapter()
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    with pytest.raises(OptionError, match=r"pip install 'irc-compiler\[lm-eval\]'"):
        lm_eval_model(steps.decoder(), Letters(), prefix=0)


def test_a_task_of_lm_eval(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the package and what it imports
        lm_eval = pytest.importorskip("lm_eval")
        from lm_eval.tasks import TaskManager

        documents = [{"question": a, "choices": [b, c], "answer": i % 2} for i, (a, b, c) in enumerate(
            [("AB", "CD", "EF"), ("XY", "ZZ", "Q"), ("HELLO", "!", "?"), ("NO", "34", "56")])]  # fmt: skip
        (tmp_path / "docs.json").write_text("\n".join(map(json.dumps, documents)))
        (tmp_path / "tiny.yaml").write_text(
            f"""task: tiny
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path / "docs.json"}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: answer
target_delimiter: ""
metric_list: [{{metric: acc}}]
"""
        )
        found = lm_eval.simple_evaluate(
            model=lm_eval_model(steps.decoder(), Letters()), tasks=["tiny"],
            task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False), bootstrap_iters=0,
        )  # fmt: skip
    right = 0
    for one in documents:
        scores = [log_likelihood(ids(one["question"] + c), len(one["question"]))[0] for c in one["choices"]]
        right += int(scores[1] > scores[0]) == one["answer"]
    assert found["results"]["tiny"]["acc,none"] == right / 4
