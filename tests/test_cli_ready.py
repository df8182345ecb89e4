"""What `irc compile` wrote is run by the commands that generate, and refused by those that need a model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import irc
from irc.cli.models import load_model
from irc.core.target import get_target
from irc.core.toolchain import find_compiler

PROMPT = ("--prompt", "import os", "-n", "8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The draft model, compiled and saved as `irc compile draft -o draft.compiled` does."""
    loaded = load_model("draft")
    compiled = irc.compile(
        loaded.model, example_inputs=loaded.example_inputs, dynamic=loaded.dynamic, tokenizer=loaded.tokenizer,
        verify="off",
    )  # fmt: skip
    return compiled.save(tmp_path_factory.mktemp("ready") / "draft.compiled")


def test_generate_gives_the_same_as_from_the_model(run, folder: Path) -> None:
    code, plain, _ = run("generate", "draft", *PROMPT)
    assert (code, run("generate", folder, *PROMPT)[1]) == (0, plain)
    drafted = run("generate", folder, *PROMPT, "--draft", folder)
    assert (drafted[0], drafted[1]) == (0, plain)
    assert "guesses stood" in drafted[2]


def test_batch_and_serve(run, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "import os", "max_tokens": 4}\n')
    code, out, _ = run("batch", folder, tmp_path / "prompts.jsonl", "-o", tmp_path / "answers.jsonl")
    assert code == 0
    assert "1 answered" in out
    assert len(json.loads((tmp_path / "answers.jsonl").read_text())["token_ids"]) == 4

    served = []
    monkeypatch.setattr("irc.serving.serve_forever", lambda serving, **where: served.append(serving.options.name))
    assert run("serve", folder)[0] == 0
    assert served == ["draft.compiled"]


def test_what_is_compiled_is_not_compiled_again(run, folder: Path) -> None:
    code, _, err = run("generate", folder, "-t", "cpu", "-p", "merge-qkv", *PROMPT)
    assert code == 2
    assert "compiled already, for target 'reference': leave out --passes and --target" in err


def test_artifacts_that_hold_no_program_are_no_models(run, tmp_path: Path) -> None:
    (tmp_path / "compiled.json").write_text('{"target": "cpu", "name": "net", "eos": null}\n')
    (tmp_path / "graph.irc").write_text("")
    code, _, err = run("dump", tmp_path)
    assert code == 2
    assert "is compiled already, for target 'cpu': 'irc generate'" in err


def test_an_artifact_without_a_tokenizer(run, folder: Path, tmp_path: Path) -> None:
    for file in folder.iterdir():
        if file.name != "tokenizer.json":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    code, _, err = run("generate", tmp_path, *PROMPT)
    assert code == 2
    assert "comes without a tokenizer" in err


@pytest.mark.skipif(find_compiler() is None, reason="needs a C++ compiler (g++ or clang++)")
def test_a_saved_program_in_cpp_needs_no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(2, 4)
    compiled = irc.compile(
        torch.nn.Linear(4, 3).eval(), target="cpu", example_inputs=(x,), options={"isa": "plain", "flags": ("-O0",)}
    )
    compiled.save(tmp_path / "linear.irca")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert get_target("cpu").available() is not None
    loaded = irc.Compiled.load(tmp_path / "linear.irca", options={"isa": "plain"})
    assert torch.equal(loaded(x), compiled(x))
