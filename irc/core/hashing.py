"""Hashes of weights and programs: what equals what, without comparing everything.

`content_hash` names a tensor by what it holds; `structural_hash` names a program by what it computes;
`fingerprint` notices, cheaply, that somebody wrote into a tensor.
"""

from __future__ import annotations

import functools
import hashlib
import operator
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from irc.core.errors import IrcError
from irc.core.program import VAL, Program, dtype_name, is_size

META_HASH = "meta"
_CHUNK_BYTES = 1 << 24

# Caches by tensor identity; entries go with their tensors.
_content: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
_declared: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def content_hash(tensor: Tensor) -> str:
    """sha256 (hex) of type, shape and values in row-major order, whatever the strides.

    A tensor on the meta device has no values: it gives the hash that was declared for it (`declare_hash`), or
    `META_HASH`. Cached until the tensor is written in place; writes behind autograd's back (`.data`) go
    unnoticed here, `fingerprint` sees them.
    """
    if tensor.device.type == "meta":
        return _declared.get(tensor, META_HASH)
    stamp = (version_of(tensor), tensor.data_ptr(), tuple(tensor.shape), tensor.dtype)
    known = _content.get(tensor)
    if known is not None and known[0] == stamp:
        return known[1]
    digest = hashlib.sha256(f"{dtype_name(tensor.dtype)}{list(tensor.shape)}".encode())
    for chunk in _byte_chunks(tensor):
        digest.update(chunk.numpy().data)
    result = digest.hexdigest()
    _content[tensor] = (stamp, result)
    return result


def copy_hash(source: Tensor, same: Tensor) -> None:
    """Remember for a tensor the hash that was computed for another with the same type, shape and values."""
    if source is not same and source in _content:
        stamp = (version_of(same), same.data_ptr(), tuple(same.shape), same.dtype)
        _content[same] = (stamp, _content[source][1])


def declare_hash(tensor: Tensor, digest: str) -> None:
    """Remember the content hash that a tensor without data (meta device) stands for."""
    _declared[tensor] = digest


def version_of(tensor: Tensor) -> int:
    """PyTorch's count of in-place writes; 0 for inference tensors, which have none."""
    return 0 if tensor.is_inference() else tensor._version


def fingerprint(tensor: Tensor) -> tuple[Any, ...]:
    """Something that changes when the tensor is written to, also through `.data`: type, version, two checksums.

    Reads every byte once or twice at memory speed. The checksums are sums weighted by row and by column of
    the bytes laid out as a table, so that exchanged rows show. Not for adversaries: `content_hash` is.
    """
    shape, kind = tuple(tensor.shape), dtype_name(tensor.dtype)
    if tensor.device.type == "meta":
        return (kind, shape, version_of(tensor))
    sums = []
    for chunk in _byte_chunks(tensor):
        sums.append(_checksum(chunk))
    mixed = hashlib.blake2b(repr(sums).encode(), digest_size=16).hexdigest()
    return (kind, shape, version_of(tensor), mixed)


def _checksum(data: Tensor) -> tuple[int, ...]:
    """Row- and column-weighted sums (modulo 2^64) of bytes, read as a table of 64-bit integers."""
    whole = data.numel() // 8 * 8
    rest = bytes(data[whole:].tolist())
    words = data[:whole].view(torch.int64) if whole else torch.empty(0, dtype=torch.int64)
    columns = 512
    rows = words.numel() // columns
    table = words[: rows * columns].view(rows, columns)
    tail = words[rows * columns :]
    by_row = (table.sum(1) * _odd_weights(rows)).sum()
    by_column = (table.sum(0) * _odd_weights(columns)).sum()
    by_tail = (tail * _odd_weights(tail.numel())).sum()
    return (data.numel(), int(by_row), int(by_column), int(by_tail), int.from_bytes(rest, "little"))


def _odd_weights(count: int) -> Tensor:
    # Multiples of an odd constant: distinct modulo 2^64, and cheap.
    return torch.arange(1, count + 1, dtype=torch.int64) * 0x1E3779B97F4A7C15


def _byte_chunks(tensor: Tensor) -> Iterable[Tensor]:
    """The values as bytes (uint8, CPU), row-major, in pieces: a strided tensor is copied a piece at a time."""
    if tensor.layout != torch.strided or tensor.is_quantized:
        raise IrcError(f"a weight must be a dense tensor, not {tensor.layout}, {tensor.dtype}")
    plain = tensor.detach().resolve_conj().resolve_neg()
    if plain.is_contiguous() or plain.dim() == 0:
        yield from _split_bytes(plain.reshape(-1))
        return
    row_bytes = max(1, plain[:1].numel() * plain.element_size())
    step = max(1, _CHUNK_BYTES // row_bytes)
    for start in range(0, plain.shape[0], step):
        yield from _split_bytes(plain[start : start + step].reshape(-1))


def _split_bytes(flat: Tensor) -> Iterable[Tensor]:
    step = _CHUNK_BYTES // flat.element_size()
    for start in range(0, flat.numel(), step):
        yield flat[start : start + step].cpu().view(torch.uint8)


def structural_hash(program: Program, weight: Callable[[Tensor], str] = content_hash) -> str:
    """Hash of what a program is: operations, weights by content, types of inputs, dims, aliases, specs, metadata.

    Names of nodes, names of weights, the order of independent operations and provenance do not count. Unused
    operations do, and so does computing the same thing twice. `weight` tells weights of one type apart.
    """
    from irc.core.text.specs import FLATTENED, spec_text  # the text form itself imports this module

    values: dict[fx.Node, bytes] = {}
    operations: list[bytes] = []
    for index, node in enumerate(program.placeholders):
        values[node] = _digest("input", str(index), str(node.target), _type_key(program, node.meta.get(VAL)))
    for node in program.graph.nodes:
        if node.op == "get_attr":
            tensor = program.weight(node)
            name = str(node.target) if tensor.device.type == "meta" and content_hash(tensor) == META_HASH else ""
            values[node] = _digest("weight", weight(tensor), _type_key(program, tensor), name)
        elif node.op == "call_function" and is_size(node):
            values[node] = _digest("size", _size_key(program, node.meta[VAL]))
        elif node.op == "call_function":
            target = "getitem" if node.target is operator.getitem else str(node.target)
            values[node] = _digest(target, _key(node.args, values), _key(node.kwargs, values))
            operations.append(values[node])
    summary = _digest(
        "program",
        repr([values[node] for node in program.placeholders]),
        repr(sorted(operations)),
        _key(program.outputs, values),
        repr([(d.name, d.minimum, d.maximum) for d in program.dims.values()]),
        repr(sorted(program.aliases.items())),
        repr(sorted(program.tied)),
        spec_text(program, "in_spec"),
        spec_text(program, "out_spec"),
        repr({key: value for key, value in program.metadata.items() if key != FLATTENED}),
    )
    return summary.hex()


class Structure:
    """What a program was when this was made, for comparisons that read weights only if nothing else decides.

    Reading the weights of a large model takes seconds. Programs over the very same tensors differ just where their
    operations do, and programs that differ where weights of one type are all taken for equal differ in any case.
    """

    def __init__(self, program: Program) -> None:
        self._program = program
        self._over_tensors = structural_hash(program, _identity)

    def same_as(self, other: Structure) -> bool:
        """Whether both have the same structural hash. Weights must not have been written into."""
        if self._over_tensors == other._over_tensors:
            return True
        if self._over_types != other._over_types or not (self._is_current() and other._is_current()):
            return False
        return structural_hash(self._program) == structural_hash(other._program)

    @functools.cached_property
    def _over_types(self) -> str:
        return structural_hash(self._program, _nothing)

    def _is_current(self) -> bool:
        """Whether the program is still what it was."""
        return structural_hash(self._program, _identity) == self._over_tensors


def _identity(tensor: Tensor) -> str:
    return str(id(tensor))


def _nothing(tensor: Tensor) -> str:
    return ""


def _digest(*parts: str) -> bytes:
    return hashlib.blake2b("\0".join(parts).encode("utf-8", "backslashreplace"), digest_size=20).digest()


def _key(value: Any, values: dict[fx.Node, bytes]) -> str:
    if isinstance(value, fx.Node):
        return values[value].hex()
    if isinstance(value, (list, tuple)):
        return "[" + ",".join([_key(item, values) for item in value]) + "]"
    if isinstance(value, dict):
        return "{" + ",".join([f"{k}={_key(value[k], values)}" for k in sorted(value)]) + "}"
    return f"{type(value).__name__}:{value!r}"


def _size_key(program: Program, size: Any) -> str:
    if isinstance(size, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        from irc.core.text.expressions import expr_text  # the text form itself imports this module

        return expr_text(program.expr(size))
    return repr(size)


def _type_key(program: Program, value: Any) -> str:
    if isinstance(value, Tensor):
        sizes = ",".join(_size_key(program, size) for size in value.shape)
        return f"{value.dtype}[{sizes}]{value.device.type if value.device.type != 'meta' else 'cpu'}"
    return _size_key(program, value)
