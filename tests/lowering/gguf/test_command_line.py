"""`irc compile --target gguf`, from a program folder to a file and back."""

from pathlib import Path

import torch
from typer.testing import CliRunner

import irc
from irc.cli import main as cli
from tests.lowering.gguf.models import ids, program


def test_compiled_on_the_command_line_and_read_back(tmp_path: Path) -> None:
    source, file = program("odd"), tmp_path / "odd.gguf"
    source.save(tmp_path / "odd")
    arguments = ["compile", str(tmp_path / "odd"), "--target", "gguf", "-O", "type=q8_0", "-o", str(file)]
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 0, result.output
    assert "architecture llama" in result.output
    found, expected = irc.from_gguf(file).run(ids())[0], source.run(ids())[0]
    assert (found - expected).abs().max() < 0.02 * expected.abs().max()
    assert torch.equal(found.argmax(-1)[:, -1], expected.argmax(-1)[:, -1])


def test_an_unknown_type_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    program("odd").save(tmp_path / "odd")
    target = ["--target", "gguf", "-O", "type=q4_9", "-o", str(tmp_path / "x.gguf")]
    result = CliRunner().invoke(cli.app, ["compile", str(tmp_path / "odd"), *target])
    assert result.exit_code != 0
    assert "q4_9" in f"{result.output}{result.exception}"
    assert not list(tmp_path.glob("*.gguf"))
