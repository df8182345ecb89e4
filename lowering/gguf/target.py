"""The target `gguf` and its artifact: a file for llama.cpp, which irc runs by reading it back."""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from irc.core.artifact_check import ArtifactCheck, check_artifact
from irc.core.errors import StorageError, TargetError
from irc.core.program import Program
from irc.core.target import Artifact, Concern, Coverage, Options, Target, count_ops, read_options, register_target
from irc.lowering.gguf.describe import describe
from irc.lowering.gguf.export import Exported, export_gguf
from irc.lowering.gguf.importing import from_gguf
from irc.lowering.gguf.match import find_architecture

_FILE = "model.gguf"
# Largest error of an output, relative to its largest value, that a type may cause: rounding it was asked for. A wrong
# tensor or a wrong order of rows gives 1 and more.
_TOLERANCES = {
    "f16": 0.02, "bf16": 0.05, "q8_0": 0.05, "q6_k": 0.1, "q5_k": 0.2, "q5_1": 0.2, "q5_0": 0.2, "q4_k": 0.4,
    "q4_1": 0.4, "q4_0": 0.4, "q3_k": 0.7, "q2_k": 0.9,
}  # fmt: skip
_GELU_ERROR = 2e-3


@dataclass(frozen=True, kw_only=True)
class GgufOptions:
    """Options of the target; see `export_gguf`."""

    type: str | None = None
    types: Mapping[str, str] | None = None
    tokenizer: Any = None
    chat_template: str | None = None
    imatrix: Any = None
    architecture: str | None = None
    context_length: int | None = None
    metadata: Mapping[str, Any] | None = None


class GgufArtifact(Artifact):
    """A GGUF file, run through irc's own reading of it."""

    target: ClassVar[str] = "gguf"

    def __init__(
        self, path: Path, *, exported: Exported | None = None, notes: Iterable[str] = (), temporary: bool = False
    ) -> None:
        self.path, self.exported = path, exported
        if temporary:  # the folder goes when the artifact does
            weakref.finalize(self, shutil.rmtree, path.parent, ignore_errors=True)
        self._program: Program | None = None
        super().__init__(["input_ids"], None, notes)

    @property
    def program(self) -> Program:
        """What the file computes."""
        if self._program is None:
            self._program = from_gguf(self.path)
        return self._program

    def run(self, *inputs: Any) -> list[Any]:
        self.check_inputs(inputs)
        return self.program.run(*inputs)

    def save(self, path: str | Path) -> Path:
        target = Path(path)
        if target.is_dir():
            target = target / _FILE
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".irc-", dir=target.parent) as aside:
            shutil.copyfile(self.path, Path(aside) / _FILE)
            os.replace(Path(aside) / _FILE, target)
        return target

    @classmethod
    def load(cls, path: str | Path, options: Options | None = None) -> GgufArtifact:
        file = Path(path)
        if not file.is_file():
            raise StorageError(f"{file} does not exist")
        return cls(file)

    def verify(self, program: Program, inputs: Sequence[Any] | None = None) -> ArtifactCheck:
        """As for every artifact; a type that rounds may differ by what it rounds."""
        tolerance = None
        if self.exported is not None and self.exported.lossy:
            tolerance = max(_TOLERANCES.get(kind, 0.0) for kind in self.exported.types.values())
        if any("gelu" in note for note in self.notes):
            tolerance = max(tolerance or 0.0, _GELU_ERROR)
        return check_artifact(self.target, self.run, program, inputs, tolerance=tolerance)


@register_target
class GgufTarget(Target):
    """Lowers a transformer to a GGUF file."""

    name: ClassVar[str] = "gguf"
    description: ClassVar[str] = "a GGUF file that llama.cpp loads"
    options_type: ClassVar[type] = GgufOptions
    artifact_type: ClassVar[type[Artifact]] = GgufArtifact
    suffix: ClassVar[str] = ".gguf"

    def available(self) -> str | None:
        missing = importlib.util.find_spec("gguf") is None
        return "the package gguf is missing (pip install 'irc-compiler[gguf]')" if missing else None

    def check(self, program: Program) -> Coverage:
        coverage = Coverage(self.name)
        try:
            find_architecture(describe(program))
        except TargetError as error:
            coverage.refused.append(Concern(program.name, 1, str(error)))
        else:
            coverage.supported = count_ops(program.operations())
        return coverage

    def lower(self, program: Program, options: Options | None = None) -> GgufArtifact:
        self.require_available()
        chosen = read_options(GgufOptions, options, what="target gguf")
        path = Path(tempfile.mkdtemp(prefix="irc-gguf-")) / _FILE
        try:
            exported = export_gguf(program, path, **vars(chosen))
        except BaseException:
            shutil.rmtree(path.parent, ignore_errors=True)
            raise
        notes = [f"architecture {exported.architecture}", *exported.notes]
        return GgufArtifact(path, exported=exported, notes=notes, temporary=True)
