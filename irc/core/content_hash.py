"""Hashes of tensors: what they hold, and whether somebody wrote into them.

`content_hash` names a tensor by its values; `fingerprint` notices, cheaply, that they changed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from irc.core.dtypes import dtype_name
from irc.core.errors import IrcError

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
