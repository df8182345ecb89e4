"""KV-cache quantization: a step program keeps its keys and values in 8 or 4 bits, with a scale a token and head.

Runs behind `insert-kv-cache`. Each cache input becomes two: the stored numbers [B, H, L, D] (two 4-bit integers share a
byte: D / 2) under the old name, and their scales f32[B, H, L, 1] as `<name>_scale`; of a paged cache [blocks, P, H, D]
and [blocks, P, H, 1]. New keys and values are quantized once, when they are written; attention reads the whole cache
dequantized, which a target with a kernel for it fuses (target `reference` restores only the pages that a step reads).

Does not handle: a cache that something else than its own write reads.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.fx as fx
import torch.utils._pytree as pytree
from torch import Tensor

from irc.core.contract import Finding, Pass, PassContext, PassResult, Preserves, Skip, register_pass
from irc.core.errors import OptionError, nearest
from irc.core.evaluate import Observer, evaluate
from irc.core.kv_cache import METADATA_KEY, KVCache
from irc.core.ops.registry import is_irc_op
from irc.core.program import VAL, Program, dtype_name
from irc.passes.quantize._cache_codec import CODECS, Codec

_WRITES = ("cache_write", "paged_cache_write")
# Largest change of logits and of what the cache gives back, relative to the largest value; largest mean KL in nats.
_LIMITS = {"int8": (0.03, 0.01), "fp8": (0.15, 0.05), "int4": (0.4, 0.3)}


@register_pass
@dataclass(frozen=True, kw_only=True)
class QuantizeKVCache(Pass):
    """cache_write(c, k) → dequantize(cache_write(c', quantize(k, s)), cache_write(c_s, s)), s = max|k| / high a head.

    Preserves: lossy; every number read back is within half a step of its own token and head.

    Attributes:
        format: `int8`, `int4` or `fp8` (e4m3).
    """

    name: ClassVar[str] = "quantize-kv-cache"
    format: Literal["int8", "int4", "fp8"] = "int8"

    def __post_init__(self) -> None:
        if self.format not in CODECS:
            raise OptionError(f"{self.name}: no cache format is called {self.format!r}{nearest(self.format, CODECS)}")

    @property
    def preserves(self) -> Preserves:
        rtol, max_kl = _LIMITS[self.format]
        return Preserves("lossy", rtol=rtol, max_kl=max_kl)

    def requires(self, program: Program) -> list[str]:
        if KVCache.of(program) is None:
            return ["the program has no key-value cache: run insert-kv-cache before"]
        return []

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        codec, skips, quantized = CODECS[self.format], list[Skip](), dict[str, torch.dtype]()
        before = _cache_of(program)
        continues = {program.outputs[out]: program.placeholders[i] for out, i in program.aliases.items()}
        for node in program.placeholders[before.num_inputs :]:
            write = _own_write(program, node)
            problem = write if isinstance(write, str) else codec.why_not(int(node.meta[VAL].shape[-1]))
            if problem is not None:
                skips.append(Skip.at(node, problem))
            elif isinstance(write, fx.Node) and ctx.allow(node):
                quantized[str(node.target)] = node.meta[VAL].dtype
                _quantize(program, node, write, codec, continues)
        if not quantized:
            return PassResult(program, skips=skips, modified=False)
        _describe(program, before, quantized, codec, continues)
        if program.example_inputs is not None:
            program.example_inputs = tuple(_stored_inputs(program.example_inputs, before, quantized, codec))
        after = _cache_of(program)

        def replay(step: Program, inputs: Sequence[Any]) -> list[Any]:
            return _replay(step, inputs, before, quantized, codec)

        def trace(step: Program, inputs: Sequence[Any], observer: Observer) -> None:
            _trace(step, inputs, before, quantized, codec, observer)

        statistics = {"bytes_before": before.num_bytes(), "bytes_after": after.num_bytes()}
        return PassResult(
            program,
            matches=len(quantized),
            skips=skips,
            modified=True,
            statistics=statistics,
            replay=replay,
            trace=trace,
        )

    def ensures(self, before: Program, result: PassResult) -> list[Finding]:
        """Each output continues the input of its name, and the metadata describe the inputs that are there."""
        program, findings = result.program, []
        cache = _cache_of(program)
        placeholders, outputs = program.placeholders, program.outputs
        first = cache.num_inputs
        for one, node in zip(cache.caches, placeholders[first:], strict=True):
            value = node.meta[VAL]
            found = (str(node.target), *(int(size) for size in value.shape[1:]), value.dtype)
            if found != (one.name, *cache.shape(one, None)[1:], one.dtype):
                findings.append(Finding(node.name, f"is {found}, the metadata say {one}"))
        if sorted(program.aliases.values()) != list(range(first, len(placeholders))):
            findings.append(Finding(program.output_node.name, f"continues the inputs {program.aliases}"))
        for output, source in program.aliases.items():
            written, name = outputs[output], str(placeholders[source].target)
            stored = any(one.stores and name in (one.name, f"{one.name}_scale") for one in cache.caches)
            if stored and (not _is_write(written) or written.args[0] is not placeholders[source]):
                findings.append(Finding(placeholders[source].name, "is not what its output continues"))
        return findings


def _is_write(node: fx.Node) -> bool:
    return any(is_irc_op(node.target, name) for name in _WRITES)


def _cache_of(program: Program) -> KVCache:
    cache = KVCache.of(program)
    assert cache is not None
    return cache


def _own_write(program: Program, cache: fx.Node) -> fx.Node | str:
    """The one write that a cache input goes through, or why it cannot be quantized."""
    if not cache.meta[VAL].is_floating_point() or cache.meta[VAL].dtype.itemsize == 1:
        return f"{cache.target} holds {dtype_name(cache.meta[VAL].dtype)} numbers: it is quantized already"
    if str(cache.target).endswith("_scale"):
        return f"{cache.target} holds the scales of a quantized cache"
    writes = list(cache.users)
    if len(writes) != 1 or not _is_write(writes[0]) or writes[0].args[0] is not cache:
        return f"{cache.target} is read by {', '.join(n.name for n in writes)}, not only by its own write"
    if writes[0] not in program.outputs:
        return f"what is written to {cache.target} is no output"
    return writes[0]


def _quantize(
    program: Program, cache: fx.Node, write: fx.Node, codec: Codec, continues: dict[fx.Node, fx.Node]
) -> None:
    """Replace one cache: its input's type, its write, what attention reads, and the outputs."""
    _, value, places = write.args
    assert isinstance(value, fx.Node)
    assert callable(write.target)
    dtype = write.meta[VAL].dtype
    stored, scale = codec.encode(program, value, write)
    shape = tuple(cache.meta[VAL].shape)
    stored_shape, stored_type = codec.stored(shape)
    device = cache.meta[VAL].device
    with program.graph.inserting_after(cache):
        scales = program.graph.placeholder(f"{cache.target}_scale")
    with program.fake_mode:
        cache.meta[VAL] = torch.empty(stored_shape, dtype=stored_type, device=device)
        scales.meta[VAL] = torch.empty((*shape[:-1], 1), dtype=scale.meta[VAL].dtype, device=device)
    written = program.insert(write.target, cache, stored, places, before=write)
    written_scales = program.insert(write.target, scales, scale, places, before=write)
    restored = codec.decode(program, written, written_scales, dtype, write)
    outputs: list[Any] = []
    for out in program.outputs:
        outputs.extend((written, written_scales) if out is write else (out,))
    program.output_node.args = (tuple(outputs),)
    program.replace(write, restored)
    continues |= {written: cache, written_scales: scales}


def _describe(
    program: Program,
    before: KVCache,
    quantized: dict[str, torch.dtype],
    codec: Codec,
    continues: dict[fx.Node, fx.Node],
) -> None:
    """Signature, aliases and metadata of the program with its new inputs."""
    placeholders, outputs = program.placeholders, program.outputs
    program.in_spec = pytree.tree_flatten(((0,) * len(placeholders), {}))[1]
    program.out_spec = pytree.tree_flatten((0,) * len(outputs))[1]
    program.aliases = {i: placeholders.index(continues[out]) for i, out in enumerate(outputs) if out in continues}
    entries = []
    heads = 1 if before.block_size is None else 2
    for node in placeholders[before.num_inputs :]:
        value, name = node.meta[VAL], str(node.target)
        entry = {"name": name, "heads": int(value.shape[heads]), "head_dim": int(value.shape[3]),
                 "dtype": dtype_name(value.dtype)}  # fmt: skip
        known = next((one.stores for one in before.caches if one.name == name), None)
        stores = codec.text if name in quantized else known
        entries.append(entry | ({"stores": stores} if stores else {}))
    program.metadata = program.metadata | {METADATA_KEY: program.metadata[METADATA_KEY] | {"caches": entries}}


# -------------------------------------------------------------------- the same inputs for both programs


def _stored_inputs(
    inputs: Sequence[Any], before: KVCache, quantized: dict[str, torch.dtype], codec: Codec
) -> Iterator[Any]:
    """Inputs of the program before as inputs of the quantized one."""
    yield from inputs[: before.num_inputs]
    for one, value in zip(before.caches, inputs[before.num_inputs :], strict=True):
        if one.name in quantized:
            yield from codec.encode_tensor(value)
        else:
            yield value


def _restored_caches(
    caches: Sequence[Tensor], before: KVCache, quantized: dict[str, torch.dtype], codec: Codec
) -> Iterator[Tensor]:
    """Caches of the quantized program as those of the program before."""
    remaining = iter(caches)
    for one in before.caches:
        value = next(remaining)
        yield codec.decode_tensor(value, next(remaining), quantized[one.name]) if one.name in quantized else value


def _in_parts(step: Program, inputs: Sequence[Any], see: Callable[[fx.Node, Any], None]) -> tuple[Tensor, list[Tensor]]:
    """Logits of all tokens and the caches at the end, from steps over parts: half, one token, the rest."""
    tokens, positions, _, *caches = inputs
    length = tokens.shape[1]
    bounds = sorted({0, max(length // 2, 1), min(length // 2 + 1, length), length})
    logits = []
    for first, last in itertools.pairwise(bounds):
        wanted = torch.arange(last - first, device=tokens.device).expand(tokens.shape[0], -1).contiguous()
        parts = [x[:, first:last].contiguous() for x in (tokens, positions)]
        part, *caches = evaluate(step.graph, step.weight, (*parts, wanted, *caches), see)
        logits.append(part)
    return torch.cat(logits, 1), caches


def _replay(
    step: Program, inputs: Sequence[Any], before: KVCache, quantized: dict[str, torch.dtype], codec: Codec
) -> list[Any]:
    """The outputs that the program before would have given for its own inputs."""
    stored = list(_stored_inputs(inputs, before, quantized, codec))
    if before.block_size is not None:
        logits, *caches = evaluate(step.graph, step.weight, stored)
        return [logits, *_restored_caches(caches, before, quantized, codec)]
    logits, caches = _in_parts(step, stored, lambda node, value: None)
    return [_pick(logits, 1, inputs[2]), *_restored_caches(caches, before, quantized, codec)]


def _trace(
    step: Program,
    inputs: Sequence[Any],
    before: KVCache,
    quantized: dict[str, torch.dtype],
    codec: Codec,
    observer: Observer,
) -> None:
    """Show the parts' values joined along the tokens, at the wanted ones where the step has only those."""
    stored = list(_stored_inputs(inputs, before, quantized, codec))
    if before.block_size is not None:  # one step, in which everything is read back from the pages
        evaluate(step.graph, step.weight, stored, observer)
        return
    parts: dict[fx.Node, list[Any]] = {}
    _in_parts(step, stored, lambda node, value: parts.setdefault(node, []).append(value))
    sequence, wanted = (step.shape_expr(node)[1] for node in step.placeholders[1:3])
    for node, values in parts.items():
        if not isinstance(values[0], Tensor):
            continue  # sizes of a part: those of the whole are other numbers
        shape = step.shape_expr(node)
        along = [dim for dim, size in enumerate(shape) if size in (sequence, wanted)]
        if len(along) != 1:
            observer(node, values[-1])
            continue
        joined = torch.cat(values, dim=along[0])
        if shape[along[0]] != wanted:
            observer(node, joined)
        elif along[0] > 0 and node.op == "call_function" and joined.shape[0] == inputs[2].shape[0]:
            observer(node, _pick(joined, along[0], inputs[2]))


def _pick(values: Tensor, dim: int, indices: Tensor) -> Tensor:
    """values[b, …, indices[b, r], …] along `dim`."""
    shape = [1] * values.ndim
    shape[0], shape[dim] = indices.shape
    sizes = list(values.shape)
    sizes[dim] = indices.shape[1]
    return values.gather(dim, indices.view(shape).expand(sizes))
