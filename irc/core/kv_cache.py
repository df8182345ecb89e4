"""What a step program says about its key-value cache: the contract between cache insertion and the runtime.

A step program takes `tokens[B, S]`, `positions[B, S]` (absolute, per sequence), `logit_indices[B, R]` (which
of the S tokens' logits are wanted) and its caches, and gives logits[B, R, V] and the new caches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from irc.core.errors import VerificationError
from irc.core.program import Program, dtype_from_name

METADATA_KEY = "kv_cache"
_FIRST_CACHE = 3


@dataclass(frozen=True)
class CacheTensor:
    """One cache input: [B, heads, max_length, head_dim].

    Attributes:
        head_dim: of what is stored (half the model's, where two 4-bit integers share a byte).
        stores: format of quantized values (`int8.row`, `f8e4m3.row`), whose scales are the cache `<name>_scale`; None:
            plain numbers.
    """

    name: str
    heads: int
    head_dim: int
    dtype: torch.dtype
    stores: str | None = None


@dataclass(frozen=True)
class KVCache:
    """The cache of a step program, read from `program.metadata["kv_cache"]`.

    Attributes:
        max_length: L, positions a sequence can have.
        layout: `contiguous`.
        caches: in the order of the step's inputs.
    """

    max_length: int
    layout: str
    caches: tuple[CacheTensor, ...]

    @staticmethod
    def of(program: Program) -> KVCache | None:
        """The cache of a program, or None when it is no step program."""
        return KVCache.from_metadata(program.metadata)

    @staticmethod
    def from_metadata(metadata: Mapping[str, Any]) -> KVCache | None:
        """Read the entry that cache insertion wrote.

        Raises:
            VerificationError: the entry is incomplete.
        """
        entry = metadata.get(METADATA_KEY)
        if entry is None:
            return None
        try:
            caches = tuple(
                CacheTensor(
                    c["name"], int(c["heads"]), int(c["head_dim"]), dtype_from_name(c["dtype"]), c.get("stores")
                )
                for c in entry["caches"]
            )
            return KVCache(int(entry["max_length"]), str(entry["layout"]), caches)
        except (KeyError, TypeError, ValueError) as error:
            raise VerificationError(f"metadata of the key-value cache is damaged: {error!r}") from error

    def empty(self, batch: int, *, device: torch.device | str | None = None) -> list[Tensor]:
        """Zeroed caches for `batch` sequences."""
        return [
            torch.zeros((batch, c.heads, self.max_length, c.head_dim), dtype=c.dtype, device=device)
            for c in self.caches
        ]

    def num_bytes(self, batch: int = 1) -> int:
        """Bytes of the caches of `batch` sequences."""
        return sum(batch * c.heads * self.max_length * c.head_dim * c.dtype.itemsize for c in self.caches)

    def split(self, inputs: Sequence[Any]) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
        """Flat inputs of a step → tokens, positions, logit indices, caches."""
        tokens, positions, wanted = inputs[:_FIRST_CACHE]
        return tokens, positions, wanted, list(inputs[_FIRST_CACHE:])
