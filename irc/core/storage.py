"""Reads a program folder (`irc.core.folder`) back.

Every size and hash is checked before anything is trusted, and `parse` checks every weight against the hash that the
text declares.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeGuard

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from irc.core.content_hash import content_hash
from irc.core.errors import StorageError
from irc.core.folder import FORMAT_VERSION, GRAPH, INPUTS, MANIFEST, NUMBERS, WEIGHTS, file_hash
from irc.core.folder import save as save
from irc.core.paging import release
from irc.core.program import VAL, Program
from irc.core.provenance import SOURCES_KEY, Source
from irc.core.text import parse
from irc.core.text.lexer import MAX_TEXT

MAX_MANIFEST = 1 << 28
MAX_HEADER = 1 << 27


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


def _read_manifest(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        reason = "is no folder" if folder.exists() else "does not exist"
        raise StorageError(f"{folder} {reason}: a program or an artifact is a folder that irc wrote")
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
        expected = entry.get("bytes") if isinstance(entry, dict) else None
        if path.stat().st_size != expected:
            raise StorageError(f"{path} has {path.stat().st_size} bytes, the manifest says {expected}")
        if name == GRAPH and path.stat().st_size > 4 * MAX_TEXT:
            raise StorageError(f"{path} is too large")
        if file_hash(path) != entry.get("sha256"):
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
    if isinstance(entry, dict) and "value" in entry and (entry["value"] is None or isinstance(entry["value"], NUMBERS)):
        return entry["value"]
    raise StorageError("the manifest's example inputs are damaged")
