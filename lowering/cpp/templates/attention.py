"""Attention over contiguous and paged keys and values, grouped heads, in f32: decode, verification and prefill.

One call does all sizes: few queries and paged caches are worked on by dots with the keys split over the workers, many
queries over contiguous keys by matrix tiles. `irc/attention.h` has both, and the bound on their error.

Nothing is packed: keys and values are read as they lie. `epilogue(b, h, s, values)` gets one head's output of one query
as f32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from irc.core.errors import TargetError
from irc.lowering.cpp.templates.base import C_TYPES

INCLUDES = ("irc/attention.h",)
MASKS = ("full", "causal", "sliding", "chunked")
_WIDEST = 512
_BIASES = {**C_TYPES, "bool": "bool"}
_CACHES = {**C_TYPES, "i8": "int8_t", "u8": "irc::nibbles"}
SCALED = ("i8", "u8")
_PAGING = {"table": "nullptr", "table_stride": "0", "page_size": "1"}


@dataclass(frozen=True, kw_only=True)
class AttentionProblem:
    """softmax(cap(q · kᵀ · scale), masked) · v; what is known when the kernel is printed.

    Attributes:
        width: D of queries and keys.
        value_width: D of values.
        query: type of queries in memory: f32, bf16 or f16.
        cache: type of keys and values: f32, bf16, f16; with a scale a row i8, and u8, which are pairs of 4-bit
            numbers (strides are in bytes).
        mask: as `irc::attention` has it.
        window: of sliding and chunked masks.
        scale: of the scores.
        softcap: of the scores, or None.
        bias: type of a tensor [batch, heads, queries, keys] that is added to the scores: f32, bf16, f16, or bool, which
            keeps scores where it is true. None: there is none.
    """

    width: int
    value_width: int
    query: str = "f32"
    cache: str = "f32"
    mask: str = "full"
    window: int | None = None
    scale: float = 1.0
    softcap: float | None = None
    bias: str | None = None


def refuses(problem: AttentionProblem, isa: str) -> str | None:
    """Why the template cannot do the problem, or None. The same on every instruction set."""
    if problem.bias is not None and problem.bias not in _BIASES:
        return f"a bias in {problem.bias}; known: {', '.join(_BIASES)}"
    for what, kind, known in (("queries", problem.query, C_TYPES), ("keys and values", problem.cache, _CACHES)):
        if kind not in known:
            return f"{what} in {kind}; known: {', '.join(known)}"
    if problem.mask not in MASKS:
        return f"mask {problem.mask!r}; known: {', '.join(MASKS)}"
    if problem.mask in ("sliding", "chunked") and not problem.window:
        return f"mask {problem.mask!r} without a window"
    if problem.cache == "u8" and (problem.width % 2 or problem.value_width % 2):
        return f"4-bit heads of {problem.width} and {problem.value_width}, which are no pairs"
    if not (0 < problem.width <= _WIDEST and 0 < problem.value_width <= _WIDEST):
        return f"heads of {problem.width} and {problem.value_width}; at most {_WIDEST}"
    return None


def scratch_expression(problem: AttentionProblem, args: Mapping[str, str], *, paged: bool = False) -> str:
    """C++ expression of the bytes that `call` needs, over the sizes and `workers` in args."""
    sizes = ", ".join(args[name] for name in ("batch", "heads", "kv_heads", "queries", "length"))
    return (
        f"irc::attention_scratch({problem.width}, {problem.value_width}, {sizes},"
        f" {'true' if paged else 'false'}, {args['workers']})"
    )


def call(problem: AttentionProblem, args: Mapping[str, str], epilogue: str) -> str:
    """Attends.

    Args: worker, scratch; batch, heads, kv_heads, queries, length; query, keys, values, each with `<name>_strides`:
        three expressions "batch, head, row" in elements.
        With a bias: bias, and `bias_strides`: five expressions "batch, head, query, key", 0 where it is broadcast, and
        how many keys it has.
        Optional (default nullptr): positions (const int64_t* [batch, queries]), sinks (const float* [heads]).
        Flat tokens over a paged cache: sequence_ids (const int64_t* [queries]), table (const int64_t*), table_stride,
        page_size; batch is 1, the batch stride of keys and values is a block's, length is the table's width times
        page_size.
    """
    reason = refuses(problem, "plain")
    if reason:
        raise TargetError(f"attention cannot do {problem}: {reason}")
    query, cache = C_TYPES[problem.query], _CACHES[problem.cache]
    cast = f"reinterpret_cast<const {cache}*>"
    paging = ", ".join(args.get(name, default) for name, default in _PAGING.items())
    scales = {name: ", {" + f"{args[f'{name}_scales']}, {args[f'{name}_scales_strides']}" + "}"
              if problem.cache in SCALED else "" for name in ("key", "value")}  # fmt: skip
    sizes = ", ".join(args[name] for name in ("batch", "heads", "kv_heads", "queries", "length"))
    bias_type, bias = "irc::NoBias", ""
    if problem.bias is not None:
        bias_type = f"irc::BiasRows<{_BIASES[problem.bias]}>"
        bias = f", {{{args['bias']}, {args['bias_strides']}}}"
    return (
        "{\n"
        f"    const irc::AttentionArguments<{query}, {cache}, {bias_type}> attended{{\n"
        f"        {args['query']}, {args['query_strides']},\n"
        f"        {{{cast}({args['keys']}), {args['keys_strides']}, {paging}{scales['key']}}},\n"
        f"        {{{cast}({args['values']}), {args['values_strides']}, {paging}{scales['value']}}},\n"
        f"        {args.get('positions', 'nullptr')}, {args.get('sequence_ids', 'nullptr')},"
        f" {args.get('sinks', 'nullptr')}, {sizes},\n"
        f"        irc::MaskKind::{problem.mask}, {problem.window or 0}, {_float(problem.scale)},"
        f" {_float(problem.softcap or 0.0)}{bias}}};\n"
        f"    irc::attention<{problem.width}, {problem.value_width}>({args['worker']}, attended, {args['scratch']},"
        f" {epilogue});\n"
        "}\n"
    )


def _float(x: float) -> str:
    return f"{float(x)!r}f"
