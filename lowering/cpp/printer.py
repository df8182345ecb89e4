"""Kernels as C++ functions that every worker of a pool runs (SPMD), sharing the outer loop among them.

    void k(irc::Worker& worker, float* out0, const float* in0, int64_t B, int64_t S)

Names are positional, so that kernels that do the same for other layers come out as the same text; the program
prints such text once and calls it often.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import sympy

from irc.lowering.cpp.expressions import (
    STORAGE_TYPES,
    size_text,
)
from irc.lowering.cpp.function import PrintedEpilogue, PrintedFunction
from irc.lowering.cpp.statements import Body
from irc.lowering.kernels.buffers import Buffer
from irc.lowering.kernels.kernel import Axis, Kernel, Loop, Statement, Store, axes_of, statements, values_of
from irc.lowering.kernels.printing import Lines
from irc.lowering.kernels.values import Apply, loads, walk

WORK_A_CHUNK = 2048
"""Elements that a worker takes at a time at least, about a microsecond's: taking a chunk costs a twentieth of that."""


def print_kernel(kernel: Kernel, share: int | None = None) -> PrintedFunction:
    """Print a kernel; `share`: innermost iterations that a worker takes at least (None: as the kernel says)."""
    return _Printer(kernel, share).printed()


def print_epilogue(kernel: Kernel, *, ahead: str = "") -> PrintedEpilogue:
    """Print the kernel of a template's epilogue.

    Args:
        ahead: rows (C++ text) between a call and the next one for the same columns, if arithmetic enough stands between
            them to fetch what that one will touch.
    """
    return _Printer(kernel).epilogue(ahead)


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
    def __init__(self, kernel: Kernel, share: int | None = None) -> None:
        self.kernel, self.share = kernel, share
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
            self.kernel.name, comment, tuple(self.declared), self._body(), tuple(self.pointers), self._sizes(),
            seconds=0.1,
        )  # fmt: skip

    def _sizes(self) -> tuple[sympy.Symbol, ...]:
        return tuple(s for s in self.kernel.sizes if s not in self.names)

    def epilogue(self, ahead: str) -> PrintedEpilogue:
        """The epilogue, whose pointers, and what no index leads to, are copied into locals.

        What a lambda captures lies in memory, and after each byte written to a tensor a compiler has to expect other
        values there, which keeps it from using lanes.
        """
        kernel, out = self.kernel, Lines(2)
        local = {buffer: f"{name}_here" for buffer, name in self.pointers.items()}
        for buffer, name in self.pointers.items():
            out.add(f"auto* const {local[buffer]} = {name};")
        if len(kernel.outer) == 1:
            self.names[kernel.outer[0].symbol] = "m"
        elif kernel.outer:
            self._decompose(out, "m")
        body, columns = kernel.body, []
        while len(body) == 1 and isinstance(body[0], Loop):
            columns.append(body[0].axis)
            body = body[0].body
        if ahead:
            self._fetch_ahead(columns, local, ahead, out)
        around = Body(local, self.names, out)
        for load in loads(*values_of(kernel)):
            if not load.symbols and not load.bindings and load.buffer not in kernel.writes:
                around.name(load)
        out.add("#pragma omp simd", indent=False)
        out.add("for (int64_t n = n0; n < n1; ++n) {")
        out.depth += 1
        self._columns(columns, out)
        out.add("const float acc = values[n - n0];")
        Body(local, self.names, out, around).statements(body)
        out.depth -= 1
        out.add("}")
        head = "[&]([[maybe_unused]] int64_t m, int64_t n0, int64_t n1, const float* values) {\n"
        return PrintedEpilogue(f"{head}{out.text()}    }}", tuple(self.declared), tuple(self.pointers), self._sizes())

    def _fetch_ahead(self, columns: Sequence[Axis], local: Mapping[Buffer, str], ahead: str, out: Lines) -> None:
        """Prefetches of what the call `ahead` rows on reads and writes, where rows lie at a fixed distance."""
        if len(self.kernel.outer) != 1 or len(columns) != 1:
            return
        row, column = self.kernel.outer[0].symbol, columns[0].symbol
        stores = [
            (s.buffer, s.offset.expr, s.offset.bindings) for s in statements(self.kernel.body) if isinstance(s, Store)
        ]
        read = [(load.buffer, load.offset, load.bindings) for load in loads(*values_of(self.kernel))]
        for buffer, offset, bindings in dict.fromkeys([*stores, *read]):
            if bindings or offset.coeff(column) != 1 or not offset.coeff(row).is_Integer or offset.coeff(row) == 0:
                continue
            if offset.free_symbols - {row, column} - set(self.kernel.sizes):
                continue
            later = size_text(offset, {**self.names, row: f"(m + {ahead})", column: "n0"})
            kind = "write" if buffer in self.kernel.writes else "read"
            out.add(f"irc::fetch_for_{kind}({local[buffer]} + {later}, n1 - n0);")

    def _body(self) -> str:
        kernel, out = self.kernel, Lines(1)
        if not kernel.outer:
            out.add("if (worker.index != 0) return;")
            Body(self.pointers, self.names, out).statements(kernel.body)
            return out.text()
        total = sympy.prod([axis.extent for axis in kernel.outer])
        out.add(f"const int64_t total = {size_text(total, self.names)};")
        vector = kernel.outer[-1].kind == "vector"
        smallest = str(self.share or kernel.outer[-1].tile or 1) if vector else self._smallest_share()
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
        return f"irc::max_of(1, {self.share or WORK_A_CHUNK} / irc::max_of(1, {size_text(work, self.names)}))"


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
