"""KV-cache insertion: a decoder over whole sequences becomes one step over new tokens.

    f(tokens[B, S]) → logits[B, S, V]   ⇒
    step(tokens[B, S], positions[B, S], logit_indices[B, R], caches…) → (logits[B, R, V], caches…)

Works by dataflow on any program whose attentions are canonical, whatever model it came from:

1. Proof (`_per_position`): between attentions every token is treated alone. A convolution, reduction
   or running sum over the sequence, a bidirectional attention, or a mask made from data is refused.
2. Tables (`_position_tables`): values that depend on positions but not on tokens (rotary tables,
   learned positions, ALiBi) are evaluated for the whole cache and gathered by `positions`; a table that
   changes as the sequence grows (dynamic NTK scaling) is refused.
3. Rewrite (`_step_rewrite`): at each attention, keys and values (KV heads not repeated) are written to
   the cache at their positions, and attention runs over the cache; the head runs on the tokens whose
   logits are wanted (`_head`).

Positions are per sequence, so a batch may be ragged: padding to the right of a prompt is written behind
it and overwritten before any query sees it. Runs after canonicalization. Does not handle: encoder–decoder
models, state-space models, a cache shorter than the sequence (ring buffers).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from irc.core.contract import EXACT, Finding, Pass, PassContext, PassResult, Preserves, register_pass
from irc.core.errors import OptionError, PassError, nearest
from irc.core.evaluate import Observer, evaluate
from irc.core.kv_cache import METADATA_KEY, KVCache
from irc.core.ops.registry import is_irc_op
from irc.core.program import VAL, Program, dtype_from_name, dtype_name
from irc.passes.attention._analysis import analyze, require
from irc.passes.attention._sequence import Sequence as TokenSequence
from irc.passes.attention._sequence import attention_nodes
from irc.passes.attention._step_rewrite import StepRewrite

_DTYPES = ("f64", "f32", "f16", "bf16")
_NUM_SINGLE_STEPS = 3


@register_pass
@dataclass(frozen=True, kw_only=True)
class InsertKVCache(Pass):
    """attention(q, k, v) → attention(q, cache_write(cache_k, k), cache_write(cache_v, v), positions).

    Attributes:
        max_length: L, positions that the cache holds; None: the model's own limit, at most 512 unless
            the example is longer.
        layout: `contiguous`, one row of L positions a sequence.
        cache_dtype: type of the caches (`f32`, `f16`, `bf16`); None: the type of keys and values.
        tokens: name of the input that holds the tokens; None: the one that carries the sequence.

    Preserves: 1e-5 relative in f32. A `cache_dtype` makes it lossy: 0.1 of the largest logit.
    """

    name: ClassVar[str] = "insert-kv-cache"
    max_length: int | None = None
    layout: str = "contiguous"
    cache_dtype: str | None = None
    tokens: str | None = None

    def __post_init__(self) -> None:
        problems = []
        if self.max_length is not None and self.max_length < 2:
            problems.append(f"max-length must be at least 2, got {self.max_length}")
        if self.layout == "paged":
            problems.append("layout=paged is not available in this pass yet: only the paged ops exist; use contiguous")
        elif self.layout != "contiguous":
            problems.append(f"unknown layout {self.layout!r}{nearest(self.layout, ['contiguous'])}")
        if self.cache_dtype is not None and self.cache_dtype not in _DTYPES:
            problems.append(f"unknown cache-dtype {self.cache_dtype!r}{nearest(self.cache_dtype, _DTYPES)}")
        if problems:
            raise OptionError(f"{self.name}: " + "; ".join(problems))

    @property
    def preserves(self) -> Preserves:  # type: ignore[override]
        return EXACT if self.cache_dtype is None else Preserves(kind="lossy", rtol=0.1)

    def requires(self, program: Program) -> list[str]:
        try:
            return analyze(program, self.max_length, self.tokens).problems
        except PassError as error:
            return [str(error)]

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        analysis = analyze(program, self.max_length, self.tokens)
        require(analysis)
        example = program.example_inputs
        inputs_before = program.input_names
        rewrite = StepRewrite(program, analysis, dtype_from_name(self.cache_dtype) if self.cache_dtype else None)
        rewrite.run()
        sequence, length = analysis.sequence, analysis.tables.length
        count = len(rewrite.caches)
        program.in_spec = pytree.tree_flatten(((0,) * len(program.placeholders), {}))[1]
        program.out_spec = pytree.tree_flatten((0,) * (1 + count))[1]
        program.aliases = {1 + i: 3 + i for i in range(count)}
        token_index = inputs_before.index(str(sequence.tokens.target))
        program.metadata = program.metadata | {
            METADATA_KEY: {
                "layout": self.layout,
                "max_length": length,
                "tokens": str(sequence.tokens.target),
                "positions": str(rewrite.positions.target),
                "logit_indices": str(rewrite.logit_indices.target),
                "caches": [
                    {
                        "name": str(node.target),
                        "heads": heads,
                        "head_dim": width,
                        "dtype": dtype_name(node.meta[VAL].dtype),
                    }
                    for node, (heads, width) in zip(rewrite.caches, rewrite.heads, strict=True)
                ],
            }
        }
        if example is not None:
            program.example_inputs = _example_step(program, sequence, example[token_index])

        def replay(step: Program, inputs: Sequence[Any]) -> list[Any]:
            return [_replay(step, inputs[token_index], sequence.axis, sequence.batch_axis)]

        def trace(step: Program, inputs: Sequence[Any], observer: Observer) -> None:
            _trace(step, inputs[token_index], sequence, observer)

        return PassResult(
            program,
            matches=len(analysis.attentions),
            modified=True,
            statistics={"max_length": length, "tables": len(analysis.tables.found) + len(analysis.tables.biases)},
            replay=replay,
            trace=trace,
        )

    def ensures(self, before: Program, result: PassResult) -> list[Finding]:
        """Every attention reads two written caches by position, and every cache comes out again."""
        program, findings = result.program, []
        for node in attention_nodes(program):
            if node.kwargs.get("positions") is None:
                findings.append(Finding(node.name, "attends without positions"))
            for operand in node.args[1:3]:
                source = operand
                if getattr(source, "target", None) is torch.ops.aten._to_copy.default:
                    source = source.args[0]  # type: ignore[union-attr]
                if not is_irc_op(getattr(source, "target", None), "cache_write"):
                    findings.append(Finding(node.name, f"attends over {operand}, which is no cache"))
        placeholders, outputs = program.placeholders, program.outputs
        for output, source in program.aliases.items():
            written = outputs[output].args[0] if isinstance(outputs[output], torch.fx.Node) else None
            if written is not placeholders[source]:
                findings.append(Finding(placeholders[source].name, "is not what its output continues"))
        return findings


def _example_step(program: Program, sequence: TokenSequence, tokens: Tensor) -> tuple[Tensor, ...]:
    """A first step on the example's tokens: positions from zero, empty caches, logits of the last two."""
    batch, length = tokens.shape[sequence.batch_axis], tokens.shape[sequence.axis]
    positions = torch.arange(length, device=tokens.device).expand(batch, -1).clone()
    caches = _cache_of(program).empty(batch, device=tokens.device)
    return (tokens, positions, positions[:, max(length - 2, 0) :].clone(), *caches)


def _cache_of(program: Program) -> KVCache:
    cache = KVCache.of(program)
    assert cache is not None
    return cache


def _replay(step: Program, tokens: Tensor, axis: int, batch_axis: int, observer: Observer | None = None) -> Tensor:
    """Logits of all tokens, from steps over parts: half at once, a few one by one, the rest at once."""
    batch, length = tokens.shape[batch_axis], tokens.shape[axis]
    limit = _cache_of(step).max_length
    if length > limit:
        raise PassError(f"the inputs have {length} tokens, the cache holds {limit}")
    start = max(length // 2, 1)
    singles = min(_NUM_SINGLE_STEPS, length - start)
    bounds = sorted({0, *range(start, start + singles + 1), length})
    caches = _cache_of(step).empty(batch, device=tokens.device)
    logits = []
    for first, last in itertools.pairwise(bounds):
        count = last - first
        positions = torch.arange(first, last, device=tokens.device).expand(batch, -1).contiguous()
        wanted = torch.arange(count, device=tokens.device).expand(batch, -1).contiguous()
        inputs = (tokens.narrow(axis, first, count), positions, wanted, *caches)
        part, *caches = evaluate(step.graph, step.weight, inputs, observer)
        logits.append(part)
    return torch.cat(logits, dim=_sequence_dim(step))


def _trace(step: Program, tokens: Tensor, sequence: TokenSequence, observer: Observer) -> None:
    """Show the values of the replay's steps joined along the tokens: what one run of the old program had."""
    parts: dict[torch.fx.Node, list[Any]] = {}
    _replay(step, tokens, sequence.axis, sequence.batch_axis, lambda n, value: parts.setdefault(n, []).append(value))
    lengths = {step.shape_expr(node)[1] for node in step.placeholders[1:3]}
    for node, values in parts.items():
        if not isinstance(values[0], Tensor):
            continue  # a step's own sizes: those of the whole are other numbers
        shape = step.shape_expr(node)
        along = [dim for dim, size in enumerate(shape) if size in lengths]
        observer(node, torch.cat(values, dim=along[0]) if len(along) == 1 else values[-1])


def _sequence_dim(step: Program) -> int:
    """Which dimension of the logits holds the wanted tokens."""
    wanted = step.shape_expr(step.placeholders[2])[1]
    return step.shape_expr(step.outputs[0]).index(wanted)
