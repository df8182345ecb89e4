"""Do the arguments of a node fit the schema of its operator? Answered without running anything."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor

from irc.core.errors import nearest
from irc.core.typed import VAL

NAMESPACES = ("aten", "irc", "prims", "_c10d_functional")

# Operators that touch the world outside: files, streams, devices.
_REFUSED = frozenset({"aten::from_file", "aten::_pin_memory", "aten::pin_memory", "aten::record_stream"})
_SYMBOLS = (torch.SymInt, torch.SymFloat, torch.SymBool)


@lru_cache(maxsize=4096)
def refusal(target: Any) -> str | None:
    """Why a program may not call `target`, or None if it may: a pure operator with tensors as results."""
    if not isinstance(target, torch._ops.OpOverload):
        return f"{target} is not an operator"
    schema = target._schema
    if target.namespace not in NAMESPACES:
        return f"{schema.name} is of namespace {target.namespace!r}; programs call {', '.join(NAMESPACES)}"
    if schema.name in _REFUSED:
        return f"{schema.name} reaches outside of the program"
    if schema.is_mutable:
        return f"{target} writes into an argument; programs are functional"
    if not schema.returns:
        return None if schema.name.startswith("aten::_assert") else f"{target} returns nothing"
    if not any("Tensor" in str(r.type) for r in schema.returns):
        return f"{target} returns no tensor"
    return None


def argument_problems(target: torch._ops.OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[str]:
    """How arguments (nodes and constants) break the operator's schema; empty when they fit."""
    arguments = _arguments(target)
    positional = [a.name for a in arguments if not a.kwarg_only]
    problems = []
    if len(args) > len(positional):
        problems.append(f"takes {len(positional)} positional arguments, got {len(args)}")
    given: dict[str, Any] = dict(zip(positional, args, strict=False))
    names = [a.name for a in arguments]
    for key, value in kwargs.items():
        if key not in names:
            problems.append(f"has no argument {key!r}{nearest(key, names)}")
        elif key in given:
            problems.append(f"argument {key!r} is given twice")
        else:
            given[key] = value
    for argument in arguments:
        if argument.name not in given:
            if not argument.has_default:
                problems.append(f"argument {argument.name!r} is missing")
        elif not _fits(given[argument.name], argument.kind):
            problems.append(f"argument {argument.name!r} must be {argument.kind}, got {_what(given[argument.name])}")
    return problems


@dataclass(frozen=True)
class _Argument:
    """An argument of a schema, read once: PyTorch's bindings are slow."""

    name: str
    kind: str
    kwarg_only: bool
    has_default: bool


@lru_cache(maxsize=4096)
def _arguments(target: torch._ops.OpOverload) -> tuple[_Argument, ...]:
    return tuple(
        _Argument(a.name, str(a.real_type), a.kwarg_only, a.has_default_value()) for a in target._schema.arguments
    )


def _what(value: Any) -> str:
    if isinstance(value, fx.Node):
        return f"%{value.name}"
    return f"{type(value).__name__} {value!r}"


def _fits(value: Any, kind: str) -> bool:
    if kind.startswith("Optional["):
        return value is None or _fits(value, kind[len("Optional[") : -1])
    if kind.startswith("List["):
        inner = kind[len("List[") : -1]
        if isinstance(value, (list, tuple)):
            return all(_fits(item, inner) for item in value)
        if isinstance(value, fx.Node) and isinstance(value.meta.get(VAL), (list, tuple)):
            return True
        # `int[2] stride=1` takes one number for all.
        return inner in ("int", "SymInt", "float", "bool") and _fits(value, inner)
    if isinstance(value, fx.Node):
        return _node_fits(value, kind)
    check = _CHECKS.get(kind)
    return check is None or check(value)


def _node_fits(node: fx.Node, kind: str) -> bool:
    value = node.meta.get(VAL)
    if isinstance(value, Tensor):
        # PyTorch takes a tensor of no dimensions for a number.
        return kind == "Tensor" or (kind in ("number", "Scalar") and value.dim() == 0)
    if isinstance(value, (*_SYMBOLS, int, float, bool)):
        return kind in ("int", "SymInt", "float", "number", "Scalar", "bool", "SymFloat", "SymBool", "Tensor")
    return value is None


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


_CHECKS: dict[str, Callable[[Any], bool]] = {
    # PyTorch makes a tensor of a number: `aten.add.Tensor(x, 2)`.
    "Tensor": lambda v: isinstance(v, (bool, int, float)),
    "int": _is_int,
    "SymInt": _is_int,
    "float": lambda v: isinstance(v, (int, float)) and not isinstance(v, bool),
    "bool": lambda v: isinstance(v, bool),
    "number": lambda v: isinstance(v, (bool, int, float, complex)),
    "Scalar": lambda v: isinstance(v, (bool, int, float, complex)),
    "str": lambda v: isinstance(v, str),
    "Device": lambda v: isinstance(v, torch.device),
    "ScalarType": lambda v: isinstance(v, torch.dtype),
    "Layout": lambda v: isinstance(v, torch.layout),
    "MemoryFormat": lambda v: isinstance(v, torch.memory_format),
    "Generator": lambda v: False,
    "Stream": lambda v: False,
}
