"""A GGUF file's metadata and tensors, read without trusting any number in it.

Every count and length is held against what is left of the file before it is used, so a hostile file costs neither
memory nor time. Tensors are views of the mapped file: nothing is copied until it is used.

Source: the GGUF specification (ggml, docs/gguf.md), versions 2 and 3.
"""

from __future__ import annotations

import mmap
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from irc.core.errors import StorageError
from irc.lowering.gguf.encode import num_bytes
from irc.lowering.gguf.mixes import BLOCKS, FLOATS

_MAGIC = b"GGUF"
_MAX_DIMS, _MAX_NAME, _MAX_ALIGNMENT = 4, 1 << 16, 1 << 20
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
TYPE_NAMES = {
    0: "f32", 1: "f16", 2: "q4_0", 3: "q4_1", 6: "q5_0", 7: "q5_1", 8: "q8_0", 10: "q2_k", 11: "q3_k", 12: "q4_k",
    13: "q5_k", 14: "q6_k", 30: "bf16",
}  # fmt: skip
_DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a file.

    Attributes:
        kind: `f32`, `q4_k`, ….
        shape: in PyTorch's order, [rows, K].
        data: floats of that shape, or u8 [..., rows, bytes].
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    data: Tensor


@dataclass(frozen=True)
class GgufFile:
    """What a file holds: metadata by key, tensors by name."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, StoredTensor]


def read_file(path: str | Path) -> GgufFile:
    """Read a GGUF file.

    Raises:
        StorageError: it is missing, no GGUF file, truncated, or says something that cannot be.
    """
    file = Path(path)
    try:
        with file.open("rb") as handle:
            size = os.fstat(handle.fileno()).st_size
            if size < 24:
                raise StorageError(f"{file} is no GGUF file: it has {size} bytes")
            mapped = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_COPY)
    except OSError as error:
        raise StorageError(f"{file} cannot be read: {error.strerror}") from error
    return _Parser(file, mapped).parse()


class _Parser:
    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.at = path, data, 0

    def fail(self, what: str) -> StorageError:
        return StorageError(f"{self.path} is damaged at byte {self.at}: {what}")

    # ---------------------------------------------------------------- values

    def take(self, code: str) -> Any:
        size = struct.calcsize("<" + code)
        if self.at + size > len(self.data):
            raise self.fail("it ends in the middle of a value")
        (value,) = struct.unpack_from("<" + code, self.data, self.at)
        self.at += size
        return value

    def text(self, limit: int | None = None) -> str:
        length = self.take("Q")
        if length > len(self.data) - self.at or (limit is not None and length > limit):
            raise self.fail(f"a text of {length} bytes, with {len(self.data) - self.at} left")
        raw = self.data[self.at : self.at + length]
        self.at += length
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            raise self.fail("a text that is not UTF-8") from None

    def value(self, kind: int, *, nested: bool = False) -> Any:
        if kind in _SCALARS:
            return self.take(_SCALARS[kind])
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY or nested:
            raise self.fail(f"a value of type {kind}" + (" inside an array" if nested else ""))
        inner, count = self.take("I"), self.take("Q")
        smallest = 8 if inner == _STRING else struct.calcsize("<" + _SCALARS.get(inner, "B"))
        if count > (len(self.data) - self.at) // smallest:
            raise self.fail(f"an array of {count} values, with {len(self.data) - self.at} bytes left")
        if inner in _SCALARS:
            code = f"<{count}{_SCALARS[inner]}"
            values = list(struct.unpack_from(code, self.data, self.at))
            self.at += struct.calcsize(code)
            return values
        return [self.value(inner, nested=True) for _ in range(count)]

    # ---------------------------------------------------------------- the file

    def parse(self) -> GgufFile:
        if self.data[:4] != _MAGIC:
            raise StorageError(f"{self.path} is no GGUF file: it starts with {self.data[:4]!r}")
        self.at = 4
        version = self.take("I")
        if version not in (2, 3):
            raise StorageError(f"{self.path} is GGUF of version {version}; irc reads versions 2 and 3, little-endian")
        num_tensors, num_values = self.take("Q"), self.take("Q")
        for count, smallest, what in ((num_values, 13, "values"), (num_tensors, 24, "tensors")):
            if count > (len(self.data) - self.at) // smallest:
                raise self.fail(f"{count} {what}, with {len(self.data) - self.at} bytes left")
        metadata: dict[str, Any] = {}
        for _ in range(num_values):
            key = self.text(_MAX_NAME)
            if key in metadata:
                raise self.fail(f"{key!r} twice")
            metadata[key] = self.value(self.take("I"))
        infos = [self.info() for _ in range(num_tensors)]
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 1 <= alignment <= _MAX_ALIGNMENT:
            raise self.fail(f"an alignment of {alignment!r}")
        start = self.at + -self.at % alignment
        tensors: dict[str, StoredTensor] = {}
        for name, shape, kind, offset in infos:
            if name in tensors:
                raise self.fail(f"tensor {name!r} twice")
            tensors[name] = self.tensor(name, shape, kind, start + offset)
        return GgufFile(self.path, metadata, tensors)

    def info(self) -> tuple[str, tuple[int, ...], str, int]:
        name, num_dims = self.text(_MAX_NAME), self.take("I")
        if not 1 <= num_dims <= _MAX_DIMS:
            raise self.fail(f"tensor {name!r} of {num_dims} dimensions")
        sizes = [self.take("Q") for _ in range(num_dims)]
        kind, offset = self.take("I"), self.take("Q")
        if kind not in TYPE_NAMES:
            raise self.fail(f"tensor {name!r} of type {kind}, which irc does not read (it reads {', '.join(_known())})")
        if any(not 1 <= size <= len(self.data) * 8 for size in sizes):
            raise self.fail(f"tensor {name!r} of shape {sizes[::-1]}")
        return name, tuple(reversed(sizes)), TYPE_NAMES[kind], offset

    def tensor(self, name: str, shape: tuple[int, ...], kind: str, start: int) -> StoredTensor:
        if kind not in FLOATS and shape[-1] % BLOCKS[kind]:
            raise self.fail(f"tensor {name!r}: blocks of {BLOCKS[kind]} do not divide its rows of {shape[-1]}")
        count = 1
        for size in shape:
            count *= size
        size = num_bytes(shape, kind) if count < 1 << 62 else len(self.data) + 1
        if start + size > len(self.data):
            raise self.fail(
                f"tensor {name!r} ({kind}, {list(shape)}) would lie at bytes {start} to {start + size} of"
                f" {len(self.data)}"
            )
        raw = torch.frombuffer(self.data, dtype=torch.uint8, count=size, offset=start)
        if kind in FLOATS:
            wanted = _DTYPES[kind]
            if start % wanted.itemsize:
                raw = raw.clone()
            return StoredTensor(name, kind, shape, raw.view(wanted).view(shape))
        return StoredTensor(name, kind, shape, raw.view(*shape[:-1], -1))


def _known() -> list[str]:
    return list(TYPE_NAMES.values())
