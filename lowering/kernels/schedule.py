"""From values to loops: where reductions go, which axes are split, merged, run in parallel or in lanes.

A kernel is made from items, each a store over axes. The kernel's outer axes are those that its reductions depend
on; inside, reductions become loops in front of the store that needs them, as far out as their indices allow:

    rms_norm over [B, S, 256]   outer (b, s): loop r: sum += x²; loop e: store x · rsqrt(sum / 256 + eps) · w
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import sympy
from torch.utils._sympy.functions import FloorDiv, Mod

from irc.lowering.kernels.buffers import Buffer
from irc.lowering.kernels.indexing import ZERO, Ranges, equal, exchanged, index_symbol
from irc.lowering.kernels.kernel import Axis, Combine, Kernel, Loop, Origin, Start, Statement, Store, statements
from irc.lowering.kernels.values import Index, Load, Local, Reduce, Value, loads, reductions, rewrite, substitute, walk

AxisRange = tuple[sympy.Symbol, sympy.Expr]
MIN_SPLIT = 8
"""Axes are split at divisions by at least this much: shorter inner loops cost more than the division."""
PARALLEL_TILE = 4096
LANE_PIECES = (512, 256, 448, 320, 128, 192, 224, 160, 64, 96, 80, 112, 48, 32)
"""Lengths of the pieces that `_long_lanes` takes, the best first."""


@dataclass(frozen=True)
class Item:
    """A store over axes.

    Attributes:
        axes: (symbol, extent), outermost first; items of one kernel share the symbols of its outer axes.
        offset: where in the buffer, over the axes (and gathered indices).
        when: condition of the store.
        origin: the graph node whose value is stored.
        covers: names of the nodes that were fused into it.
    """

    buffer: Buffer
    axes: tuple[AxisRange, ...]
    offset: Index
    value: Value
    when: Value | None = None
    origins: tuple[Origin, ...] = ()

    @property
    def values(self) -> list[Value]:
        return [v for v in (self.offset, self.value, self.when) if v is not None]

    def reduced_over(self) -> set[sympy.Symbol]:
        """Own axes that some reduction depends on."""
        own = {symbol for symbol, _ in self.axes}
        return {s for r in reductions(*self.values) for s in r.symbols} & own

    def outer_axes(self) -> tuple[AxisRange, ...]:
        """Axes around everything else, when the item is a kernel of its own."""
        needed = self.reduced_over()
        if not needed and not reductions(*self.values):
            return self.axes[:-1]
        return tuple(axis for axis in self.axes if axis[0] in needed)

    def renamed(self, mapping: dict[sympy.Symbol, sympy.Symbol], ranges: Ranges) -> Item:
        """The same store with other symbols for its axes."""
        wanted = {a: b for a, b in mapping.items() if a != b}
        if not wanted:
            return self
        axes = tuple((wanted.get(s, s), extent) for s, extent in self.axes)
        return self.mapped(axes, lambda value: substitute(value, wanted, ranges))

    def mapped(self, axes: tuple[AxisRange, ...], change: Callable[[Value], Value]) -> Item:
        offset = change(self.offset)
        assert isinstance(offset, Index)
        when = None if self.when is None else change(self.when)
        return replace(self, axes=axes, offset=offset, value=change(self.value), when=when)


def build_kernel(name: str, items: Sequence[Item], outer: Sequence[AxisRange], ranges: dict) -> Kernel:
    """One kernel for all items.

    Args:
        outer: axes of every item that enclose the kernel's body.
        ranges: extents of all index symbols; those of new axes are added.
    """
    items, outer = list(items), list(outer)
    for _ in range(4):
        items, outer, split = _split_axes(items, outer, ranges)
        if not split:
            break
    items, outer = _merge_axes(items, outer, ranges)
    items, outer = _long_lanes(items, outer, ranges)
    # A lone elementwise store: its one remaining axis is both parallel and vector.
    flat = [i.axes for i in items] if not outer else []
    if len(items) == 1 and flat and len(flat[0]) == 1 and not reductions(*items[0].values):
        block = _Block(None, {flat[0][0][0]})
        block.statements.append(Store(items[0].buffer, items[0].offset, items[0].value, items[0].when))
        axis = Axis(*flat[0][0], kind="vector", tile=PARALLEL_TILE)
        return Kernel(name, (axis,), tuple(block.statements), _origins(items))
    block = _Block(None, {symbol for symbol, _ in outer})
    for item in items:
        _emit(item, block, outer)
    axes = tuple(Axis(symbol, extent, kind="parallel") for symbol, extent in outer)
    return Kernel(name, axes, tuple(block.statements), _origins(items))


def build_epilogue(name: str, item: Item, columns: Sequence[AxisRange], ranges: dict) -> Kernel:
    """The kernel that a template runs on its result: rows are the outer axes, columns the loops."""
    outer = [axis for axis in item.axes if axis not in columns]
    items, outer = _merge_axes([replace(item, axes=(*outer, *columns))], outer, ranges)
    block = _Block(None, {symbol for symbol, _ in outer})
    _emit(items[0], block, outer)
    axes = tuple(Axis(symbol, extent, kind="parallel") for symbol, extent in outer)
    return Kernel(name, axes, tuple(block.statements), _origins(items))


def _origins(items: Sequence[Item]) -> tuple[Origin, ...]:
    return tuple(dict.fromkeys(origin for item in items for origin in item.origins))


# ---------------------------------------------------------------- statements


@dataclass
class _Block:
    """Statements under construction at one depth of loops."""

    parent: _Block | None
    bound: set[sympy.Symbol]
    statements: list[Statement] = field(default_factory=list)
    placed: dict[Value, Local] = field(default_factory=dict)
    counter: list[int] = field(default_factory=lambda: [0])

    def inside(self, symbols: set[sympy.Symbol]) -> _Block:
        return _Block(self, self.bound | symbols, counter=self.counter)

    def chain(self) -> list[_Block]:
        """This block and those around it, the outermost first."""
        return [*(self.parent.chain() if self.parent else []), self]

    def lower(self, value: Value) -> Value:
        """The value with every reduction replaced by its result; their loops are added where they belong."""
        return rewrite(value, self._reduced)

    def _reduced(self, value: Value) -> Value | None:
        if not isinstance(value, Reduce):
            return None
        axis_symbols = _all_axes(self)
        block = next(b for b in self.chain() if value.symbols & axis_symbols <= b.bound)
        known = block.placed.get(value)
        if known is None:
            known = block.placed[value] = block.add_reduction(value)
        return known

    def add_reduction(self, value: Reduce) -> Local:
        name = f"{value.op}{self.counter[0]}"
        self.counter[0] += 1
        stop = None if value.stop is None else self.lower(value.stop)
        inner = self.inside({symbol for symbol, _ in value.axes})
        body = inner.lower(value.body)
        position = _position(value) if value.op.startswith("arg") else None
        inner.statements.append(Combine(name, value.op, body, position))
        nested: tuple[Statement, ...] = tuple(inner.statements)
        innermost = len(value.axes) - 1
        for i, (symbol, extent) in reversed(list(enumerate(value.axes))):
            simple = i == innermost and len(nested) == 1 and not value.op.startswith("arg")
            kind = "vector" if simple and _contiguous(body, symbol) else "serial"
            nested = (Loop(Axis(symbol, extent, kind=kind, stop=stop if i == 0 else None), nested),)
        self.statements.append(Start(name, value.op, body.dtype))
        self.statements.extend(nested)
        return Local(name, value.dtype)


def _all_axes(block: _Block) -> set[sympy.Symbol]:
    """Symbols that some block around binds: all others are sizes or gathered."""
    return set().union(*(b.bound for b in block.chain()))


def _position(value: Reduce) -> Value:
    flat: sympy.Expr = sympy.Integer(0)
    for symbol, extent in value.axes:
        flat = flat * extent + symbol
    return Index(sympy.expand(flat))


def _contiguous(value: Value, symbol: sympy.Symbol) -> bool:
    """True where every load moves by at most one element when the symbol does."""
    for part in walk(value):
        if isinstance(part, Load) and symbol in part.symbols:
            if any(symbol in inner.symbols for _, inner in part.bindings):
                return False
            step = part.offset.coeff(symbol, 1)
            if step != 1 or symbol in (part.offset - symbol).free_symbols:
                return False
    return True


def _emit(item: Item, block: _Block, outer: Sequence[AxisRange]) -> None:
    """Add an item's loops and its store to the kernel's body."""
    enclosed = {symbol for symbol, _ in outer}
    inner_axes = [axis for axis in item.axes if axis[0] not in enclosed]
    before = len(block.statements)
    inner = block.inside({symbol for symbol, _ in inner_axes})
    store = Store(
        item.buffer, inner.lower(item.offset), inner.lower(item.value),
        None if item.when is None else inner.lower(item.when),
    )  # fmt: skip
    inner.statements.append(store)
    body: tuple[Statement, ...] = tuple(inner.statements)
    if not inner_axes:
        block.statements.extend(body)
        return
    previous = block.statements[-1] if block.statements else None
    alone = len(block.statements) == before and len(body) == 1
    if alone and _same_loop(previous, inner_axes) and _reads_its_place(store, previous):
        block.statements[-1] = _joined(previous, inner_axes, body, len(inner_axes))
        return
    innermost = len(inner_axes) - 1
    for i, (symbol, extent) in reversed(list(enumerate(inner_axes))):
        kind = "vector" if i == innermost and len(body) == 1 else "serial"
        body = (Loop(Axis(symbol, extent, kind=kind), body),)
    block.statements.extend(body)


def _same_loop(statement: Statement | None, axes: Sequence[AxisRange]) -> bool:
    """Whether a statement is a nest of store loops over these very axes."""
    for symbol, extent in axes:
        if not isinstance(statement, Loop) or statement.axis.symbol != symbol or statement.axis.extent != extent:
            return False
        only = statement.body
        statement = only[0]
    return isinstance(statement, Store)


def _reads_its_place(store: Store, loop: Statement) -> bool:
    """Whether a store reads of what the loop's stores wrote nothing but its own element: others may come later."""
    values = [v for v in (store.offset, store.value, store.when) if v is not None]
    written = {s.buffer: s.offset for s in statements((loop,)) if isinstance(s, Store)}
    return all(
        load.offset == written[load.buffer].expr and load.bindings == written[load.buffer].bindings
        for load in loads(*values) if load.buffer in written
    )  # fmt: skip


def _joined(loop: Loop, axes: Sequence[AxisRange], body: tuple[Statement, ...], depth: int) -> Loop:
    if depth == 1:
        return replace(loop, body=(*loop.body, *body))
    inner = loop.body[0]
    assert isinstance(inner, Loop)
    return replace(loop, body=(_joined(inner, axes, body, depth - 1),))


# ---------------------------------------------------------------- axes


def _expressions(items: Sequence[Item]) -> list[sympy.Expr]:
    """Every index expression and reduction bound in the items."""
    found: list[sympy.Expr] = []
    for part in walk(*(value for item in items for value in item.values)):
        if isinstance(part, Load):
            found.append(part.offset)
        elif isinstance(part, Index):
            found.append(part.expr)
        elif isinstance(part, Reduce):
            found.extend(extent for _, extent in part.axes)
    return list(dict.fromkeys(found))


def _all_symbols(items: Sequence[Item]) -> dict[sympy.Symbol, sympy.Expr]:
    return {symbol: extent for item in items for symbol, extent in item.axes}


def _split_axes(
    items: list[Item], outer: list[AxisRange], ranges: dict[sympy.Symbol, sympy.Expr]
) -> tuple[list[Item], list[AxisRange], bool]:
    """x → x_hi · k + x_lo wherever some index divides the axis x by k."""
    axes = _all_symbols(items)
    divisors: dict[sympy.Symbol, int] = {}
    for expr in _expressions(items):
        for part in expr.atoms(FloorDiv, Mod):
            x, k = part.args
            if x in axes and k.is_Integer and k >= MIN_SPLIT and axes[x].is_Integer and axes[x] % k == 0:
                divisors[x] = max(int(k), divisors.get(x, 0))
    if not divisors:
        return items, outer, False
    pieces: dict[sympy.Symbol, tuple[AxisRange, AxisRange]] = {}
    for x, k in divisors.items():
        high, low = index_symbol(f"{x}_o"), index_symbol(f"{x}_i")
        ranges[high], ranges[low] = axes[x] / k, sympy.Integer(k)
        pieces[x] = ((high, ranges[high]), (low, ranges[low]))
    mapping = {x: high * k + low for x, k in divisors.items() for (high, _), (low, _) in [pieces[x]]}

    def cut(given: Sequence[AxisRange]) -> list[AxisRange]:
        return [piece for axis in given for piece in (pieces.get(axis[0], (axis,)))]

    changed = [i.mapped(tuple(cut(i.axes)), lambda v: substitute(v, mapping, ranges)) for i in items]
    return changed, cut(outer), True


def _long_lanes(
    items: list[Item], outer: list[AxisRange], ranges: dict[sympy.Symbol, sympy.Expr]
) -> tuple[list[Item], list[AxisRange]]:
    """A lone elementwise store whose last axis has a few elements: a piece of the axis before it goes inside.

    So an image whose three channels lie apart is quantized pixel by pixel in lanes. Lanes read what lies together.
    """
    if len(items) != 1 or len(outer) < 1 or len(items[0].axes) != len(outer) + 1 or reductions(*items[0].values):
        return items, outer
    item = items[0]
    (x, long), (_, short) = outer[-1], item.axes[-1]
    if not (short.is_Integer and short < MIN_SPLIT and long.is_Integer) or item.axes[:-1] != tuple(outer):
        return items, outer
    if item.when is not None or _contiguous(item.value, item.axes[-1][0]) or not _contiguous(item.value, x):
        return items, outer
    size = next((n for n in LANE_PIECES if long % n == 0 and long > n), None)
    if size is None:
        return items, outer
    high, low = index_symbol(f"{x}_o"), index_symbol(f"{x}_i")
    ranges[high], ranges[low] = long / size, sympy.Integer(size)
    above = [*outer[:-1], (high, ranges[high])]
    axes = (*above, item.axes[-1], (low, ranges[low]))
    return [item.mapped(axes, lambda value: substitute(value, {x: high * size + low}, ranges))], above


def _merge_axes(
    items: list[Item], outer: list[AxisRange], ranges: dict[sympy.Symbol, sympy.Expr]
) -> tuple[list[Item], list[AxisRange]]:
    """Neighbouring axes that all indices walk as if they were one become one."""
    enclosed = len(outer)
    position = 0
    while True:
        merged = False
        nests = [outer] if position == 0 and outer else []
        nests += [[a for a in item.axes if a not in outer] for item in items]
        for nest in nests:
            for first, second in itertools.pairwise(nest):
                users = [i for i in items if first in i.axes or second in i.axes]
                if all(_adjacent(i, first, second) for i in users) and _walked_as_one(users, first, second):
                    items, outer = _merge(items, outer, first, second, ranges)
                    merged = True
                    break
            if merged:
                break
        if not merged:
            break
    assert len(outer) <= enclosed
    return items, outer


def _adjacent(item: Item, first: AxisRange, second: AxisRange) -> bool:
    return any(pair == (first, second) for pair in zip(item.axes, item.axes[1:], strict=False))


def _walked_as_one(items: Sequence[Item], first: AxisRange, second: AxisRange) -> bool:
    (a, _), (b, size) = first, second
    for expr in _expressions(items):
        if a not in expr.free_symbols and b not in expr.free_symbols:
            continue
        joined = exchanged(exchanged(expr, frozenset([(a, ZERO)])), frozenset([(b, a * size + b)]))
        if not equal(joined, expr):
            return False
    return True


def _merge(
    items: list[Item], outer: list[AxisRange], first: AxisRange, second: AxisRange, ranges: dict
) -> tuple[list[Item], list[AxisRange]]:
    (a, rows), (b, size) = first, second
    symbol = index_symbol(f"{a}{b}" if len(str(a)) + len(str(b)) < 12 else f"m_{a}_{b}")
    ranges[symbol] = sympy.expand(rows * size)
    one = (symbol, ranges[symbol])

    def joined(axes: Sequence[AxisRange]) -> list[AxisRange]:
        return [one if axis == second else axis for axis in axes if axis != first]

    mapping = {a: sympy.Integer(0), b: symbol}
    changed = [
        i.mapped(tuple(joined(i.axes)), lambda v: substitute(v, mapping, ranges)) if first in i.axes else i
        for i in items
    ]
    return changed, joined(outer)
