"""Which ops keep positions apart, and where their result carries the sequence: the whitelist of the proof.

A rule sees an op with its operands' token layouts and gives the result's, or refuses. Most need only say
which dimensions an op works along; the result's shape then tells where the sequence went, and the walk
checks that it is in exactly one place.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import sympy
import torch
import torch.fx as fx

from irc.core import formats
from irc.core.program import VAL, is_size
from irc.passes.attention._per_position import Layout, Refusal, Rule, Token, Walk
from irc.passes.attention._per_position_indexing import (
    embedding_rule,
    gather_rule,
    index_add_rule,
    index_rule,
    schema_name,
)


def _argument(node: fx.Node, name: str, default: Any = None) -> Any:
    """An argument by schema name, wherever it was given."""
    assert isinstance(node.target, torch._ops.OpOverload)
    for index, argument in enumerate(node.target._schema.arguments):
        if argument.name == name:
            if not argument.kwarg_only and index < len(node.args):
                return node.args[index]
            return node.kwargs.get(name, argument.default_value if argument.has_default_value() else default)
    return default


# ---------------------------------------------------------------- rules


def _pointwise(walk: Walk, node: fx.Node) -> Token | None:
    """Positions meet only themselves: operands agree on the dimension and its order."""
    for arg in node.all_input_nodes:
        if is_size(arg) and walk.carries(walk.program.expr(arg.meta[VAL])):
            raise Refusal(f"computes with the sequence length ({arg.name}), which a single step does not know")
    return _pointwise_of(walk, node, (node.args, node.kwargs), len(node.meta[VAL].shape))


def _pointwise_of(walk: Walk, node: fx.Node, operands: Any, rank: int) -> Token | None:
    found = walk.layouts_of(operands)
    aligned = {Token(t.dim + rank - len(n.meta[VAL].shape), t.inner) for n, t in found.items()}
    if len(aligned) > 1:
        raise Refusal("pairs positions with positions; only attention may")
    return next(iter(aligned), None)


def _same_size(walk: Walk, node: fx.Node) -> Token | None:
    """Casts, copies and other ops of one operand that keep every element in its place."""
    return walk.layout(node.args[0])


def _uniform(walk: Walk, node: fx.Node) -> None:
    """Constants whose shape, not value, comes from data."""


def _shape_says(walk: Walk, node: fx.Node) -> Layout:
    """Ops that move whole dimensions: the result's one dimension that carries S is the token's."""
    found = walk.layouts_of(node.args)
    if not found:
        return None
    inners = {t.inner for t in found.values()}
    sizes = {walk.shape(n)[t.dim] for n, t in found.items()}
    if len(inners) > 1 or len(sizes) > 1:
        raise Refusal("combines different token layouts")

    def token_of(value: Any) -> Token | None:
        dims = walk.token_dims(value)
        if len(dims) != 1 or walk.program.expr(value.shape[dims[0]]) not in sizes:
            raise Refusal(f"cuts, repeats or pairs the sequence dimension {walk.sequence.name}")
        return Token(dims[0], next(iter(inners)))

    value = node.meta[VAL]
    return tuple(token_of(v) for v in value) if isinstance(value, (tuple, list)) else token_of(value)


def _along(argument: str | Callable[[fx.Node], list[int]], verb: str) -> Rule:
    """Ops that work along given dimensions (all, when None): none of them may hold S or B."""

    def rule(walk: Walk, node: fx.Node) -> Layout:
        dims = argument(node) if callable(argument) else _argument(node, argument)
        source = _argument(node, "tensors") or node.args[0]
        operands = source if isinstance(source, (list, tuple)) else [source]
        for operand in operands:
            sizes = walk.shape(operand)
            if dims is None or (isinstance(dims, (list, tuple)) and not dims):
                touched = list(range(len(sizes)))
            else:
                touched = [d % len(sizes) for d in (dims if isinstance(dims, (list, tuple)) else [dims])]
            for dim in touched:
                mixed = walk.mixes(sizes[dim])
                if mixed is not None:
                    raise Refusal(f"{verb} {mixed} (dimension {dim} of {list(sizes)})")
        return _shape_says(walk, node)

    return rule


def _slice(walk: Walk, node: fx.Node) -> Layout:
    if walk.shape(node) == walk.shape(node.args[0]) and _argument(node, "step", 1) == 1:
        return walk.layout(node.args[0])
    return _along("dim", "slices")(walk, node)


def _view(walk: Walk, node: fx.Node) -> Token | None:
    """Regrouping keeps row-major order: S keeps the number of elements behind one step of it."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    token = walk.layout(source)
    if token is None:
        return None
    behind = token.inner * sympy.prod(walk.shape(source)[token.dim + 1 :])
    after = sympy.Integer(1)
    sizes = walk.shape(node)
    for dim in reversed(range(len(sizes))):
        if walk.carries(sizes[dim]):
            inner = sympy.cancel(behind / after)
            outer = sympy.cancel(sizes[dim] / (inner * walk.sequence.symbol))
            if _is_whole(inner, walk) and _is_whole(outer, walk):
                return Token(dim, inner)
            break
        after = after * sizes[dim]
    raise Refusal(f"regroups {list(walk.shape(source))} to {list(sizes)}, which takes positions apart")


def _is_whole(size: sympy.Expr, walk: Walk) -> bool:
    return not walk.carries(size) and sympy.denom(size) == 1


def _matmul(walk: Walk, node: fx.Node) -> Layout:
    """Products that contract the last dimension of one operand with the last or second-last of another."""
    operands = [a for a in node.args if isinstance(a, fx.Node) and not is_size(a)]
    name = schema_name(node)
    addend = operands.pop(0) if name in ("aten::addmm", "aten::baddbmm") else None
    left, right = operands[0], operands[1]
    contracted = [(left, -1), (right, -1 if name == "aten::linear" or len(walk.shape(right)) == 1 else -2)]
    for operand, dim in contracted:
        mixed = walk.mixes(walk.shape(operand)[dim])
        if mixed is not None:
            raise Refusal(f"contracts over {mixed} ({list(walk.shape(left))} times {list(walk.shape(right))})")
    if name == "aten::linear" and walk.layout(right) is not None:
        raise Refusal("has a weight that depends on the position")
    found = walk.layouts_of([left, right])
    rank = len(node.meta[VAL].shape)
    tokens = set()
    for operand, token in found.items():
        of_rank = len(walk.shape(operand))
        tokens.add(Token(token.dim + (rank - of_rank if of_rank > 1 and name != "aten::linear" else 0), token.inner))
    if len(tokens) > 1:
        raise Refusal("pairs positions with positions; only attention may")
    token = next(iter(tokens), None)
    if addend is not None and token is not None:
        extra = walk.layout(addend, token.inner)
        if extra is not None and Token(extra.dim + rank - len(walk.shape(addend)), extra.inner) != token:
            raise Refusal("adds a bias of another token layout")
    return token


def _repeat_interleave(walk: Walk, node: fx.Node) -> Token | None:
    source, repeats, dim = node.args[0], node.args[1], _argument(node, "dim")
    token = walk.layout(source)
    if token is None or not isinstance(repeats, int) or not isinstance(dim, int):
        raise Refusal("repeats elements by data or in flat order")
    rank = len(walk.shape(source))
    same = dim % rank == token.dim
    return Token(token.dim, token.inner * repeats if same else token.inner)


def _getitem(walk: Walk, node: fx.Node) -> Token | None:
    parts = walk.layouts[node.args[0]]
    assert isinstance(parts, tuple)
    assert isinstance(node.args[1], int)
    return parts[node.args[1]]


def _scatter_along(walk: Walk, node: fx.Node) -> Token | None:
    """A part along a dimension without positions is replaced; the other dimensions line up."""
    target, source = node.args[:2]
    assert isinstance(target, fx.Node)
    assert isinstance(source, fx.Node)
    sizes = walk.shape(target)
    dim = int(_argument(node, "dim", 0)) % len(sizes)
    mixed = walk.mixes(sizes[dim])
    if mixed is not None and walk.shape(source) != sizes:
        raise Refusal(f"replaces a part of {mixed}")
    token = _pointwise_of(walk, node, [source], rank=len(walk.shape(source)))
    if token is not None and len(walk.shape(source)) < len(sizes) and token.dim >= dim:
        token = Token(token.dim + 1, token.inner)  # select_scatter: the source lacks the dimension
    own = walk.layout(target, token.inner if token is not None else None)
    if own is not None and token is not None and own != token:
        raise Refusal("pairs positions with positions; only attention may")
    return own or token


def _rope(walk: Walk, node: fx.Node) -> Token | None:
    token = _pointwise(walk, node)
    if token is not None and token.dim == len(node.meta[VAL].shape) - 1:
        raise Refusal("rotates along the sequence dimension")
    return token


def _quantization(walk: Walk, node: fx.Node) -> Layout:
    """Quantize and dequantize work along groups of the last dimension; with one stored scale, on each number."""
    chosen = formats.parse(str(node.kwargs["format"]))
    if chosen.per_tensor:
        if schema_name(node) == "irc::dynamic_scale":
            raise Refusal("computes one scale from all tokens")
        if chosen.row_multiple == 1:
            return walk.layout(node.args[0])
    return _along(lambda node: [-1], "quantizes along")(walk, node)


def _last_dims(count: Callable[[fx.Node], int], verb: str) -> Rule:
    return _along(lambda node: [-i - 1 for i in range(count(node))], verb)


def _normalized_rank(node: fx.Node) -> int:
    return len(_argument(node, "normalized_shape"))


def _attention(walk: Walk, node: fx.Node) -> Token:
    return walk.attention(walk, node)


_REDUCE = _along("dim", "reduces over")
_SHAPE = ("view", "reshape", "_unsafe_view", "flatten", "unflatten", "view_copy")
_MOVE = ("unsqueeze", "squeeze", "transpose", "permute", "t", "expand", "repeat", "movedim", "swapaxes", "stack",
         "expand_as", "numpy_T", "mT", "one_hot", "swapdims", "view_as_real", "view_as_complex")  # fmt: skip
_SAME = ("clone", "contiguous", "to", "_to_copy", "alias", "detach", "lift_fresh_copy", "type_as", "dropout", "float",
         "native_dropout")  # fmt: skip
# Composite ops that lack PyTorch's `pointwise` tag.
_POINTWISE = ("copy", "where", "masked_fill", "rsub", "true_divide", "floor_divide", "multiply", "divide", "subtract",
              "negative", "absolute", "greater", "greater_equal", "less", "less_equal", "not_equal", "hardswish",
              "log_sigmoid", "special_expit", "__and__", "__or__", "__xor__", "isfinite", "complex", "polar", "real",
              "imag")  # fmt: skip
_REDUCTIONS = ("mean", "sum", "amax", "amin", "max", "min", "argmax", "argmin", "var", "std", "logsumexp", "prod",
               "any", "all", "linalg_vector_norm", "norm", "var_mean")  # fmt: skip
_ALONG = {"softmax": "normalises over", "_softmax": "normalises over", "log_softmax": "normalises over",
          "cumsum": "accumulates over", "cumprod": "accumulates over", "cummax": "accumulates over",
          "topk": "ranks over", "sort": "sorts over", "argsort": "sorts over", "glu": "splits",
          "split": "splits", "split_with_sizes": "splits", "chunk": "splits", "unbind": "splits",
          "tensor_split": "splits", "select": "selects along", "cat": "concatenates along",
          "narrow": "cuts"}  # fmt: skip
# Elementwise forms of operations whose other overloads reduce.
_POINTWISE_OVERLOADS: dict[Any, Rule] = {torch.ops.aten.max.other: _pointwise, torch.ops.aten.min.other: _pointwise}
_RULES: dict[str, Rule] = {
    **{f"aten::{n}": _view for n in _SHAPE},
    **{f"aten::{n}": _shape_says for n in _MOVE},
    **{f"aten::{n}": _same_size for n in _SAME},
    **{f"aten::{n}": _REDUCE for n in _REDUCTIONS},
    **{f"aten::{n}": _along("dim", verb) for n, verb in _ALONG.items()},
    **{f"aten::{n}": _along("dims", "reorders") for n in ("flip", "roll")},
    **{f"aten::{n}": _matmul for n in ("linear", "matmul", "mm", "bmm", "addmm", "baddbmm")},
    **{f"aten::{n}": _uniform for n in ("zeros_like", "ones_like", "full_like", "empty_like", "new_zeros",
                                        "new_ones", "new_full", "new_empty")},
    **{f"aten::{n}": gather_rule for n in ("gather", "scatter", "scatter_add", "scatter_reduce", "take_along_dim")},
    **{f"aten::{n}": _pointwise for n in _POINTWISE},
    "aten::slice_scatter": _scatter_along,
    "aten::select_scatter": _scatter_along,
    "aten::slice": _slice,
    "aten::embedding": embedding_rule,
    "aten::index": index_rule,
    "aten::index_select": index_rule,
    "aten::index_add": index_add_rule,
    "aten::repeat_interleave": _repeat_interleave,
    "aten::tril": _along(lambda node: [-1, -2], "masks"),
    "aten::triu": _along(lambda node: [-1, -2], "masks"),
    "aten::layer_norm": _last_dims(_normalized_rank, "normalises over"),
    "aten::native_layer_norm": _last_dims(_normalized_rank, "normalises over"),
    "aten::rms_norm": _last_dims(_normalized_rank, "normalises over"),
    "irc::rms_norm": _last_dims(lambda node: 1, "normalises over"),
    "irc::glu": _pointwise,
    "irc::rope": _rope,
    **{f"irc::{n}": _quantization for n in ("quantize", "dequantize", "dynamic_scale", "fake_quantize")},
    "irc::attention": _attention,
    "irc::flash_attention": _attention,
}  # fmt: skip


def rule_for(node: fx.Node) -> Rule:
    if node.target is operator.getitem:
        return _getitem
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return _unknown
    if target._schema.is_mutable:
        return _mutates
    known = _POINTWISE_OVERLOADS.get(target) or _RULES.get(target._schema.name)
    if known is not None:
        return known
    return _pointwise if torch.Tag.pointwise in target.tags else _unknown


def _unknown(walk: Walk, node: fx.Node) -> Layout:
    kind = " (a convolution)" if "conv" in str(node.target) else ""
    raise Refusal(f"is not known to work per position{kind}: it may mix tokens along {walk.sequence.name}")


def _mutates(walk: Walk, node: fx.Node) -> Layout:
    raise Refusal("writes into its operand")
