"""Attention, contiguous and paged: FlashAttention for many queries, Flash-Decoding for few."""

from __future__ import annotations

import sympy
import torch.fx as fx

from irc.core.target import op_name
from irc.lowering.kernels.definitions import Call, Definer
from irc.lowering.kernels.layers import as_stored
from irc.lowering.kernels.sites import Memory, Site, TemplateCall, bias_strides
from irc.lowering.triton.options import TritonOptions
from irc.lowering.triton.sites.registry import SiteKind, StepWriter, register_site
from irc.lowering.triton.templates.attention import AttentionProblem, refuses

_CONTIGUOUS, _PAGED = ("irc.attention", "irc.flash_attention"), "irc.paged_attention"
_IMPORTS = (
    "from irc.lowering.triton.device import device_of",
    "from irc.lowering.triton.templates import attention",
)


def match(options: TritonOptions, definer: Definer, node: fx.Node) -> Site | None:
    """The site of an attention that the kernels can do, or None."""
    if op_name(node) not in (*_CONTIGUOUS, _PAGED):
        return None
    call, paged = Call(definer, node), op_name(node) == _PAGED
    names = ("query", "key_cache", "value_cache") if paged else ("query", "key", "value")
    operands = [call._arguments[names[0]], *(_narrow(call._arguments[name]) for name in names[1:])]
    query, key, value = map(call.as_operand, operands)
    widths = (query.shape[-1], value.shape[-1])
    kv_heads = key.shape[2 if paged else 1]
    heads = query.shape[1]
    if key.dtype != value.dtype or not all(x.is_Integer for x in (*widths, kv_heads, heads)):
        return None
    problem = AttentionProblem(
        width=int(widths[0]), value_width=int(widths[1]), query=query.dtype, cache=key.dtype,
        mask=str(call.raw("mask")), window=call.raw("window"), scale=float(call.raw("scale")),
        softcap=call.raw("softcap"), bias=call.operand("bias").dtype if call.has("bias") else None,
        precision=options.float32,
    )  # fmt: skip
    if problem.bias is not None and len(call.operand("bias").shape) != (3 if paged else 4):
        return None
    if refuses(problem, group=int(heads) // int(kv_heads), paged=paged) is not None:
        return None
    reads = [(operand, "strided") for operand in operands]
    further = ("block_tables", "sequence_ids", "positions") if paged else ("positions",)
    reads += [(call._arguments[name], "rows") for name in (*further, "sinks") if call.has(name)]
    reads += [(call._arguments["bias"], "strided")] if problem.bias is not None else []
    # Heads lie side by side in memory, so that what follows, a layer over all of them, reads dense rows.
    return Site("attention", node, tuple(reads), problem, order=(0, 1, 2) if paged else (0, 2, 1, 3))


def _narrow(operand: fx.Node) -> fx.Node:
    """A cache of 16-bit floats that the graph widens in front of attention: the kernel reads it as it is."""
    source, scale = as_stored(operand)
    return source if scale is None else operand


def emit(call: TemplateCall, writer: StepWriter) -> list[str]:
    """The choice of block sizes, and the launch."""
    node = Call(Definer(writer.program), call.site.node)
    paged = op_name(call.site.node) == _PAGED
    problem: AttentionProblem = call.site.problem
    query, keys, values = call.reads[:3]
    further = list(call.reads[3:])
    names = ("block_tables", "sequence_ids", "positions") if paged else ("positions",)
    names = tuple(name for name in (*names, "sinks", "bias") if node.has(name))
    given = dict(zip(names, further, strict=True))
    writer.imports.update(_IMPORTS)
    constant = writer.constant("attention", f"attention.{problem!r}")
    sizes = _paged_sizes(query, keys, given["block_tables"]) if paged else _contiguous_sizes(query, keys)
    text = {name: writer.size(size) for name, size in sizes.items()}
    rows = text["batch"] if not paged else writer.size(given["block_tables"].shape[0])
    page = f", page_size={writer.size(keys.shape[1])}" if paged else ""
    lines = [
        f"config = attention.choose({constant}, {rows}, {text['heads']}, {text['kv_heads']}, {text['queries']},"
        f" {text['length']}, device_of(memory.device).multiprocessors,"
        f" capability=device_of(memory.device).capability{page})"
    ]
    arguments = [f"{name}={value}" for name, value in text.items()]
    out = call.write.strides
    strides = {
        "out_strides": (sympy.Integer(0), out[1], out[0]) if paged else out[:3],
        "query_strides": (sympy.Integer(0), query.strides[1], query.strides[0]) if paged else query.strides[:3],
        "key_strides": _row_strides(keys, paged), "value_strides": _row_strides(values, paged),
    }  # fmt: skip
    for name, memory in given.items():
        arguments.append(f"{'tables' if name == 'block_tables' else name}={writer.dense(memory)}")
        if name == "block_tables":
            arguments.append(f"table_stride={writer.size(memory.shape[1])}{page}")
        if name == "bias":
            strides["bias_strides"] = bias_strides(memory, query)
            arguments.append(f"bias_keys={writer.size(memory.shape[-1])}")
    arguments += [f"{name}=({', '.join(map(writer.size, value))})" for name, value in strides.items()]
    tokens = writer.size(sizes["batch"] * sizes["queries"])
    elements = f"attention.scratch_elements({constant}, config, {tokens}, {text['heads']})"
    lines.append(f"scratch = torch.empty({elements}, dtype=torch.float32, device=memory.device)")
    arguments.append("scratch=scratch")
    tensors = ", ".join([writer.pointer(call.write), *map(writer.dense, (query, keys, values))])
    return [*lines, f"attention.launch({constant}, config, {tensors}, {', '.join(arguments)})"]


def _contiguous_sizes(query: Memory, keys: Memory) -> dict[str, sympy.Expr]:
    """Sizes over [B, H, S, D]."""
    return {"batch": query.shape[0], "heads": query.shape[1], "kv_heads": keys.shape[1], "queries": query.shape[2],
            "length": keys.shape[2]}  # fmt: skip


def _paged_sizes(query: Memory, keys: Memory, table: Memory) -> dict[str, sympy.Expr]:
    """Sizes of queries [N, H, D] over pages [K, P, Hkv, D]."""
    return {"batch": sympy.Integer(1), "heads": query.shape[1], "kv_heads": keys.shape[2], "queries": query.shape[0],
            "length": table.shape[1] * keys.shape[1]}  # fmt: skip


def _row_strides(memory: Memory, paged: bool) -> tuple[sympy.Expr, ...]:
    """Strides of batch or block, head and row."""
    first, second, third = memory.strides[:3]
    return (first, third, second) if paged else (first, second, third)


register_site(SiteKind("attention", match, emit))
