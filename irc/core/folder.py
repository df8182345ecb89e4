"""A program as a folder: what is in it, and how it is written. Never pickle.

    graph.irc            the text form
    weights.safetensors  weights by name (tied names stay in the text)
    inputs.safetensors   example inputs, if there are any
    manifest.json        format, sizes and sha256 of the files, versions, provenance of every node, other inputs

A folder is written aside and renamed, so it is there whole or not at all. `irc.core.storage` reads it back.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Collection, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from irc.core.errors import StorageError
from irc.core.listing.printer import print_program
from irc.core.provenance import sources_of
from irc.core.typed_graph import TypedGraph

FORMAT_VERSION = 1
GRAPH, WEIGHTS, INPUTS, MANIFEST = "graph.irc", "weights.safetensors", "inputs.safetensors", "manifest.json"
NUMBERS = (bool, int, float)


def save(program: TypedGraph, folder: str | Path, *, beside: Mapping[str, str] | None = None) -> None:
    """Write the program as a folder. A program folder that is there already is replaced; anything else is not.

    Args:
        beside: texts by file name that are written with it. A folder that has those files is replaced too, whatever
            else it holds.

    Raises:
        StorageError: weights without data, a target that is no program folder, or a full disk.
    """
    folder, beside = Path(folder), beside or {}
    prepare(folder, marks=beside)
    missing = [name for name, tensor in program.weights.items() if tensor.device.type == "meta"]
    if missing:
        raise StorageError(f"program {program.name} has no values for {len(missing)} weights (first: {missing[0]})")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.part-", dir=folder.parent))
    except OSError as error:
        raise StorageError(f"cannot write {folder}: {error}") from error
    try:
        _write(program, aside)
        for name, text in beside.items():
            (aside / name).write_text(text, encoding="utf-8")
        _put_in_place(aside, folder)
    except (OSError, SafetensorError) as error:
        raise StorageError(f"cannot write {folder}: {error}") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def prepare(folder: Path, *, marks: Collection[str] = ()) -> None:
    """Find out, before long work, that a program can be written there: nothing else is in the way.

    A folder that holds the files `marks` is known to be one that was written before, and may be replaced.

    Raises:
        StorageError: it cannot.
    """
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise StorageError(f"{folder} exists and is not a folder")
    if folder.is_dir() and not (marks and all((folder / name).is_file() for name in marks)):
        strangers = sorted(p.name for p in folder.iterdir() if p.name not in (GRAPH, WEIGHTS, INPUTS, MANIFEST))
        if strangers:
            raise StorageError(f"{folder} holds other files ({', '.join(strangers[:5])}): choose another place")
    require_place(folder)


def require_place(path: Path) -> None:
    """Find out, before long work, that a file or folder can be made there.

    Raises:
        StorageError: what is above it is no folder, or must not be written to.
    """
    above = next(parent for parent in path.absolute().parents if parent.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise StorageError(f"cannot write {path}: {above} is not a folder that can be written to")


def _write(program: TypedGraph, folder: Path) -> None:
    (folder / GRAPH).write_text(print_program(program), encoding="utf-8")
    save_file({name: _plain(tensor) for name, tensor in program.weights.items()}, folder / WEIGHTS)
    examples, tensors = _split_inputs(program)
    if tensors:
        save_file(tensors, folder / INPUTS)
    files = {path.name: {"bytes": path.stat().st_size, "sha256": file_hash(path)} for path in sorted(folder.iterdir())}
    manifest = {
        "format": FORMAT_VERSION,
        "name": program.name,
        "versions": {"irc": _irc_version(), "torch": torch.__version__},
        "files": files,
        "example_inputs": examples,
        "provenance": {
            node.name: [[s.node, s.module, s.location] for s in sorted(sources_of(node))]
            for node in program.graph.nodes
            if sources_of(node)
        },
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")


def _put_in_place(aside: Path, folder: Path) -> None:
    """Rename; an older folder of the same name is moved out of the way first and comes back if that fails."""
    os.chmod(aside, 0o755)  # mkdtemp made it private, and safetensors its files
    for path in aside.iterdir():
        os.chmod(path, 0o644)
    if not folder.exists():
        aside.rename(folder)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{folder.name}.old-", dir=folder.parent))
    try:
        folder.rename(old / "was")
        try:
            aside.rename(folder)
        except OSError:
            (old / "was").rename(folder)
            raise
    finally:
        shutil.rmtree(old, ignore_errors=True)


def _plain(tensor: Tensor) -> Tensor:
    # Safetensors refuses shared storage and strides: give each name its own dense copy where needed.
    dense = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    whole = dense.untyped_storage().nbytes() == dense.numel() * dense.element_size()
    return dense if whole and dense is not tensor and not _shares(dense, tensor) else dense.clone()


def _shares(a: Tensor, b: Tensor) -> bool:
    return b.device.type == "cpu" and a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def _split_inputs(program: TypedGraph) -> tuple[list[Any] | None, dict[str, Tensor]]:
    """Example inputs as JSON entries, and the tensors among them."""
    if program.example_inputs is None:
        return None, {}
    entries: list[Any] = []
    tensors: dict[str, Tensor] = {}
    for index, value in enumerate(program.example_inputs):
        if isinstance(value, Tensor):
            tensors[str(index)] = _plain(value)
            entries.append({"tensor": str(index)})
        elif value is None or isinstance(value, NUMBERS):
            entries.append({"value": value})
        else:
            raise StorageError(
                f"example input {index} is a {type(value).__name__}: only tensors and numbers are stored"
            )
    return entries, tensors


def _irc_version() -> str:
    try:
        return version("irc-compiler")
    except PackageNotFoundError:
        return "unknown"


def file_hash(path: Path) -> str:
    """sha256 (hex) of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
