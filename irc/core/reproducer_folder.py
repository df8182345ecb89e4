"""Writes reproducer folders: everything that is needed to run a failing pass again, somewhere else.

program/            the program just before the failing pass (see `irc.load`)
pipeline.txt        the failing pass as pipeline text
inputs.safetensors  the flat example inputs (those that are no tensors: in reproducer.json)
reproducer.json     versions and settings
error.txt           the error
README.md           how to run it again: `irc.core.reproducer`
"""

from __future__ import annotations

import json
import platform
import shutil
import tempfile
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from irc.core.contract import Pass
from irc.core.errors import OptionError
from irc.core.pipeline import print_pipeline
from irc.core.program import Program

_PACKAGES = ("irc-compiler", "torch", "numpy", "transformers", "sympy")
_README = """# A failing pass

`{pass_name}` failed on the program in this folder:

    {first_line}

Run it again: `python -c "from irc.core.reproducer import replay_reproducer; replay_reproducer('.')"`

The whole message is in `error.txt`, the pass with its options in `pipeline.txt`.
"""


def write_reproducer(
    folder: str | Path, program: Program, one: Pass, inputs: Sequence[Any], error: Exception, *, verify: str
) -> Path:
    """Write a reproducer as a new folder inside `folder`; returns its path. It is there whole or not at all."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=".part-", dir=folder))
    try:
        program.save(aside / "program")
        try:
            text, problem = print_pipeline([one]), None
        except OptionError as unprintable:
            text, problem = one.name, str(unprintable)
        (aside / "pipeline.txt").write_text(text + "\n", encoding="utf-8")
        _write_inputs(aside, inputs, verify, problem)
        (aside / "error.txt").write_text(f"{type(error).__name__}: {error}\n", encoding="utf-8")
        first = (str(error).splitlines() or [type(error).__name__])[0]
        readme = _README.format(pass_name=text, first_line=first)
        (aside / "README.md").write_text(readme, encoding="utf-8")
        return aside.rename(_free(folder, f"{program.name}-{one.name}"))
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _write_inputs(folder: Path, inputs: Sequence[Any], verify: str, problem: str | None) -> None:
    tensors: dict[str, Tensor] = {}
    entries: list[dict[str, Any]] = []
    for index, value in enumerate(inputs):
        if isinstance(value, Tensor):
            tensors[f"input_{index}"] = value.detach().clone().contiguous()
            entries.append({"tensor": f"input_{index}"})
        else:
            entries.append({"value": value})
    save_file(tensors, folder / "inputs.safetensors")
    settings = {"verify": verify, "inputs": entries, "versions": _versions(), "pipeline_problem": problem}
    (folder / "reproducer.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _versions() -> dict[str, str]:
    installed = {dist.metadata["Name"]: dist.version for dist in metadata.distributions()}
    versions = {name: installed[name] for name in _PACKAGES if name in installed}
    return {"python": platform.python_version(), "platform": platform.platform()} | versions


def _free(folder: Path, name: str) -> Path:
    safe = "".join(c if c.isalnum() or c in "-_." else "_" for c in name)
    path, count = folder / safe, 2
    while path.exists():
        path, count = folder / f"{safe}-{count}", count + 1
    return path
