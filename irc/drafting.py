"""`make_draft`: a draft model for speculative decoding, made from the model itself: layers dropped, fewer bits."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from irc.compiled import Compiled
from irc.compiler import compile as compile_model
from irc.core.contract import Pass, PassContext
from irc.core.errors import OptionError
from irc.core.manager import FIRST_STAGE
from irc.core.program import Program
from irc.core.target import Target
from irc.passes.attention.insert_kv_cache import InsertKVCache
from irc.passes.fuse.merge_gate_up import MergeGateUp
from irc.passes.fuse.merge_qkv import MergeQkv
from irc.passes.prune.drop_layers import DropLayers, find_layers
from irc.passes.quantize.quantize_weights import QuantizeWeights


def make_draft(
    model: Compiled | Program,
    *,
    keep: int | float = 0.4,
    layers: Sequence[int] | None = None,
    tokens: Tensor | None = None,
    bits: int | None = 4,
    group_size: int = 32,
    target: str | Target = "reference",
) -> Compiled:
    """A smaller model that says much the same: `compiled.generate(..., draft=make_draft(compiled))`.

    Args:
        model: what to make it from: the captured program is taken, before any pass.
        keep: layers to keep, as a number or a share of all.
        layers: which to keep; None: chosen, by `tokens` if given, else spread evenly.
        tokens: i64[B, S], representative text: layers are dropped one by one, each time the one without which most
            next tokens stay the same.
        bits, group_size: of the weights; None: as they are.
        target: what to lower to.

    Raises:
        OptionError: there are no layers, or not as many.
    """
    program = model.stages[FIRST_STAGE] if isinstance(model, Compiled) else model
    count = len(find_layers(program))
    wanted = round(keep * count) if isinstance(keep, float) else keep
    if layers is None and not 1 <= max(wanted, 1) <= count:
        raise OptionError(
            f"a draft with {wanted} layers cannot be made from the {count} that program {program.name} has"
        )
    kept = list(layers) if layers is not None else choose_layers(program, max(wanted, 1), tokens)
    dropped = [i for i in range(count) if i not in kept]
    passes: list[Pass] = [DropLayers(layers=";".join(map(str, dropped)))] if dropped else []
    if bits is not None:
        passes.append(QuantizeWeights(bits=bits, group_size=group_size))
    passes += [MergeQkv(), MergeGateUp(), InsertKVCache(layout="paged")]
    tokenizer = model.tokenizer if isinstance(model, Compiled) else None
    return compile_model(program, passes, target=target, verify="off", tokenizer=tokenizer)


def choose_layers(program: Program, keep: int, tokens: Tensor | None = None) -> list[int]:
    """Which layers to keep: see `make_draft`."""
    count = len(find_layers(program))
    if tokens is None:
        places = [round(i * (count - 1) / max(keep - 1, 1)) for i in range(keep)]
        return sorted(set(places) | set(itertools.islice((i for i in range(count) if i not in places),
                                                         keep - len(set(places)))))  # fmt: skip
    expected = program.run(tokens)[0].argmax(-1)
    kept = list(range(count))
    while len(kept) > keep:
        kept.remove(max(kept, key=lambda layer: _agreement(program, kept, layer, tokens, expected)))
    return kept


def _agreement(program: Program, kept: Sequence[int], without: int, tokens: Tensor, expected: Tensor) -> float:
    """Share of next tokens that stay the same when only `kept` but one are left."""
    count = len(find_layers(program))
    dropped = [i for i in range(count) if i not in kept or i == without]
    smaller = DropLayers(layers=";".join(map(str, dropped))).run(program.copy(), PassContext()).program
    with torch.no_grad():
        return float((smaller.run(tokens)[0].argmax(-1) == expected).float().mean())
