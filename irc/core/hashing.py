"""Hashes of programs: which computes the same as another, without comparing everything."""

from __future__ import annotations

import functools
import hashlib
import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor

from irc.core.content_hash import META_HASH, content_hash
from irc.core.listing.expressions import expr_text
from irc.core.listing.specs import FLATTENED, spec_text
from irc.core.typed_graph import VAL, TypedGraph, is_size


def structural_hash(program: TypedGraph, weight: Callable[[Tensor], str] = content_hash) -> str:
    """Hash of what a program is: operations, weights by content, types of inputs, dims, aliases, specs, metadata.

    Names of nodes, names of weights, the order of independent operations and provenance do not count. Unused
    operations do, and so does computing the same thing twice. `weight` tells weights of one type apart.
    """
    values: dict[fx.Node, bytes] = {}
    operations: list[bytes] = []
    for index, node in enumerate(program.placeholders):
        values[node] = _digest("input", str(index), str(node.target), _type_key(program, node.meta.get(VAL)))
    for node in program.graph.nodes:
        if node.op == "get_attr":
            tensor = program.weight(node)
            name = str(node.target) if tensor.device.type == "meta" and content_hash(tensor) == META_HASH else ""
            values[node] = _digest("weight", weight(tensor), _type_key(program, tensor), name)
        elif node.op == "call_function" and is_size(node):
            values[node] = _digest("size", _size_key(program, node.meta[VAL]))
        elif node.op == "call_function":
            target = "getitem" if node.target is operator.getitem else str(node.target)
            values[node] = _digest(target, _key(node.args, values), _key(node.kwargs, values))
            operations.append(values[node])
    summary = _digest(
        "program",
        repr([values[node] for node in program.placeholders]),
        repr(sorted(operations)),
        _key(program.outputs, values),
        repr([(d.name, d.minimum, d.maximum) for d in program.dims.values()]),
        repr(sorted(program.aliases.items())),
        repr(sorted(program.tied)),
        spec_text(program, "in_spec"),
        spec_text(program, "out_spec"),
        repr({key: value for key, value in program.metadata.items() if key != FLATTENED}),
    )
    return summary.hex()


class Structure:
    """What a program was when this was made, for comparisons that read weights only if nothing else decides.

    Reading the weights of a large model takes seconds. Programs over the very same tensors differ just where their
    operations do, and programs that differ where weights of one type are all taken for equal differ in any case.
    """

    def __init__(self, program: TypedGraph) -> None:
        self._program = program
        self._over_tensors = structural_hash(program, _identity)

    def same_as(self, other: Structure) -> bool:
        """Whether both have the same structural hash. Weights must not have been written into."""
        if self._over_tensors == other._over_tensors:
            return True
        if self._over_types != other._over_types or not (self._is_current() and other._is_current()):
            return False
        return structural_hash(self._program) == structural_hash(other._program)

    @functools.cached_property
    def _over_types(self) -> str:
        return structural_hash(self._program, _nothing)

    def _is_current(self) -> bool:
        """Whether the program is still what it was."""
        return structural_hash(self._program, _identity) == self._over_tensors


def _identity(tensor: Tensor) -> str:
    return str(id(tensor))


def _nothing(tensor: Tensor) -> str:
    return ""


def _digest(*parts: str) -> bytes:
    return hashlib.blake2b("\0".join(parts).encode("utf-8", "backslashreplace"), digest_size=20).digest()


def _key(value: Any, values: dict[fx.Node, bytes]) -> str:
    if isinstance(value, fx.Node):
        return values[value].hex()
    if isinstance(value, (list, tuple)):
        return "[" + ",".join([_key(item, values) for item in value]) + "]"
    if isinstance(value, dict):
        return "{" + ",".join([f"{k}={_key(value[k], values)}" for k in sorted(value)]) + "}"
    return f"{type(value).__name__}:{value!r}"


def _size_key(program: TypedGraph, size: Any) -> str:
    if isinstance(size, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return expr_text(program.expr(size))
    return repr(size)


def _type_key(program: TypedGraph, value: Any) -> str:
    if isinstance(value, Tensor):
        sizes = ",".join(_size_key(program, size) for size in value.shape)
        return f"{value.dtype}[{sizes}]{value.device.type if value.device.type != 'meta' else 'cpu'}"
    return _size_key(program, value)
