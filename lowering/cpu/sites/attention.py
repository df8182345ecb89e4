"""Attention, contiguous and paged: one kernel, which splits the keys of few queries over the workers."""

from __future__ import annotations

import sympy
import torch.fx as fx

from irc.core.program import VAL, Program
from irc.core.target import op_name
from irc.lowering.cpp.expressions import STORAGE_TYPES, size_text
from irc.lowering.cpp.function import PrintedFunction
from irc.lowering.cpp.templates import attention as template
from irc.lowering.cpp.templates.attention import AttentionProblem
from irc.lowering.cpp.templates.base import C_TYPES
from irc.lowering.cpu.options import CpuOptions
from irc.lowering.cpu.sites.registry import SiteKind, register_site
from irc.lowering.cpu.weights import WeightBlock
from irc.lowering.kernels.definitions import Call, Definer
from irc.lowering.kernels.layers import as_stored
from irc.lowering.kernels.sites import Memory, Site, TemplateCall, bias_strides

_CONTIGUOUS, _PAGED = ("irc.attention", "irc.flash_attention"), "irc.paged_attention"


def match(options: CpuOptions, definer: Definer, node: fx.Node) -> Site | None:
    """The site of an attention that the kernel can do, or None."""
    if op_name(node) not in (*_CONTIGUOUS, _PAGED):
        return None
    call, paged = Call(definer, node), op_name(node) == _PAGED
    names = ("query", "key_cache", "value_cache") if paged else ("query", "key", "value")
    stored = [as_stored(call._arguments[name]) for name in names[1:]]
    operands = [call._arguments[names[0]], *(cache for cache, _ in stored)]
    scales = [scale for _, scale in stored if scale is not None]
    query, key, value = map(call.as_operand, operands)
    value_width = call._arguments[names[2]].meta[VAL].shape[-1]
    known = query.shape[-1].is_Integer and isinstance(value_width, int)
    if key.dtype != value.dtype or len(scales) not in (0, 2) or not known:
        return None
    if call.has("sinks") and call.operand("sinks").dtype != "f32":
        return None
    problem = AttentionProblem(
        width=int(query.shape[-1]), value_width=int(value_width), query=query.dtype, cache=key.dtype,
        mask=str(call.raw("mask")), window=call.raw("window"), scale=float(call.raw("scale")),
        softcap=call.raw("softcap"), bias=call.operand("bias").dtype if call.has("bias") else None,
    )  # fmt: skip
    if problem.bias is not None and len(call.operand("bias").shape) != (3 if paged else 4):
        return None
    if template.refuses(problem, "plain") is not None:
        return None
    reads = [(operand, "strided") for operand in (*operands, *scales)]
    further = ("block_tables", "sequence_ids", "positions") if paged else ("positions",)
    reads += [(call._arguments[name], "rows") for name in (*further, "sinks") if call.has(name)]
    reads += [(call._arguments["bias"], "strided")] if problem.bias is not None else []
    # Heads lie side by side in memory, so that what follows, a layer over all of them, reads dense rows.
    return Site("attention", node, tuple(reads), problem, order=(0, 1, 2) if paged else (0, 2, 1, 3))


def emit(call: TemplateCall, program: Program, weights: WeightBlock) -> PrintedFunction:
    """The call; heads are stored where the result's strides say."""
    paged = op_name(call.site.node) == _PAGED
    definer = Definer(program)
    node = Call(definer, call.site.node)
    query, keys, values = call.reads[:3]
    scales = call.reads[3:5] if call.site.problem.cache in template.SCALED else ()
    further = list(call.reads[3 + len(scales) :])
    sizes: set[sympy.Symbol] = set()

    def text(expr: sympy.Expr | int) -> str:
        expr = sympy.sympify(expr)
        sizes.update(expr.free_symbols)
        return f"int64_t({size_text(expr, {})})"

    problem: AttentionProblem = call.site.problem
    parameters = [f"{STORAGE_TYPES[call.write.dtype]}* out", f"const {C_TYPES[problem.query]}* query",
                  *(f"const {STORAGE_TYPES[problem.cache]}* {name}" for name in ("keys", "values"))]  # fmt: skip
    arguments: list[Memory | str | object] = [call.write, query, keys, values]
    args = {"worker": "worker", "scratch": "scratch", "query": "query", "keys": "keys", "values": "values",
            "workers": "workers"}  # fmt: skip
    names: tuple[str, ...]
    if paged:
        args |= _paged_sizes(query, keys, values, further[0], text)
        names = ("block_tables", "sequence_ids", "positions")
    else:
        args |= _contiguous_sizes(query, keys, values, text)
        names = ("positions",) if node.has("positions") else ()
    for name, memory in zip(("key_scales", "value_scales"), scales, strict=False):
        parameters.append(f"const float* {name}")
        arguments.append(memory)
        args |= {name: name, f"{name}_strides": _row_strides(memory, paged, text)}
    names = (*names, *(name for name in ("sinks", "bias") if node.has(name)))
    for name, memory in zip(names, further, strict=True):
        parameters.append(f"const {STORAGE_TYPES[memory.buffer.dtype]}* {name}")
        arguments.append(memory)
        args["table" if name == "block_tables" else name] = name
        if name == "bias":
            args["bias_strides"] = ", ".join(text(x) for x in (*bias_strides(memory, query), memory.shape[-1]))
    scratch = template.scratch_expression(problem, args, paged=paged)
    parameters.append("uint8_t* scratch")
    arguments.append("arguments.arena + scratch")
    write_strides = [text(s) for s in call.write.strides]
    place = " + ".join(f"{index} * {s}" for index, s in zip(("s", "h") if paged else ("b", "h", "s"), write_strides,
                                                             strict=False))  # fmt: skip
    epilogue = (
        "[&]([[maybe_unused]] int64_t b, int64_t h, int64_t s, const float* row) {\n"
        f"        for (int64_t d = 0; d < {problem.value_width}; ++d)"
        f" out[{place} + d] = irc::scalar::put<{STORAGE_TYPES[call.write.dtype]}>(row[d]);\n    }}"
    )
    body = "    " + template.call(problem, args, epilogue).replace("\n", "\n    ").rstrip(" ")
    return PrintedFunction(
        call.name, tuple(str(origin) for origin in call.origins), tuple(parameters), body, tuple(arguments),
        tuple(sorted(sizes, key=lambda s: s.name)), template.INCLUDES, scratch, seconds=1.2,
    )  # fmt: skip


def _contiguous_sizes(query: Memory, keys: Memory, values: Memory, text: object) -> dict[str, str]:
    """Sizes and strides over [B, H, S, D]."""
    assert callable(text)
    batch, heads, queries, _ = query.shape
    sizes = {"batch": batch, "heads": heads, "kv_heads": keys.shape[1], "queries": queries, "length": keys.shape[2]}
    found = {name: text(size) for name, size in sizes.items()}
    for name, memory in (("query", query), ("keys", keys), ("values", values)):
        found[f"{name}_strides"] = _row_strides(memory, False, text)
    return found


def _paged_sizes(query: Memory, keys: Memory, values: Memory, table: Memory, text: object) -> dict[str, str]:
    """Sizes and strides: queries [N, H, D], pages [K, P, Hkv, D]."""
    assert callable(text)
    page, width = keys.shape[1], table.shape[1]
    sizes = {"batch": sympy.Integer(1), "heads": query.shape[1], "kv_heads": keys.shape[2], "queries": query.shape[0],
             "length": width * page, "table_stride": width, "page_size": page}  # fmt: skip
    found = {name: text(size) for name, size in sizes.items()}
    found["query_strides"] = ", ".join(["0", text(query.strides[1]), text(query.strides[0])])
    for name, memory in (("keys", keys), ("values", values)):
        found[f"{name}_strides"] = _row_strides(memory, True, text)
    return found


def _row_strides(memory: Memory, paged: bool, text: object) -> str:
    """Strides of batch or block, head and row."""
    assert callable(text)
    first, second, third = (text(s) for s in memory.strides[:3])
    return f"{first}, {third}, {second}" if paged else f"{first}, {second}, {third}"


register_site(SiteKind("attention", match, emit))
