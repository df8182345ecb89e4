"""What printers of kernels share: text under construction, and which values have a name where."""

from __future__ import annotations

import abc
from collections import Counter
from collections.abc import Mapping, Sequence

import sympy

from irc.lowering.kernels.buffers import Buffer
from irc.lowering.kernels.kernel import Combine, Statement, Store
from irc.lowering.kernels.values import Apply, Index, Literal, Load, Local, Value, loads


class Lines:
    """Text under construction, with indentation."""

    def __init__(self, depth: int) -> None:
        self.depth = depth
        self._lines: list[str] = []

    def add(self, line: str, *, indent: bool = True) -> None:
        self._lines.append(("    " * self.depth if indent else "") + line)

    def text(self) -> str:
        return "".join(f"{line}\n" for line in self._lines)


class Scope(abc.ABC):
    """A block of printed statements, with the values that have a name there. A language says how each part reads.

    Attributes:
        pointers: buffer → its name.
        names: index symbol → its name.
        known: value → its name in this block.
    """

    def __init__(
        self, pointers: Mapping[Buffer, str], names: Mapping[sympy.Symbol, str], out: Lines,
        parent: Scope | None = None,
    ) -> None:  # fmt: skip
        self.pointers, self.out, self.parent = pointers, out, parent
        self.known: dict[Value, str] = {}
        self.names: dict[sympy.Symbol, str] = dict(names)
        self.counter: list[int] = parent.counter if parent else [0]

    # ------------------------------------------------------------ the language

    @abc.abstractmethod
    def declare(self, name: str, dtype: str, text: str) -> str:
        """The statement that names a value of a register type."""

    @abc.abstractmethod
    def literal(self, value: Literal) -> str: ...

    @abc.abstractmethod
    def index(self, value: Index) -> str: ...

    @abc.abstractmethod
    def load(self, value: Load) -> str: ...

    @abc.abstractmethod
    def operation(self, value: Apply) -> str: ...

    # ------------------------------------------------------------ values

    def expression(self, value: Value) -> str:
        """The value as text; parts that are used twice get names first."""
        for part in self._shared(value):
            if part not in self.everything_known():
                self.bind(part, self.text(part))
        return self.text(value)

    def named(self, value: Value) -> str:
        """A name or number for a value."""
        text = self.expression(value)
        return text if bare(value) or value in self.everything_known() else self.bind(value, text)

    def name(self, value: Value) -> None:
        """Gives a value a name here, which inner blocks use."""
        self.bind(value, self.text(value))

    def bind(self, value: Value, text: str, *, remember: bool = True) -> str:
        """A name for the text of a value."""
        name = f"v{self.counter[0]}"
        self.counter[0] += 1
        self.out.add(self.declare(name, value.dtype, text))
        if remember:
            self.known[value] = name
        return name

    def everything_known(self) -> dict[Value, str]:
        merged = dict(self.parent.everything_known()) if self.parent else {}
        merged.update(self.known)
        return merged

    def forget(self, buffer: Buffer) -> None:
        """Values read from a buffer that was written are no longer known."""
        block: Scope | None = self
        while block is not None:
            for value in [v for v in block.known if any(load.buffer is buffer for load in loads(v))]:
                del block.known[value]
            block = block.parent

    def text(self, value: Value) -> str:
        """A value by its name, or written out."""
        known = self.everything_known().get(value)
        if known is not None:
            return known
        if isinstance(value, Literal):
            return self.literal(value)
        if isinstance(value, Local):
            return value.name
        if isinstance(value, Index):
            return self.index(value)
        if isinstance(value, Load):
            return self.load(value)
        assert isinstance(value, Apply)
        return self.operation(value)

    def index_names(self, value: Load | Index) -> dict[sympy.Symbol, str]:
        """Names of the symbols in an index, those that are read from memory included."""
        return {**self.names, **{symbol: self.text(inner) for symbol, inner in value.bindings}}

    def _shared(self, value: Value) -> list[Value]:
        """Parts that are needed for certain and more than once, operands first."""
        known = self.everything_known()
        counts: Counter[Value] = Counter()
        order: list[Value] = []

        def visit(part: Value) -> None:
            counts[part] += 1
            if counts[part] > 1 or part in known:
                return
            for operand in part.args[:1] if isinstance(part, Apply) and part.op == "guard" else part.operands():
                visit(operand)
            order.append(part)

        visit(value)
        gathered = {inner for part in order if isinstance(part, (Load, Index)) for _, inner in part.bindings}
        return [p for p in order if (counts[p] > 1 or p in gathered) and not bare(p) and p is not value]


def bare(value: Value) -> bool:
    """Values that are names or numbers already."""
    return isinstance(value, (Literal, Local)) or (isinstance(value, Index) and value.expr.is_Symbol)


def read_again(store: Store, following: Sequence[Statement]) -> bool:
    """Whether a statement behind a store reads the element that was stored."""
    return any(load.buffer is store.buffer and load.offset == store.offset.expr for load in _loads_in(following))


def _loads_in(body: Sequence[Statement]) -> list[Load]:
    found: list[Value] = []
    for statement in body:
        if isinstance(statement, Store):
            found += [v for v in (statement.offset, statement.value, statement.when) if v is not None]
        elif isinstance(statement, Combine):
            found.append(statement.value)
    return loads(*found)


def before_rounding(value: Value, rounding: str) -> Value:
    """A value that rounds to the same: rounding is monotonic, so the larger of two may be found before it."""
    if isinstance(value, Apply) and value.op == rounding:
        return value.args[0]
    if isinstance(value, Apply) and value.op in ("maximum", "minimum"):
        args = [before_rounding(arg, rounding) for arg in value.args]
        if all(new is not old or _rounds_to_itself(old) for new, old in zip(args, value.args, strict=True)):
            return Apply(value.op, tuple(args), value.dtype)
    return value


def _rounds_to_itself(value: Value) -> bool:
    """Whole numbers that every type of halves holds."""
    return isinstance(value, Literal) and value.dtype == "f32" and value.value == int(value.value) in range(-256, 257)
