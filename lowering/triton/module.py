"""A printed program as a module in this process. Triton reads a kernel's text from its file, so there has to be one."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import sys
import tempfile
from pathlib import Path
from types import ModuleType

from irc.core.errors import TargetError
from irc.core.toolchain import cache_folder


def installed() -> bool:
    """Whether Triton is there."""
    return importlib.util.find_spec("triton") is not None


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter: decided by the environment when Triton is imported."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on")


def import_module(source: str) -> ModuleType:
    """The module of a printed program; equal text is imported once.

    Raises:
        TargetError: Triton is missing.
    """
    if not installed():
        raise TargetError("target 'triton' needs the package triton: pip install 'irc-compiler[triton]'")
    name = f"irc_triton_{hashlib.sha256(source.encode()).hexdigest()[:24]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, _written(name, source))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _written(name: str, source: str) -> Path:
    folder = cache_folder() / "triton"
    path = folder / f"{name}.py"
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        descriptor, aside = tempfile.mkstemp(dir=folder, suffix=".tmp")
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(source)
        os.replace(aside, path)
    return path
