"""One spelling for a graph node's call: arguments by name, defaults filled in, equal operations under one name."""

from __future__ import annotations

import functools
import operator
import sys
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor

from irc.core.program import VAL

_DIM_ARGUMENTS = {"dim", "dims", "dim0", "dim1", "start_dim", "end_dim"}
SAME_OPERATION = {"aten::reshape": "aten::view", "aten::_unsafe_view": "aten::view"}
_RESPELLED = SAME_OPERATION | {"aten::square": "aten::pow", "aten::rsub": "aten::sub"}
_ARGUMENT_NAMES = {("aten::view", "shape"): "size"}
_SIZED = {"aten::slice", "aten::slice_scatter"}
_CAST_OPS = {"aten::to", "aten::_to_copy", "aten::type_as"}
COMMUTATIVE = {"aten::add", "aten::mul", "aten::maximum", "aten::minimum", "aten::eq", "aten::logical_and"}


@dataclass(frozen=True)
class NodeCall:
    """What a node calls: operation name without overload, and its arguments by name."""

    name: str
    arguments: dict[str, Any]


def call_name(node: fx.Node) -> str | None:
    """The name that `call_of` would give, without looking at the arguments: most nodes are ruled out by it."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return None
    name = node.target._schema.name
    if name in _CAST_OPS and cast_input(node) is not None:
        return "aten::to"
    return _RESPELLED.get(name, name)


def call_of(node: fx.Node) -> NodeCall | None:
    """The call of an operator node; None for anything else."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return None
    if cast_input(node) is not None:
        return NodeCall("aten::to", {})
    sizes = size_along(node) if takes_sizes(node.target) else {}
    return bind(node.target, node.args, node.kwargs, rank_of(node), sizes)


def bind(
    operation: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], rank: int | None,
    size: dict[Any, int | None],
) -> NodeCall | None:  # fmt: skip
    """Arguments in the words of an operation's schema, or None when they do not fit it."""
    words = _words_of(operation)
    names = words.names
    if len(args) > len(names) or not words.known.issuperset(kwargs):
        return None
    given = dict(zip(names, args, strict=False))
    given.update(kwargs)
    found: dict[str, Any] = {}
    for name, default, renamed in words.arguments:
        value = given.get(name, default)
        if value is _REQUIRED:
            return None
        found[renamed] = _normal_dims(value, rank) if name in _DIM_ARGUMENTS else value
    return _one_spelling(words.name, found, size)


@dataclass(frozen=True)
class _Words:
    """What `bind` needs of a schema: reading it through PyTorch's bindings takes longer than everything else.

    Attributes:
        name: of the operation, one for all its spellings.
        arguments: (name, default or `_REQUIRED`, name in the one spelling).
    """

    name: str
    names: tuple[str, ...]
    known: frozenset[str]
    arguments: tuple[tuple[str, Any, str], ...]


def takes_sizes(operation: torch._ops.OpOverload) -> bool:
    """Whether `bind` needs the sizes of the first input."""
    return _words_of(operation).name in _SIZED


_REQUIRED = object()


@functools.cache
def _words_of(operation: torch._ops.OpOverload) -> _Words:
    schema = operation._schema
    name = SAME_OPERATION.get(schema.name, schema.name)
    arguments = tuple(
        (a.name, a.default_value if a.has_default_value() else _REQUIRED, _ARGUMENT_NAMES.get((name, a.name), a.name))
        for a in schema.arguments
    )
    names = tuple(argument[0] for argument in arguments)
    return _Words(name, names, frozenset(names), arguments)


def _one_spelling(name: str, found: dict[str, Any], size: dict[Any, int | None]) -> NodeCall:
    if name == "aten::square":
        return NodeCall("aten::pow", {"self": found["self"], "exponent": 2})
    if name == "aten::rsub":
        return NodeCall("aten::sub", {"self": found["other"], "other": found["self"], "alpha": found["alpha"]})
    if name in _SIZED:
        length = size.get(found["dim"], size.get(None))
        found["start"] = _normal_bound(found["start"], 0, length)
        found["end"] = _normal_bound(found["end"], sys.maxsize, length)
    return NodeCall(name, found)


def _normal_dims(value: Any, rank: int | None) -> Any:
    if isinstance(value, (list, tuple)):
        return [_normal_dims(item, rank) for item in value]
    if rank and isinstance(value, int) and not isinstance(value, bool):
        return value % rank
    return value


def _normal_bound(value: Any, default: int, length: int | None) -> Any:
    value = default if value is None else value
    if isinstance(value, int) and length is not None:
        return min(value if value >= 0 else value + length, length)
    return value


def _first_tensor(node: fx.Node) -> Tensor | None:
    for used in node.all_input_nodes:
        if isinstance(used.meta.get(VAL), Tensor):
            return used.meta[VAL]
    return None


def rank_of(node: fx.Node) -> int | None:
    """Rank that the node's `dim` arguments refer to (`unsqueeze` and `stack` count the new dimension)."""
    tensor = _first_tensor(node)
    if tensor is None:
        return None
    name = getattr(node.target, "_schema", None)
    return tensor.ndim + (1 if name is not None and name.name in ("aten::unsqueeze", "aten::stack") else 0)


def size_along(node: fx.Node) -> dict[Any, int | None]:
    """Fixed sizes of the first input by dimension."""
    tensor = _first_tensor(node)
    return {} if tensor is None else {i: s for i, s in enumerate(tensor.shape) if isinstance(s, int)}


def cast_input(node: fx.Node) -> fx.Node | None:
    """The input of a node that changes nothing but the element type, else None."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return None
    if node.target._schema.name not in _CAST_OPS or not node.args or not isinstance(node.args[0], fx.Node):
        return None
    before, after = node.args[0].meta.get(VAL), node.meta.get(VAL)
    if not isinstance(before, Tensor) or not isinstance(after, Tensor) or before.device != after.device:
        return None
    return node.args[0]


def is_item(node: fx.Node) -> bool:
    """True for `getitem` of an operation with several results."""
    return node.op == "call_function" and node.target is operator.getitem
