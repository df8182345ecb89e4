"""Reproducer folders: everything that is needed to run a failing pass again, somewhere else.

program/            the program just before the failing pass (see `irc.load`)
pipeline.txt        the failing pass as pipeline text
inputs.safetensors  the flat example inputs (those that are no tensors: in reproducer.json)
reproducer.json     versions and settings
error.txt           the error
README.md           how to run it again
"""

from __future__ import annotations

import json
import platform
import shutil
import tempfile
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from irc.core.contract import Pass
from irc.core.errors import OptionError, StorageError
from irc.core.pipeline import Source, print_pipeline
from irc.core.program import Program

if TYPE_CHECKING:
    from irc.core.manager import PipelineResult

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
    from irc.core.storage import save

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=".part-", dir=folder))
    try:
        save(program, aside / "program")
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


def replay_reproducer(folder: str | Path, passes: Source | None = None) -> PipelineResult:
    """Run the pass of a reproducer again: raises what it raised, or returns if that is fixed.

    `passes` stands in for `pipeline.txt` where the pass has no registered name.
    """
    from irc.core.manager import PassManager
    from irc.core.storage import load

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
