"""Patterns: the graph that a pattern function describes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from irc.core.errors import IrcError
from irc.core.rewrite.calls import SAME_OPERATION
from irc.core.rewrite.tracing import MULTI_OUTPUT, Traced, parameters, unwrap_result

CAST = "aten::to"


@dataclass(frozen=True, eq=False)
class Variable:
    """A parameter of the pattern: any tensor (`kind` None), or any constant of a Python type."""

    name: str
    kind: type | None = None


@dataclass(frozen=True, eq=False)
class Call:
    """An operation in the pattern, by its name without overload: `aten::mul`."""

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Item:
    """Result `index` of an operation that has several."""

    of: Call
    index: int


@dataclass(frozen=True, eq=False)
class Attribute:
    """The `dtype` of a value in the pattern, known once that value is matched."""

    of: Any
    name: str


@dataclass(frozen=True)
class Pattern:
    """A traced pattern function.

    Attributes:
        root: the operation whose value the pattern computes.
        variables: parameters by name.
        num_operations: operations in it, casts not counted: what a failed match is measured against.
    """

    root: Call | Item
    variables: dict[str, Variable]
    num_operations: int


class _PatternRecorder:
    def __init__(self) -> None:
        self.num_operations = 0

    def call(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        self.num_operations += name != CAST
        return Call(SAME_OPERATION.get(name, name), args, kwargs)

    def attribute(self, value: Any, name: str) -> Attribute:
        if name != "dtype":
            raise IrcError(f"a pattern cannot ask for .{name}: ask in the check function, where sizes are known")
        return Attribute(value, name)

    def item(self, value: Any, index: int) -> Item:
        return Item(value, index)

    def num_items(self, value: Any) -> int | None:
        if not isinstance(value, Call) or value.name.removeprefix("aten::") not in MULTI_OUTPUT:
            return None
        operation = value.name.removeprefix("aten::")
        given = value.args[1] if len(value.args) > 1 else None
        if operation == "chunk" and isinstance(given, int):
            return given
        if operation in ("split", "split_with_sizes") and isinstance(given, (list, tuple)):
            return len(given)
        return 2 if operation in ("topk", "sort") else 0  # 0: index them, their number is not known


def trace_pattern(function: Callable[..., Any]) -> Pattern:
    """The graph that `function`, ordinary PyTorch code, computes from its parameters.

    Raises:
        IrcError: the function does something that no pattern can hold, or computes nothing.
    """
    recorder = _PatternRecorder()
    variables = {name: Variable(name, kind) for name, kind in parameters(function).items()}
    root = unwrap_result(function(**{name: Traced(recorder, variable) for name, variable in variables.items()}))
    if not isinstance(root, (Call, Item)):
        raise IrcError(f"the pattern of {getattr(function, '__name__', function)} must return an operation's result")
    return Pattern(root, variables, recorder.num_operations)
