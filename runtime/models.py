"""Any artifact of a language model as a `PagedModel`: paged caches as they are, other programs wrapped.

- paged cache: the artifact's own step.
- contiguous cache: a block is a whole row, so a sequence has one block and shares nothing.
- no cache: the pages hold token ids, and each step runs whole sequences again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from irc.core.errors import TargetError
from irc.core.kv_cache import KVCache
from irc.core.operands import input_node
from irc.core.paged import PagedModel, StepInputs
from irc.core.program import VAL, Program
from irc.core.target import Artifact

_TOKEN_TYPES = (torch.int64, torch.int32)
_RECOMPUTED_LENGTH = 1 << 14


def paged_model(artifact: Artifact, program: Program) -> PagedModel:
    """The step over flat tokens of an artifact of a program.

    Raises:
        TargetError: the program is no language model over one input of tokens.
    """
    cache = artifact.kv_cache
    if cache is None:
        check_token_program(program)
        return RecomputedModel(artifact, program)
    wrapper = PagedArtifact if cache.block_size is not None else ContiguousModel
    return wrapper(artifact, cache, vocabulary_size(program))


class PagedArtifact:
    """An artifact with a paged cache."""

    notice = ""
    max_sequences: int | None = None

    def __init__(self, artifact: Artifact, cache: KVCache, vocabulary_size: int) -> None:
        assert cache.block_size is not None
        self.block_size, self.max_length = cache.block_size, cache.max_length
        self.block_bytes, self.vocabulary_size = cache.num_bytes(1), vocabulary_size
        self.new_pages, self.paged_step, self.copy_blocks = (
            artifact.new_pages,
            artifact.paged_step,
            artifact.copy_blocks,
        )


class ContiguousModel:
    """An artifact with a contiguous cache; sequences with equally many tokens run together."""

    notice = ""
    max_sequences: int | None = None

    def __init__(self, artifact: Artifact, cache: KVCache, vocabulary_size: int) -> None:
        self.block_size = self.max_length = cache.max_length
        self.block_bytes, self.vocabulary_size = cache.num_bytes(1), vocabulary_size
        self._artifact = artifact

    def new_pages(self, num_blocks: int) -> list[Tensor]:
        return self._artifact.new_caches(num_blocks)

    def copy_blocks(self, pages: list[Tensor], sources: Sequence[int], targets: Sequence[int]) -> None:
        with torch.inference_mode():
            for page in pages:
                page[list(targets)] = page[list(sources)]

    def paged_step(self, pages: list[Tensor], inputs: StepInputs) -> Tensor:
        counts = torch.bincount(inputs.sequence_ids, minlength=len(inputs.block_tables))
        starts = counts.cumsum(0) - counts
        place = torch.empty(len(inputs.tokens), dtype=torch.int64)
        found: list[Tensor] = []
        offset = 0
        wanted = torch.zeros(len(inputs.tokens), dtype=torch.bool)
        wanted[inputs.logit_indices] = True
        for count in sorted(set(counts.tolist()) - {0}):
            rows = (counts == count).nonzero().squeeze(1)
            tokens = starts[rows].unsqueeze(1) + torch.arange(count)
            logits, columns = self._run(pages, inputs, inputs.block_tables[rows, 0], tokens, wanted[tokens])
            found.append(logits.flatten(0, 1))
            where = offset + torch.arange(len(rows) * len(columns)).view(len(rows), -1)
            place[tokens[:, columns]] = where
            offset += where.numel()
        return torch.cat(found)[place[inputs.logit_indices].to(found[0].device)]

    def _run(
        self, pages: list[Tensor], inputs: StepInputs, blocks: Tensor, tokens: Tensor, wanted: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Logits [G, C, V] of the columns C in which any row's logits are wanted."""
        columns = wanted.any(0).nonzero().squeeze(1)
        if not len(columns):
            columns = torch.tensor([tokens.shape[1] - 1])
        first, count = int(blocks[0]), len(blocks)
        whole = blocks.tolist() == list(range(first, first + count))
        views = [page[first : first + count] if whole else page[blocks.to(page.device)] for page in pages]
        given = list(views)
        logits = self._artifact.step(
            given, inputs.tokens[tokens], inputs.positions[tokens], columns.expand(count, -1).contiguous()
        )
        with torch.inference_mode():
            for page, view, new in zip(pages, views, given, strict=True):
                if not whole:
                    page[blocks.to(page.device)] = new
                elif new.data_ptr() != view.data_ptr():
                    view.copy_(new)
        return logits, columns


class RecomputedModel:
    """A program without a cache: every token recomputes its whole sequence; sequences of one length run together."""

    notice = "no key-value cache: every token recomputes its whole sequence (insert-kv-cache avoids that)"
    max_sequences: int | None = None
    block_size, block_bytes = 16, 16 * 8

    def __init__(self, artifact: Artifact, program: Program) -> None:
        self.vocabulary_size = vocabulary_size(program)
        bounds = [dim.maximum for dim in program.dims.values() if dim.symbol in _length(program).free_symbols]
        self.max_length = min((b for b in bounds if b is not None), default=_RECOMPUTED_LENGTH)
        self._artifact = artifact
        self._dtype = program.placeholders[0].meta[VAL].dtype

    def new_pages(self, num_blocks: int) -> Tensor:
        return torch.zeros((num_blocks, self.block_size), dtype=torch.int64)

    def copy_blocks(self, pages: Tensor, sources: Sequence[int], targets: Sequence[int]) -> None:
        pages[list(targets)] = pages[list(sources)]

    def paged_step(self, pages: Tensor, inputs: StepInputs) -> Tensor:
        kept = inputs.slots >= 0
        pages.view(-1)[inputs.slots[kept]] = inputs.tokens[kept]
        sequences = inputs.sequence_ids[inputs.logit_indices].tolist()
        positions = inputs.positions[inputs.logit_indices].tolist()
        lengths: dict[int, int] = {}
        for sequence, position in zip(sequences, positions, strict=True):
            lengths[sequence] = max(lengths.get(sequence, 0), position + 1)
        by_length: dict[int, list[int]] = {}
        for sequence, length in lengths.items():
            by_length.setdefault(length, []).append(sequence)
        found: dict[int, Tensor] = {}
        for length, group in by_length.items():
            tokens = pages[inputs.block_tables[group]].flatten(1)[:, :length]
            (logits, *_) = self._artifact.run(tokens.to(self._dtype).contiguous())
            found.update(zip(group, logits, strict=True))
        if not sequences:
            return torch.empty(0, self.vocabulary_size)
        return torch.stack([found[s][p] for s, p in zip(sequences, positions, strict=True)])


def check_token_program(program: Program) -> None:
    """Raise unless the program is a language model without a cache.

    Raises:
        TargetError: says what is missing.
    """
    what = f"program {program.name} cannot generate"
    if len(program.placeholders) != 1:
        raise TargetError(
            f"{what}: it takes {', '.join(program.input_names)}; only one input, the tokens, can be supplied"
        )
    value, output = program.placeholders[0].meta.get(VAL), program.outputs[0]
    if not isinstance(value, Tensor) or value.dtype not in _TOKEN_TYPES or value.dim() != 2:
        raise TargetError(f"{what}: its input {program.input_names[0]!r} is no integer tensor [B, S]")
    logits = output.meta[VAL] if isinstance(output, torch.fx.Node) else None
    if not isinstance(logits, Tensor) or logits.dim() != 3 or not logits.is_floating_point():
        raise TargetError(f"{what}: its first output is no tensor of logits [B, S, V]")
    if program.shape_expr(program.outputs[0])[1] != _length(program):
        raise TargetError(f"{what}: it gives no logits for every token")
    if not isinstance(value.shape[1], torch.SymInt):
        raise TargetError(f"{what}: its sequence length is fixed to {value.shape[1]}; capture it with a dynamic one")


def _length(program: Program) -> Any:
    return program.shape_expr(program.placeholders[0])[1]


def vocabulary_size(program: Program) -> int:
    """Rows of the table that the tokens are looked up in; without one, the width of the first output."""
    tokens = program.placeholders[0]
    users = [*tokens.users, *(u for user in tokens.users if user.target is torch.ops.aten.unsqueeze.default
                              for u in user.users)]  # fmt: skip
    for user in users:
        if user.target is torch.ops.aten.embedding.default:
            return int(input_node(user).meta[VAL].shape[0])
    return int(program.outputs[0].meta[VAL].shape[-1])
