"""Reproducer folders: whole, readable, and they fail again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from irc.core.contract import PassContext, PassResult
from irc.core.errors import NumericError, StorageError
from irc.core.manager import PassManager
from irc.core.program import Program
from irc.core.reproducer import replay_reproducer
from tests.manager.toys import SquareToPow

pytestmark = pytest.mark.usefixtures("registered")


def leave(program: Program, folder: Path) -> tuple[Path, str]:
    with pytest.raises(NumericError) as caught:
        PassManager("square-to-pow{wrong=[1]}", repro_dir=folder).run(program)
    (made,) = folder.iterdir()
    return made, str(caught.value)


def test_it_fails_again(program: Program, tmp_path: Path) -> None:
    folder, message = leave(program, tmp_path)
    assert folder.name == "toy-square-to-pow"
    assert message.endswith(f"\n  reproducer: {folder}")
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md", "error.txt", "inputs.safetensors", "pipeline.txt", "program", "reproducer.json",
    ]  # fmt: skip
    assert (folder / "pipeline.txt").read_text() == "square-to-pow{wrong=[1]}\n"
    assert (folder / "error.txt").read_text().startswith("NumericError: pass 'square-to-pow' changed the numbers")
    assert "replay_reproducer('.')" in (folder / "README.md").read_text()
    settings = json.loads((folder / "reproducer.json").read_text())
    assert settings["versions"]["torch"].startswith("2.")
    with pytest.raises(NumericError, match="pass 'square-to-pow' changed the numbers") as again:
        replay_reproducer(folder)
    assert again.value.node is not None
    assert again.value.node.startswith("pow")


def test_a_fixed_pass_returns(program: Program, tmp_path: Path) -> None:
    folder, _ = leave(program, tmp_path)
    assert replay_reproducer(folder, [SquareToPow()]).report.rows[1].matches == 3


def test_a_second_failure_gets_a_folder_of_its_own(program: Program, tmp_path: Path) -> None:
    leave(program, tmp_path)
    with pytest.raises(NumericError):
        PassManager("square-to-pow{wrong=[1]}", repro_dir=tmp_path).run(program)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["toy-square-to-pow", "toy-square-to-pow-2"]


@pytest.mark.parametrize("missing", ["pipeline.txt", "reproducer.json", "inputs.safetensors"])
def test_a_damaged_folder_is_an_error(program: Program, tmp_path: Path, missing: str) -> None:
    folder, _ = leave(program, tmp_path)
    (folder / missing).unlink()
    with pytest.raises(StorageError, match="is no whole reproducer folder"):
        replay_reproducer(folder)


def test_a_failure_to_write_does_not_hide_the_error(program: Program, tmp_path: Path) -> None:
    occupied = tmp_path / "file"
    occupied.write_text("not a folder")
    with pytest.raises(NumericError, match="no reproducer could be written") as caught:
        PassManager("square-to-pow{wrong=[1]}", repro_dir=occupied).run(program)
    assert "changed the numbers" in str(caught.value)


def test_an_anonymous_pass_is_left_by_name(program: Program, tmp_path: Path) -> None:
    class Odd(SquareToPow):
        def run(self, program: Program, ctx: PassContext) -> PassResult:
            raise KeyError("odd")

    with pytest.raises(Exception, match="odd"):
        PassManager([Odd(wrong=object())], repro_dir=tmp_path).run(program)
    (folder,) = tmp_path.iterdir()
    assert (folder / "pipeline.txt").read_text() == "square-to-pow\n"
    assert "has no text form" in json.loads((folder / "reproducer.json").read_text())["pipeline_problem"]
