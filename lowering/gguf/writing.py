"""The file: header and tensor list first, then one tensor after the other, aside, and renamed when all is there.

The maintained `gguf` package writes the header; tensors go to the file as they are made, so that no more than one
chunk of one of them is in memory.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from irc.core.contract import Progress
from irc.core.errors import StorageError, TargetError
from irc.core.program import Program
from irc.lowering.gguf.encode import encode, num_bytes
from irc.lowering.gguf.pieces import FileTensor

_ALIGNMENT = 32
_TYPE_NAMES = {"f32": "F32", "f16": "F16", "bf16": "BF16"}


class Typed:
    """A metadata value whose type Python does not tell."""

    def __init__(self, value: Any, kind: str) -> None:
        self.value, self.kind = value, kind


def write_file(
    path: Path,
    architecture: str,
    metadata: Mapping[str, Any],
    program: Program,
    tensors: list[tuple[FileTensor, str]],
    importance: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> None:
    """Write a GGUF file of tensors and the types they are to have.

    Raises:
        StorageError: the file cannot be written; nothing is left under its name.
    """
    import gguf

    with _aside(path) as temporary:
        writer = gguf.GGUFWriter(temporary, architecture)
        for key, value in metadata.items():
            _add(writer, key, value)
        for tensor, kind in tensors:
            raw = gguf.GGMLQuantizationType[_TYPE_NAMES.get(kind, _ggml_name(kind))]
            writer.add_tensor_info(
                tensor.name, tensor.shape, np.dtype(np.float32), num_bytes(tensor.shape, kind), raw_dtype=raw
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        assert writer.fout is not None
        file = writer.fout[0]
        try:
            _pad(file)
            for index, (tensor, kind) in enumerate(tensors):
                if progress is not None:
                    progress(f"writing {tensor.name}", index, len(tensors))
                written = 0
                for chunk in encode(program, tensor, kind, (importance or {}).get(tensor.name)):
                    data = np.ascontiguousarray(chunk).data.cast("B")
                    written += len(data)
                    file.write(data)
                if written != num_bytes(tensor.shape, kind):
                    raise TargetError(
                        f"{tensor.name}: {written} bytes were made of the {num_bytes(tensor.shape, kind)} that a {kind}"
                        f" of {list(tensor.shape)} has; this is a bug in irc"
                    )
                _pad(file)
        finally:
            writer.close()


def write_arrays(path: Path, metadata: Mapping[str, Any], tensors: Mapping[str, Any]) -> None:
    """Write a GGUF file of f32 tensors without an architecture (an importance matrix)."""
    import gguf

    with _aside(path) as temporary:
        writer = gguf.GGUFWriter(temporary, "imatrix")
        writer.kv_data[0].pop("general.architecture", None)
        for key, value in metadata.items():
            _add(writer, key, value)
        for name, tensor in tensors.items():
            writer.add_tensor(name, tensor.float().contiguous().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def _ggml_name(kind: str) -> str:
    """`q4_k` → `Q4_K`."""
    return kind.upper()


def _pad(file: Any) -> None:
    file.write(bytes(-file.tell() % _ALIGNMENT))


@contextmanager
def _aside(path: Path) -> Iterator[Path]:
    """A file beside `path` that becomes it, or is removed when something fails."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    except OSError as error:
        raise StorageError(f"{path} cannot be written: {error.strerror}") from error
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError as error:
        raise StorageError(f"{path} cannot be written: {error.strerror}") from error
    finally:
        temporary.unlink(missing_ok=True)


def _add(writer: Any, key: str, value: Any) -> None:
    from gguf import GGUFValueType

    if isinstance(value, Typed):
        writer.add_key_value(key, value.value, GGUFValueType.ARRAY, GGUFValueType[value.kind])
    elif isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_key_value(key, value, GGUFValueType.STRING)
    elif isinstance(value, (list, tuple)):
        if value and isinstance(value[0], int) and not isinstance(value[0], bool):
            writer.add_key_value(key, value, GGUFValueType.ARRAY, GGUFValueType.INT32)
        elif value:
            writer.add_array(key, value)
    else:
        raise TargetError(f"metadata {key}: a {type(value).__name__} has no GGUF type")
