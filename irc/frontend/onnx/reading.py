"""An ONNX file, read and checked before anything is made of it.

Nothing in the file is trusted: external data must lie in regular files below the model's own folder, within their size;
sizes of tensors must fit their bytes; values must be computed before they are used, each once.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from irc.core.errors import StorageError

_MOST_BYTES = 1 << 40
_MOST_DIMENSIONS = 16
_FOUR_BITS = {"UINT4": False, "INT4": True}


def read_model(path: Path) -> Any:
    """The checked `onnx.ModelProto`, external data not loaded.

    Raises:
        StorageError: no ONNX file, damaged, or a graph that cannot be computed in order.
    """
    import onnx
    from google.protobuf.message import DecodeError

    if not path.is_file():
        raise StorageError(f"{path} does not exist, or is no file")
    try:
        model = onnx.load_model(str(path), load_external_data=False)
    except (DecodeError, ValueError, RecursionError) as error:
        raise StorageError(f"{path} is no ONNX file, or is damaged: {error}") from error
    if not model.HasField("graph") or not model.opset_import:
        raise StorageError(f"{path} is no ONNX file, or is damaged: it holds no graph")
    _check_order(path, model.graph)
    return model


def _check_order(path: Path, graph: Any) -> None:
    known = {value.name for value in graph.input}
    for tensor in graph.initializer:
        known.add(tensor.name)
    made: set[str] = set()
    for index, node in enumerate(graph.node):
        for name in node.input:
            if name and name not in known:
                raise StorageError(
                    f"{path}: node {index} ({node.op_type} {node.name!r}) uses {name!r} before anything computes it:"
                    " the graph has a cycle, is out of order, or lacks that value"
                )
        for name in filter(None, node.output):
            if name in made or name in known:
                raise StorageError(f"{path}: two values are called {name!r}")
            made.add(name)
        known.update(filter(None, node.output))
    if not graph.output:
        raise StorageError(f"{path}: the graph gives no output")
    for value in graph.output:
        if value.name not in known:
            raise StorageError(f"{path}: output {value.name!r} is computed by nothing")


def read_tensor(folder: Path, tensor: Any) -> Tensor:
    """The numbers of a `TensorProto`. Integers of 4 bits come as bytes of one number each.

    Raises:
        StorageError: a type without a PyTorch counterpart, or sizes and data that do not fit.
    """
    import onnx

    shape = list(tensor.dims)
    if len(shape) > _MOST_DIMENSIONS or any(size < 0 for size in shape):
        raise StorageError(f"tensor {tensor.name!r} has the impossible shape {shape}")
    kind = onnx.TensorProto.DataType.Name(tensor.data_type) if tensor.data_type else "UNDEFINED"
    bits = _bits(tensor, kind)
    count = math.prod(shape)
    num_bytes = -(-count * bits // 8)
    if num_bytes > _MOST_BYTES:
        raise StorageError(f"tensor {tensor.name!r} of shape {shape} would take {num_bytes:,} bytes")
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        data = _external(folder, tensor, num_bytes)
    elif tensor.HasField("raw_data"):
        data = bytearray(tensor.raw_data)
        if len(data) != num_bytes:
            raise StorageError(f"tensor {tensor.name!r} of shape {shape} needs {num_bytes} bytes and has {len(data)}")
    else:
        return _from_fields(tensor, shape, kind)
    return _from_bytes(data, kind, shape, count)


def _bits(tensor: Any, kind: str) -> int:
    if kind in _FOUR_BITS:
        return 4
    dtype = DTYPES.get(kind)
    if dtype is None:
        raise StorageError(f"tensor {tensor.name!r} is of type {kind}, which irc does not read")
    return 8 * dtype.itemsize


DTYPES = {
    "FLOAT": torch.float32, "DOUBLE": torch.float64, "FLOAT16": torch.float16, "BFLOAT16": torch.bfloat16,
    "INT64": torch.int64, "INT32": torch.int32, "INT16": torch.int16, "INT8": torch.int8, "UINT8": torch.uint8,
    "UINT16": torch.uint16, "UINT32": torch.uint32, "UINT64": torch.uint64, "BOOL": torch.bool,
    "FLOAT8E4M3FN": torch.float8_e4m3fn, "FLOAT8E5M2": torch.float8_e5m2,
}  # fmt: skip
"""Types of ONNX that PyTorch has."""


def _from_bytes(data: bytearray, kind: str, shape: list[int], count: int) -> Tensor:
    if kind in _FOUR_BITS:
        packed = torch.frombuffer(data, dtype=torch.uint8) if data else torch.zeros(0, dtype=torch.uint8)
        numbers = torch.stack((packed & 15, packed >> 4), dim=-1).flatten()[:count]
        if _FOUR_BITS[kind]:
            numbers = torch.where(numbers > 7, numbers.to(torch.int16) - 16, numbers.to(torch.int16)).to(torch.int8)
        return numbers.reshape(shape)
    if count == 0:
        return torch.zeros(shape, dtype=DTYPES[kind])
    return torch.frombuffer(data, dtype=DTYPES[kind]).reshape(shape)


def _from_fields(tensor: Any, shape: list[int], kind: str) -> Tensor:
    """Numbers kept in the typed lists of the message."""
    from onnx import numpy_helper

    try:
        array = numpy_helper.to_array(tensor)
        if kind in _FOUR_BITS:
            array = array.astype("int8" if _FOUR_BITS[kind] else "uint8")
        if kind == "BFLOAT16":
            return torch.from_numpy(array.astype("float32")).to(torch.bfloat16).reshape(shape)
        return torch.from_numpy(array.copy()).to(DTYPES.get(kind, torch.uint8)).reshape(shape)
    except (ValueError, TypeError, RuntimeError) as error:
        raise StorageError(f"tensor {tensor.name!r} of shape {shape} does not fit its data: {error}") from error


def _external(folder: Path, tensor: Any, num_bytes: int) -> bytearray:
    entries = {entry.key: entry.value for entry in tensor.external_data}
    what = f"external data of tensor {tensor.name!r}"
    location = entries.get("location", "")
    file = _inside(folder, location, what)
    try:
        offset = int(entries.get("offset", "0"))
        length = int(entries.get("length", str(num_bytes)))
    except ValueError:
        raise StorageError(f"{what}: offset and length must be numbers, not {entries}") from None
    size = file.stat().st_size
    if offset < 0 or length != num_bytes or offset + length > size:
        raise StorageError(
            f"{what}: bytes {offset} to {offset + length} of {location}, which has {size}; its shape needs {num_bytes}"
        )
    with file.open("rb") as stream:
        stream.seek(offset)
        data = bytearray(stream.read(length))
    if len(data) != length:
        raise StorageError(f"{what}: {location} ended early")
    return data


def _inside(folder: Path, location: str, what: str) -> Path:
    """The file of that name below the folder, reached through no link that leads out of it."""
    if not location or "\0" in location or os.path.isabs(location) or ".." in Path(location).parts:
        raise StorageError(f"{what}: {location!r} is no place below the model's folder")
    try:
        root, file = folder.resolve(), (folder / location).resolve()
    except (OSError, RuntimeError, ValueError) as error:
        raise StorageError(f"{what}: {location!r}: {error}") from error
    if not file.is_relative_to(root) or not file.is_file():
        raise StorageError(f"{what}: {location!r} is no file below the model's folder")
    return file


def tensors_of(graph: Any) -> Iterator[Any]:
    """All stored tensors of the graph: initializers, and constants in nodes."""
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
