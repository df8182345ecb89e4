"""A program on disk: a folder of text and tensors, never pickle.

    graph.irc            the text form
    weights.safetensors  weights by name (tied names stay in the text)
    inputs.safetensors   example inputs, if there are any
    manifest.json        format, sizes and sha256 of the files, versions, provenance of every node, other inputs

A folder is written aside and renamed, so it is there whole or not at all. Reading checks every size and hash
before it trusts anything, and `parse` checks every weight against the hash that the text declares.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import struct
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeGuard

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from irc.core.errors import StorageError
from irc.core.hashing import content_hash
from irc.core.paging import release
from irc.core.program import VAL, Program
from irc.core.provenance import SOURCES_KEY, Source, sources_of
from irc.core.text import parse, print_program
from irc.core.text.lexer import MAX_TEXT

FORMAT_VERSION = 1
GRAPH, WEIGHTS, INPUTS, MANIFEST = "graph.irc", "weights.safetensors", "inputs.safetensors", "manifest.json"
MAX_MANIFEST = 1 << 28
MAX_HEADER = 1 << 27
_NUMBERS = (bool, int, float)


def save(program: Program, folder: str | Path) -> None:
    """Write the program as a folder. A program folder that is there already is replaced; anything else is not.

    Raises:
        StorageError: weights without data, a target that is no program folder, or a full disk.
    """
    folder = Path(folder)
    _check_target(folder)
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
        _put_in_place(aside, folder)
    except (OSError, SafetensorError) as error:
        raise StorageError(f"cannot write {folder}: {error}") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def load(folder: str | Path) -> Program:
    """The program in a folder, with weights, example inputs and provenance.

    Raises:
        StorageError: a file is missing, damaged or not what the manifest says.
        ParseError: the text is not a program, or not of these weights.
    """
    folder = Path(folder)
    try:
        manifest = _read_manifest(folder)
        _check_files(folder, manifest)
        text = (folder / GRAPH).read_text(encoding="utf-8")
        weights = _read_tensors(folder / WEIGHTS)
        for tensor in weights.values():  # hashed one by one, so that the mapped file is never in memory as a whole
            content_hash(tensor)
            release(tensor)
        inputs = _read_tensors(folder / INPUTS) if INPUTS in manifest["files"] else {}
    except (OSError, UnicodeDecodeError) as error:
        raise StorageError(f"cannot read program folder {folder}: {error}") from error
    program = parse(text, weights=weights)
    unused = sorted(set(weights) - set(program.weights))
    if unused:
        raise StorageError(f"{folder / WEIGHTS} has {len(unused)} tensors that the program lacks (first: {unused[0]})")
    _restore_provenance(program, manifest.get("provenance"))
    program.example_inputs = _example_inputs(program, manifest.get("example_inputs"), inputs)
    return program


# -------------------------------------------------------------------- writing


def _check_target(folder: Path) -> None:
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise StorageError(f"{folder} exists and is not a folder")
    if folder.is_dir():
        strangers = sorted(p.name for p in folder.iterdir() if p.name not in (GRAPH, WEIGHTS, INPUTS, MANIFEST))
        if strangers:
            raise StorageError(f"{folder} holds other files ({', '.join(strangers[:5])}): choose another place")


def _write(program: Program, folder: Path) -> None:
    (folder / GRAPH).write_text(print_program(program), encoding="utf-8")
    save_file({name: _plain(tensor) for name, tensor in program.weights.items()}, folder / WEIGHTS)
    examples, tensors = _split_inputs(program)
    if tensors:
        save_file(tensors, folder / INPUTS)
    files = {path.name: {"bytes": path.stat().st_size, "sha256": _file_hash(path)} for path in sorted(folder.iterdir())}
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


def _split_inputs(program: Program) -> tuple[list[Any] | None, dict[str, Tensor]]:
    """Example inputs as JSON entries, and the tensors among them."""
    if program.example_inputs is None:
        return None, {}
    entries: list[Any] = []
    tensors: dict[str, Tensor] = {}
    for index, value in enumerate(program.example_inputs):
        if isinstance(value, Tensor):
            tensors[str(index)] = _plain(value)
            entries.append({"tensor": str(index)})
        elif value is None or isinstance(value, _NUMBERS):
            entries.append({"value": value})
        else:
            raise StorageError(
                f"example input {index} is a {type(value).__name__}: only tensors and numbers are stored"
            )
    return entries, tensors


def _irc_version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("irc-compiler")
    except PackageNotFoundError:
        return "unknown"


def _file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# -------------------------------------------------------------------- reading


def _read_manifest(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise StorageError(f"there is no program folder {folder}")
    path = folder / MANIFEST
    if not path.is_file():
        raise StorageError(f"{folder} is no program folder: it has no {MANIFEST}")
    if path.stat().st_size > MAX_MANIFEST:
        raise StorageError(f"{path} is too large")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise StorageError(f"{path} is not JSON: {error}") from error
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict):
        raise StorageError(f"{path} does not list the files")
    if manifest.get("format") != FORMAT_VERSION:
        raise StorageError(f"{path} is of format {manifest.get('format')!r}; this version reads {FORMAT_VERSION}")
    return manifest


def _check_files(folder: Path, manifest: Mapping[str, Any]) -> None:
    files = manifest["files"]
    unknown = sorted(set(files) - {GRAPH, WEIGHTS, INPUTS})
    missing = [name for name in (GRAPH, WEIGHTS) if name not in files]
    if unknown or missing:
        raise StorageError(f"{folder / MANIFEST} lists files {unknown} that do not belong, lacks {missing}")
    for name, entry in files.items():
        path = folder / name
        if not path.is_file():
            raise StorageError(f"{path} is missing")
        if not isinstance(entry, dict) or path.stat().st_size != entry.get("bytes"):
            raise StorageError(f"{path} has {path.stat().st_size} bytes, the manifest says otherwise")
        if name == GRAPH and path.stat().st_size > 4 * MAX_TEXT:
            raise StorageError(f"{path} is too large")
        if _file_hash(path) != entry.get("sha256"):
            raise StorageError(f"{path} is damaged: its sha256 is not the one in the manifest")


def _read_tensors(path: Path) -> dict[str, Tensor]:
    _check_header(path)
    try:
        return load_file(path)
    except (SafetensorError, ValueError, KeyError, RuntimeError, OverflowError, AttributeError, TypeError) as error:
        raise StorageError(f"{path} is not a safetensors file that can be read: {error}") from error


def _check_header(path: Path) -> None:
    """Look at the header before any library maps the file: sizes inside of the file, shapes that fit them."""
    total = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else -1
        if not 2 <= length <= min(MAX_HEADER, total - 8):
            raise StorageError(f"{path} is truncated, or its header is too large")
        raw = file.read(length)
    try:
        header = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise StorageError(f"{path} has a header that is not JSON: {error}") from error
    if not isinstance(header, dict):
        raise StorageError(f"{path} has no table of tensors")
    for name, entry in header.items():
        if name != "__metadata__" and not _sane(entry, total - 8 - length):
            raise StorageError(f"{path}: the entry of tensor {name[:80]!r} is not possible")


def _sane(entry: Any, available: int) -> bool:
    if not isinstance(entry, dict):
        return False
    shape, offsets = entry.get("shape"), entry.get("data_offsets")
    if not _naturals(shape) or not _naturals(offsets) or len(offsets) != 2 or len(shape) > 64:
        return False
    return offsets[0] <= offsets[1] <= available and math.prod(shape) <= available


def _naturals(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _restore_provenance(program: Program, recorded: Any) -> None:
    """Replace what the comments of the text say by the full record."""
    if not isinstance(recorded, dict):
        raise StorageError("the manifest has no provenance")
    for node in program.graph.nodes:
        entries = recorded.get(node.name, [])
        if not isinstance(entries, list) or not all(_is_source(entry) for entry in entries):
            raise StorageError(f"the manifest's provenance of {node.name} is not a list of sources")
        node.meta.pop(SOURCES_KEY, None)
        if entries:
            node.meta[SOURCES_KEY] = frozenset(Source(*entry) for entry in entries)


def _is_source(entry: Any) -> bool:
    return isinstance(entry, list) and len(entry) == 3 and all(isinstance(part, str) for part in entry)


def _example_inputs(program: Program, entries: Any, tensors: Mapping[str, Tensor]) -> tuple[Any, ...] | None:
    if entries is None:
        return None
    placeholders = program.placeholders
    if not isinstance(entries, list) or len(entries) != len(placeholders):
        raise StorageError(f"the manifest does not give an example for each of the {len(placeholders)} inputs")
    values = []
    for entry, node in zip(entries, placeholders, strict=True):
        value = _example(entry, tensors)
        expected = node.meta[VAL]
        fits = isinstance(value, Tensor) == isinstance(expected, Tensor)
        if fits and isinstance(value, Tensor):
            fits = value.dtype == expected.dtype and value.dim() == expected.dim()
        if not fits:
            raise StorageError(f"the example for input {node.target} is not of its type")
        values.append(value)
    return tuple(values)


def _example(entry: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(entry, dict) and isinstance(entry.get("tensor"), str) and entry["tensor"] in tensors:
        return tensors[entry["tensor"]]
    if (
        isinstance(entry, dict)
        and "value" in entry
        and (entry["value"] is None or isinstance(entry["value"], _NUMBERS))
    ):
        return entry["value"]
    raise StorageError("the manifest's example inputs are damaged")


__all__ = ["load", "save"]
