"""Kernels as C++ functions that every worker of a pool runs (SPMD), sharing the outer loop among them.

    void k(irc::Worker& worker, float* out0, const float* in0, int64_t B, int64_t S)

Names are positional, so that kernels that do the same for other layers come out as the same text; the program
prints such text once and calls it often.
"""

from __future__ import annotations

from collections.abc import Sequence

import sympy

from irc.lowering.cpp.expressions import (
    STORAGE_TYPES,
    size_text,
)
from irc.lowering.cpp.function import PrintedEpilogue, PrintedFunction
from irc.lowering.cpp.statements import Body, Lines
from irc.lowering.kernels.buffers import Buffer
from irc.lowering.kernels.kernel import Axis, Kernel, Loop, Statement, axes_of, values_of
from irc.lowering.kernels.values import Apply, walk

WORK_A_CHUNK = 2048
"""Elements that a worker takes at a time at least, about a microsecond's: taking a chunk costs a twentieth of that."""


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
        kernel, out = self.kernel, Lines(2)
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
        Body(self.pointers, self.names, out).statements(body)
        out.depth -= 1
        out.add("}")
        head = "[&]([[maybe_unused]] int64_t m, int64_t n0, int64_t n1, const float* values) {\n"
        return PrintedEpilogue(f"{head}{out.text()}    }}", tuple(self.declared), tuple(self.pointers), self._sizes())

    def _body(self) -> str:
        kernel, out = self.kernel, Lines(1)
        if not kernel.outer:
            out.add("if (worker.index != 0) return;")
            Body(self.pointers, self.names, out).statements(kernel.body)
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
        Body(self.pointers, self.names, out).statements(kernel.body)
        out.depth -= 1
        out.add("}")
        out.depth -= 1
        out.add("});")
        return out.text()

    def _columns(self, columns: Sequence[Axis], out: Lines) -> None:
        """Indices of the columns' axes from their common position n."""
        if len(columns) == 1:
            self.names[columns[0].symbol] = "n"
        elif columns:
            high, low = columns
            extent = size_text(low.extent, self.names)
            out.add(f"const int64_t {self.names[high.symbol]} = n / {extent};")
            out.add(f"const int64_t {self.names[low.symbol]} = n % {extent};")

    def _decompose(self, out: Lines, rest: str = "i") -> None:
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


def unsupported(kernel: Kernel) -> list[str]:
    """Operations in a kernel that cannot be printed."""
    from irc.lowering.cpp.expressions import known_operation

    operations = {part.op for value in values_of(kernel) for part in walk(value) if isinstance(part, Apply)}
    return sorted(op for op in operations if not known_operation(op))
