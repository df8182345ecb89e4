"""Wrong input from Python: an error of irc's own that says what is wrong, whatever would have come of it inside."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import irc
from irc.core.errors import OptionError, StorageError, TargetError

X = torch.ones(3, 4)


@pytest.fixture(scope="module")
def compiled() -> irc.Compiled:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).eval()
    return irc.compile(model, example_inputs=(X,), verify="off")


def program_of(compiled: irc.Compiled) -> irc.Program:
    return compiled.stages["capture"]


@pytest.mark.parametrize("called", [lambda c: c, program_of], ids=["compiled", "program"])
@pytest.mark.parametrize(
    ("value", "said"),
    [
        (torch.ones(3, 5), "input is f32[3, 5], not f32[B, 4]"),
        (torch.ones(3, 4, dtype=torch.int64), "input is i64[3, 4], not f32[B, 4]"),
        (torch.ones(2, 3, 5), "input is f32[2, 3, 5], not f32[B, 4]"),
        ("x", "input is str, not f32[B, 4]"),
    ],
)
def test_inputs_that_do_not_fit(
    compiled: irc.Compiled, called: Callable[[irc.Compiled], Any], value: Any, said: str
) -> None:
    with pytest.raises(irc.IrcError) as caught:
        called(compiled)(value)
    assert str(caught.value) == f"program Sequential cannot take these inputs:\n  - {said}"
    assert called(compiled)(torch.ones(7, 4)).shape == (7, 2)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"options": 5}, "options are a mapping of names to values, not 5"),
        ({"target": 5}, "target is a name or a Target, not 5"),
        ({"target": "gpu"}, "did you mean 'cpu'"),
        ({"verify": "sometimes"}, "not 'sometimes'"),
        ({"passes": 5}, "5 is not a pass"),
        ({"cache": __file__}, "is not a folder that can be written to"),
    ],
)
def test_arguments_of_compile(compiled: irc.Compiled, options: dict[str, Any], said: str) -> None:
    with pytest.raises(irc.IrcError, match=said):
        irc.compile(program_of(compiled), **options)


def test_stages_and_pictures(compiled: irc.Compiled, tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="there is no stage 'capt'; there are capture"):
        compiled.stages["capt"]
    assert irc.draw(program_of(compiled), str(tmp_path / "net.svg")) == 3


def test_what_is_no_description_of_sizes_and_no_program(compiled: irc.Compiled) -> None:
    with pytest.raises(irc.IrcError, match=r"which sizes stay symbolic, .* not 'B'"):
        irc.capture(nn.Linear(4, 2), (torch.ones(3, 4),), dynamic="B")
    with pytest.raises(irc.IrcError, match=r"diff compares two programs, .* not a int"):
        irc.diff(program_of(compiled), 5)  # type: ignore[arg-type]  # the mistake that is tried


def test_places_that_hold_nothing_of_irc(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="nowhere does not exist: a program or an artifact is a folder"):
        irc.load(tmp_path / "nowhere")
    (tmp_path / "file").write_text("text")
    with pytest.raises(StorageError, match="file is no folder"):
        irc.load(tmp_path / "file")
    with pytest.raises(StorageError, match=r"is no compiled model: it has no compiled\.json, which Compiled\.save"):
        irc.Compiled.load(tmp_path)
    with pytest.raises(StorageError, match="is no compiled model: there is no such folder"):
        irc.Compiled.load(tmp_path / "nowhere")
    with pytest.raises(OptionError, match=r"cannot read none\.yaml: No such file or directory"):
        irc.PassManager("none.yaml")


def test_options_of_a_pass_are_named_once() -> None:
    with pytest.raises(OptionError, match=r"pass 'quantize-weights': bits must be 2 to 8, not 9"):
        irc.PassManager("quantize-weights{bits=9}")


def test_what_gguf_files_are_not_for(compiled: irc.Compiled, tmp_path: Path) -> None:
    with pytest.raises(TargetError, match=r"reads f32\[.*\], not token ids: GGUF files are language models"):
        irc.export_gguf(compiled.stages["capture"], tmp_path / "net.gguf")
