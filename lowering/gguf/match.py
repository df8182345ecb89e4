"""Which architecture computes what a transformer does, or what keeps the nearest one from it."""

from __future__ import annotations

import math
from collections.abc import Iterator

from irc.core.errors import OptionError, TargetError, nearest
from irc.lowering.gguf.architectures import (
    ALWAYS,
    BY_NAME,
    DOWN,
    GATE,
    HEAD,
    NEVER,
    TABLE,
    UP,
    Architecture,
    K,
    O,
    Q,
    V,
)
from irc.lowering.gguf.description import Experts, HeadNorm, Layer, Linear, Mlp, Norm, Transformer
from irc.lowering.gguf.rotary import explain_frequencies

_PART_NAMES = {
    Q: "queries", K: "keys", V: "values", O: "the attention's output", GATE: "the gate", UP: "the MLP's first layer",
    DOWN: "the MLP's last layer", HEAD: "the head",
}  # fmt: skip


def find_architecture(model: Transformer, wanted: str | None = None) -> Architecture:
    """The first entry of the table that computes the same; `wanted`: that one.

    Raises:
        OptionError: no entry is called `wanted`.
        TargetError: no entry does; names the nearest and all that differs.
    """
    if wanted is not None and wanted not in BY_NAME:
        raise OptionError(f"no GGUF architecture is called {wanted!r}{nearest(wanted, BY_NAME)}")
    entries = TABLE if wanted is None else (BY_NAME[wanted],)
    found = {entry: list(differences(model, entry)) for entry in _by_preference(model, entries)}
    for entry, problems in found.items():
        if not problems:
            return entry
    entry, problems = min(found.items(), key=lambda item: len(item[1]))
    listed = "\n".join(f"  - {problem}" for problem in problems)
    asked = f"is not {wanted}" if wanted is not None else "matches no GGUF architecture"
    raise TargetError(f"the program {asked}; it is like {entry.name}, but\n{listed}")


def _by_preference(model: Transformer, entries: tuple[Architecture, ...]) -> list[Architecture]:
    """Entries whose wish is fulfilled in table order, then the others."""
    traits = _traits(model)
    return sorted(entries, key=lambda entry: not traits.issuperset(entry.prefers))


def _traits(model: Transformer) -> set[str]:
    layer = model.layers[0]
    traits = set()
    attention = layer.attention
    if attention.query.bias is not None and attention.output.bias is None:
        traits.add("qkv-bias")
    if attention.output.bias is not None:
        traits.add("bias")
    if model.embedding_scale != 1 or layer.attention_scale != 1 or model.logit_scale != 1:
        traits.add("scales")
    return traits


def differences(model: Transformer, entry: Architecture) -> Iterator[str]:
    """What the architecture does not compute, or cannot hold."""
    yield from _whole(model, entry)
    first = model.layers[0]
    for index, layer in enumerate(model.layers):
        for problem in _layer(layer, first, entry, model):
            yield f"layer {index} {problem}"
    yield from _norm_kinds(model, entry)
    yield from _ropes(model, entry)


def _whole(model: Transformer, entry: Architecture) -> Iterator[str]:
    if (model.positions is not None) != (entry.rope is None):
        yield "its positions are " + ("looked up in a table" if model.positions is not None else "not looked up")
    if model.token_types is not None and entry.causal:
        yield "it adds a token type"
    if (model.embedding_norm is not None) != (not entry.causal):
        yield "its embeddings are " + ("normalized" if model.embedding_norm is not None else "not normalized")
    if (model.final_norm is None) != (not entry.causal):
        yield "it has " + ("no norm" if model.final_norm is None else "a norm") + " after the last layer"
    if (model.head is None) != (not entry.causal):
        yield "it has " + ("no head" if model.head is None else "a head")
    if model.head is not None:
        if entry.head == NEVER and not model.tied:
            yield f"its head ({model.head.where}) is not its embedding"
        if model.head.bias is not None and entry.bias(HEAD) == NEVER:
            yield f"its head ({model.head.where}) has a bias"
    if model.softcap is not None and entry.logit_softcap == NEVER:
        yield f"its logits are capped at {model.softcap:g}"
    if model.softcap is None and entry.logit_softcap == ALWAYS:
        yield "its logits are not capped"
    if model.logit_scale != 1 and entry.logit_scale is None and entry.head == NEVER:
        yield f"its logits are scaled by {model.logit_scale:g}"
    scale = math.sqrt(model.width) if entry.embedding_scale == "sqrt" else 1.0
    unlike = abs(model.embedding_scale / scale - 1) > 1e-5
    if unlike and entry.embedding_scale != "key" and model.tied and entry.head == NEVER:
        yield f"its embeddings are scaled by {model.embedding_scale:g} instead of {scale:g}, and are its head too"
    windows = {layer.attention.window for layer in model.layers}
    if len(windows - {None}) > 1:
        yield f"its layers have windows of {sorted(w for w in windows if w is not None)}"
    caps = {layer.attention.softcap for layer in model.layers}
    if len(caps) > 1:
        yield f"its layers cap their scores at {sorted(map(str, caps))}"


def _layer(layer: Layer, first: Layer, entry: Architecture, model: Transformer) -> Iterator[str]:
    attention, mlp = layer.attention, layer.mlp
    block = _block(layer, entry)
    if block not in entry.block:
        yield f"is {block}"
    yield from _layer_norms(layer, entry, block)
    if attention.causal != entry.causal:
        yield "attends to " + ("earlier tokens only" if attention.causal else "later tokens too")
    if attention.window is not None and not entry.window and _window_matters(attention.window, model):
        yield f"has a window of {attention.window} among layers without one"
    if attention.softcap is not None and entry.attention_softcap == NEVER:
        yield f"caps its scores at {attention.softcap:g}"
    if attention.softcap is None and entry.attention_softcap == ALWAYS:
        yield "does not cap its scores"
    if attention.head_dim != attention.value_dim:
        yield f"has heads of {attention.head_dim} for keys and {attention.value_dim} for values"
    if not entry.free_head_dim and attention.head_dim * attention.num_heads != model.width:
        yield f"has {attention.num_heads} heads of {attention.head_dim}, which do not fill {model.width}"
    if not entry.grouped_heads and attention.num_kv_heads != attention.num_heads:
        yield f"has {attention.num_kv_heads} heads of keys for {attention.num_heads} of queries"
    yield from _head_norm(attention.query_norm, "queries", entry)
    yield from _head_norm(attention.key_norm, "keys", entry)
    for part, linear in _linears(layer):
        if linear.bias is not None and entry.bias(part) == NEVER:
            yield f"has a bias on {_PART_NAMES[part]} ({linear.where})"
    yield from _mlp(mlp, entry)
    yield from _sizes(layer, first, entry)


def _window_matters(window: int, model: Transformer) -> bool:
    """Whether layers differ: one window in all layers is a context length instead."""
    return any(layer.attention.window != window for layer in model.layers)


def _block(layer: Layer, entry: Architecture) -> str:
    if not layer.parallel:
        return "sequential"
    same = layer.attention_norm is not None and layer.mlp_norm is not None and _same(layer)
    return "parallel" if same and "parallel" in entry.block else "parallel-2"


def _same(layer: Layer) -> bool:
    first, second = layer.attention_norm, layer.mlp_norm
    assert first is not None
    assert second is not None
    return first == second


def _layer_norms(layer: Layer, entry: Architecture, block: str) -> Iterator[str]:
    found = {
        "attn": layer.attention_norm, "ffn": layer.mlp_norm, "attn_post": layer.attention_post_norm,
        "ffn_post": layer.mlp_post_norm, "attn_out": layer.attention_out_norm, "ffn_out": layer.mlp_out_norm,
    }  # fmt: skip
    wanted = set(entry.norms)
    if block == "parallel":
        wanted, found["ffn"] = wanted - {"ffn"}, None
    names = {
        "attn": "before the attention", "ffn": "before the MLP", "attn_post": "after the attention",
        "ffn_post": "after the MLP", "attn_out": "on the sum with the attention", "ffn_out": "on the sum with the MLP",
    }  # fmt: skip
    for key, norm in found.items():
        if norm is not None and key not in wanted:
            yield f"has a norm {names[key]} ({norm.where})"
        if norm is None and key in wanted:
            yield f"has no norm {names[key]}"


def _norm_kinds(model: Transformer, entry: Architecture) -> Iterator[str]:
    norms = [norm for norm in all_norms(model) if norm is not None]
    eps = {norm.eps for norm in norms} | {
        head.eps for layer in model.layers for head in (layer.attention.query_norm, layer.attention.key_norm)
        if head is not None
    }  # fmt: skip
    if len(eps) > 1:
        yield f"its norms add {sorted(eps)}, and the file holds one number for all"
    for norm in norms:
        if norm.kind != entry.norm:
            yield f"its norms are of the kind {norm.kind} ({norm.where})"
            return
    for norm in norms:
        if norm.bias is not None and not entry.norm_bias:
            yield f"its norms have biases ({norm.where})"
            return


def all_norms(model: Transformer) -> list[Norm | None]:
    norms = [model.final_norm, model.embedding_norm]
    for layer in model.layers:
        norms += [layer.attention_norm, layer.mlp_norm, layer.attention_post_norm, layer.mlp_post_norm]
        norms += [layer.attention_out_norm, layer.mlp_out_norm]
    return norms


def _head_norm(norm: HeadNorm | None, what: str, entry: Architecture) -> Iterator[str]:
    if norm is None:
        if entry.head_norm is not None and entry.head_norm_use == ALWAYS:
            yield f"does not normalize its {what}"
        return
    if entry.head_norm is None:
        yield f"normalizes its {what}"
        return
    kind, span = entry.head_norm
    fits = norm.kind == kind and (norm.span == span or (span == "heads" and norm.span == "head"))
    if not fits:
        yield f"normalizes its {what} in another way ({norm.kind}, {norm.span}; not {kind}, {span})"
    if norm.after_rope:
        yield f"normalizes its {what} after the rotation"


def _linears(layer: Layer) -> Iterator[tuple[str, Linear]]:
    attention, mlp = layer.attention, layer.mlp
    yield from ((Q, attention.query), (K, attention.key), (V, attention.value), (O, attention.output))
    if isinstance(mlp, Mlp):
        yield from ((UP, mlp.up), (DOWN, mlp.down))
        if mlp.gate is not None:
            yield GATE, mlp.gate


def _mlp(mlp: Mlp | Experts, entry: Architecture) -> Iterator[str]:
    if isinstance(mlp, Experts):
        if entry.experts == NEVER:
            yield f"has {mlp.num_experts} experts"
        elif mlp.normalized != entry.experts_normalized:
            yield "has experts whose weights " + ("add up to 1" if mlp.normalized else "do not add up to 1")
        if abs(mlp.weight_scale - 1) > 1e-6:
            yield f"scales its experts' weights by {mlp.weight_scale:g}"
        if mlp.router.bias is not None:
            yield f"has a bias on its router ({mlp.router.where})"
    else:
        if entry.experts == ALWAYS:
            yield "has no experts"
        if (mlp.gate is not None) != entry.gated:
            yield "has an MLP " + ("with a gate" if mlp.gate is not None else "without a gate")
    allowed = ("gelu", "gelu_tanh") if entry.activation == "gelu" else (entry.activation,)
    if mlp.activation not in allowed:
        yield f"has {mlp.activation} in its MLP"


def _sizes(layer: Layer, first: Layer, entry: Architecture) -> Iterator[str]:
    if entry.per_layer:
        return
    mine, its = layer.attention, first.attention
    for what in ("num_heads", "num_kv_heads", "head_dim"):
        if getattr(mine, what) != getattr(its, what):
            yield f"has {what} {getattr(mine, what)} where layer 0 has {getattr(its, what)}"
    if type(layer.mlp) is not type(first.mlp):
        yield "has another kind of MLP than layer 0"
    elif mlp_width(layer.mlp) != mlp_width(first.mlp):
        yield f"has an MLP of {mlp_width(layer.mlp)} where layer 0 has {mlp_width(first.mlp)}"


def mlp_width(mlp: Mlp | Experts) -> int:
    """F: channels between the layers of an MLP (of one expert)."""
    up = mlp.up
    if up.rows is not None:
        return up.rows.numel()
    from irc.core.program import VAL

    return int(up.weight.meta[VAL].shape[-2])


def _ropes(model: Transformer, entry: Architecture) -> Iterator[str]:
    ropes = [layer.attention.rope for layer in model.layers]
    if entry.rope is None:
        if any(rope is not None for rope in ropes):
            yield "it rotates its queries and keys"
        return
    for index, rope in enumerate(ropes):
        if rope is None:
            yield f"layer {index} does not rotate its queries and keys"
            return
    groups = distinct_ropes(model)
    dims = [layer.attention.head_dim for layer in model.layers]
    for rope, dim in zip(ropes, dims, strict=True):
        assert rope is not None
        if rope.width != dim and not entry.partial_rope:
            yield f"it rotates {rope.width} of {dim} channels of a head"
            break
    if len(groups) > (2 if entry.name == "gemma3" else 1):
        yield f"its layers rotate in {len(groups)} ways"
        return
    for rope in groups:
        found = explain_frequencies(rope.frequencies)
        if (found.factors is not None or rope.magnitude != 1) and not entry.rope_factors:
            yield "its rotary frequencies are no powers of one base"
        elif found.scaling != 1 and len(groups) > 1 and rope is groups[1]:
            yield "the rotary frequencies of its layers with a window are scaled"


def distinct_ropes(model: Transformer) -> list:
    """Rotations of the layers without a window, then of those with one; once each."""
    found: list = []
    ordered = sorted(model.layers, key=lambda layer: layer.attention.window is not None)
    for layer in ordered:
        rope = layer.attention.rope
        if rope is not None and not any(rope.same_as(other) for other in found):
            found.append(rope)
    return found
