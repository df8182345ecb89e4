"""Matching a pattern against a program, with backtracking, and remembering how far the best failure came."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
import torch.fx as fx
from torch import Tensor

from irc.core.program import VAL, Program
from irc.core.rewrite.calls import (
    COMMUTATIVE,
    NodeCall,
    bind,
    call_name,
    call_of,
    cast_input,
    is_item,
    rank_of,
    size_along,
    takes_sizes,
)
from irc.core.rewrite.pattern import CAST, Attribute, Call, Item, Pattern, Variable


@dataclass(frozen=True)
class Match:
    """A place where a pattern fits. What a `check` function reads.

    Attributes:
        program: where it was found.
        root: the node whose value the pattern computes.
        values: node or constant of each pattern parameter.
        nodes: every operation that the pattern covers, root included.
    """

    program: Program
    root: fx.Node
    values: Mapping[str, Any]
    nodes: frozenset[fx.Node]

    def __getitem__(self, name: str) -> Any:
        return self.values[name]

    def tensor(self, name: str) -> Tensor:
        """Type and shape (a fake tensor) of a tensor parameter."""
        value = self.values[name].meta[VAL]
        assert isinstance(value, Tensor)
        return value

    def shape(self, name: str) -> tuple[sympy.Expr, ...]:
        """Sizes of a tensor parameter over the program's named dimensions."""
        return self.program.shape_expr(self.values[name])

    def dtype(self, name: str) -> torch.dtype:
        """Element type of a tensor parameter."""
        return self.tensor(name).dtype


@dataclass(frozen=True)
class Failure:
    """Where a match broke off: how many operations had fitted, the node, and what did not fit there."""

    progress: int
    node: fx.Node
    reason: str


@dataclass(frozen=True)
class _State:
    """Immutable progress of a match: pattern part → node, parameter → value."""

    bound: dict[Any, Any] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)
    covered: frozenset[fx.Node] = frozenset()
    types: tuple[tuple[fx.Node, Any], ...] = ()  # casts whose type must equal that of a part not matched yet

    def with_part(self, part: Any, node: fx.Node, *covered: fx.Node) -> _State:
        return _State(self.bound | {part: node}, self.values, self.covered | set(covered), self.types)

    def covering(self, node: fx.Node) -> _State:
        return _State(self.bound, self.values, self.covered | {node}, self.types)

    def with_value(self, name: str, value: Any) -> _State:
        return _State(self.bound, self.values | {name: value}, self.covered, self.types)

    def with_type(self, node: fx.Node, wanted: Any) -> _State:
        return _State(self.bound, self.values, self.covered, (*self.types, (node, wanted)))


class Matcher:
    """Finds one pattern at one node. `best_failure` tells about the last `match` that found nothing."""

    def __init__(self, program: Program, pattern: Pattern, *, extra_users: bool = False) -> None:
        self._program, self._pattern, self._extra_users = program, pattern, extra_users
        self.best_failure: Failure | None = None
        self._calls: dict[fx.Node, tuple[Any, Any, NodeCall | None]] = {}
        self._wanted: dict[tuple[Call, Any, int | None], NodeCall | None] = {}

    def match(self, root: fx.Node) -> Iterator[Match]:
        """Every way the pattern fits with `root` as its result (commutative operands give several)."""
        self.best_failure = None
        for state in self._part(self._pattern.root, root, _State()):
            problem = self._type_problem(state) or self._extra_user(state, root)
            if problem is not None:
                self._fail(state, *problem, complete=True)
            else:
                yield Match(self._program, root, state.values, state.covered)

    # ---------------------------------------------------------------- parts

    def _part(self, part: Any, value: Any, state: _State) -> Iterator[_State]:
        """All states in which the pattern part describes the graph value."""
        if isinstance(part, Variable):
            yield from self._variable(part, value, state)
        elif isinstance(part, (Call, Item)):
            if not isinstance(value, fx.Node):
                return
            if part in state.bound:
                if _through_noop_casts(state.bound[part]) is _through_noop_casts(value):
                    yield state
                return
            yield from self._operation(part, value, state)
        elif isinstance(part, (list, tuple)):
            yield from self._sequence(part, value, state)
        elif _same_literal(part, self._literal(value)):
            yield state

    def _operation(self, part: Call | Item, node: fx.Node, state: _State) -> Iterator[_State]:
        if isinstance(part, Item):
            if is_item(node) and node.args[1] == part.index:
                yield from self._part(part.of, node.args[0], state.with_part(part, node, node))
            else:
                self._fail(state, node, f"expected result {part.index} of {_short(part.of.name)}, found {_what(node)}")
            return
        if part.name == CAST:
            yield from self._cast(part, node, state)
            return
        same = call_name(node) == ("aten::pow" if part.name == "aten::square" else part.name)
        call = self._call_of(node) if same else None
        wanted = self._words(part, node, call)
        if call is not None and wanted is not None:
            yield from self._arguments(part, node, wanted, call, state.with_part(part, node, node))
        else:
            self._fail(state, node, f"expected {_short(part.name)}, found {_what(node)}")
        source = cast_input(node)
        if source is not None and source.meta[VAL].dtype == node.meta[VAL].dtype:
            yield from self._part(part, source, state.covering(node))

    def _call_of(self, node: fx.Node) -> NodeCall | None:
        """As `call_of`, remembered while the node keeps its arguments."""
        known = self._calls.get(node)
        if known is None or known[0] is not node.args or known[1] is not node.kwargs:
            known = self._calls[node] = (node.args, node.kwargs, call_of(node))
        return known[2]

    def _words(self, part: Call, node: fx.Node, call: NodeCall | None) -> NodeCall | None:
        """The pattern's call in the words of the node's schema, if it is a call of the same operation."""
        if call is None or not isinstance(node.target, torch._ops.OpOverload):
            return None
        if part.name == "aten::square":  # call_of spells it pow
            part = Call("aten::pow", (*part.args, 2))
        if call.name != part.name:
            return None
        target = node.target
        name = target._schema.name
        if name in ("aten::square", "aten::rsub"):  # the node was respelled: use the spelling's own schema
            target = torch.ops.aten.pow.Tensor_Scalar if name == "aten::square" else torch.ops.aten.sub.Tensor
        rank = rank_of(node)
        if not takes_sizes(target):
            key = (part, target, rank)
            if key not in self._wanted:
                self._wanted[key] = bind(target, part.args, part.kwargs, rank, {})
            return self._wanted[key]
        sizes = size_along(node)
        if isinstance(call.arguments.get("dim"), int):
            sizes[None] = sizes.get(call.arguments["dim"])  # for a pattern whose dim is a parameter
        return bind(target, part.args, part.kwargs, rank, sizes)

    def _arguments(
        self, part: Call, node: fx.Node, wanted: NodeCall, found: NodeCall, state: _State
    ) -> Iterator[_State]:
        names = list(found.arguments)
        orders = [names]
        if part.name in COMMUTATIVE and found.arguments.get("alpha", 1) == 1:
            orders.append([names[1], names[0], *names[2:]])
        for order in orders:
            pairs = [(wanted.arguments.get(w), found.arguments[f], f) for w, f in zip(names, order, strict=True)]
            yield from self._all(pairs, node, state)

    def _all(self, pairs: list[tuple[Any, Any, str]], node: fx.Node, state: _State) -> Iterator[_State]:
        if not pairs:
            yield state
            return
        wanted, found, name = pairs[0]
        matched = False
        for after in self._part(wanted, found, state):
            matched = True
            yield from self._all(pairs[1:], node, after)
        if not matched and not isinstance(wanted, (Call, Item, list, tuple)):
            self._fail(state, node, f"{_what(node)} has {name}={_value(found)}, expected {_value(wanted)}")

    def _cast(self, part: Call, node: fx.Node, state: _State) -> Iterator[_State]:
        """A cast in the pattern fits a cast to that type, or nothing where the type is right already."""
        wanted = part.args[1] if len(part.args) > 1 else part.kwargs.get("dtype")
        tensor = node.meta.get(VAL)
        if not isinstance(tensor, Tensor):
            return
        if isinstance(wanted, torch.dtype) and tensor.dtype != wanted:
            self._fail(state, node, f"expected a cast to {wanted}, found {_what(node)} of {tensor.dtype}")
            return
        if isinstance(wanted, Variable):
            states = list(self._variable(wanted, tensor.dtype, state))
        else:
            states = [state if isinstance(wanted, torch.dtype) else state.with_type(node, wanted)]
        source = cast_input(node)
        for after in states:
            if source is not None:
                yield from self._part(part.args[0], source, after.with_part(part, node, node))
            yield from self._part(part.args[0], node, after.with_part(part, node))

    def _sequence(self, part: Any, value: Any, state: _State) -> Iterator[_State]:
        items = list(value) if isinstance(value, (list, tuple)) else [value]
        if len(part) != len(items):
            return
        states = [state]
        for wanted, found in zip(part, items, strict=True):
            states = [after for before in states for after in self._part(wanted, found, before)]
        yield from states

    def _variable(self, variable: Variable, value: Any, state: _State) -> Iterator[_State]:
        if variable.kind is None:
            if not isinstance(value, fx.Node) or not isinstance(value.meta.get(VAL), Tensor):
                return
        else:
            value = self._literal(value)
            if isinstance(value, (list, tuple)) and len(value) == 1 and variable.kind in (int, float):
                value = value[0]
            if not _is_constant(value, variable.kind):
                return
        if variable.name not in state.values:
            yield state.with_value(variable.name, value)
            return
        known = state.values[variable.name]
        if variable.kind is None:
            same = _through_noop_casts(known) is _through_noop_casts(value)
        else:
            same = _same_literal(known, value)
        if same:
            yield state
        elif isinstance(value, fx.Node):
            self._fail(state, value, f"{variable.name} is {_value(known)} elsewhere in the pattern")

    # ---------------------------------------------------------------- conditions

    def _literal(self, value: Any) -> Any:
        """A constant tensor (not a trainable parameter) that holds one number stands for that number."""
        if isinstance(value, fx.Node) and value.op == "get_attr":
            tensor = self._program.weight(value)
            if tensor.ndim == 0 and not tensor.is_meta and not isinstance(tensor, torch.nn.Parameter):
                return tensor.item()
        return value

    def _type_problem(self, state: _State) -> tuple[fx.Node, str] | None:
        for node, wanted in state.types:
            assert isinstance(wanted, Attribute)
            of = state.values.get(wanted.of.name) if isinstance(wanted.of, Variable) else state.bound.get(wanted.of)
            expected = of.meta[VAL].dtype if isinstance(of, fx.Node) else None
            if node.meta[VAL].dtype != expected:
                return node, f"{_what(node)} gives {node.meta[VAL].dtype}, expected {expected}"
        return None

    def _extra_user(self, state: _State, root: fx.Node) -> tuple[fx.Node, str] | None:
        if self._extra_users:
            return None
        for node in state.covered:
            if node is root or cast_input(node) is not None:
                continue  # a cast that others read simply stays
            for user in node.users:
                if user not in state.covered:
                    return node, f"{node.name} is also used by {user.name}"
        return None

    def _fail(self, state: _State, node: fx.Node, reason: str, *, complete: bool = False) -> None:
        """Remember a failure. Unless everything fitted, the operation at `node` has not fitted itself."""
        progress = sum(
            isinstance(part, Call) and part.name != CAST and (complete or found is not node)
            for part, found in state.bound.items()
        )
        if self.best_failure is None or progress > self.best_failure.progress:
            self.best_failure = Failure(progress, node, reason)


def _through_noop_casts(node: Any) -> Any:
    while isinstance(node, fx.Node):
        source = cast_input(node)
        if source is None or source.meta[VAL].dtype != node.meta[VAL].dtype:
            break
        node = source
    return node


def _is_constant(value: Any, kind: type) -> bool:
    if kind is object:
        return not isinstance(value, fx.Node)
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def _same_literal(a: Any, b: Any) -> bool:
    if isinstance(a, fx.Node) or isinstance(b, fx.Node):
        return a is b
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b
    if isinstance(b, (list, tuple)) and len(b) == 1 and not isinstance(a, (list, tuple)):
        return _same_literal(a, b[0])
    return bool(a == b)


def _short(name: str) -> str:
    return name.removeprefix("aten::")


def _what(node: fx.Node) -> str:
    if node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload):
        return _short(node.target._schema.name)
    return {"placeholder": "an input", "get_attr": "a weight"}.get(node.op, str(node.target))


def _value(value: Any) -> str:
    if isinstance(value, fx.Node):
        return f"%{value.name}"
    if isinstance(value, Variable):
        return f"a tensor ({value.name})" if value.kind is None else f"a {value.kind.__name__} ({value.name})"
    return repr(value)
