"""Remember types that were computed, so that nobody computes them again.

PyTorch's shape functions take milliseconds an operation, every pass types and verifies the whole program, and the
layers of a model are alike. A type follows from the operator, the constants and the types of the inputs.
Two memories use that: a node keeps what its type was computed from (`record`, `holds`: the very same objects
as then, which copies of a program share), and `TypeMemo` gives what an operator gave for equal types elsewhere.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

VAL = "val"
_PROOF = "irc_typed"
# Compared by value; anything else (tensors, symbolic sizes: comparing those adds guards) by identity.
_PLAIN = (bool, int, float, complex, str, torch.dtype, torch.device, torch.layout, torch.memory_format)
_SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)


def record(node: fx.Node) -> None:
    """Note that `meta["val"]` of an operation is what its operator gives for its inputs' present types."""
    if node.op == "call_function" and all(VAL in used.meta for used in node.all_input_nodes):
        inputs = fx.map_arg((node.args, node.kwargs), lambda used: used.meta[VAL])
        node.meta[_PROOF] = (node.target, inputs, node.meta[VAL])


def holds(node: fx.Node) -> bool:
    """Whether `meta["val"]` was computed by this call from the types its inputs have now."""
    proof = node.meta.get(_PROOF)
    if proof is None or node.op != "call_function":
        return False
    target, (args, kwargs), result = proof
    return (
        node.target is target
        and node.meta.get(VAL) is result
        and _identical(node.args, args)
        and _identical(node.kwargs, kwargs)
    )


def alike(a: Any, b: Any) -> bool:
    """Whether two types are one and the same in every respect, layout in memory included; adds no guards."""
    if a is b:
        return True
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        plain = (a.dtype, a.device, a.layout, a.dim()) == (b.dtype, b.device, b.layout, b.dim())
        return plain and alike(_numbers(a), _numbers(b))
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
        return len(a) == len(b) and all(alike(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, _SYMBOLIC) and type(a) is type(b):
        return bool(a.node.expr == b.node.expr)
    return a is b or (isinstance(a, _PLAIN) and type(a) is type(b) and a == b)


def _numbers(tensor: Tensor) -> tuple[Any, ...]:
    return (*tensor.shape, *tensor.stride(), tensor.storage_offset()) if tensor.layout == torch.strided else ()


def _identical(now: Any, then: Any) -> bool:
    if isinstance(now, fx.Node):
        return VAL in now.meta and now.meta[VAL] is then
    if isinstance(now, (tuple, list)):
        same_length = isinstance(then, (tuple, list)) and len(now) == len(then)
        return same_length and all(_identical(a, b) for a, b in zip(now, then, strict=True))
    if isinstance(now, dict):
        return isinstance(then, dict) and now.keys() == then.keys() and all(_identical(now[k], then[k]) for k in now)
    return now is then or (isinstance(now, _PLAIN) and type(now) is type(then) and now == then)


class _NoKey(Exception):
    """The result may depend on more than types."""


class TypeMemo:
    """What operators gave for types, by operator, constants and types; one for each fake mode.

    An entry holds only while its result names no symbol that its inputs do not: sizes that depend on data are
    new symbols at each call. Tensors are compared by everything that a shape function sees of them: element
    type, device, sizes, strides and offset.
    """

    def __init__(self) -> None:
        self._results: dict[Hashable, Any] = {}
        self._numbers: dict[Hashable, int] = {}  # description of a tensor → its number
        # By identity; the tensor is kept, so that no other gets its address.
        self._tensors: dict[int, tuple[Tensor, int, frozenset[Any]]] = {}

    @staticmethod
    def of(fake_mode: FakeTensorMode) -> TypeMemo:
        """The mode's own; it goes when the mode goes."""
        return fake_mode.__dict__.setdefault("irc_type_memo", TypeMemo())

    def key(self, target: Any, args: Any, kwargs: Any) -> Hashable | None:
        """What a result is remembered by; None where it must be computed."""
        if getattr(getattr(target, "_schema", None), "is_mutable", False):
            return None
        try:
            return (target, self._key(args), self._key(kwargs))
        except _NoKey:
            return None

    def get(self, key: Hashable | None) -> Any:
        """A result that was kept, or None."""
        return None if key is None else self._results.get(key)

    def keep(self, key: Hashable | None, args: Any, kwargs: Any, result: Any) -> None:
        """Remember a result, if it follows from the types."""
        if key is None or result is None:
            return
        try:
            if self._symbols(result) <= self._symbols((args, kwargs)):
                self._results[key] = result
        except _NoKey:
            return

    def _key(self, value: Any) -> Hashable:
        if isinstance(value, Tensor):
            return ("tensor", self._tensor(value)[1])
        if isinstance(value, (tuple, list)):
            return ("list", *[self._key(item) for item in value])
        if isinstance(value, dict):
            return ("dict", *[(name, self._key(item)) for name, item in value.items()])
        if isinstance(value, _SYMBOLIC):
            return (type(value), value.node.expr)
        if value is None or isinstance(value, _PLAIN):
            return (type(value), value)
        raise _NoKey

    def _symbols(self, value: Any) -> frozenset[Any]:
        if isinstance(value, Tensor):
            return self._tensor(value)[2]
        if isinstance(value, dict):
            value = list(value.values())
        if isinstance(value, (tuple, list)):
            return frozenset().union(*[self._symbols(item) for item in value])
        return frozenset(value.node.expr.free_symbols) if isinstance(value, _SYMBOLIC) else frozenset()

    def _tensor(self, tensor: Tensor) -> tuple[Tensor, int, frozenset[Any]]:
        known = self._tensors.get(id(tensor))
        if known is None:
            # A fake that stands for a known number (`constant`) is more than its type.
            if not isinstance(tensor, FakeTensor) or tensor.constant is not None or tensor.layout != torch.strided:
                raise _NoKey
            sizes = (tuple(tensor.shape), tensor.stride(), tensor.storage_offset())
            described = (tensor.dtype, tensor.device, self._key(sizes), tensor.requires_grad, tensor.is_conj())
            number = self._numbers.setdefault(described, len(self._numbers))
            known = self._tensors[id(tensor)] = (tensor, number, self._symbols(sizes))
        return known
