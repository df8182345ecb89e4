"""Embeddings from an encoder: the mean of the last hidden states, normalised; texts of one length run together."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from irc.core.errors import OptionError
from irc.runtime.text import TextCodec


class Embedder:
    """Runs an encoder.

    Args:
        run: i64[B, S] → hidden states [B, S, E].
    """

    def __init__(self, run: Callable[[Tensor], Tensor], tokenizer: Any, *, width: int, vocabulary_size: int,
                 max_length: int = 512) -> None:  # fmt: skip
        self.width, self.max_length, self.vocabulary_size = width, max_length, vocabulary_size
        self._run, self._codec = run, TextCodec(tokenizer)
        self._lock = asyncio.Lock()

    def ids_of(self, given: Any) -> list[list[int]]:
        """Texts or ids as lists of ids.

        Raises:
            OptionError: one is empty, too long, or has ids that there are not.
        """
        items = [given] if isinstance(given, str) or (given and isinstance(given[0], int)) else list(given)
        rows = [self._codec.encode(one) if isinstance(one, str) else list(one) for one in items]
        for number, row in enumerate(rows):
            if not row or len(row) > self.max_length:
                raise OptionError(f"input {number} has {len(row)} tokens; 1 to {self.max_length} are possible")
            if any(not 0 <= token < self.vocabulary_size for token in row):
                raise OptionError(f"input {number} has an id outside of 0 to {self.vocabulary_size - 1}")
        return rows

    async def embed(self, rows: Sequence[Sequence[int]]) -> list[list[float]]:
        """A vector of length 1 for each row."""
        async with self._lock:
            return await asyncio.get_running_loop().run_in_executor(None, self._embed, rows)

    def _embed(self, rows: Sequence[Sequence[int]]) -> list[list[float]]:
        by_length: dict[int, list[int]] = {}
        for index, row in enumerate(rows):
            by_length.setdefault(len(row), []).append(index)
        found: dict[int, list[float]] = {}
        for group in by_length.values():
            hidden = self._run(torch.tensor([list(rows[i]) for i in group])).float().mean(1)
            vectors = torch.nn.functional.normalize(hidden, dim=-1)
            found.update(zip(group, vectors.tolist(), strict=True))
        return [found[i] for i in range(len(rows))]
