"""Runs a failing pass again from the folder that `irc.core.reproducer_folder` wrote of it."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file

from irc.core.errors import StorageError
from irc.core.manager import PassManager, PipelineResult
from irc.core.pipeline import Source
from irc.core.storage import load


def replay_reproducer(folder: str | Path, passes: Source | None = None) -> PipelineResult:
    """Run the pass of a reproducer again: raises what it raised, or returns if that is fixed.

    `passes` stands in for `pipeline.txt` where the pass has no registered name.
    """
    folder = Path(folder)
    try:
        text = (folder / "pipeline.txt").read_text(encoding="utf-8").strip()
        settings = json.loads((folder / "reproducer.json").read_text(encoding="utf-8"))
        tensors = load_file(folder / "inputs.safetensors")
        inputs = [tensors[entry["tensor"]] if "tensor" in entry else entry["value"] for entry in settings["inputs"]]
        verify = settings["verify"]
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, SafetensorError, KeyError, TypeError) as error:
        raise StorageError(f"{folder} is no whole reproducer folder: {type(error).__name__}: {error}") from error
    program = load(folder / "program")
    return PassManager(passes if passes is not None else text, verify=verify).run(program, inputs)
