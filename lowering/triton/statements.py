"""Statements and values of a kernel as Triton.

Every value is a tensor that broadcasts: what depends on the kernel's rows has their shape, what depends on the lanes of
the loop around it has theirs, everything else is a scalar. `Shape` says how the two look in a kernel.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import sympy

from irc.lowering.kernels.buffers import Buffer
from irc.lowering.kernels.kernel import Combine, Loop, Start, Statement, Store
from irc.lowering.kernels.printing import Lines, Scope, before_rounding, read_again
from irc.lowering.kernels.values import REGISTER, Apply, Index, Literal, Load, Local, Value, loads, walk
from irc.lowering.triton.expressions import REGISTER_TYPES, apply_text, index_text, operand_text, size_text, typed

ROWS, LANES, STOP = "rows", "lanes", "stop"
_FLOATS = ("f32", "f64")
MOST_LANES = 2048
DYNAMIC_LANES = 1024
"""Lanes of a loop whose length is known only when it runs."""


@dataclass(frozen=True)
class Shape:
    """How values of a kernel look.

    Attributes:
        rows: shape of what depends on rows, `[BLOCK]` or `[ROWS, 1]`.
        lanes: whether innermost loops run in lanes, as a second axis; without, all loops run one by one.
        most: lanes of a loop at most.
    """

    rows: tuple[int, ...]
    lanes: bool
    most: int = MOST_LANES

    def text(self, lanes: int | None = None) -> str:
        return str(list(self.rows if lanes is None else (self.rows[0], lanes)))


class Body(Scope):
    """Statements of one block.

    Attributes:
        masks: what limits memory accesses to rows and to lanes that exist.
        whole: all lanes of the loop are here at the same time.
        guard: further condition, of loads only, with what it depends on.
        zeros: text of zeros that give an offset the shape of rows, or of lanes.
    """

    def __init__(
        self, pointers: Mapping[Buffer, str], names: Mapping[sympy.Symbol, str], out: Lines, shape: Shape,
        rows: frozenset[sympy.Symbol] = frozenset(), masks: Mapping[str, str] | None = None,
        zeros: Mapping[str, str] | None = None, parent: Body | None = None,
    ) -> None:  # fmt: skip
        super().__init__(pointers, names, out, parent)
        self.shape, self.rows = shape, rows
        self.masks: dict[str, str]
        self.zeros: dict[str, str]
        self.lanes: sympy.Symbol | None = parent.lanes if parent else None
        self.width: int | None = parent.width if parent else None
        self.masks = dict(masks if masks is not None else parent.masks if parent else {})
        self.zeros = dict(zeros if zeros is not None else parent.zeros if parent else {})
        self.whole = False
        self.finished: set[str] = parent.finished if parent else set()
        self.guard: tuple[str, frozenset[str]] | None = parent.guard if parent else None

    def inside(self) -> Body:
        return Body(self.pointers, self.names, self.out, self.shape, self.rows, parent=self)

    # ------------------------------------------------------------ statements

    def statements(self, body: Sequence[Statement]) -> None:
        written: set[Buffer] = set()
        started: list[Start] = []
        for number, statement in enumerate(body):
            if written & self._from_memory(statement):
                self.out.add("tl.debug_barrier()")  # threads read what others of the same program wrote
                written.clear()
            if isinstance(statement, Start):
                self._start(statement)
                started.append(statement)
            elif isinstance(statement, Combine):
                self._combine(statement)
            elif isinstance(statement, Store):
                self._store(statement, body[number + 1 :])
            else:
                self._loop(statement)
                self._finish(started)
                started.clear()
            written |= _written(statement)

    def _from_memory(self, statement: Statement) -> set[Buffer]:
        """Buffers that a statement reads elements of that have no name."""
        if isinstance(statement, Loop):
            return _read(statement)
        known = self.everything_known()
        return {load.buffer for load in _loads(statement) if load not in known}

    def _finish(self, started: Sequence[Start | Combine]) -> None:
        """A maximum of floats with a NaN among them is NaN."""
        for start in started:
            kind = start.dtype if isinstance(start, Start) else start.value.dtype
            if start.op in ("max", "min") and kind in _FLOATS and start.name not in self.finished:
                self.finished.add(start.name)
                self.out.add(f'{start.name} = tl.where({start.name}_nan != 0, float("nan"), {start.name})')

    def _start(self, start: Start) -> None:
        op = start.op.removeprefix("arg")
        kind, shape = REGISTER_TYPES[start.dtype], self.shape.text()
        name = f"{start.name}_best" if start.op != op else start.name
        self.out.add(f"{name} = tl.full({shape}, {neutral(op, start.dtype)}, {kind})")
        if start.op != op:
            self.out.add(f"{start.name} = tl.zeros({shape}, tl.int64)")
        if op in ("max", "min") and start.dtype in _FLOATS:
            self.out.add(f"{start.name}_nan = tl.zeros({shape}, tl.int32)")

    def _combine(self, combine: Combine) -> None:
        if combine.op.startswith("arg"):
            self._combine_position(combine)
            return
        op, name, kind = combine.op, combine.name, combine.value.dtype
        value = self._settled(combine.value, neutral(op, kind))
        floating = kind in _FLOATS
        if op in ("max", "min") and floating:
            value = value if value.isidentifier() else self._keep(value)
            self.out.add(f"{name}_nan |= {self._over_lanes('max', f'({value} != {value}).to(tl.int32)')}")
            value = f"tl.where({value} != {value}, {neutral(op, kind)}, {value})"
        value = self._over_lanes(op, value)
        if op in ("sum", "prod"):
            self.out.add(f"{name} {'+' if op == 'sum' else '*'}= {value}")
        elif op in ("max", "min"):
            self.out.add(f"{name} = tl.{op}imum({name}, {value})")
        else:
            self.out.add(f"{name} = {name} {'|' if op == 'any' else '&'} {value}")
        if self.whole:
            self._finish([combine])

    def _settled(self, value: Value, otherwise: str) -> str:
        """A value with the shape of the loop, where lanes and positions that do not exist are neutral."""
        text = self.expression(value)
        exists = [self.masks[key] for key in (LANES, STOP) if key in self.masks]
        if exists:
            return f"tl.where({' & '.join(exists)}, {text}, {otherwise})"
        return text

    def _over_lanes(self, op: str, text: str) -> str:
        """The value of each row from those of its lanes."""
        if self.lanes is None:
            return text
        spread = f"tl.broadcast_to({text}, {self.shape.text(self.width)})"
        if op == "prod":
            return f"tl.reduce({spread}, 1, library.product_of, keep_dims=True)"
        if op in ("any", "all"):
            joined = f"tl.{'max' if op == 'any' else 'min'}({spread}.to(tl.int32), axis=1, keep_dims=True)"
            return f"({joined} != 0)"
        return f"tl.{op}({spread}, axis=1, keep_dims=True)"

    def _combine_position(self, combine: Combine) -> None:
        """The first NaN wins, as in PyTorch, then the first of equal values."""
        assert combine.position is not None
        name, op, kind = combine.name, combine.op.removeprefix("arg"), combine.value.dtype
        value, position = self.named(combine.value), self.expression(combine.position)
        exists = [self.masks[key] for key in (LANES, STOP) if key in self.masks]
        none = neutral(op, kind)
        value = self._keep(f"tl.where({' & '.join(exists)}, {value}, {none})" if exists else value)
        if self.lanes is not None:
            value = self._keep(f"tl.broadcast_to({value}, {self.shape.text(self.width)})")
            position = self._keep(f"tl.broadcast_to({position}, {self.shape.text(self.width)})")
            wins = "library.first_of_largest" if op == "max" else "library.first_of_smallest"
            wins += "" if kind in _FLOATS else "_integers"
            value, position = self._keep_two(f"{wins}({value}, {position})")
        better = f"({value} {'>' if op == 'max' else '<'} {name}_best)"
        if kind in _FLOATS:
            better = f"({name}_nan == 0) & ({better} | ({value} != {value}))"
        better = self._keep(better)
        self.out.add(f"{name} = tl.where({better}, {position}, {name})")
        self.out.add(f"{name}_best = tl.where({better}, {value}, {name}_best)")
        if kind in _FLOATS:
            self.out.add(f"{name}_nan = tl.where({better} & ({value} != {value}), 1, {name}_nan)")

    def _keep(self, text: str) -> str:
        name = f"v{self.counter[0]}"
        self.counter[0] += 1
        self.out.add(f"{name} = {text}")
        return name

    def _keep_two(self, text: str) -> tuple[str, str]:
        first, second = f"v{self.counter[0]}", f"v{self.counter[0] + 1}"
        self.counter[0] += 2
        self.out.add(f"{first}, {second} = {text}")
        return first, second

    def _store(self, store: Store, following: Sequence[Statement]) -> None:
        needed = self._depends(store.offset)
        wanted = needed | frozenset(self.zeros)  # a value may differ where its place, by extents of 1, does not say so
        offset = self._spread(self._offset(store.offset), needed, wanted)
        again = read_again(store, following)
        value = store.value if again else before_rounding(store.value, f"round.{store.buffer.dtype}")
        text = self.named(value) if again else self.expression(value)
        stored = f"library.to_bf16({text})" if store.buffer.dtype == "bf16" else text
        conditions = [self.expression(store.when)] if store.when is not None else []
        mask = self._mask(wanted, conditions)
        self.out.add(f"tl.store({self.pointers[store.buffer]} + {offset}, {stored}{mask})")
        self.forget(store.buffer)
        if again and store.when is None:
            self.known[Load(store.buffer, store.offset.expr, store.offset.bindings)] = text

    def _offset(self, offset: Index) -> str:
        """An offset in elements, whose gathered parts get names first."""
        for _, inner in offset.bindings:
            self.named(inner)
        return size_text(offset.expr, self.index_names(offset))

    def _loop(self, loop: Loop) -> None:
        axis = loop.axis
        name, extent = self.names[axis.symbol], size_text(axis.extent, self.names)
        stop = None if axis.stop is None else self.named(axis.stop)
        depth = self.out.depth
        if self.shape.lanes and all(isinstance(s, (Combine, Store)) for s in loop.body):
            inner = self._loop_of_lanes(loop, name, extent, stop)
        else:
            until = extent
            if stop is not None:
                assert axis.stop is not None
                most = f"tl.max({stop})" if self._depends(axis.stop) else stop
                until = f"tl.minimum(tl.cast({extent}, tl.int64), {most}).to(tl.int32)"
            self.out.add(f"for {name} in range(0, {until}):")
            self.out.depth += 1
            inner = self.inside()
            if stop is not None:
                inner.masks[STOP] = f"({name} < {stop})"
        inner.statements(loop.body)
        self.out.depth = depth

    def _loop_of_lanes(self, loop: Loop, name: str, extent: str, stop: str | None) -> Body:
        """The loop's iterations as lanes, as many at a time as fit."""
        size = loop.axis.extent
        width = min(next_power(int(size)), self.shape.most) if size.is_Integer else DYNAMIC_LANES
        whole = bool(size.is_Integer and size <= width)
        if not whole:
            first = f"{name}_0"
            self.out.add(f"for {first} in range(0, {extent}, {width}):")
            self.out.depth += 1
            self.out.add(f"{name} = {first} + tl.arange(0, {width})[None, :]")
        else:
            self.out.add(f"{name} = tl.arange(0, {width})[None, :]")
        inner = self.inside()
        inner.lanes, inner.width, inner.whole = loop.axis.symbol, width, whole
        inner.zeros[LANES] = f"0 * {name}"
        if not (size.is_Integer and size > 0 and size % width == 0):
            self.out.add(f"{name}_exists = {name} < {extent}")
            inner.masks[LANES] = f"{name}_exists"
        if stop is not None:
            inner.masks[STOP] = f"({name} < {stop})"
        return inner

    # ------------------------------------------------------------ the language

    def declare(self, name: str, dtype: str, text: str) -> str:
        return f"{name} = {text}"

    def literal(self, value: Literal) -> str:
        return operand_text(value)

    def index(self, value: Index) -> str:
        return index_text(value, self.index_names(value))

    def load(self, value: Load) -> str:
        offset = size_text(value.offset, self.index_names(value))
        needed = self._depends(value)
        conditions = []
        if self.guard is not None:
            condition, of = self.guard
            conditions.append(condition)
            offset = self._spread(offset, needed, needed | of)
            needed = needed | of
        mask = self._mask(needed, conditions)
        text = f"tl.load({self.pointers[value.buffer]} + {offset}{mask}{', other=0' if mask else ''})"
        kind = REGISTER[value.buffer.dtype]
        return text if kind == value.buffer.dtype else f"{text}.to({REGISTER_TYPES[kind]})"

    def operation(self, value: Apply) -> str:
        if value.op == "guard":
            return self._guarded(value)
        return apply_text(value, [self.text(a) for a in value.args])

    def _guarded(self, value: Apply) -> str:
        """What is read only where a condition holds: loads elsewhere are masked."""
        condition, kept, otherwise = value.args
        text = self.named(condition)
        inner = self.inside()
        own = (text, self._depends(condition))
        if self.guard is not None:
            own = (f"({self.guard[0]} & {text})", own[1] | self.guard[1])
        inner.guard = own
        there = inner.expression(kept)
        if isinstance(kept, Literal) and isinstance(otherwise, Literal):
            there = typed(kept)
        return f"tl.where({text}, {there}, {self.text(otherwise)})"

    # ------------------------------------------------------------ shapes

    def _depends(self, value: Value) -> frozenset[str]:
        """Which of rows and lanes a value differs by."""
        found = set()
        if value.symbols & self.rows or any(isinstance(part, Local) for part in walk(value)):
            found.add(ROWS)
        if self.lanes is not None and self.lanes in value.symbols:
            found.add(LANES)
        return frozenset(found)

    def _spread(self, offset: str, have: frozenset[str], needed: frozenset[str]) -> str:
        missing = [self.zeros[key] for key in (ROWS, LANES) if key in needed - have and key in self.zeros]
        return f"({' + '.join([offset, *missing])})" if missing else offset

    def _mask(self, needed: frozenset[str], conditions: Sequence[str]) -> str:
        parts = [self.masks[key] for key in (ROWS, LANES) if key in needed and key in self.masks]
        parts += conditions
        return f", mask={' & '.join(parts)}" if parts else ""


def neutral(op: str, dtype: str) -> str:
    """What a reduction starts with, as text."""
    if op in ("max", "min") and dtype not in _FLOATS:
        bits = 63 if dtype == "i64" else 31
        return str(-(1 << bits) if op == "max" else (1 << bits) - 1)
    return {"sum": "0", "prod": "1", "max": 'float("-inf")', "min": 'float("inf")', "any": "False", "all": "True"}[op]


def next_power(number: int) -> int:
    """The least power of two that is as large."""
    return 1 << max(0, number - 1).bit_length()


def _loads(statement: Start | Combine | Store) -> list[Load]:
    values: list[Value | None] = []
    if isinstance(statement, Store):
        values = [statement.offset, statement.value, statement.when]
    elif isinstance(statement, Combine):
        values = [statement.value]
    return loads(*(v for v in values if v is not None))


def _read(statement: Statement) -> set[Buffer]:
    if isinstance(statement, Loop):
        return set().union(*(_read(inner) for inner in statement.body))
    return {load.buffer for load in _loads(statement)}


def _written(statement: Statement) -> set[Buffer]:
    if isinstance(statement, Loop):
        return set().union(*(_written(inner) for inner in statement.body))
    return {statement.buffer} if isinstance(statement, Store) else set()
