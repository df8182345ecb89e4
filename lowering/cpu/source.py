"""A schedule as one C++ source: its kernels, the step that calls them, and the interface in C."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import sympy

from irc.core.program import Program
from irc.lowering.cpp.expressions import STORAGE_TYPES, size_text
from irc.lowering.cpp.printer import PrintedFunction, print_kernel
from irc.lowering.cpu.memory import ALIGNMENT, Plan, touched
from irc.lowering.cpu.sites.registry import print_template
from irc.lowering.cpu.weights import WeightBlock
from irc.lowering.kernels.buffers import Buffer
from irc.lowering.kernels.fusion import Schedule
from irc.lowering.kernels.kernel import Kernel
from irc.lowering.kernels.sites import Memory

_INCLUDES = ("cmath", "cstring", "limits", "irc/isa.h", "irc/pool.h", "irc/pool_impl.h", "irc/elementwise.h")
INTERFACE = """
extern "C" {
#define IRC_EXPORT __attribute__((visibility("default")))
IRC_EXPORT void* irc_pool_create(int threads) { return new irc::Pool(threads); }
IRC_EXPORT void irc_pool_destroy(void* pool) { delete static_cast<irc::Pool*>(pool); }
IRC_EXPORT int64_t irc_arena_bytes(const int64_t* sizes, int threads) { return arena_bytes(sizes, threads); }
IRC_EXPORT void irc_run(void* pool, const int64_t* sizes, void* const* inputs, void* const* outputs,
                        const void* weights, void* arena) {
    Arguments arguments{sizes, inputs, outputs, static_cast<const uint8_t*>(weights), static_cast<uint8_t*>(arena)};
    auto body = [&](irc::Worker& worker) { step(worker, arguments); };
    static_cast<irc::Pool*>(pool)->run(body);
}
}
"""

PROFILE_INTERFACE = """
extern "C" IRC_EXPORT int64_t* irc_part_times() { return times.totals; }
"""


@dataclass
class SourceText:
    """A printed program.

    Attributes:
        text: the C++ source.
        num_functions: kernels printed, after those of equal text became one.
        num_barriers: times that the workers meet in a step.
        parts: what each step of the program is, for a profile.
    """

    text: str
    num_functions: int
    num_barriers: int
    parts: tuple[str, ...] = ()


@dataclass
class _Step:
    comment: list[str]
    statement: str
    writes: set[str]
    reads: set[str]


@dataclass
class _Functions:
    """Functions by text: kernels that differ in their buffers only share one."""

    names: dict[str, str] = field(default_factory=dict)
    taken: set[str] = field(default_factory=set)
    texts: list[str] = field(default_factory=list)

    def name_of(self, printed: PrintedFunction) -> str:
        if printed.key not in self.names:
            name = _identifier(f"k{len(self.texts)}_{printed.name}", self.taken)
            self.names[printed.key] = name
            self.texts.append(printed.text(name))
        return self.names[printed.key]


def print_program(
    program: Program, schedule: Schedule, plan: Plan, weights: WeightBlock, dims: Mapping[str, int], *,
    profile: bool = False,
) -> SourceText:  # fmt: skip
    """The source of a scheduled program.

    Args:
        weights: gets the weights that the steps read; offsets are part of the text.
        dims: dimension → its place among the sizes.
        profile: measure each step's time, which then ends at a barrier.
    """
    functions, includes, scratch = _Functions(), list(_INCLUDES), list[str]()
    pointers = _Pointers(program, schedule, plan, weights)
    steps: list[_Step] = []
    for step in schedule.steps:
        writes, reads = touched(step)
        made = print_kernel(step) if isinstance(step, Kernel) else print_template(step, program, weights)
        includes += [i for i in made.includes if i not in includes]
        scratch += [made.scratch] if made.scratch else []
        arguments = [pointers.argument(a) for a in made.arguments]
        statement, comment = made.call(functions.name_of(made), arguments), list(made.comment)
        steps.append(_Step(comment, statement, {pointers.place(b) for b in writes}, {pointers.place(b) for b in reads}))
    steps += _copies(program, schedule, pointers)
    if profile:
        for number, step in enumerate(steps):
            step.statement += f"\n    worker.barrier();\n    times.mark(worker.index, {number});"
        includes.append("irc/profile.h")
    lines, barriers = _with_barriers(steps)
    sizes = [f"    const int64_t {name} = sizes[{place}];" for name, place in dims.items()]
    layout, total = _layout(plan, scratch)
    text = "".join(f"#include {_include(i)}\n" for i in includes)
    text += f"\nnamespace {{\n\n// Program {program.name}.\n\n"
    text += f"irc::PartTimes<{len(steps)}> times;\n\n" if profile and steps else ""
    text += "\n".join(functions.texts)
    text += "\nstruct Arguments {\n    const int64_t* sizes;\n    void* const* inputs;\n    void* const* outputs;\n"
    text += "    const uint8_t* weights;\n    uint8_t* arena;\n};\n\n"
    unused = [f"    (void){name};" for name in dims]
    text += "int64_t arena_bytes(const int64_t* sizes, int workers) {\n" + "\n".join([*sizes, *unused, *layout])
    text += f"\n    (void)sizes;\n    (void)workers;\n    return {total};\n}}\n\n"
    text += "void step(irc::Worker& worker, const Arguments& arguments) {\n"
    text += "    const int64_t* const sizes = arguments.sizes;\n"
    text += "    const int workers = worker.count;\n    (void)sizes;\n    (void)workers;\n"
    started = ["    times.start(worker.index);"] if profile and steps else []
    text += "\n".join([*sizes, *unused, *layout, *pointers.declarations(), *started, *lines])
    text += "\n}\n\n}  // namespace\n" + INTERFACE + (PROFILE_INTERFACE if started else "")
    return SourceText(text, len(functions.texts), barriers, tuple(_part(step) for step in steps) if started else ())


def _part(step: _Step) -> str:
    """A step in a profile: its function, and the last node that it computes."""
    return step.statement.split("(", 1)[0] + (f": {step.comment[-1]}" if step.comment else "")


class _Pointers:
    """C++ names of buffers in the step."""

    def __init__(self, program: Program, schedule: Schedule, plan: Plan, weights: WeightBlock) -> None:
        self._inputs = {name: i for i, name in enumerate(n.name for n in program.placeholders)}
        self._program, self._schedule, self._plan, self._weights = program, schedule, plan, weights
        self._names: dict[Buffer, str] = {}
        self._taken = {"worker", "arguments", "sizes", "workers", "arena", "scratch", *program.dims}
        self._lines: list[str] = []

    def of(self, buffer: Buffer) -> str:
        if buffer not in self._names:
            name = self._names[buffer] = _identifier(buffer.name, self._taken)
            kind = STORAGE_TYPES[buffer.dtype]
            self._lines.append(f"    {'const ' if buffer.kind == 'weight' else ''}{kind}* const {name} ="
                               f" reinterpret_cast<{'const ' if buffer.kind == 'weight' else ''}{kind}*>"
                               f"({self._source(buffer)});  // {buffer}")  # fmt: skip
        return self._names[buffer]

    def argument(self, value: Buffer | Memory | str) -> str:
        """An argument of a function as C++."""
        if isinstance(value, str):
            return value
        if isinstance(value, Buffer):
            return self.of(value)
        return self.of(value.buffer) + ("" if value.start == 0 else f" + {size_text(value.start, {})}")

    def place(self, buffer: Buffer) -> str:
        """What memory a buffer is: equal for buffers that share it."""
        if buffer in self._plan.places:
            return f"slot{self._plan.places[buffer]}"
        return buffer.name

    def _source(self, buffer: Buffer) -> str:
        if buffer.kind == "input":
            return f"arguments.inputs[{self._inputs[buffer.name]}]"
        if buffer.kind == "weight":
            return f"arguments.weights + {self._weights.add(buffer.name, self._program.weight(buffer.name))}"
        if buffer.kind == "output":
            number = next(i for i, b in enumerate(self._schedule.outputs) if b is buffer)
            return f"arguments.outputs[{number}]"
        return f"arguments.arena + slot{self._plan.places[buffer]}"

    def declarations(self) -> list[str]:
        return self._lines


def _copies(program: Program, schedule: Schedule, pointers: _Pointers) -> list[_Step]:
    """Outputs that are inputs, weights, or the same as another output."""
    steps = []
    for i, buffer in enumerate(schedule.outputs):
        if not isinstance(buffer, Buffer) or i in schedule.in_place:
            continue
        first = next(k for k, b in enumerate(schedule.outputs) if b is buffer)
        if buffer.kind == "output" and first == i:
            continue
        size = size_text(buffer.num_bytes, {})
        statement = f"if (worker.index == 0) std::memcpy(arguments.outputs[{i}], {pointers.of(buffer)}, {size});"
        steps.append(_Step([f"output {i}"], statement, {f"output {i}"}, {pointers.place(buffer)}))
    return steps


def _with_barriers(steps: list[_Step]) -> tuple[list[str], int]:
    """The statements, with a barrier wherever one step needs what another worker may not have finished."""
    lines, count = [], 0
    written: set[str] = set()
    read: set[str] = set()
    for step in steps:
        if step.reads & written or step.writes & (written | read):
            lines.append("    worker.barrier();")
            count += 1
            written, read = set(), set()
        written |= step.writes
        read |= step.reads
        lines += [f"    // {text}" for text in step.comment]
        lines.append(f"    {step.statement}")
    return lines, count


def _layout(plan: Plan, scratch: list[str]) -> tuple[list[str], str]:
    """Declarations of the slots' offsets, and the arena's size."""
    lines, previous = [], "0"
    for i, slot in enumerate(plan.slots):
        size = size_text(slot.sizes[0], {})
        for other in slot.sizes[1:]:
            size = f"irc::max_of({size}, {size_text(other, {})})"
        lines.append(f"    const int64_t slot{i} = {previous};")
        lines.append(f"    (void)slot{i};")
        previous = f"slot{i} + irc::round_up({size}, {ALIGNMENT})"
    if scratch:
        lines.append(f"    const int64_t scratch = {previous};")
        lines.append("    (void)scratch;")
        largest = scratch[0]
        for other in dict.fromkeys(scratch[1:]):
            largest = f"irc::max_of({largest}, {other})"
        previous = f"scratch + irc::round_up({largest}, {ALIGNMENT})"
    return lines, previous


def _include(name: str) -> str:
    return f'"{name}"' if "/" in name else f"<{name}>"


def _identifier(name: str, taken: set[str]) -> str:
    """A C++ name, unique among those taken."""
    text = "".join(c if c.isalnum() and c.isascii() else "_" for c in name)
    text = f"n{text}" if not text or text[0].isdigit() else text
    if text in _RESERVED or text.startswith("_") or "__" in text:
        text = "n_" + text.replace("__", "_").strip("_")
    chosen, count = text, 1
    while chosen in taken:
        chosen, count = f"{text}_{count}", count + 1
    taken.add(chosen)
    return chosen


_RESERVED = {
    "and", "or", "not", "xor", "int", "float", "double", "long", "short", "char", "bool", "if", "else", "for", "while",
    "do", "switch", "case", "default", "break", "continue", "return", "new", "delete", "this", "class", "struct",
    "union", "enum", "const", "static", "template", "typename", "operator", "public", "private", "auto", "void",
    "true", "false", "signed", "unsigned", "register", "inline", "namespace", "using", "volatile", "step", "main",
    "exp", "log", "tanh", "erf", "sqrt", "floor", "ceil", "round", "pow", "abs", "sin", "cos", "gamma", "y0", "y1",
    "j0", "j1", "irc", "std", "arena_bytes", "Arguments", "index", "div", "remainder", "trunc", "exp2", "log2",
}  # fmt: skip


def dims_of(program: Program) -> dict[str, int]:
    """Dimension name → place among the sizes that are handed to the step."""
    return {name: i for i, name in enumerate(program.dims)}


def hints_of(program: Program) -> dict[sympy.Symbol, int]:
    """Sizes to plan by: those of the example."""
    from irc.core.dims import dim_symbol

    return {dim_symbol(name): dim.hint for name, dim in program.dims.items()}
