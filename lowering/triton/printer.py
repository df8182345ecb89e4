"""Kernels as Triton functions: rows of the outer axes are shared among programs, innermost loops run in lanes.

    @triton.jit
    def k(out0, in0, in1, B, S, INDEX: tl.constexpr):
        i = tl.program_id(0).to(INDEX) * 4 + tl.arange(0, 4)[:, None]     # rows
        ...
        j0 = tl.arange(0, 256)[None, :]                                   # lanes

Elementwise kernels have no lanes of their own: all axes together are the rows, a block of them a program. Names are
positional, so that kernels that do the same for other layers come out as the same text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import sympy

from irc.lowering.kernels.buffers import Buffer
from irc.lowering.kernels.kernel import Axis, Combine, Kernel, Loop, Statement, Store, axes_of, statements, values_of
from irc.lowering.kernels.printing import Lines
from irc.lowering.kernels.signature import python_size
from irc.lowering.kernels.sites import Memory
from irc.lowering.kernels.values import Apply, loads, walk
from irc.lowering.triton.expressions import STORAGE_TYPES, known_operation, size_text
from irc.lowering.triton.lanes import joined
from irc.lowering.triton.statements import DYNAMIC_LANES, LANES, MOST_LANES, ROWS, Body, Shape, next_power

BLOCK = 512
"""Elements that a program of an elementwise kernel computes: with 2 warps 8 a thread, which is 16 bytes of halves."""
_LEAST_COLUMNS = 256
"""Columns of a result below which a tile may be wider than it."""
_ELEMENTS = 2048
"""Elements of rows times lanes that a program has at most where rows are short."""


INDEX = "INDEX"
"""Type of indices: 64 bits where a tensor has 2^31 elements, which depends on the sizes of a call."""


@dataclass(frozen=True)
class PrintedKernel:
    """A Triton function and how it is launched.

    Attributes:
        name: readable; the program makes it unique.
        comment: lines above it.
        parameters: names of the pointers; the sizes follow.
        body: text of the function.
        arguments: for each parameter its buffer or memory.
        sizes: named dimensions that follow as parameters.
        grid: number of programs, over the sizes.
        warps: of a program.
    """

    name: str
    comment: tuple[str, ...]
    parameters: tuple[str, ...]
    body: str
    arguments: tuple[Buffer | Memory, ...]
    sizes: tuple[sympy.Symbol, ...]
    grid: str
    warps: int

    def text(self, name: str) -> str:
        """The whole function under a name, without the comment."""
        parameters = ", ".join((*self.parameters, *(size.name for size in self.sizes), f"{INDEX}: tl.constexpr"))
        return f"@triton.jit\ndef {name}({parameters}):\n{wide_sizes(self.sizes)}{self.body}"

    def call(self, name: str, arguments: Sequence[str]) -> str:
        """The launch, as a line of the step."""
        sizes = (size.name for size in self.sizes)
        given = ", ".join((*arguments, *sizes, f"{INDEX}={INDEX.lower()}", f"num_warps={self.warps}"))
        return f"{name}[({self.grid},)]({given})"


def wide_sizes(sizes: Sequence[sympy.Symbol]) -> str:
    """Lines that give sizes the type of indices."""
    return "".join(f"    {size.name} = tl.cast({size.name}, {INDEX})\n" for size in sizes)


def print_kernel(kernel: Kernel) -> PrintedKernel:
    """Print a kernel."""
    return _Printer(kernel).printed()


@dataclass(frozen=True)
class PrintedEpilogue:
    """What a template does with its tile `acc` at rows `m` [BM, 1] and columns `n` [1, BN], below `M` and `N`.

    Attributes:
        body: its lines.
        parameters, arguments, sizes: what it uses, as of `PrintedKernel`.
    """

    body: str
    parameters: tuple[str, ...]
    arguments: tuple[Buffer | Memory, ...]
    sizes: tuple[sympy.Symbol, ...]


def print_epilogue(kernel: Kernel, columns: int) -> PrintedEpilogue:
    """Print the kernel of a template's epilogue; `columns`: of the result."""
    printer = _Printer(kernel)
    outer, body = list(kernel.outer), kernel.body
    inner: list[Axis] = []
    while len(body) == 1 and isinstance(body[0], Loop):
        inner.append(body[0].axis)
        body = body[0].body
    assert len(inner) <= 1, "an epilogue has its columns along one axis"
    out, names = Lines(1), printer.names
    out.add(f"m = m.to({INDEX})")
    if len(outer) == 1:
        names[outer[0].symbol] = "m"
    elif outer:
        names |= {axis.symbol: f"i{n}" for n, axis in enumerate(outer)}
        printer.outer = outer
        printer.decompose(out, "m")
    out.add("rows_exist = m < M")
    masks = {ROWS: "rows_exist"}
    if columns & (columns - 1) or columns < _LEAST_COLUMNS:
        out.add(f"columns_exist = n < {columns}")
        masks[LANES] = "columns_exist"
    made = Body(printer.pointers, names, out, Shape((1, 1), False), frozenset(a.symbol for a in outer), masks,
                {ROWS: "0 * m", LANES: "0 * n"})  # fmt: skip
    if inner:
        made.lanes = inner[0].symbol
        names[made.lanes] = made.names[made.lanes] = "n"
    made.statements(body)
    sizes = tuple(s for s in kernel.sizes if s not in names)
    return PrintedEpilogue(out.text(), tuple(printer.pointers.values()), tuple(printer.pointers), sizes)


class _Printer:
    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.outer, self.body = _flattened(kernel)
        self.pointers = pointer_names(kernel.writes, kernel.reads)
        self.names: dict[sympy.Symbol, str] = {axis.symbol: f"i{n}" for n, axis in enumerate(self.outer)}
        if len(self.outer) == 1:
            self.names[self.outer[0].symbol] = "i"
        inner = [a.symbol for a in axes_of(kernel) if a.symbol not in self.names]
        self.names |= {symbol: f"j{n}" for n, symbol in enumerate(dict.fromkeys(inner))}

    def printed(self) -> PrintedKernel:
        nests = _independent(self.kernel)
        return self._side_by_side(nests) if nests else self._rows()

    def _side_by_side(self, nests: Sequence[tuple[list[Axis], tuple[Statement, ...]]]) -> PrintedKernel:
        """Each nest of loops has programs of its own: done one after the other, a token's heads would wait in turn."""
        out, totals, counter = Lines(1), [], [0]
        for axes, _ in nests:
            total = sympy.prod([axis.extent for axis in axes])
            totals.append((size_text(total, {}), python_size(total)))
        out.add(f"pid = tl.program_id(0).to({INDEX})")
        for number, (total, _) in enumerate(totals[:-1]):
            out.add(f"end{number} = {f'end{number - 1} + ' if number else ''}tl.cdiv({total}, {BLOCK})")
        for number, (axes, body) in enumerate(nests):
            self.outer, total = axes, totals[number][0]
            names = {axis.symbol: f"i{n}" for n, axis in enumerate(axes)}
            self.names |= names if len(axes) > 1 else dict.fromkeys(names, "i")
            first, last = number == 0, number == len(nests) - 1
            out.add("else:" if last else f"{'if' if first else 'elif'} pid < end{number}:")
            out.depth += 1
            out.add(f"i = {f'(pid - end{number - 1})' if number else 'pid'} * {BLOCK} + tl.arange(0, {BLOCK})")
            out.add(f"exists = i < {total}")
            self.decompose(out)
            symbols = frozenset(axis.symbol for axis in axes)
            made = Body(self.pointers, self.names, out, Shape((BLOCK,), False), symbols, {ROWS: "exists"},
                        {ROWS: "0 * i"})  # fmt: skip
            made.counter = counter  # one name has one type, in all branches
            made.statements(body)
            out.depth -= 1
        return self._made(out, " + ".join(f"triton.cdiv({total}, {BLOCK})" for _, total in totals), _warps(BLOCK))

    def _rows(self) -> PrintedKernel:
        """One kind of programs, which share the outer axes."""
        out = Lines(1)
        total = sympy.sympify(sympy.prod([axis.extent for axis in self.outer]))
        lanes = _in_lanes(self.body, self.outer)
        if lanes:
            self.body = joined(self.body, MOST_LANES)
        rows, width = (1, _width(self.body)) if lanes else (BLOCK, 0)
        if lanes:
            rows = max(1, min(next_power(_ELEMENTS // width), 16)) if width * 4 <= _ELEMENTS and self.outer else 1
        elif total.is_Integer:
            rows = min(BLOCK, next_power(int(total)))
        shape = Shape((rows, 1) if lanes else (rows,), lanes)
        suffix = "[:, None]" if lanes else ""
        out.add(f"i = tl.program_id(0).to({INDEX}) * {rows} + tl.arange(0, {rows}){suffix}")
        masks = {}
        text = size_text(total, self.names)
        if rows > 1 and not (total.is_Integer and total % rows == 0):
            out.add(f"exists = i < {text}")
            masks[ROWS] = "exists"
        self.decompose(out)
        symbols = frozenset(axis.symbol for axis in self.outer)
        Body(self.pointers, self.names, out, shape, symbols, masks, {ROWS: "0 * i"}).statements(self.body)
        grid = f"triton.cdiv({python_size(total)}, {rows})" if rows > 1 else python_size(total)
        return self._made(out, grid, _warps(rows * max(width, 1)))

    def _made(self, out: Lines, grid: str, warps: int) -> PrintedKernel:
        kernel = self.kernel
        comment = tuple(str(origin) for origin in kernel.origins)
        return PrintedKernel(
            kernel.name, comment, tuple(self.pointers.values()), out.text(), tuple(self.pointers),
            tuple(s for s in kernel.sizes if s not in self.names), grid, warps,
        )  # fmt: skip

    def decompose(self, out: Lines, rest: str = "i") -> None:
        """Indices of the outer axes from their common position."""
        if len(self.outer) <= 1:
            return
        for number in range(len(self.outer) - 1, 0, -1):
            extent = size_text(self.outer[number].extent, self.names)
            out.add(f"i{number} = {rest} % {extent}")
            if number > 1:
                out.add(f"q{number} = {rest} // {extent}")
                rest = f"q{number}"
            else:
                out.add(f"i0 = {rest} // {extent}")


def pointer_names(written: Sequence[Buffer], read: Sequence[Buffer]) -> dict[Buffer, str]:
    """Names of pointer parameters: what is written first."""
    names = {buffer: f"out{i}" for i, buffer in enumerate(written)}
    names |= {buffer: f"in{i}" for i, buffer in enumerate(b for b in read if b not in names)}
    return names


def _flattened(kernel: Kernel) -> tuple[list[Axis], tuple[Statement, ...]]:
    """(outer axes, body), with the loops around stores alone among the axes where there is one nest of them."""
    outer, body = list(kernel.outer), kernel.body
    if any(not isinstance(s, (Loop, Store)) for s in statements(body)):
        return outer, body
    while len(body) == 1 and isinstance(body[0], Loop) and body[0].axis.stop is None:
        outer.append(body[0].axis)
        body = body[0].body
    return outer, body


def _independent(kernel: Kernel) -> list[tuple[list[Axis], tuple[Statement, ...]]]:
    """(all axes, stores) of each nest of loops, if there are several, of stores alone, and none reads another's."""
    nests: list[tuple[list[Axis], tuple[Statement, ...]]] = []
    for statement in kernel.body:
        axes, body = list(kernel.outer), (statement,)
        while len(body) == 1 and isinstance(body[0], Loop) and body[0].axis.stop is None:
            axes.append(body[0].axis)
            body = body[0].body
        if not axes or not all(isinstance(s, Store) for s in body):
            return []
        nests.append((axes, body))
    touched = [(_touched(body)) for _, body in nests]
    apart = all(not (written & read or written & also) for i, (written, _) in enumerate(touched)
                for k, (also, read) in enumerate(touched) if i != k)  # fmt: skip
    return nests if len(nests) > 1 and apart else []


def _touched(body: Sequence[Statement]) -> tuple[set[Buffer], set[Buffer]]:
    """(buffers written, buffers read) by stores."""
    stores = [s for s in body if isinstance(s, Store)]
    values = [v for s in stores for v in (s.offset, s.value, s.when) if v is not None]
    return {s.buffer for s in stores}, {load.buffer for load in loads(*values)}


def _in_lanes(body: Sequence[Statement], outer: Sequence[Axis]) -> bool:
    """Whether innermost loops become lanes: where one walks memory step by step, or nothing else is parallel."""
    innermost = [
        s for s in statements(tuple(body)) if isinstance(s, Loop) and not any(isinstance(x, Loop) for x in s.body)
    ]
    if not innermost:
        return False
    positions = any(isinstance(x, Combine) and x.op.startswith("arg") for loop in innermost for x in loop.body)
    return not outer or positions or any(loop.axis.kind == "vector" for loop in innermost)


def _width(body: Sequence[Statement]) -> int:
    """Lanes of the widest loop."""
    widest = 1
    for statement in statements(tuple(body)):
        if isinstance(statement, Loop) and all(isinstance(s, (Combine, Store)) for s in statement.body):
            extent = statement.axis.extent
            lanes = min(next_power(int(extent)), MOST_LANES) if extent.is_Integer else DYNAMIC_LANES
            widest = max(widest, lanes)
    return widest


def _warps(elements: int) -> int:
    """Warps of a program: some eight elements a thread, at most 8 warps."""
    return max(1, min(8, next_power(elements // 256)))


def unsupported(kernel: Kernel) -> list[str]:
    """Operations and types in a kernel that cannot be printed."""
    operations = {part.op for value in values_of(kernel) for part in walk(value) if isinstance(part, Apply)}
    kinds = {f"numbers of type {b.dtype}" for b in (*kernel.writes, *kernel.reads) if b.dtype not in STORAGE_TYPES}
    return sorted({op for op in operations if not known_operation(op)} | kinds)
