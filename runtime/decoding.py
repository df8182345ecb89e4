"""How the next logits of a batch of sequences are computed: with a key-value cache, or by recomputation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from irc.core.errors import TargetError
from irc.core.kv_cache import KVCache
from irc.core.program import VAL, Program
from irc.core.target import Artifact

_TOKEN_TYPES = (torch.int64, torch.int32)


class Decoder(Protocol):
    """Computes next-token logits of a batch.

    Attributes:
        max_length: most tokens a sequence may have, or None.
        vocabulary_size: token ids are below it.
        notice: what the user should know, or an empty string.
    """

    max_length: int | None
    vocabulary_size: int
    notice: str

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Start with these sequences; logits [N, V] after the last token of each."""

    def decode(self, sequences: Sequence[Sequence[int]], active: Sequence[int]) -> Tensor:
        """Logits [len(active), V] after the last token of the active sequences (all else has been seen)."""


def decoder_for(artifact: Artifact, program: Program) -> Decoder:
    """The decoder that fits an artifact of a program.

    Raises:
        TargetError: the program is no language model over one input of tokens.
    """
    if artifact.kv_cache is not None:
        return CachedDecoder(artifact, artifact.kv_cache, _vocabulary(program))
    _check_token_program(program)
    return RecomputeDecoder(artifact, program)


class CachedDecoder:
    """One step over the prompts (padded to the right), then one token a step.

    Padding is written to the cache behind the prompt it pads, and overwritten before any query sees it.
    """

    notice = ""

    def __init__(self, artifact: Artifact, cache: KVCache, vocabulary_size: int) -> None:
        self.max_length: int | None = cache.max_length
        self.vocabulary_size = vocabulary_size
        self._artifact = artifact
        self._caches: list[Tensor] = []
        self._rows: list[int] = []

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        longest = max(map(len, prompts))
        tokens = torch.tensor([[*prompt, *[0] * (longest - len(prompt))] for prompt in prompts])
        positions = torch.arange(longest).expand(len(prompts), -1).contiguous()
        last = torch.tensor([[len(prompt) - 1] for prompt in prompts])
        self._rows = list(range(len(prompts)))
        self._caches = self._artifact.new_caches(len(prompts))
        return self._artifact.step(self._caches, tokens, positions, last)[:, 0]

    def decode(self, sequences: Sequence[Sequence[int]], active: Sequence[int]) -> Tensor:
        # A finished sequence runs along, its last token written again; when half are finished, rows are dropped.
        if 2 * len(active) <= len(self._rows):
            kept = torch.tensor([self._rows.index(i) for i in active])
            self._caches = [cache[kept.to(cache.device)] for cache in self._caches]
            self._rows = list(active)
        assert self.max_length is not None
        positions = [min(len(sequences[i]), self.max_length) - 1 for i in self._rows]
        tokens = torch.tensor([[sequences[i][p]] for i, p in zip(self._rows, positions, strict=True)])
        first = torch.zeros((len(self._rows), 1), dtype=torch.int64)
        logits = self._artifact.step(self._caches, tokens, torch.tensor(positions).unsqueeze(1), first)[:, 0]
        if len(active) == len(self._rows):
            return logits
        wanted = set(active)
        return logits[[row for row, i in enumerate(self._rows) if i in wanted]]


class RecomputeDecoder:
    """Runs the whole sequence again for every token; sequences of one length run together."""

    notice = "no key-value cache: every token recomputes its whole sequence (insert-kv-cache avoids that)"

    def __init__(self, artifact: Artifact, program: Program) -> None:
        self.vocabulary_size = _vocabulary(program)
        bounds = [dim.maximum for dim in program.dims.values() if dim.symbol in _length(program).free_symbols]
        self.max_length: int | None = min((b for b in bounds if b is not None), default=None)
        self._artifact = artifact
        self._dtype = program.placeholders[0].meta[VAL].dtype

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        return self.decode(prompts, range(len(prompts)))

    def decode(self, sequences: Sequence[Sequence[int]], active: Sequence[int]) -> Tensor:
        by_length: dict[int, list[int]] = {}
        for i in active:
            by_length.setdefault(len(sequences[i]), []).append(i)
        found: dict[int, Tensor] = {}
        for group in by_length.values():
            (logits, *_) = self._artifact.run(torch.tensor([list(sequences[i]) for i in group], dtype=self._dtype))
            found.update(zip(group, logits[:, -1], strict=True))
        return torch.stack([found[i] for i in active])


def _check_token_program(program: Program) -> None:
    what = f"program {program.name} cannot generate"
    if len(program.placeholders) != 1:
        raise TargetError(
            f"{what}: it takes {', '.join(program.input_names)}; only one input, the tokens, can be supplied"
        )
    value, output = program.placeholders[0].meta.get(VAL), program.outputs[0]
    if not isinstance(value, Tensor) or value.dtype not in _TOKEN_TYPES or value.dim() != 2:
        raise TargetError(f"{what}: its input {program.input_names[0]} is no integer tensor [B, S]")
    logits = output.meta[VAL] if isinstance(output, torch.fx.Node) else None
    if not isinstance(logits, Tensor) or logits.dim() != 3 or not logits.is_floating_point():
        raise TargetError(f"{what}: its first output is no tensor of logits [B, S, V]")
    if program.shape_expr(program.outputs[0])[1] != _length(program):
        raise TargetError(f"{what}: it gives no logits for every token")
    if not isinstance(value.shape[1], torch.SymInt):
        raise TargetError(f"{what}: its sequence length is fixed to {value.shape[1]}; capture it with a dynamic one")


def _length(program: Program):  # type: ignore[no-untyped-def]
    return program.shape_expr(program.placeholders[0])[1]


def _vocabulary(program: Program) -> int:
    """Rows of the table that the tokens are looked up in; without one, the width of the logits."""
    for user in program.placeholders[0].users:
        if user.target is torch.ops.aten.embedding.default:
            return int(user.args[0].meta[VAL].shape[0])  # type: ignore[union-attr]
    return int(program.outputs[0].meta[VAL].shape[-1])
