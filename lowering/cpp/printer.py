"""Kernels as C++ functions that every worker of a pool runs (SPMD), sharing the outer loop among them.

    void k(irc::Worker& worker, float* out0, const float* in0, int64_t B, int64_t S)

Names are positional, so that kernels that do the same for other layers come out as the same text; the program
prints such text once and calls it often.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import sympy

from irc.lowering.cpp.expressions import (
    REGISTER_TYPES,
    STORAGE_TYPES,
    apply_text,
    bare,
    literal_text,
    size_text,
)
from irc.lowering.kernels.buffers import Buffer
from irc.lowering.kernels.kernel import Axis, Combine, Kernel, Loop, Start, Statement, Store, axes_of, values_of
from irc.lowering.kernels.sites import Memory
from irc.lowering.kernels.values import Apply, Index, Literal, Load, Local, Value, loads, walk

WORK_A_CHUNK = 16384
"""Elements that a worker takes at a time at least: below, sharing costs more than it gains."""
_OPERATORS = {"sum": "+", "prod": "*", "max": "max", "min": "min", "any": "||", "all": "&&"}


@dataclass(frozen=True)
class PrintedFunction:
    """A function that all workers call.

    Attributes:
        name: readable; the program makes it unique.
        comment: lines above it.
        parameters: declarations after the worker, without the sizes.
        body: text between the braces.
        arguments: for each parameter its buffer, memory, or C++ text.
        sizes: named dimensions that follow as parameters.
        includes: headers that it needs.
        scratch: C++ expression of the bytes that it needs beside its operands; empty: none.
    """

    name: str
    comment: tuple[str, ...]
    parameters: tuple[str, ...]
    body: str
    arguments: tuple[Buffer | Memory | str, ...]
    sizes: tuple[sympy.Symbol, ...]
    includes: tuple[str, ...] = ()
    scratch: str = ""

    @property
    def key(self) -> str:
        """Equal for functions that do the same."""
        return f"{self.parameters}{self.sizes}{self.body}"

    def text(self, name: str) -> str:
        """The whole function under a name."""
        comment = "".join(f"// {line}\n" for line in self.comment)
        parameters = [*self.parameters, *(f"int64_t {size.name}" for size in self.sizes)]
        return f"{comment}void {name}(irc::Worker& worker, {', '.join(parameters)}) {{\n{self.body}}}\n"

    def call(self, name: str, arguments: Sequence[str]) -> str:
        return f"{name}(worker, {', '.join((*arguments, *(size.name for size in self.sizes)))});"


@dataclass(frozen=True)
class PrintedEpilogue:
    """What a template does with its result, as a C++ lambda `(int64_t m, int64_t n0, int64_t n1, const float* values)`.

    Attributes:
        text: the lambda.
        parameters, arguments, sizes: what it uses, as of `PrintedFunction`.
    """

    text: str
    parameters: tuple[str, ...]
    arguments: tuple[Buffer, ...]
    sizes: tuple[sympy.Symbol, ...]


def print_kernel(kernel: Kernel) -> PrintedFunction:
    """Print a kernel."""
    return _Printer(kernel).printed()


def print_epilogue(kernel: Kernel) -> PrintedEpilogue:
    """Print the kernel of a template's epilogue."""
    return _Printer(kernel).epilogue()


def pointer_declarations(written: Sequence[Buffer], read: Sequence[Buffer]) -> tuple[dict[Buffer, str], list[str]]:
    """Names and declarations of pointer parameters: what is written first."""
    names: dict[Buffer, str] = {}
    declared = []
    for i, buffer in enumerate(written):
        names[buffer] = f"out{i}"
        declared.append(f"{STORAGE_TYPES[buffer.dtype]}* out{i}")
    for i, buffer in enumerate(b for b in read if b not in names):
        names[buffer] = f"in{i}"
        declared.append(f"const {STORAGE_TYPES[buffer.dtype]}* in{i}")
    return names, declared


class _Printer:
    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.pointers, self.declared = pointer_declarations(kernel.writes, kernel.reads)
        self.names: dict[sympy.Symbol, str] = {}
        for i, axis in enumerate(kernel.outer):
            self.names[axis.symbol] = f"i{i}"
        inner = [a for a in axes_of(kernel) if a.symbol not in self.names]
        for i, symbol in enumerate(dict.fromkeys(a.symbol for a in inner)):
            self.names[symbol] = f"j{i}"

    def printed(self) -> PrintedFunction:
        comment = tuple(str(origin) for origin in self.kernel.origins)
        return PrintedFunction(
            self.kernel.name, comment, tuple(self.declared), self._body(), tuple(self.pointers), self._sizes()
        )

    def _sizes(self) -> tuple[sympy.Symbol, ...]:
        return tuple(s for s in self.kernel.sizes if s not in self.names)

    def epilogue(self) -> PrintedEpilogue:
        kernel, out = self.kernel, _Lines(2)
        if len(kernel.outer) == 1:
            self.names[kernel.outer[0].symbol] = "m"
        elif kernel.outer:
            self._decompose(out, "m")
        body, columns = kernel.body, []
        while len(body) == 1 and isinstance(body[0], Loop):
            columns.append(body[0].axis)
            body = body[0].body
        out.add("#pragma omp simd", indent=False)
        out.add("for (int64_t n = n0; n < n1; ++n) {")
        out.depth += 1
        self._columns(columns, out)
        out.add("const float acc = values[n - n0];")
        _Body(self, out).statements(body)
        out.depth -= 1
        out.add("}")
        head = "[&]([[maybe_unused]] int64_t m, int64_t n0, int64_t n1, const float* values) {\n"
        return PrintedEpilogue(f"{head}{out.text()}    }}", tuple(self.declared), tuple(self.pointers), self._sizes())

    def _body(self) -> str:
        kernel, out = self.kernel, _Lines(1)
        if not kernel.outer:
            out.add("if (worker.index != 0) return;")
            _Body(self, out).statements(kernel.body)
            return out.text()
        total = sympy.prod([axis.extent for axis in kernel.outer])
        out.add(f"const int64_t total = {size_text(total, self.names)};")
        vector = kernel.outer[-1].kind == "vector"
        smallest = str(kernel.outer[-1].tile or 1) if vector else self._smallest_share()
        out.add(f"const int64_t share = irc::max_of({smallest}, irc::ceil_div(total, 4 * worker.count));")
        out.add("irc::for_chunks(worker, irc::ceil_div(total, share), [&](int64_t chunk) {")
        out.depth += 1
        out.add("const int64_t last = irc::min_of(total, (chunk + 1) * share);")
        if vector:
            out.add("#pragma omp simd", indent=False)
        name = "i0" if len(kernel.outer) == 1 else "i"
        out.add(f"for (int64_t {name} = chunk * share; {name} < last; ++{name}) {{")
        out.depth += 1
        if len(kernel.outer) > 1:
            self._decompose(out)
        _Body(self, out).statements(kernel.body)
        out.depth -= 1
        out.add("}")
        out.depth -= 1
        out.add("});")
        return out.text()

    def _columns(self, columns: Sequence[Axis], out: _Lines) -> None:
        """Indices of the columns' axes from their common position n."""
        if len(columns) == 1:
            self.names[columns[0].symbol] = "n"
        elif columns:
            high, low = columns
            extent = size_text(low.extent, self.names)
            out.add(f"const int64_t {self.names[high.symbol]} = n / {extent};")
            out.add(f"const int64_t {self.names[low.symbol]} = n % {extent};")

    def _decompose(self, out: _Lines, rest: str = "i") -> None:
        """Indices of the outer axes from their common position."""
        for number in range(len(self.kernel.outer) - 1, -1, -1):
            extent = size_text(self.kernel.outer[number].extent, self.names)
            if number == 0:
                out.add(f"const int64_t i0 = {rest};")
            else:
                out.add(f"const int64_t i{number} = {rest} % {extent};")
                if number > 1:
                    out.add(f"const int64_t q{number} = {rest} / {extent};")
                    rest = f"q{number}"
                else:
                    rest = f"{rest} / {extent}"

    def _smallest_share(self) -> str:
        """Iterations that make a chunk worth sharing."""
        work = _work(self.kernel.body)
        return f"irc::max_of(1, {WORK_A_CHUNK} / irc::max_of(1, {size_text(work, self.names)}))"


def _work(body: Sequence[Statement]) -> sympy.Expr:
    """Innermost iterations of a block, loops with a run-time end counted whole."""
    total: sympy.Expr = sympy.Integer(0)
    for statement in body:
        if isinstance(statement, Loop):
            total = total + statement.axis.extent * _work(statement.body)
        else:
            total = total + 1
    return sympy.expand(total)


class _Lines:
    """Text under construction, with indentation."""

    def __init__(self, depth: int) -> None:
        self.depth = depth
        self._lines: list[str] = []

    def add(self, line: str, *, indent: bool = True) -> None:
        self._lines.append(("    " * self.depth if indent else "") + line)

    def text(self) -> str:
        return "".join(f"{line}\n" for line in self._lines)


class _Body:
    """Statements of one block, with the values that have a name there."""

    def __init__(self, printer: _Printer, out: _Lines, parent: _Body | None = None) -> None:
        self.printer, self.out, self.parent = printer, out, parent
        self.known: dict[Value, str] = {}
        self.names: dict[sympy.Symbol, str] = dict(parent.names) if parent else dict(printer.names)
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
        if isinstance(value, Apply) and value.op == rounding and not again:
            value = value.args[0]  # the store rounds
        text = self.expression(value)
        if again and not bare(value):
            text = self._name(value, text)
        plain = REGISTER_TYPES.get(store.buffer.dtype) == REGISTER_TYPES[value.dtype]
        stored = text if plain else f"irc::scalar::put<{storage}>({text})"
        target = f"{self.printer.pointers[store.buffer]}[{offset}]"
        condition = "" if store.when is None else f"if ({self.expression(store.when)}) "
        self.out.add(f"{condition}{target} = {stored};")
        self._forget(store.buffer)
        if again and store.when is None:
            load = Load(store.buffer, store.offset.expr, store.offset.bindings)
            self.known[load] = text

    def _forget(self, buffer: Buffer) -> None:
        """Values read from a buffer that was written are no longer known."""
        block: _Body | None = self
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
        _Body(self.printer, self.out, self).statements(loop.body)
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
            text = f"{self.printer.pointers[value.buffer]}[{offset}]"
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


def unsupported(kernel: Kernel) -> list[str]:
    """Operations in a kernel that cannot be printed."""
    from irc.lowering.cpp.expressions import known_operation

    operations = {part.op for value in values_of(kernel) for part in walk(value) if isinstance(part, Apply)}
    return sorted(op for op in operations if not known_operation(op))
