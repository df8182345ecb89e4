"""Statements and values of a kernel as C++."""

from __future__ import annotations

from collections.abc import Sequence

from irc.lowering.cpp.expressions import REGISTER_TYPES, STORAGE_TYPES, apply_text, literal_text, size_text
from irc.lowering.kernels.kernel import Combine, Loop, Start, Statement, Store
from irc.lowering.kernels.printing import Scope, bare, before_rounding, read_again
from irc.lowering.kernels.values import Apply, Index, Literal, Load

_OPERATORS = {"sum": "+", "prod": "*", "max": "max", "min": "min", "any": "||", "all": "&&"}


class Body(Scope):
    """Statements of one block."""

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
        value = self.named(combine.value)
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
        again = read_again(store, following)
        if not again:
            value = before_rounding(value, rounding)  # the store rounds
        text = self.expression(value)
        if again and not bare(value):
            text = self.bind(value, text)
        plain = REGISTER_TYPES.get(store.buffer.dtype) == REGISTER_TYPES[value.dtype]
        stored = text if plain else f"irc::scalar::put<{storage}>({text})"
        target = f"{self.pointers[store.buffer]}[{offset}]"
        condition = "" if store.when is None else f"if ({self.expression(store.when)}) "
        self.out.add(f"{condition}{target} = {stored};")
        self.forget(store.buffer)
        if again and store.when is None:
            load = Load(store.buffer, store.offset.expr, store.offset.bindings)
            self.known[load] = text

    def _loop(self, loop: Loop) -> None:
        axis = loop.axis
        name, stop = self.names[axis.symbol], size_text(axis.extent, self.names)
        if axis.stop is not None:
            stop = self.bind(axis.stop, f"irc::min_of({stop}, {self.expression(axis.stop)})", remember=False)
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

    # ------------------------------------------------------------ the language

    def declare(self, name: str, dtype: str, text: str) -> str:
        return f"const {REGISTER_TYPES[dtype]} {name} = {text};"

    def literal(self, value: Literal) -> str:
        return literal_text(value)

    def index(self, value: Index) -> str:
        return f"int64_t({size_text(value.expr, self.index_names(value))})"

    def load(self, value: Load) -> str:
        text = f"{self.pointers[value.buffer]}[{size_text(value.offset, self.index_names(value))}]"
        return text if REGISTER_TYPES.get(value.buffer.dtype) else f"irc::scalar::get({text})"

    def operation(self, value: Apply) -> str:
        return apply_text(value, [self.text(a) for a in value.args])
