"""What a step program says about its key-value cache: the contract between cache insertion and the runtime.

Contiguous: a step program takes `tokens[B, S]`, `positions[B, S]` (absolute, per sequence), `logit_indices[B, R]`
(which of the S tokens' logits are wanted) and its caches, and gives logits[B, R, V] and the new caches.

Paged: it takes the inputs of `irc.core.paged.StepInputs` and its caches, and gives logits[R, V] and the new caches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from irc.core.errors import OptionError, VerificationError
from irc.core.paged import NUM_STEP_INPUTS, StepInputs, tables_in_order
from irc.core.program import Program, dtype_from_name

METADATA_KEY = "kv_cache"
_FIRST_CACHE = 3


@dataclass(frozen=True)
class CacheTensor:
    """One cache input: [B, heads, max_length, head_dim], or paged [num_blocks, block_size, heads, head_dim].

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
        layout: `contiguous` or `paged`.
        caches: in the order of the step's inputs.
        block_size: P, tokens a block of a paged cache; None for a contiguous one.
    """

    max_length: int
    layout: str
    caches: tuple[CacheTensor, ...]
    block_size: int | None = None

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
            layout = str(entry["layout"])
            block_size = int(entry["block_size"]) if layout == "paged" else None
            return KVCache(int(entry["max_length"]), layout, caches, block_size)
        except (KeyError, TypeError, ValueError) as error:
            raise VerificationError(f"metadata of the key-value cache is damaged: {error!r}") from error

    @property
    def num_inputs(self) -> int:
        """Inputs of the step program in front of its caches."""
        return NUM_STEP_INPUTS if self.block_size is not None else _FIRST_CACHE

    @property
    def num_rows(self) -> int:
        """Positions of one entry of the caches' first dimension: of a sequence, or of a block."""
        return self.block_size or self.max_length

    def empty(self, batch: int, *, device: torch.device | str | None = None) -> list[Tensor]:
        """Zeroed caches for `batch` sequences; of a paged cache, `batch` blocks."""
        return [torch.zeros(self.shape(c, batch), dtype=c.dtype, device=device) for c in self.caches]

    def shape(self, cache: CacheTensor, batch: Any) -> tuple[Any, ...]:
        """Shape of one cache for `batch` sequences or blocks."""
        if self.block_size is not None:
            return (batch, self.block_size, cache.heads, cache.head_dim)
        return (batch, cache.heads, self.max_length, cache.head_dim)

    def num_bytes(self, batch: int = 1) -> int:
        """Bytes of the caches of `batch` sequences; of a paged cache, `batch` blocks."""
        return sum(batch * c.heads * self.num_rows * c.head_dim * c.dtype.itemsize for c in self.caches)

    def split(self, inputs: Sequence[Any]) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
        """Flat inputs of a contiguous step → tokens, positions, logit indices, caches."""
        tokens, positions, wanted = inputs[:_FIRST_CACHE]
        return tokens, positions, wanted, list(inputs[_FIRST_CACHE:])

    def split_paged(self, inputs: Sequence[Any]) -> tuple[StepInputs, list[Tensor]]:
        """Flat inputs of a paged step → step inputs, caches."""
        return StepInputs(*inputs[:NUM_STEP_INPUTS]), list(inputs[NUM_STEP_INPUTS:])

    def whole_rows(self, tokens: Tensor) -> tuple[tuple[Tensor, ...], int]:
        """Inputs of a step that gives the logits of every token of whole rows, and how many entries of the caches it
        needs (`empty`).

        Shapes: tokens i64[B, S].

        Raises:
            OptionError: the rows are longer than the cache.
        """
        batch, length = tokens.shape
        if length > self.max_length:
            raise OptionError(
                f"{length} tokens do not fit into a key-value cache of {self.max_length}:"
                f" shorter inputs, or compile with insert-kv-cache{{max-length={length}}}"
            )
        if self.block_size is None:
            positions = torch.arange(length, device=tokens.device).expand(batch, -1).contiguous()
            return (tokens, positions, positions), batch
        tables = tables_in_order(batch, length, self.block_size, tokens.device)
        return StepInputs.of_rows(tokens, 0, tables, self.block_size).flat(), tables.numel()
