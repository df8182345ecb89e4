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
it and overwritten before any query sees it. With `layout=paged` (`_paged_rewrite`) the step takes N flat tokens of any
sequences, and caches are pools of blocks that block tables point into (inputs: `irc.core.paged.StepInputs`):

    step(tokens[N], positions[N], sequence_ids[N], block_tables[Q, M], slots[N], logit_indices[R], caches…)
        → (logits[R, V], caches…)

Runs after canonicalization. Does not handle: encoder–decoder models, state-space models, a cache shorter than the
sequence (ring buffers).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.utils._pytree as pytree

from irc.core.contract import EXACT, Finding, Pass, PassContext, PassResult, Preserves, register_pass
from irc.core.errors import OptionError, PassError, nearest
from irc.core.evaluate import Observer
from irc.core.kv_cache import METADATA_KEY
from irc.core.operands import input_node
from irc.core.ops.registry import is_irc_op
from irc.core.program import VAL, Program, dtype_from_name, dtype_name
from irc.passes.attention._analysis import Analysis, analyze, require
from irc.passes.attention._paged_rewrite import PagedRewrite, one_row
from irc.passes.attention._sequence import is_attention
from irc.passes.attention._step_replay import Axes, ContiguousSteps, PagedSteps
from irc.passes.attention._step_rewrite import StepRewrite

_LAYOUTS = ("contiguous", "paged")
_DTYPES = ("f64", "f32", "f16", "bf16")


@register_pass
@dataclass(frozen=True, kw_only=True)
class InsertKVCache(Pass):
    """attention(q, k, v) → attention(q, cache_write(cache_k, k), cache_write(cache_v, v), positions).

    Attributes:
        max_length: L, positions that the cache holds; None: the model's own limit, at most 512 unless
            the example is longer.
        layout: `contiguous`, one row of L positions a sequence; `paged`, blocks and block tables.
        block_size: P, tokens a block of the paged layout.
        cache_dtype: type of the caches (`f32`, `f16`, `bf16`); None: the type of keys and values.
        tokens: name of the input that holds the tokens; None: the one that carries the sequence.

    Preserves: 1e-5 relative in f32. A `cache_dtype` makes it lossy: 0.1 of the largest logit.
    """

    name: ClassVar[str] = "insert-kv-cache"
    max_length: int | None = None
    layout: Literal["contiguous", "paged"] = "contiguous"
    block_size: int = 16
    cache_dtype: str | None = None
    tokens: str | None = None

    def __post_init__(self) -> None:
        problems = []
        if self.max_length is not None and self.max_length < 2:
            problems.append(f"max-length must be at least 2, got {self.max_length}")
        if self.layout not in _LAYOUTS:
            problems.append(f"unknown layout {self.layout!r}{nearest(self.layout, _LAYOUTS)}")
        if self.block_size < 1:
            problems.append(f"block-size must be at least 1, got {self.block_size}")
        if self.cache_dtype is not None and self.cache_dtype not in _DTYPES:
            problems.append(f"unknown cache-dtype {self.cache_dtype!r}{nearest(self.cache_dtype, _DTYPES)}")
        if problems:
            raise OptionError(f"{self.name}: " + "; ".join(problems))

    @property
    def preserves(self) -> Preserves:
        return EXACT if self.cache_dtype is None else Preserves(kind="lossy", rtol=0.1)

    def requires(self, program: Program) -> list[str]:
        try:
            return analyze(program, self.max_length, self.tokens).problems
        except PassError as error:
            return [str(error)]

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        analysis = analyze(program, self.max_length, self.tokens)
        require(analysis)
        example, inputs_before = program.example_inputs, program.input_names
        sequence = analysis.sequence
        axes = Axes.of(program, sequence)
        dtype = dtype_from_name(self.cache_dtype) if self.cache_dtype else None
        if self.layout == "paged":
            axes.require_three(program)
            one_row(program, sequence)
            analysis = analyze(program, analysis.tables.length, self.tokens)
            require(analysis)
            rewrite: StepRewrite = PagedRewrite(program, analysis, dtype, block_size=self.block_size)
        else:
            rewrite = StepRewrite(program, analysis, dtype)
        rewrite.run()
        self._describe(program, analysis, rewrite)
        token_index = inputs_before.index(str(sequence.tokens.target))
        steps = PagedSteps(axes) if self.layout == "paged" else ContiguousSteps(axes)
        if example is not None:
            program.example_inputs = steps.example(program, example[token_index])

        def replay(step: Program, inputs: Sequence[Any]) -> list[Any]:
            return [steps.replay(step, inputs[token_index])]

        def trace(step: Program, inputs: Sequence[Any], observer: Observer) -> None:
            steps.trace(step, inputs[token_index], observer)

        tables = analysis.tables
        return PassResult(
            program,
            matches=len(analysis.attentions),
            modified=True,
            statistics={"max_length": tables.length, "tables": len(tables.found) + len(tables.biases)},
            replay=replay,
            trace=trace,
        )

    def _describe(self, program: Program, analysis: Analysis, rewrite: StepRewrite) -> None:
        """Signature, aliases and metadata of the step."""
        count, first = len(rewrite.caches), len(program.placeholders) - len(rewrite.caches)
        program.in_spec = pytree.tree_flatten(((0,) * len(program.placeholders), {}))[1]
        program.out_spec = pytree.tree_flatten((0,) * (1 + count))[1]
        program.aliases = {1 + i: first + i for i in range(count)}
        caches = [
            {"name": str(node.target), "heads": heads, "head_dim": width, "dtype": dtype_name(node.meta[VAL].dtype)}
            for node, (heads, width) in zip(rewrite.caches, rewrite.heads, strict=True)
        ]
        program.metadata = program.metadata | {
            METADATA_KEY: {
                "layout": self.layout,
                **({"block_size": self.block_size} if self.layout == "paged" else {}),
                "max_length": analysis.tables.length,
                "tokens": str(analysis.sequence.tokens.target),
                "positions": "positions",
                "logit_indices": "logit_indices",
                "caches": caches,
            }
        }

    def ensures(self, before: Program, result: PassResult) -> list[Finding]:
        """Every attention reads two written caches by position, and every cache comes out again."""
        program, findings = result.program, []
        paged = self.layout == "paged"
        attention, write = ("paged_attention", "paged_cache_write") if paged else ("attention", "cache_write")
        for node in program.operations():
            if paged and is_attention(node):
                findings.append(Finding(node.name, "attends over no cache"))
            if not (is_attention(node) if not paged else is_irc_op(node.target, attention)):
                continue
            if not paged and node.kwargs.get("positions") is None:
                findings.append(Finding(node.name, "attends without positions"))
            for given in (input_node(node, index) for index in (1, 2)):
                origin = given
                if origin.target is torch.ops.aten._to_copy.default:
                    origin = input_node(origin)
                if not is_irc_op(origin.target, write):
                    findings.append(Finding(node.name, f"attends over {given}, which is no cache"))
        placeholders, outputs = program.placeholders, program.outputs
        for output, source in program.aliases.items():
            written = outputs[output].args[0] if isinstance(outputs[output], torch.fx.Node) else None
            if written is not placeholders[source]:
                findings.append(Finding(placeholders[source].name, "is not what its output continues"))
        return findings
