"""Importance matrices: for each matrix, the mean square of what its columns are multiplied by.

Gathered by running a program on calibration data, written and read in llama.cpp's file format (GGUF, and its older
binary one for reading), and used by the quantizers of super-blocks.

Source: llama.cpp, `tools/imatrix/imatrix.cpp`.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor

from irc.core.errors import OptionError, StorageError
from irc.core.lockstep import Lockstep
from irc.core.operands import input_node
from irc.core.program import Program
from irc.lowering.gguf.layout import Layout
from irc.lowering.gguf.reading import read_file

aten = torch.ops.aten
_MAX_ENTRIES, _MAX_NAME = 1 << 16, 1 << 10


@dataclass
class ImportanceMatrix:
    """Sums over calibration.

    Attributes:
        sums: by tensor name in the file (`blk.0.attn_q.weight`): f32 [experts or 1, K], sums of squares.
        counts: by tensor name: f32 [experts or 1], how many rows were summed.
        datasets: where the data came from.
    """

    sums: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, Tensor] = field(default_factory=dict)
    datasets: list[str] = field(default_factory=list)
    chunk_size: int = 512

    def importance(self, name: str) -> Tensor | None:
        """Mean squares, f32 [K] or [experts, K]; experts that saw nothing count all columns alike."""
        if name not in self.sums:
            return None
        counts = self.counts[name].unsqueeze(-1)
        mean = torch.where(counts > 0, self.sums[name] / counts.clamp(min=1), 1.0)
        return mean[0] if len(mean) == 1 else mean

    def save(self, path: str | Path) -> Path:
        """Write it as llama.cpp's tools do."""
        from irc.lowering.gguf.writing import write_arrays

        tensors: dict[str, Tensor] = {}
        for name, sums in self.sums.items():
            tensors[f"{name}.in_sum2"] = sums
            tensors[f"{name}.counts"] = self.counts[name].unsqueeze(-1)
        most = max((float(counts.max()) for counts in self.counts.values()), default=0.0)
        metadata = {
            "general.type": "imatrix",
            "imatrix.datasets": self.datasets or ["unknown"],
            "imatrix.chunk_count": int(most) // self.chunk_size,
            "imatrix.chunk_size": self.chunk_size,
        }
        write_arrays(Path(path), metadata, tensors)
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> ImportanceMatrix:
        """Read a file of llama.cpp's, GGUF or the older binary format.

        Raises:
            StorageError: it is missing, damaged, or something else.
        """
        file = Path(path)
        try:
            with file.open("rb") as handle:
                is_gguf = handle.read(4) == b"GGUF"
        except OSError as error:
            raise StorageError(f"{file} cannot be read: {error.strerror}") from error
        return _from_gguf(file) if is_gguf else _from_binary(file)


def collect_importance(
    program: Program, layout: Layout, batches: Iterable[Sequence[Any]], *, description: str = "calibration"
) -> ImportanceMatrix:
    """Run a program over flat inputs and sum the squares of what its linear layers read (experts are left out)."""
    wanted: dict[fx.Node, list[str]] = {}
    for tensor in layout.tensors:
        if len(tensor.shape) == 2 and tensor.role not in ("embedding", "positions", "norm", "router"):
            for piece in tensor.pieces:
                if piece.node is not None:
                    wanted.setdefault(piece.node, []).append(tensor.name)
    result = ImportanceMatrix(datasets=[description])

    def visit(node: fx.Node, values: Any) -> None:
        for name in dict.fromkeys(wanted.get(input_node(node, 1), ())):
            for x in values(node.args[0]):
                rows = x.detach().float().flatten(0, -2)
                found = rows.square().sum(0, keepdim=True)
                result.sums[name] = result.sums[name] + found if name in result.sums else found
                count = torch.tensor([float(len(rows))])
                result.counts[name] = result.counts[name] + count if name in result.counts else count

    layers = [node for node in program.operations() if node.target is aten.linear.default and node.args[1] in wanted]
    Lockstep(program, list(batches)).run(visit, layers)
    return result


def open_importance(given: Any) -> ImportanceMatrix:
    """An importance matrix, or the one in a file."""
    if isinstance(given, ImportanceMatrix):
        return given
    if isinstance(given, (str, Path)):
        return ImportanceMatrix.load(given)
    raise OptionError(f"imatrix is an ImportanceMatrix or a path, not a {type(given).__name__}")


def checked(matrix: ImportanceMatrix, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """The importances of a file's tensors.

    Raises:
        OptionError: none is of these tensors, or one has another width.
    """
    found: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        importance = matrix.importance(name)
        if importance is None:
            continue
        experts = shape[0] if len(shape) == 3 else 1
        if importance.shape[-1] != shape[-1] or (importance.ndim == 2 and len(importance) != experts):
            raise OptionError(f"the importance matrix has {list(importance.shape)} for {name}, which is {list(shape)}")
        found[name] = importance
    if not found:
        raise OptionError("the importance matrix is of another model: it has none of this one's tensors")
    return found


def _from_gguf(path: Path) -> ImportanceMatrix:
    file = read_file(path)
    if file.metadata.get("general.type") != "imatrix":
        raise StorageError(f"{path} is a GGUF file, but no importance matrix")
    result = ImportanceMatrix(datasets=[str(name) for name in file.metadata.get("imatrix.datasets", [])])
    for name, tensor in file.tensors.items():
        base, dot, kind = name.rpartition(".")
        if not dot or kind not in ("in_sum2", "counts") or tensor.kind != "f32":
            raise StorageError(f"{path} holds {name!r}, which no importance matrix does")
        rows = tensor.data.reshape(-1, tensor.shape[-1]).clone()
        if kind == "in_sum2":
            result.sums[base] = rows
        else:
            result.counts[base] = rows.flatten()
    for name, sums in result.sums.items():
        if name not in result.counts or len(result.counts[name]) != len(sums):
            raise StorageError(f"{path}: {name} has sums of {len(sums)} matrices without as many counts")
        if not bool(sums.isfinite().all()) or bool((sums < 0).any()):
            raise StorageError(f"{path}: {name} has sums that are no squares")
    return result


def _from_binary(path: Path) -> ImportanceMatrix:
    """The older format: entries of name, calls, and mean squares times calls."""
    data, at = path.read_bytes(), 0

    def take(code: str) -> int:
        nonlocal at
        if at + 4 > len(data):
            raise StorageError(f"{path} is no importance matrix: it ends at byte {at}")
        (value,) = struct.unpack_from("<" + code, data, at)
        at += 4
        return int(value)

    result = ImportanceMatrix()
    count = take("i")
    if not 0 < count <= _MAX_ENTRIES:
        raise StorageError(f"{path} is no importance matrix: {count} entries")
    for _ in range(count):
        length = take("i")
        if not 0 < length <= min(_MAX_NAME, len(data) - at):
            raise StorageError(f"{path} is damaged at byte {at}: a name of {length} bytes")
        name = data[at : at + length].decode("utf-8", "replace")
        at += length
        calls, size = take("i"), take("i")
        if calls < 1 or not 0 < size <= (len(data) - at) // 4:
            raise StorageError(f"{path} is damaged at byte {at}: {size} values from {calls} calls")
        values = torch.frombuffer(bytearray(data[at : at + 4 * size]), dtype=torch.float32)
        at += 4 * size
        if not bool(values.isfinite().all()):
            raise StorageError(f"{path}: {name} has values that are no numbers")
        result.sums[name], result.counts[name] = values.unsqueeze(0), torch.tensor([float(calls)])
    return result
