"""What the command line accepts as a model, and how each kind is loaded.

demo, tinypy-draft         the models that ship with irc
model.py:name              a module, or a function that returns one (or a pair: module, example inputs)
folder/                    a program saved by irc, or a Hugging Face model folder (safetensors)
model.pt2, .onnx, .gguf    an exported program, an ONNX file, a GGUF file
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import sys
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from irc.core.calibration import CalibrationData
    from irc.core.program import Program

MODEL_HELP = (
    "A model: 'demo' (ships with irc), FILE.py:NAME (a module, or a function that returns one"
    " or a pair of one and its example inputs), a program folder, a Hugging Face folder,"
    " or a .pt2, .onnx or .gguf file."
)
_SHIPPED = {"demo": "tinypy", "tinypy": "tinypy", "draft": "tinypy-draft", "tinypy-draft": "tinypy-draft"}


@dataclass(frozen=True)
class LoadedModel:
    """A model as the user named it: a module or a program, with what is known about it."""

    model: Any
    name: str
    example_inputs: Any = None
    dynamic: Any = None
    tokenizer: Any = None

    def program(self) -> Program:
        """The canonical program: captured now, unless the user gave one."""
        from irc.core.program import Program
        from irc.frontend import capture

        if isinstance(self.model, Program):
            return self.model
        return capture(self.model, self.example_inputs, dynamic=self.dynamic, name=self.name)


def load_model(spec: str) -> LoadedModel:
    """Load what `spec` names.

    Raises:
        OptionError: nothing of that name, or a file of an unknown kind.
    """
    from irc.core.errors import OptionError

    if spec in _SHIPPED:
        return load_shipped(_SHIPPED[spec])
    file, _, attribute = spec.rpartition(":")
    if file.endswith(".py"):
        return _load_python(Path(file), attribute)
    path = Path(spec)
    compiled = compiled_for(spec)
    if compiled is not None and not (path / "weights.safetensors").is_file():
        raise OptionError(
            f"{spec} is compiled already, for target {compiled!r}: 'irc generate', 'irc serve' and 'irc batch' run it,"
            " irc.load in Python; other commands need the model or a program folder"
        )
    if (path / "graph.irc").is_file():
        from irc.core.storage import load

        return LoadedModel(load(path), path.resolve().name)
    if (path / "config.json").is_file():
        return _load_huggingface(path)
    if path.suffix == ".pt2" and path.is_file():
        return LoadedModel(str(path), path.stem)
    if path.suffix == ".onnx" and path.is_file():
        from irc.frontend.onnx import from_onnx

        return LoadedModel(from_onnx(path), path.stem)
    if path.suffix == ".gguf" and path.is_file():
        from irc.lowering.gguf import from_gguf

        return LoadedModel(from_gguf(path), path.stem)
    if path.is_dir():
        raise OptionError(f"{spec} holds neither a program (graph.irc) nor a Hugging Face model (config.json)")
    if path.suffix == ".py":
        raise OptionError(f"say which model in the file: {spec}:NAME")
    reason = "is not a kind of model that irc reads" if path.exists() else "does not exist"
    raise OptionError(f"{spec} {reason}. {MODEL_HELP}")


def compiled_for(spec: str) -> str | None:
    """The target that a folder was compiled for; None where `irc compile` wrote nothing there.

    Raises:
        StorageError: the folder is damaged.
    """
    from irc.compiled_folder import holds_settings, read_settings

    return read_settings(Path(spec)).target if holds_settings(Path(spec)) else None


def served_name(spec: str, loaded: LoadedModel) -> str:
    """What clients call a model that was given as `spec`: as the user did, or by the name of its file or folder."""
    return spec if spec in _SHIPPED else loaded.name


def load_shipped(which: str) -> LoadedModel:
    """The demo model or its draft, with tokenizer and example inputs."""
    import torch

    from irc.demo import tinypy

    tokenizer = tinypy.load_tokenizer()
    ids = tokenizer.encode("def main(argv=None):\n    parser = argparse.ArgumentParser(description=__doc__)\n").ids[:16]
    example = torch.tensor([ids, ids[::-1]])
    return LoadedModel(tinypy.load_model(which), which, (example,), ({0: "B", 1: "S"},), tokenizer)


def load_calibration(
    given: Path | None, loaded: LoadedModel, *, length: int = 512, count: int = 128, batch_size: int = 8
) -> CalibrationData | None:
    """Calibration data from what `--calibration` names: text goes through the model's tokenizer, in windows.

    Raises:
        OptionError: it does not exist, or is text for a model without a tokenizer.
    """
    from irc.core.calibration import CalibrationData
    from irc.core.errors import OptionError

    if given is None:
        return None
    options: dict[str, Any] = {
        "tokenizer": loaded.tokenizer, "length": length, "count": count, "batch_size": batch_size,
    }  # fmt: skip
    if str(given) == "demo" and not given.exists():
        from irc.demo.corpus import read_documents
        from irc.evaluation.datasets import END_OF_TEXT

        if loaded.tokenizer is None:
            raise OptionError("--calibration demo is text: this model comes without a tokenizer")
        return CalibrationData.from_text(
            (text + END_OF_TEXT for text in read_documents("train")), description="demo corpus", **options
        )
    if given.is_file():
        if loaded.tokenizer is None:
            raise OptionError(f"--calibration {given} is text: this model comes without a tokenizer")
        text = given.read_text(encoding="utf-8", errors="replace")
        return CalibrationData.from_text([text], description=str(given), **options)
    if loaded.tokenizer is None:
        return CalibrationData.from_folder(given, batch_size=batch_size)
    return CalibrationData.from_folder(given, **options)


def _load_python(path: Path, attribute: str) -> LoadedModel:
    from torch import nn

    from irc.core.errors import OptionError, nearest

    if not path.is_file():
        raise OptionError(f"{path} does not exist")
    with _told_of(path):
        module = _imported(path)
    found = getattr(module, attribute, None)
    if found is None:
        names = [
            name
            for name, value in vars(module).items()
            if isinstance(value, nn.Module) or getattr(value, "__module__", None) == module.__name__
        ]
        raise OptionError(f"{path} has no {attribute!r}{nearest(attribute, names)}")
    if not isinstance(found, nn.Module) and callable(found):
        with _told_of(path):
            found = found()
    example = None
    if isinstance(found, tuple) and len(found) == 2:
        found, example = found
    if not isinstance(found, nn.Module):
        raise OptionError(f"{path}:{attribute} gives a {type(found).__name__}, not a torch.nn.Module")
    return LoadedModel(found.eval(), attribute, example)


@contextlib.contextmanager
def _told_of(path: Path) -> Iterator[None]:
    """Errors of the user's own file, told from its first line on, without what called it."""
    from irc.core.errors import IrcError, OptionError

    try:
        yield
    except IrcError:
        raise
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        own = next(
            (i for i, frame in enumerate(frames) if Path(frame.filename).resolve() == path.resolve()), len(frames)
        )
        text = "".join([*traceback.format_list(frames[own:]), *traceback.format_exception_only(error)])
        raise OptionError(f"{path} fails:\n{text.rstrip()}") from error


def _imported(path: Path) -> ModuleType:
    """The file as a module, found by its name and next to its neighbours, as `python FILE` runs it."""
    name = path.stem
    while name in sys.modules:
        name = f"_{name}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # dataclasses look their module up there
    sys.path.insert(0, str(path.resolve().parent))
    spec.loader.exec_module(module)
    return module


def _load_huggingface(path: Path) -> LoadedModel:
    from irc.core.errors import OptionError

    try:
        import transformers
    except ImportError:
        raise OptionError(
            "a Hugging Face folder needs transformers: pip install 'irc-compiler[transformers]'"
        ) from None
    config = transformers.AutoConfig.from_pretrained(path, local_files_only=True)
    architectures = json.loads((path / "config.json").read_text()).get("architectures") or []
    cls = getattr(transformers, architectures[0], None) if architectures else None
    if cls is None:
        cls = transformers.AutoModelForCausalLM
    if not list(path.glob("*.safetensors")):
        raise OptionError(f"{path} has no .safetensors weights (other formats could run code when loaded)")
    model = cls.from_pretrained(path, config=config, local_files_only=True, use_safetensors=True)
    tokenizer = None
    if (path / "tokenizer.json").is_file():
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    return LoadedModel(model.eval(), path.resolve().name, tokenizer=tokenizer)
