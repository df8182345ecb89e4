"""Stand-ins for tensors, with which ordinary PyTorch code describes a graph instead of computing.

`Traced` answers to tensor methods, operators and every torch function; what is called is handed to a
recorder. The matcher's recorder builds a pattern, the rewriter's inserts nodes into a program.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, Protocol

import torch

from irc.core.errors import IrcError

# Python and torch.nn.functional names whose ATen op is called otherwise.
_RENAMED = {
    "truediv": "div", "divide": "div", "true_divide": "div", "multiply": "mul", "subtract": "sub", "negative": "neg",
    "concat": "cat", "concatenate": "cat", "swapaxes": "transpose", "swapdims": "transpose",
}  # fmt: skip
_CASTS = {
    "float": torch.float32, "double": torch.float64, "half": torch.float16, "bfloat16": torch.bfloat16,
    "int": torch.int32, "long": torch.int64, "bool": torch.bool,
}  # fmt: skip
_SIZE_LISTS = {"view", "reshape", "permute", "expand", "repeat"}
_CALL_ONLY = {"_stacklevel", "inplace"}  # arguments of torch.nn.functional that ATen does not have
MULTI_OUTPUT = {"chunk", "split", "split_with_sizes", "unbind", "tensor_split", "topk", "sort"}


class Recorder(Protocol):
    """What a `Traced` reports to."""

    def call(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """An operation `namespace::op` was called; arguments hold recorder values in place of `Traced`."""

    def attribute(self, value: Any, name: str) -> Any:
        """`dtype`, `shape`, `ndim` or `device` of a value was asked for."""

    def item(self, value: Any, index: int) -> Any:
        """One result of an operation that has several."""

    def num_items(self, value: Any) -> int | None:
        """How many results an operation has; None for an operation with one."""


class Traced:
    """Stands for a tensor while a pattern or a replacement is traced."""

    __slots__ = ("_recorder", "_value")
    _ATTRIBUTES: ClassVar = {"dtype", "shape", "ndim", "device"}

    def __init__(self, recorder: Recorder, value: Any) -> None:
        self._recorder, self._value = recorder, value

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        recorder = next(leaf._recorder for leaf in _leaves((args, kwargs or {})) if isinstance(leaf, Traced))
        if isinstance(func, torch._ops.OpOverload):
            return _wrap(recorder, recorder.call(func._schema.name, *_unwrap((args, kwargs or {}))))
        if isinstance(func, torch._ops.OpOverloadPacket):
            return _wrap(recorder, recorder.call(func._qualified_op_name, *_unwrap((args, kwargs or {}))))
        return _record(recorder, func.__name__.strip("_"), args, kwargs or {})

    def __getattr__(self, name: str) -> Any:
        if name in self._ATTRIBUTES:
            return self._recorder.attribute(self._value, name)
        if name.startswith("__"):
            raise AttributeError(name)
        if name in ("T", "mT"):
            return _record(self._recorder, "transpose", (self, -2, -1), {})
        return lambda *args, **kwargs: _record(self._recorder, name, (self, *args), kwargs)

    def size(self, dim: int | None = None) -> Any:
        shape = self.shape
        return shape if dim is None else shape[dim]

    def dim(self) -> int:
        return int(self.ndim)

    def __getitem__(self, index: Any) -> Any:
        if self._recorder.num_items(self._value) is not None:
            return Traced(self._recorder, self._recorder.item(self._value, index))
        return _index(self, index)

    def __iter__(self) -> Iterator[Any]:
        count = self._recorder.num_items(self._value)
        if count is None:
            raise IrcError("only the results of chunk, split and unbind can be unpacked in a rewrite rule")
        return iter([self[i] for i in range(count)])

    def __bool__(self) -> bool:
        raise IrcError("a rewrite rule cannot branch on a tensor: write one pattern for each case")


def _record(recorder: Recorder, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Report a Python-level call under its ATen name."""
    if name == "getitem":
        return args[0][args[1]]
    if name == "type_as":
        name, args = "to", (args[0], args[1].dtype)
    if name in _CASTS:
        name, args = "to", (args[0], _CASTS[name])
    name = _RENAMED.get(name, name)
    if name in _SIZE_LISTS and len(args) > 1 and not isinstance(args[1], (list, tuple)) and not _is_list(args[1]):
        args = (args[0], list(args[1:]))
    if name == "softmax":
        name, kwargs = "softmax", {k: v for k, v in kwargs.items() if k != "dtype" or v is not None}
    kwargs = {key: value for key, value in kwargs.items() if key not in _CALL_ONLY}
    if name == "embedding":
        args = (args[1], args[0], *args[2:])
    if name == "div" and not _is_tensor(args[0]):  # c / x is how PyTorch computes it: reciprocal(x) * c
        name, args = "mul", (_record(recorder, "reciprocal", (args[1],), {}), args[0])
    full = f"aten::{name}"
    if not hasattr(torch.ops.aten, name):
        raise IrcError(f"{name} is no ATen operation: a rewrite rule may use tensor operations only")
    return _wrap(recorder, recorder.call(full, *_unwrap((args, kwargs))))


def _is_list(value: Any) -> bool:
    """True for a parameter that stands for a whole list (of sizes, say)."""
    return isinstance(value, Traced) and getattr(value._value, "kind", None) is object


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Traced) and getattr(value._value, "kind", None) is None


def _index(x: Traced, index: Any) -> Any:
    """x[index] as slices, selects and unsqueezes; dimensions after an ellipsis count from the end."""
    parts = list(index) if isinstance(index, tuple) else [index]
    if Ellipsis in parts and parts.index(Ellipsis) == 0:
        parts, dim, step = parts[:0:-1], -1, -1
    elif Ellipsis in parts:
        raise IrcError("a rewrite rule indexes with an ellipsis in front only: x[..., a:b]")
    else:
        dim, step = 0, 1
    for part in parts:
        if isinstance(part, slice):
            bounds = [
                given if given is not None else usual
                for given, usual in zip((part.start, part.stop, part.step), (0, sys.maxsize, 1), strict=True)
            ]
            if part != slice(None):
                x = _record(x._recorder, "slice", (x, dim, *bounds), {})
            dim += step
        elif part is None:
            x = _record(x._recorder, "unsqueeze", (x, dim), {})
            dim += step
        else:
            x = _record(x._recorder, "select", (x, dim, part), {})
            dim += 0 if step == 1 else step + 1
    return x


def _operator(name: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    def forward(self: Traced, other: Any) -> Any:
        return _record(self._recorder, name, (self, other), {})

    def reflected(self: Traced, other: Any) -> Any:
        return _record(self._recorder, name, (other, self), {})

    return forward, reflected


for _name in ("add", "sub", "mul", "truediv", "pow", "matmul"):
    _forward, _reflected = _operator(_name)
    setattr(Traced, f"__{_name}__", _forward)
    setattr(Traced, f"__r{_name}__", _reflected)
for _name in ("lt", "le", "gt", "ge", "and", "or"):
    _forward, _ = _operator(_name if _name not in ("and", "or") else f"bitwise_{_name}")
    setattr(Traced, f"__{_name}__", _forward)
setattr(Traced, "__neg__", lambda self: _record(self._recorder, "neg", (self,), {}))  # noqa: B010  (as those above)


def _wrap(recorder: Recorder, value: Any) -> Traced:
    return Traced(recorder, value)


def _unwrap(value: Any) -> Any:
    if isinstance(value, Traced):
        return value._value
    if isinstance(value, tuple):
        return tuple(_unwrap(item) for item in value)
    if isinstance(value, list):
        return [_unwrap(item) for item in value]
    if isinstance(value, dict):
        return {key: _unwrap(item) for key, item in value.items()}
    return value


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from _leaves(item)
    elif isinstance(value, dict):
        yield from _leaves(list(value.values()))
    else:
        yield value


def unwrap_result(result: Any) -> Any:
    """The recorder's value behind what a traced function returned."""
    return _unwrap(result)


def parameters(function: Callable[..., Any]) -> dict[str, type | None]:
    """Parameters of a rule function: None for a tensor, else the Python type of a constant.

    A constant is annotated (`eps: float`, `sizes: list[int]`); in a lambda its default is a type
    (`lambda x, c=float: x * c`).
    """
    found: dict[str, type | None] = {}
    types = {kind.__name__: kind for kind in (float, int, bool, str, torch.dtype, object)} | {
        "torch.dtype": torch.dtype
    }
    for name, parameter in inspect.signature(function).parameters.items():
        default = None if parameter.default is inspect.Parameter.empty else parameter.default
        kind = default if isinstance(default, type) else parameter.annotation
        if str(kind).startswith(("list[", "Sequence[")):
            kind = object
        kind = types.get(kind) if isinstance(kind, str) else kind
        found[name] = kind if kind in types.values() else None
    return found
