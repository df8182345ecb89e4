"""Results of long passes, kept layer by layer on disk, so that a killed run goes on where it was.

One safetensors file a layer, written aside and renamed. A file is used only for the very same work: same program
and weights, same pass and options, same calibration data.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from irc.core.calibration import CalibrationData
from irc.core.contract import Pass, PassContext
from irc.core.hashing import structural_hash
from irc.core.program import Program

RESUME_KEY = "resume"


class LayerStore:
    """Tensors by layer name; without a folder nothing is kept."""

    def __init__(self, folder: Path | None, work: str) -> None:
        self._folder, self._work = folder, work
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)

    @staticmethod
    def of(ctx: PassContext, one: Pass, program: Program, data: CalibrationData) -> LayerStore:
        """The store that the user asked for with `pass_options={"resume": folder}`, if any."""
        folder = ctx.options.get(RESUME_KEY)
        if folder is None:
            return LayerStore(None, "")
        parts = (structural_hash(program), repr(one), data.fingerprint())
        return LayerStore(Path(folder), hashlib.sha256("\n".join(parts).encode()).hexdigest())

    def get(self, layer: str) -> dict[str, Tensor] | None:
        """What was put for that layer, or None: not there, unreadable, or of other work."""
        path = self._path(layer)
        if path is None or not path.is_file():
            return None
        try:
            with safe_open(path, framework="pt") as stored:
                if (stored.metadata() or {}).get("work") != self._work:
                    return None
                return {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 (no mapping)
        except (SafetensorError, OSError):
            return None

    def put(self, layer: str, tensors: Mapping[str, Tensor | None]) -> None:
        """Keep a layer's tensors; the file appears under its name only when it is complete."""
        path = self._path(layer)
        if path is None:
            return
        aside = path.with_suffix(".partial")
        present = {name: tensor.contiguous() for name, tensor in tensors.items() if tensor is not None}
        save_file(present, aside, metadata={"work": self._work})
        os.replace(aside, path)

    def _path(self, layer: str) -> Path | None:
        if self._folder is None:
            return None
        digest = hashlib.sha256(layer.encode()).hexdigest()[:8]
        safe = "".join(c if c.isalnum() or c in "._-" else "_" for c in layer)[-80:]
        return self._folder / f"{safe}-{digest}.safetensors"
