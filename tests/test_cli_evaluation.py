"""`irc eval` and `irc sensitivity` as a user meets them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from typer.testing import CliRunner

from irc.cli import evaluation
from irc.cli import main as cli
from irc.cli.models import LoadedModel
from irc.core.pipeline import parse_pipeline
from irc.evaluation import Sensitivity
from tests.lowering import steps

TEXT = "the quick brown fox jumps over the lazy dog and runs away from all the other animals " * 8


@pytest.fixture(autouse=True)
def small_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """`demo` is a tiny random decoder with a tokenizer of letters; `cnn` has none."""
    letters = {char: index for index, char in enumerate(" abcdefghijklmnopqrstuvwxyz?")}
    tokenizer = Tokenizer(models.WordLevel(letters, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    known = {
        "demo": LoadedModel(steps.decoder(), "tiny", tokenizer=tokenizer),
        "other": LoadedModel(steps.decoder(), "other", tokenizer=tokenizer),
        "cnn": LoadedModel(steps.cnn(), "cnn"),
    }
    real = evaluation.load_model
    monkeypatch.setattr(evaluation, "load_model", lambda spec: known[spec] if spec in known else real(spec))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def test_variants_side_by_side(run, text: Path, tmp_path: Path) -> None:
    picture = tmp_path / "sizes.svg"
    code, out, err = run(
        "eval", "demo", "--data", text, "--length", 16, "-p", "int8=quantize-weights{bits=8,group-size=16}",
        "-p", "quantize-weights{bits=2,group-size=16},insert-kv-cache{max-length=16}", "--plot", picture,
    )  # fmt: skip
    assert code == 0, err
    rows = out[out.index("───") :].splitlines()[1:4]
    assert [re.split(r"[ {]", row)[0] for row in rows] == ["demo", "int8", "quantize-weights"]
    for word in ("bits/weight", "ppl", "KL", "top-1", "100.00%"):
        assert word in out
    assert picture.stat().st_size > 3000


def test_json_and_several_models(run, text: Path) -> None:
    code, out, err = run(
        "eval", "demo", "other", "--data", text, "--length", 16, "--windows", 3, "--metrics", "kl", "--json",
        "-p", "int2=quantize-weights{bits=2,group-size=16}",
    )  # fmt: skip
    assert code == 0, err
    found = {one["name"]: one for one in json.loads(out)["results"]}
    assert list(found) == ["demo", "demo, int2", "other", "other, int2"]
    assert found["demo"]["metrics"] == {"kl": 0.0}
    assert found["other"]["metrics"]["kl"] == pytest.approx(0, abs=1e-6)
    assert found["demo, int2"]["metrics"]["kl"] == pytest.approx(found["other, int2"]["metrics"]["kl"]) != 0
    assert found["demo"]["num_samples"] == 3


def test_classes_from_a_file(run, tmp_path: Path) -> None:
    path = tmp_path / "data.safetensors"
    save_file({"inputs": torch.randn(7, 3, 8, 8), "classes": torch.randint(5, (7,))}, path)
    code, out, err = run("eval", "cnn", "--data", path, "-p", "int8=quantize-weights{bits=8}")
    assert code == 0, err
    assert "accuracy" in out


def test_sensitivity_to_pipeline(run, text: Path, tmp_path: Path) -> None:
    results = tmp_path / "run.json"
    arguments = ("sensitivity", "demo", "--data", text, "--length", 16, "--windows", 4, "--bits", "2,3,4,8",
                 "--group-size", 16, "--metric", "second-order", "-o", results, "--average-bits", 5.5)  # fmt: skip
    code, out, err = run(*arguments)
    assert code == 0, err
    assert "layers.0.mlp.up_proj.weight" in out
    assert "not measured: weight embed.weight is an embedding table" in out
    pipeline = out.strip().splitlines()[-1]
    assert len(parse_pipeline(pipeline)) == 1
    assert Sensitivity.load(results).metric == "second-order"
    assert run(*arguments) == (0, out, err)  # from the file
    code, _, err = run("eval", "demo", "--data", text, "--length", 16, "-p", f"mixed={pipeline}")
    assert code == 0, err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["eval", "demo", "--data", "{folder}/nothing"], ["nothing does not exist"]),
        (["eval", "cnn", "--data", "{text}"], ["comes without a tokenizer"]),
        (["eval", "demo", "--data", "{text}", "--length", "2000"], ["fewer than one window of 2000"]),
        (["eval", "demo", "--data", "{text}", "--metrics", "perplexty"], ["perplexty", "did you mean 'perplexity'"]),
        (["eval", "demo", "--data", "{text}", "-p", "a=quantize-wieghts"], ["did you mean 'quantize-weights'"]),
        (["eval", "demo", "--data", "{text}", "-p", "a=", "-p", "a="], ["two variants are called 'a'"]),
        (["eval", "demo", "--data", "{text}", "--plot", "{folder}/out.bmp"], [".svg, .png, .pdf, not .bmp"]),
        (["eval", "demo", "--data", "{folder}/no.safetensors"], ["does not exist"]),
        (["eval", "cnn", "--data", "{text}.safetensors"], ["cannot be read"]),
        (["eval", "demo", "--data", "{text}", "--length", "16", "-p", "quantize-weights{rules=[*.upproj=int4.g32]}"],
         ["*.upproj=int4.g32", "up_proj"]),
        (["sensitivity", "demo", "--data", "{text}", "--bits", "2,x"], ["numbers with commas", "2,x"]),
        (["sensitivity", "demo", "--data", "{text}", "--bits", "1,9"], ["not 1", "not 9"]),
        (["sensitivity", "demo", "--data", "{text}", "--length", "16", "--bits", "4", "--group-size", "16",
          "--average-bits", "3"], ["--average-bits 3 is below the smallest of --bits 4"]),
        (["sensitivity", "demo", "--data", "{text}", "--length", "16", "--bits", "4", "--group-size", "16",
          "--average-bits", "4.5"], ["the smallest formats tried take 5.000"]),
        (["sensitivity", "{folder}/nothing"], ["nothing", "does not exist"]),
    ],
)  # fmt: skip
def test_bad_input_is_a_plain_error(run, text: Path, tmp_path: Path, arguments: list[str], words: list[str]) -> None:
    (tmp_path / "text.txt.safetensors").write_text("no tensors")
    before = sorted(p.name for p in tmp_path.iterdir())
    code, _, err = run(*(a.replace("{folder}", str(tmp_path)).replace("{text}", str(text)) for a in arguments))
    assert code == 2, err
    assert err.startswith("error: ")
    assert "Traceback" not in err
    for word in words:
        assert word in err
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_help_has_examples() -> None:
    for command in ("eval", "sensitivity"):
        assert "Examples" in CliRunner().invoke(cli.app, [command, "--help"]).stdout
