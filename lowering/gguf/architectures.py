"""llama.cpp's architectures as data: what each computes, which parts it lets a file leave out, and its names.

A program is matched by comparing what it computes with each entry, in this order: entries that ask for more come first,
so a model with biases on queries, keys and values is `qwen2`, and one without is `llama`. What no entry computes is
refused with the entry that differs least, and with every difference.

Source: llama.cpp, `src/llama-arch.cpp` (names) and `src/models/*.cpp` (graphs and tensors).
"""

from __future__ import annotations

from dataclasses import dataclass, field

Q, K, V, O = "q", "k", "v", "o"  # noqa: E741 - the field's own letters
GATE, UP, DOWN, HEAD = "gate", "up", "down", "head"

# A tensor that a file has on request: whether the architecture has no place for it, may leave it out, or needs it.
NEVER, MAYBE, ALWAYS = "never", "maybe", "always"


@dataclass(frozen=True, kw_only=True, eq=False)
class Architecture:
    """An entry of the table.

    Attributes:
        name: `general.architecture`.
        norm: `rms` or `layer`.
        norm_bias: whether norms have a bias.
        rope: `interleaved`, `half`, or None for learned positions.
        partial_rope: some channels of a head may stay as they are.
        rope_factors: a factor for each pair can be written.
        block: `sequential`, `parallel` (one norm for both branches), `parallel-2` (a norm each), or several.
        norms: those a layer has: `attn`, `ffn` in front; `attn_post`, `ffn_post` behind; `attn_out`, `ffn_out`: on the
            sum.
        head_norm: (kind, span) of queries and keys, or None; `head_norm_use` says whether it can be left out.
        activation: of the MLP; `gelu` stands for both forms, which llama.cpp does not tell apart.
        biases: part → NEVER, MAYBE or ALWAYS; parts not named: NEVER.
        fused_qkv, fused_gate_up: projections are one tensor.
        free_head_dim: heads need not split the width evenly.
        grouped_heads: there may be fewer heads of keys and values than of queries.
        per_layer: each layer may have its own numbers of heads and its own MLP width.
        head: output.weight: NEVER: the embedding is used; MAYBE: used if there is none; ALWAYS: needed.
        experts: NEVER, MAYBE or ALWAYS; their weights add up to 1 iff `experts_normalized`.
        window: layers with a sliding window and others.
        embedding_scale: `sqrt` (√E, built in), `key` (metadata), None (1).
        logit_scale: `multiply` or `divide` (metadata), None.
        residual_scale, attention_scale: metadata has it.
        attention_softcap, logit_softcap: NEVER, MAYBE, ALWAYS.
        causal: False for encoders.
        prefers: features without which an earlier entry is not chosen (any of the biases q, k, v; …).
    """

    name: str
    norm: str = "rms"
    norm_bias: bool = False
    rope: str | None = "half"
    partial_rope: bool = False
    rope_factors: bool = False
    block: tuple[str, ...] = ("sequential",)
    norms: tuple[str, ...] = ("attn", "ffn")
    head_norm: tuple[str, str] | None = None
    head_norm_use: str = ALWAYS
    activation: str = "silu"
    gated: bool = True
    biases: dict[str, str] = field(default_factory=dict)
    fused_qkv: bool = False
    fused_gate_up: bool = False
    free_head_dim: bool = False
    grouped_heads: bool = True
    per_layer: bool = False
    head: str = MAYBE
    experts: str = NEVER
    experts_normalized: bool = True
    window: bool = False
    embedding_scale: str | None = None
    logit_scale: str | None = None
    residual_scale: bool = False
    attention_scale: bool = False
    attention_softcap: str = NEVER
    logit_softcap: str = NEVER
    causal: bool = True
    prefers: tuple[str, ...] = ()
    max_width_notes: str = ""

    def bias(self, part: str) -> str:
        return self.biases.get(part, NEVER)


_QKV_MAYBE = {Q: MAYBE, K: MAYBE, V: MAYBE}
_ALL_MAYBE = dict.fromkeys((Q, K, V, O, GATE, UP, DOWN), MAYBE)
_PLAIN_ALWAYS = dict.fromkeys((Q, K, V, O, UP, DOWN), ALWAYS)

TABLE: tuple[Architecture, ...] = (
    Architecture(
        name="bert", norm="layer", norm_bias=True, rope=None, norms=("attn_out", "ffn_out"), activation="gelu",
        gated=False, biases={Q: MAYBE, K: MAYBE, V: MAYBE, O: MAYBE, UP: MAYBE, DOWN: MAYBE}, head=NEVER, causal=False,
    ),
    Architecture(
        name="gpt2", norm="layer", norm_bias=True, rope=None, activation="gelu", gated=False, biases=_PLAIN_ALWAYS,
        fused_qkv=True,
    ),
    Architecture(
        name="gptneox", norm="layer", norm_bias=True, partial_rope=True, block=("sequential", "parallel-2"),
        activation="gelu", gated=False, biases=_PLAIN_ALWAYS, fused_qkv=True, head=ALWAYS, prefers=("bias",),
    ),
    Architecture(
        name="starcoder2", norm="layer", norm_bias=True, activation="gelu", gated=False,
        biases={**_QKV_MAYBE, O: ALWAYS, UP: ALWAYS, DOWN: ALWAYS}, prefers=("bias",),
    ),
    Architecture(
        name="falcon", norm="layer", norm_bias=True, block=("parallel", "parallel-2"), activation="gelu", gated=False,
        fused_qkv=True,
    ),
    Architecture(
        name="phi2", norm="layer", norm_bias=True, partial_rope=True, block=("parallel",), norms=("attn",),
        activation="gelu", gated=False, biases={**_PLAIN_ALWAYS, **_QKV_MAYBE, HEAD: ALWAYS}, head=ALWAYS,
    ),
    Architecture(
        name="command-r", norm="layer", rope="interleaved", block=("parallel",), norms=("attn",), head=NEVER,
        logit_scale="multiply", biases=_QKV_MAYBE | {O: MAYBE}, partial_rope=True,
    ),
    Architecture(
        name="stablelm", norm="layer", norm_bias=True, partial_rope=True, block=("sequential", "parallel"),
        head_norm=("layer", "heads"), head_norm_use=MAYBE, biases=_QKV_MAYBE, head=ALWAYS,
    ),
    Architecture(
        name="gemma3", head_norm=("rms", "head"), norms=("attn", "attn_post", "ffn", "ffn_post"),
        activation="gelu", free_head_dim=True, window=True, embedding_scale="sqrt", logit_softcap=MAYBE, rope="half",
    ),
    Architecture(
        name="gemma2", norms=("attn", "attn_post", "ffn", "ffn_post"), activation="gelu", free_head_dim=True,
        window=True, embedding_scale="sqrt", attention_softcap=ALWAYS, logit_softcap=ALWAYS, head=NEVER,
    ),
    Architecture(
        name="gemma", activation="gelu", free_head_dim=True, embedding_scale="sqrt", head=NEVER,
    ),
    Architecture(
        name="olmo2", head_norm=("rms", "all"), norms=("attn_post", "ffn_post"), head=ALWAYS,
    ),
    Architecture(
        name="qwen3moe", head_norm=("rms", "head"), free_head_dim=True, experts=ALWAYS, biases=_QKV_MAYBE,
    ),
    Architecture(
        name="olmoe", head_norm=("rms", "all"), experts=ALWAYS, experts_normalized=False, head=ALWAYS,
        grouped_heads=False,
    ),
    Architecture(
        name="qwen3", head_norm=("rms", "head"), free_head_dim=True, biases=_QKV_MAYBE,
    ),
    Architecture(
        name="qwen2", biases=_QKV_MAYBE, prefers=("qkv-bias",),
    ),
    Architecture(
        name="granite", rope="interleaved", rope_factors=True, free_head_dim=True, experts=NEVER, biases=_ALL_MAYBE,
        embedding_scale="key", logit_scale="divide", residual_scale=True, attention_scale=True, prefers=("scales",),
    ),
    Architecture(
        name="llama", rope="interleaved", rope_factors=True, free_head_dim=True, biases=_ALL_MAYBE, experts=MAYBE,
    ),
    Architecture(
        name="deci", rope="interleaved", rope_factors=True, free_head_dim=True, biases=_ALL_MAYBE, per_layer=True,
    ),
    Architecture(
        name="phi3", rope="half", partial_rope=True, fused_qkv=True, fused_gate_up=True,
    ),
)  # fmt: skip

BY_NAME = {entry.name: entry for entry in TABLE}
