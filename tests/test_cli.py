"""The command line as a user meets it: results, exit codes, and that nothing partial is left behind."""

from __future__ import annotations

import importlib
import socket
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from irc.cli import main as cli
from irc.cli import running
from irc.cli.models import LoadedModel, served_name
from irc.core import contract
from irc.core.errors import IrcError
from irc.core.target import get_target

MODEL = '''
import torch
from torch import nn

class Net(nn.Module):
    """A convolution with batch norm and a classifier."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Linear(8, 10)

    def forward(self, x):
        return self.head(torch.relu(self.norm(self.conv(x))).mean((2, 3)))

def build():
    torch.manual_seed(0)
    return Net(), (torch.randn(2, 3, 8, 8),)

def broken():
    class Data(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x
    return Data(), (torch.randn(2, 3),)

def failing():
    return {}["weights"]

def other():
    return nn.Linear(5, 2), (torch.randn(2, 5),)

NUMBER = 3
'''
OWN_PASS = '''
from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import irc.passes
import torch
from net import build

@irc.passes.register_pass
@dataclass(frozen=True, kw_only=True)
class DropRelu(irc.passes.Pass):
    """relu(x)  →  x, which is wrong."""

    name: ClassVar[str] = "drop-relu"

    def run(self, program, ctx):
        found = program.graph.find_nodes(op="call_function", target=torch.ops.aten.relu.default)
        for node in found:
            program.replace(node, node.args[0])
        return irc.passes.PassResult(program, matches=len(found), modified=bool(found))
'''


@pytest.fixture
def model(tmp_path: Path) -> str:
    path = tmp_path / "net.py"
    path.write_text(MODEL)
    return f"{path}:build"


def test_capture_opt_check_diff(run, model: str, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    assert run("capture", model, "-o", first)[0] == 0
    code, out, _ = run("opt", first, "--passes", "fold-conv-batch-norm", "--print-after-change", "-o", second)
    assert code == 0
    assert "fold-conv-batch-norm" in out
    assert "program @" in out
    assert "batch_norm" not in (second / "graph.irc").read_text()
    assert run("check", second, "--against", first, "--rtol", "1e-5")[0] == 0
    code, out, _ = run("diff", first, second)
    assert code == 1
    assert "batch_norm" in out
    assert run("diff", first, first)[0] == 0


def test_dump_text_and_picture(run, model: str, tmp_path: Path) -> None:
    code, out, _ = run("dump", model)
    assert code == 0
    assert "aten.conv2d" in out or "aten.convolution" in out
    for kind in ("svg", "png"):
        picture = tmp_path / f"net.{kind}"
        assert run("dump", model, "--picture", picture)[0] == 0
        assert picture.stat().st_size > 2000
    code, out, _ = run("dump", model, "--layer", "head")
    assert code == 0
    assert "linear" in out
    assert "relu" not in out


def test_bisect_finds_nothing_wrong(run, model: str) -> None:
    code, out, _ = run("bisect", model, "--passes", "fold-conv-batch-norm")
    assert code == 0, out


def test_passes_of_the_models_own_file(run, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    importlib.import_module("irc.passes")  # those that ship register first, for good
    monkeypatch.setattr(contract, "_PASSES", dict(contract.registered_passes()))
    monkeypatch.setattr("sys.path", [*sys.path])
    (tmp_path / "own.py").write_text(OWN_PASS)
    code, out, _ = run("bisect", tmp_path / "own.py:build", "--passes", "fold-conv-batch-norm,drop-relu")
    assert code == 1
    assert "drop-relu" in out


def test_compile_to_onnx(run, model: str, tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    assert run("compile", model, "--target", "onnx", "-o", path)[0] == 0
    assert path.stat().st_size > 500


def test_opt_with_calibration(run, tmp_path: Path) -> None:
    (tmp_path / "text.py").write_text("def main():\n    return 1\n" * 400)
    arguments = ["opt", "demo", "--passes", "quantize-gptq{bits=4,group-size=32}", "--resume", tmp_path / "layers"]
    code, out, err = run(*arguments, "--calibration", tmp_path / "text.py", "-o", tmp_path / "small")
    assert code == 0, err
    assert "quantize-gptq" in out
    assert len(list((tmp_path / "layers").glob("*.safetensors"))) == 35
    code, _, err = run(*arguments, "--calibration", tmp_path / "nothing")
    assert code == 2
    assert "does not exist" in err
    code, _, err = run(*arguments)
    assert code == 2
    assert "needs calibration data" in err
    assert "--calibration" in err


def test_lists(run) -> None:
    code, out, _ = run("passes")
    assert code == 0
    assert "insert-kv-cache" in out
    code, out, _ = run("targets")
    assert code == 0
    assert "reference" in out
    assert "onnx" in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["opt", "{model}", "--passes", "fold-conv-batchnorm"], ["fold-conv-batchnorm", "fold-conv-batch-norm"]),
        (
            ["opt", "{model}", "--passes", "quantize-wieghts,quantize-weights{bit=4}"],
            ["quantize-wieghts", "bit", "bits"],
        ),
        (["opt", "{model}", "--passes", "quantize-weights{bits=4,group-size=7}"], ["7", "even"]),
        (["opt", "{model}", "--passes", "quantize-weights{bits=4,group-size=14}"], ["14", "head"]),
        (["capture", "{folder}/missing.py:build", "-o", "{folder}/out"], ["missing.py", "does not exist"]),
        (["capture", "{file}:biuld", "-o", "{folder}/out"], ["biuld", "build"]),
        (["capture", "{file}:NUMBER", "-o", "{folder}/out"], ["NUMBER"]),
        (["capture", "{file}:broken", "-o", "{folder}/out"], ["net.py"]),
        (["capture", "{file}:failing", "-o", "{folder}/out"], ["net.py fails", 'return {}["weights"]', "KeyError"]),
        (["check", "{model}", "--against", "{file}:other"], ["input is f32[2, 3, 8, 8], not f32[B, 5]"]),
        (["dump", "{model}", "--picture", "{folder}/none/out.svg"], ["there is no folder"]),
        (["dump", "{folder}/nothing"], ["nothing", "does not exist"]),
        (["dump", "{model}", "--picture", "{folder}/out.bmp"], ["bmp", "svg"]),
        (["dump", "{model}", "--layer", "layer9"], ["layer9", "head"]),
        (["compile", "{model}", "--target", "onxx", "-o", "{folder}/out"], ["onxx", "onnx"]),
        (["check", "{folder}"], ["graph.irc"]),
        (["generate", "{model}", "--prompt", "a"], ["tokenizer"]),
    ],
)
def test_bad_input_is_a_plain_error(run, model: str, tmp_path: Path, arguments: list[str], words: list[str]) -> None:
    names = {"model": model, "file": model.rpartition(":")[0], "folder": str(tmp_path)}
    before = sorted(p.name for p in tmp_path.iterdir())
    for name, value in names.items():
        arguments = [a.replace(f"{{{name}}}", value) for a in arguments]
    code, _, err = run(*arguments)
    assert code == 2
    assert err.startswith("error: ")
    assert "Traceback" not in err
    for word in words:
        assert word in err
    left = sorted(p.name for p in tmp_path.iterdir() if p.name != "__pycache__")
    assert left == [b for b in before if b != "__pycache__"]


def test_a_place_that_is_taken_is_told_before_the_work(run, model: str, tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    taken.write_text("mine")
    for arguments in (["opt", model, "-p", "fold-conv-batch-norm"], ["capture", model]):
        code, out, err = run(*arguments, "-o", taken)
        assert (code, out) == (2, "")
        assert "taken exists and is not a folder" in err
    assert taken.read_text() == "mine"
    for arguments in (["compile", model, "-t", "onnx", "-o", taken / "net.onnx"], ["demo", "-o", taken]):
        code, out, err = run(*arguments)
        assert (code, out) == (2, "")
        assert err.startswith("error: ")
        assert str(taken) in err


@pytest.mark.parametrize(
    ("target", "name", "words"),
    [
        ("onnx", "net.gguf", "target 'onnx' writes a .onnx file"),
        ("gguf", "net", "target 'gguf' writes a .gguf file"),
        ("reference", "net.onnx", "net.onnx is a name for target 'onnx'"),
        ("cpu", "taken", "taken exists and is no cpu artifact"),
        ("cpu", "taken/net", "taken is not a folder that can be written to"),
        ("onnxx", "net.onnx", "no target is called 'onnxx'"),
    ],
)
def test_compile_judges_the_place_before_the_model_is_loaded(
    run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str, name: str, words: str
) -> None:
    monkeypatch.setattr(running, "load_model", lambda spec: pytest.fail(f"{spec} was loaded"))
    (tmp_path / "taken").write_text("mine")
    code, out, err = run("compile", "demo", "-t", target, "-o", tmp_path / name)
    assert (code, out) == (2, "")
    assert words in err


def test_compile_over_what_it_wrote(run, model: str, tmp_path: Path) -> None:
    for target in ("reference", "onnx"):
        out = tmp_path / f"net{get_target(target).suffix}"
        for _ in range(2):
            code, _, err = run("compile", model, "-t", target, "-o", out)
            assert (code, err) == (0, "")


def test_a_port_that_is_taken_is_told_before_the_model_is_loaded(run) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        code, out, err = run("serve", "demo", "--port", port)
    assert (code, out) == (2, "")
    assert err == f"error: cannot listen on 127.0.0.1, port {port}: Address already in use\n"


def test_a_served_model_has_the_name_that_the_user_typed(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    served = []
    monkeypatch.setattr("irc.serving.serve_forever", lambda serving, **where: served.append(serving.options.name))
    assert run("serve", "draft")[0] == 0
    assert served == ["draft"]
    loaded = LoadedModel(None, "net")
    assert [served_name(spec, loaded) for spec in ("demo", "tinypy", f"{tmp_path}/net.gguf")] == [
        "demo",
        "tinypy",
        "net",
    ]


def test_generate_says_that_the_cache_is_full(run) -> None:
    code, _, err = run("generate", "draft", "--prompt", "x", "-n", "40", "-p", "insert-kv-cache{max-length=8}")
    assert code == 0
    assert "the length that the cache holds" in err


def test_files_of_other_tools(run, model: str, tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    assert run("compile", model, "-t", "onnx", "-o", path)[0] == 0
    code, out, _ = run("dump", path)
    assert code == 0
    assert "aten.conv2d" in out
    for name in ("net.onnx", "net.gguf", "net.pt2"):
        (tmp_path / name).write_bytes(b"GGUF and more that is none")
        code, _, err = run("dump", tmp_path / name)
        assert code == 2
        assert err.startswith("error: ")
        assert name in err
        assert "Traceback" not in err


def test_half_written_program_is_refused(run, model: str, tmp_path: Path) -> None:
    folder = tmp_path / "program"
    assert run("capture", model, "-o", folder)[0] == 0
    weights = folder / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-50])
    code, _, err = run("check", folder)
    assert code == 2
    assert "weights.safetensors" in err


def test_help_is_quick_and_has_examples() -> None:
    runner = CliRunner()
    result: Result = runner.invoke(cli.app, ["--help"])
    assert result.exit_code == 0
    for command in ("demo", "capture", "opt", "dump", "diff", "check", "compile", "generate", "bisect"):
        assert command in result.stdout
        assert "Examples" in runner.invoke(cli.app, [command, "--help"]).stdout


def test_errors_form_one_tree() -> None:
    import irc.core.errors as errors

    for value in vars(errors).values():
        if isinstance(value, type) and issubclass(value, Exception):
            assert issubclass(value, IrcError)


def test_generate_with_a_draft_says_the_same(run) -> None:
    arguments = ("generate", "draft", "--prompt", "import os", "-n", "12")
    code, plain, _ = run(*arguments)
    drafted = run(*arguments, "--draft", "tinypy-draft")
    assert (code, drafted[0], drafted[1]) == (0, 0, plain)
    assert "guesses stood" in drafted[2]


def test_reasons_keep_their_brackets(run, monkeypatch) -> None:
    from irc.core.target import get_target

    monkeypatch.setattr(type(get_target("gguf")), "available", lambda self: "pip install 'irc-compiler[gguf]'")
    code, out, _ = run("targets")
    assert code == 0
    assert "irc-compiler[gguf]" in out
