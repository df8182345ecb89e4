"""What a transformer computes, in the words that GGUF architectures are told apart by.

`describe` fills this in from a program; `architectures` compares it with llama.cpp's table. Weights are still graph
nodes here (a `get_attr`, or the `irc.dequantize` that feeds the operation), so nothing is copied before it is written.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch.fx as fx
from torch import Tensor


@dataclass(frozen=True)
class Linear:
    """y = x · weight[rows]ᵀ + bias[rows].

    Attributes:
        weight: node that holds [N, K]; of experts [X, N, K].
        bias: node that holds [N], or None.
        rows: i64 [n], the rows in use in the order in which they are used; None: all as they are.
    """

    weight: fx.Node
    bias: fx.Node | None = None
    rows: Tensor | None = None

    @property
    def where(self) -> str:
        """Name of the weight, for messages."""
        return weight_name(self.weight)


@dataclass(frozen=True)
class Norm:
    """RMSNorm or LayerNorm over the last dimension.

    Attributes:
        kind: `rms` or `layer`.
        weight, bias: nodes that hold [E], or None.
    """

    kind: str
    eps: float
    weight: fx.Node | None
    bias: fx.Node | None = None

    @property
    def where(self) -> str:
        return weight_name(self.weight) if self.weight is not None else f"a {self.kind} norm without weight"


@dataclass(frozen=True)
class HeadNorm:
    """Norm of queries or keys.

    Attributes:
        span: `head` (each head by itself, one weight for all), `heads` (each by itself, own weights), or `all` (one
            norm over all heads together).
        weight: f32 [D], [H, D] or [H * D], in the order of the heads.
        after_rope: taken after the rotation instead of before.
    """

    kind: str
    span: str
    eps: float
    weight: Tensor
    after_rope: bool = False


@dataclass(frozen=True)
class Rope:
    """Rotary positions: pair j turns by position · frequencies[j].

    Attributes:
        interleaved: pairs are (0, 1), (2, 3), …; else (0, R), (1, R + 1), ….
        frequencies: f64 [R].
        magnitude: factor on cos and sin (YaRN, LongRoPE).
    """

    interleaved: bool
    frequencies: Tensor
    magnitude: float = 1.0

    @property
    def width(self) -> int:
        """Channels that turn."""
        return 2 * self.frequencies.numel()

    def same_as(self, other: Rope) -> bool:
        return (
            self.interleaved == other.interleaved
            and self.frequencies.shape == other.frequencies.shape
            and bool(((self.frequencies - other.frequencies).abs() <= 1e-6 * self.frequencies).all())
            and abs(self.magnitude - other.magnitude) < 1e-6
        )


@dataclass(frozen=True)
class Attention:
    """Self-attention of a layer.

    Attributes:
        window: keys that a query sees, its own included; None: all before it.
        causal: False: all keys, also later ones.
    """

    query: Linear
    key: Linear
    value: Linear
    output: Linear
    num_heads: int
    num_kv_heads: int
    head_dim: int
    value_dim: int
    scale: float
    query_norm: HeadNorm | None = None
    key_norm: HeadNorm | None = None
    rope: Rope | None = None
    window: int | None = None
    causal: bool = True
    softcap: float | None = None


@dataclass(frozen=True)
class Mlp:
    """down(activation(gate(x)) * up(x)), or down(activation(up(x))) without a gate."""

    up: Linear
    down: Linear
    activation: str
    gate: Linear | None = None


@dataclass(frozen=True)
class Experts:
    """A router that sends each token to its `num_used` likeliest experts.

    Attributes:
        router: [X, E].
        normalized: the chosen experts' probabilities are scaled to add up to 1.
        gate, up, down: [X, F, E] and [X, E, F], rows within each expert.
    """

    router: Linear
    gate: Linear
    up: Linear
    down: Linear
    activation: str
    num_experts: int
    num_used: int
    normalized: bool
    weight_scale: float = 1.0


@dataclass(frozen=True)
class Layer:
    """One block.

    Attributes:
        parallel: the MLP reads what the attention reads, instead of what it wrote.
        attention_norm, mlp_norm: before each branch; None: there is none.
        attention_post_norm, mlp_post_norm: on what a branch gives, before it is added.
        attention_out_norm, mlp_out_norm: on the sum (BERT); then there are no others.
        residual_scale: what both branches are multiplied by.
    """

    attention: Attention
    mlp: Mlp | Experts
    attention_norm: Norm | None = None
    mlp_norm: Norm | None = None
    attention_post_norm: Norm | None = None
    mlp_post_norm: Norm | None = None
    attention_out_norm: Norm | None = None
    mlp_out_norm: Norm | None = None
    parallel: bool = False
    attention_scale: float = 1.0
    mlp_scale: float = 1.0


@dataclass(frozen=True)
class Transformer:
    """A decoder or an encoder over token ids.

    Attributes:
        embedding: node that holds [V, E].
        positions: node that holds learned positions [L, E].
        position_offset: row of the first position (RoBERTa: 2).
        token_types: node that holds [T, E], of which row 0 is always added.
        head: None: the hidden states are the result.
        softcap: logits become c · tanh(logits / c).
    """

    embedding: fx.Node
    width: int
    vocabulary: int
    layers: list[Layer]
    final_norm: Norm | None
    head: Linear | None
    embedding_scale: float = 1.0
    positions: fx.Node | None = None
    token_types: fx.Node | None = None
    embedding_norm: Norm | None = None
    logit_scale: float = 1.0
    softcap: float | None = None
    max_length: int | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def tied(self) -> bool:
        """The head is the embedding's weight."""
        return self.head is not None and weight_name(self.head.weight) == weight_name(self.embedding)


def weight_name(node: fx.Node) -> str:
    """Name of the weight that a node gives, through a dequantize."""
    while node.op != "get_attr" and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return str(node.target)
