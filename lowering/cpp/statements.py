"""Statements and values of a kernel as C++."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import sympy

from irc.lowering.cpp.expressions import REGISTER_TYPES, STORAGE_TYPES, apply_text, bare, literal_text, size_text
from irc.lowering.kernels.buffers import Buffer
from irc.lowering.kernels.kernel import Combine, Loop, Start, Statement, Store
from irc.lowering.kernels.values import Apply, Index, Literal, Load, Local, Value, loads

_OPERATORS = {"sum": "+", "prod": "*", "max": "max", "min": "min", "any": "||", "all": "&&"}


class Lines:
    """Text under construction, with indentation."""

    def __init__(self, depth: int) -> None:
        self.depth = depth
        self._lines: list[str] = []

    def add(self, line: str, *, indent: bool = True) -> None:
        self._lines.append(("    " * self.depth if indent else "") + line)

    def text(self) -> str:
        return "".join(f"{line}\n" for line in self._lines)


class Body:
    """Statements of one block, with the values that have a name there."""

    def __init__(
        self, pointers: Mapping[Buffer, str], names: Mapping[sympy.Symbol, str], out: Lines,
        parent: Body | None = None,
    ) -> None:  # fmt: skip
        self.pointers, self.out, self.parent = pointers, out, parent
        self.known: dict[Value, str] = {}
        self.names: dict[sympy.Symbol, str] = dict(names)
        self.counter: list[int] = parent.counter if parent else [0]

    def statements(self, body: Sequence[Statement]) -> None:
        for number, statement in enumerate(body):
            if isinstance(statement, Start):
                self._start(statement)
            elif isinstance(statement, Combine):
                self._combine(statement)
            elif isinstance(statement, Store):
                self._store(statement, body[number + 1 :])
            else:
                self._loop(statement)

    # ------------------------------------------------------------ statements

    def _start(self, start: Start) -> None:
        kind = REGISTER_TYPES[start.dtype]
        floating = start.dtype in ("f32", "f64")
        limits = f"std::numeric_limits<{kind}>::"
        largest = limits + ("infinity()" if floating else "max()")
        lowest = f"-{limits}infinity()" if floating else limits + "lowest()"
        op = start.op.removeprefix("arg")
        first = {"sum": "0", "prod": "1", "max": lowest, "min": largest, "any": "false", "all": "true"}[op]
        self.out.add(f"{kind} {start.name}{'_best' if start.op != op else ''} = {first};")
        if start.op != op:
            self.out.add(f"int64_t {start.name} = 0;")
        if op in ("max", "min") and floating:
            self.out.add(f"bool {start.name}_nan = false;")

    def _combine(self, combine: Combine) -> None:
        name, op = combine.name, combine.op
        value = self._named(combine.value)
        floating = combine.value.dtype in ("f32", "f64")
        if op.startswith("arg"):
            assert combine.position is not None
            sign = ">" if op == "argmax" else "<"
            nan = f" || ({value} != {value} && !{name}_nan)" if floating else ""
            blocked = f"!{name}_nan && " if floating else ""
            # The first NaN wins, as in PyTorch.
            self.out.add(f"if ({blocked}({value} {sign} {name}_best{nan})) {{")
            self.out.add(f"    {name}_best = {value};")
            self.out.add(f"    {name} = {self.expression(combine.position)};")
            if floating:
                self.out.add(f"    {name}_nan = {value} != {value};")
            self.out.add("}")
        elif op in ("max", "min"):
            self.out.add(f"{name} = {value} {'>' if op == 'max' else '<'} {name} ? {value} : {name};")
            if floating:
                self.out.add(f"{name}_nan |= {value} != {value};")
        elif op in ("any", "all"):
            self.out.add(f"{name} = {name} {_OPERATORS[op]} {value};")
        else:
            self.out.add(f"{name} {_OPERATORS[op]}= {value};")

    def _store(self, store: Store, following: Sequence[Statement]) -> None:
        offset = self.expression(store.offset)
        storage = STORAGE_TYPES[store.buffer.dtype]
        value = store.value
        rounding = f"round.{store.buffer.dtype}"
        again = any(load.buffer is store.buffer and load.offset == store.offset.expr
                    for load in _loads_in(following))  # fmt: skip
        if not again:
            value = _before_rounding(value, rounding)  # the store rounds
        text = self.expression(value)
        if again and not bare(value):
            text = self._name(value, text)
        plain = REGISTER_TYPES.get(store.buffer.dtype) == REGISTER_TYPES[value.dtype]
        stored = text if plain else f"irc::scalar::put<{storage}>({text})"
        target = f"{self.pointers[store.buffer]}[{offset}]"
        condition = "" if store.when is None else f"if ({self.expression(store.when)}) "
        self.out.add(f"{condition}{target} = {stored};")
        self._forget(store.buffer)
        if again and store.when is None:
            load = Load(store.buffer, store.offset.expr, store.offset.bindings)
            self.known[load] = text

    def _forget(self, buffer: Buffer) -> None:
        """Values read from a buffer that was written are no longer known."""
        block: Body | None = self
        while block is not None:
            for value in [v for v in block.known if any(load.buffer is buffer for load in loads(v))]:
                del block.known[value]
            block = block.parent

    def _loop(self, loop: Loop) -> None:
        axis = loop.axis
        name, stop = self.names[axis.symbol], size_text(axis.extent, self.names)
        if axis.stop is not None:
            stop = self._name(axis.stop, f"irc::min_of({stop}, {self.expression(axis.stop)})", remember=False)
        checks = self._extrema(loop) if axis.kind == "vector" else []
        if axis.kind == "vector":
            self.out.add(f"#pragma omp simd{self._clauses(loop)}", indent=False)
        self.out.add(f"for (int64_t {name} = 0; {name} < {stop}; ++{name}) {{")
        self.out.depth += 1
        Body(self.pointers, self.names, self.out, self).statements(loop.body)
        self.out.depth -= 1
        self.out.add("}")
        for combine in [*checks, *([] if checks else self._extrema(loop))]:
            kind = REGISTER_TYPES[combine.value.dtype]
            self.out.add(f"if ({combine.name}_nan) {combine.name} = std::numeric_limits<{kind}>::quiet_NaN();")

    def _extrema(self, loop: Loop) -> list[Combine]:
        """Float maxima and minima that this loop, as the outermost of the reduction, finishes."""
        found = []
        body: Sequence[Statement] = loop.body
        while body:
            found += [s for s in body if isinstance(s, Combine) and s.op in ("max", "min")]
            body = [s for inner in body if isinstance(inner, Loop) for s in inner.body]
        started = {s.name for s in self._started(loop.body)}
        return [c for c in found if c.value.dtype in ("f32", "f64") and c.name not in started]

    def _started(self, body: Sequence[Statement]) -> list[Start]:
        found = [s for s in body if isinstance(s, Start)]
        for inner in body:
            if isinstance(inner, Loop):
                found += self._started(inner.body)
        return found

    def _clauses(self, loop: Loop) -> str:
        """Reduction clauses of a vector loop."""
        text = ""
        for statement in loop.body:
            if isinstance(statement, Combine):
                text += f" reduction({_OPERATORS[statement.op]}:{statement.name})"
                if statement.op in ("max", "min") and statement.value.dtype in ("f32", "f64"):
                    text += f" reduction(|:{statement.name}_nan)"
        return text

    # ------------------------------------------------------------ expressions

    def expression(self, value: Value) -> str:
        """The value as C++; parts that are used twice get names first."""
        for part in self._shared(value):
            if part not in self._everything_known():
                self._name(part, self._text(part))
        return self._text(value)

    def _named(self, value: Value) -> str:
        """A name or number for a value."""
        text = self.expression(value)
        return text if bare(value) or value in self._everything_known() else self._name(value, text)

    def name(self, value: Value) -> None:
        """Gives a value a name here, which inner blocks use."""
        self._name(value, self._text(value))

    def _name(self, value: Value, text: str, *, remember: bool = True) -> str:
        name = f"v{self.counter[0]}"
        self.counter[0] += 1
        self.out.add(f"const {REGISTER_TYPES[value.dtype]} {name} = {text};")
        if remember:
            self.known[value] = name
        return name

    def _everything_known(self) -> dict[Value, str]:
        merged = dict(self.parent._everything_known()) if self.parent else {}
        merged.update(self.known)
        return merged

    def _shared(self, value: Value) -> list[Value]:
        """Parts that are needed for certain and more than once, operands first."""
        known = self._everything_known()
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

    def _text(self, value: Value) -> str:
        known = self._everything_known().get(value)
        if known is not None:
            return known
        if isinstance(value, Literal):
            return literal_text(value)
        if isinstance(value, Local):
            return value.name
        if isinstance(value, Index):
            return f"int64_t({size_text(value.expr, self._index_names(value))})"
        if isinstance(value, Load):
            offset = size_text(value.offset, self._index_names(value))
            text = f"{self.pointers[value.buffer]}[{offset}]"
            return text if REGISTER_TYPES.get(value.buffer.dtype) else f"irc::scalar::get({text})"
        assert isinstance(value, Apply)
        return apply_text(value, [self._text(a) for a in value.args])

    def _index_names(self, value: Load | Index) -> dict[sympy.Symbol, str]:
        return {**self.names, **{symbol: self._text(inner) for symbol, inner in value.bindings}}


def _loads_in(body: Sequence[Statement]) -> list[Load]:
    found: list[Value] = []
    for statement in body:
        if isinstance(statement, Store):
            found += [v for v in (statement.offset, statement.value, statement.when) if v is not None]
        elif isinstance(statement, Combine):
            found.append(statement.value)
    return loads(*found)


def _before_rounding(value: Value, rounding: str) -> Value:
    """A value that rounds to the same: rounding is monotonic, so the larger of two may be found before it."""
    if isinstance(value, Apply) and value.op == rounding:
        return value.args[0]
    if isinstance(value, Apply) and value.op in ("maximum", "minimum"):
        args = [_before_rounding(arg, rounding) for arg in value.args]
        if all(new is not old or _rounds_to_itself(old) for new, old in zip(args, value.args, strict=True)):
            return Apply(value.op, tuple(args), value.dtype)
    return value


def _rounds_to_itself(value: Value) -> bool:
    """Whole numbers that every type of halves holds."""
    return isinstance(value, Literal) and value.dtype == "f32" and value.value == int(value.value) in range(-256, 257)
