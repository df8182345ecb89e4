"""A schedule as one C++ source: its kernels, the step that calls them, and the interface in C."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import sympy

from irc.core.program import Program
from irc.lowering.cpp.expressions import STORAGE_TYPES, size_text
from irc.lowering.cpp.function import PrintedFunction
from irc.lowering.cpp.printer import print_kernel
from irc.lowering.cpu.barriers import Private, Step, with_barriers
from irc.lowering.cpu.sites.registry import print_template
from irc.lowering.cpu.units import in_units, print_units
from irc.lowering.cpu.weights import WeightBlock
from irc.lowering.kernels.buffers import Buffer
from irc.lowering.kernels.fusion import Schedule
from irc.lowering.kernels.kernel import Kernel
from irc.lowering.kernels.memory import ALIGNMENT, Plan, touched
from irc.lowering.kernels.sites import Memory

_INCLUDES = ("irc/program.h",)
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
        num_barriers_alone: the same with one token.
        parts: what each step of the program is, for a profile.
    """

    text: str
    num_functions: int
    num_barriers: int
    num_barriers_alone: int
    parts: tuple[str, ...] = ()


@dataclass
class _Functions:
    """Functions by text: kernels that differ in their buffers only share one."""

    names: dict[str, str] = field(default_factory=dict)
    taken: set[str] = field(default_factory=set)
    printed: list[tuple[str, PrintedFunction]] = field(default_factory=list)

    def name_of(self, printed: PrintedFunction) -> str:
        if printed.key not in self.names:
            name = _identifier(f"k{len(self.printed)}_{printed.name}", self.taken)
            self.names[printed.key] = name
            self.printed.append((name, printed))
        return self.names[printed.key]


def print_program(
    program: Program, schedule: Schedule, plan: Plan, weights: WeightBlock, dims: Mapping[str, int],
    private: Private | None = None, *, profile: bool = False, share: int | None = None,
) -> SourceText:  # fmt: skip
    """The source of a scheduled program.

    Args:
        weights: gets the weights that the steps read; offsets are part of the text.
        dims: dimension → its place among the sizes.
        private: what workers compute for themselves with one token; `plan` was made for it.
        profile: measure each step's time, which then ends at a barrier.
        share: innermost iterations of a kernel that a worker takes at least (None: as the kernel says).
    """
    private = private or Private()
    functions, scratch, blocks = _Functions(), list[str](), False
    pointers = _Pointers(program, schedule, plan, weights)
    steps: list[Step] = []
    for step in schedule.steps:
        writes, reads = touched(step)
        made = print_kernel(step, share) if isinstance(step, Kernel) else print_template(step, program, weights)
        scratch += [made.scratch] if made.scratch else []
        blocks |= bool(made.includes)  # templates keep blocks in the workers' memory
        arguments = [pointers.argument(a) for a in made.arguments]
        worker = "own" if isinstance(step, Kernel) and step.name in private.kernels else "worker"
        statement, comment = made.call(functions.name_of(made), arguments, worker), list(made.comment)
        written = {pointers.place(b) for b in writes} | ({"scratch"} if made.scratch else set())
        steps.append(Step(comment, statement, written, {pointers.place(b) for b in reads}))
    steps += _copies(program, schedule, pointers)
    profile = profile and bool(steps)
    if profile:
        for number, one in enumerate(steps):
            one.statement += f"\n    worker.barrier();\n    times.mark(worker.index, {number});"
    lines, barriers, barriers_alone = with_barriers(steps, {pointers.place(b) for b in private.buffers})
    layout, total = _layout(plan, scratch, private, blocks=blocks)
    text = _main_text(dims, layout, total, [*pointers.declarations(), *lines], len(steps) if profile else None)
    head = "".join(f"#include {_include(i)}\n" for i in _INCLUDES) + f"\n// Program {program.name}.\n"
    headers = ("irc/pool_impl.h", *(("irc/profile.h",) if profile else ()))
    parts = tuple(_part(step) for step in steps) if profile else ()
    whole = head + print_units(in_units(functions.printed), text, headers)
    return SourceText(whole, len(functions.printed), barriers, barriers_alone, parts)


def _main_text(dims: Mapping[str, int], layout: list[str], total: str, lines: list[str], timed: int | None) -> str:
    """The arena's size, the step, and the interface in C.

    Args:
        layout, total: declarations of the slots, and the arena's size.
        lines: of the step, behind the slots.
        timed: parts whose time is measured; None: none.
    """
    sizes = [f"    const int64_t {name} = sizes[{place}];" for name, place in dims.items()]
    sizes += [f"    (void){name};" for name in dims]
    started = [] if timed is None else ["    times.start(worker.index);"]
    text = "namespace {\n\n" + ("" if timed is None else f"irc::PartTimes<{timed}> times;\n\n")
    text += "struct Arguments {\n    const int64_t* sizes;\n    void* const* inputs;\n    void* const* outputs;\n"
    text += "    const uint8_t* weights;\n    uint8_t* arena;\n};\n\n"
    text += "int64_t arena_bytes(const int64_t* sizes, int workers) {\n" + "\n".join([*sizes, *layout])
    text += f"\n    (void)sizes;\n    (void)workers;\n    return {total};\n}}\n\n"
    text += "void step(irc::Worker& worker, const Arguments& arguments) {\n"
    text += "    const int64_t* const sizes = arguments.sizes;\n"
    text += "    const int workers = worker.count;\n    (void)sizes;\n    (void)workers;\n"
    own = [_OWN_MEMORY] if total != "blocks" else []
    text += "\n".join([*sizes, *layout, *_OWN_WORKER, *own, *started, *lines])
    return text + "\n}\n\n}  // namespace\n" + INTERFACE + ("" if timed is None else PROFILE_INTERFACE)


def _part(step: Step) -> str:
    """A step in a profile: its function, and the last node that it computes."""
    return step.statement.split("(", 1)[0] + (f": {step.comment[-1]}" if step.comment else "")


class _Pointers:
    """C++ names of buffers in the step."""

    def __init__(self, program: Program, schedule: Schedule, plan: Plan, weights: WeightBlock) -> None:
        self._inputs = {name: i for i, name in enumerate(n.name for n in program.placeholders)}
        self._program, self._schedule, self._plan, self._weights = program, schedule, plan, weights
        self._names: dict[Buffer, str] = {}
        self._taken = {"worker", "arguments", "sizes", "workers", "arena", "scratch", "blocks", "alone", "own",
                       "by_itself", *program.dims}  # fmt: skip
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
        place = self._plan.places[buffer]
        own = f" + worker.index * own{place}" if self._plan.slots[place].private else ""
        return f"arguments.arena + slot{place}{own}"

    def declarations(self) -> list[str]:
        return self._lines


def _copies(program: Program, schedule: Schedule, pointers: _Pointers) -> list[Step]:
    """Outputs that are inputs, weights, or the same as another output."""
    steps: list[Step] = []
    for i, buffer in enumerate(schedule.outputs):
        if not isinstance(buffer, Buffer) or i in schedule.in_place:
            continue
        first = next(k for k, b in enumerate(schedule.outputs) if b is buffer)
        if buffer.kind == "output" and first == i:
            continue
        size = size_text(buffer.num_bytes, {})
        statement = f"if (worker.index == 0) std::memcpy(arguments.outputs[{i}], {pointers.of(buffer)}, {size});"
        steps.append(Step([f"output {i}"], statement, {f"output {i}"}, {pointers.place(buffer)}))
    return steps


# What computes kernels of one row: the worker with the others, or by itself.
_OWN_WORKER = [
    "    irc::Worker by_itself;",
    "    [[maybe_unused]] irc::Worker& own = alone ? by_itself : worker;",
]

_OWN_MEMORY = "    worker.memory = arguments.arena + blocks + worker.index * irc::worker_bytes;"


def _layout(plan: Plan, scratch: list[str], private: Private, *, blocks: bool) -> tuple[list[str], str]:
    """Declarations of the slots' offsets, and the arena's size.

    Args:
        blocks: whether workers have memory of their own (`irc::Worker::memory`), which lies behind the rest.
    """
    alone = " && ".join(f"int64_t({size_text(rows, {})}) == 1" for rows in private.rows) or "true"
    lines, previous = [f"    [[maybe_unused]] const bool alone = {alone if private.kernels else 'false'};"], "0"
    for i, slot in enumerate(plan.slots):
        size = size_text(slot.sizes[0], {})
        for other in slot.sizes[1:]:
            size = f"irc::max_of({size}, {size_text(other, {})})"
        size = f"irc::round_up({size}, {ALIGNMENT})"
        lines.append(f"    [[maybe_unused]] const int64_t slot{i} = {previous};")
        if slot.private:
            lines.append(f"    [[maybe_unused]] const int64_t own{i} = alone ? {size} : 0;")
            size = f"(alone ? workers * own{i} : {size})"
        previous = f"slot{i} + {size}"
    if scratch:
        lines.append(f"    [[maybe_unused]] const int64_t scratch = {previous};")
        largest = scratch[0]
        for other in dict.fromkeys(scratch[1:]):
            largest = f"irc::max_of({largest}, {other})"
        previous = f"scratch + irc::round_up({largest}, {ALIGNMENT})"
    lines.append(f"    [[maybe_unused]] const int64_t blocks = {previous};")
    return lines, "blocks + workers * irc::worker_bytes" if blocks else "blocks"


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
    "j0", "j1", "irc", "std", "program", "arena_bytes", "Arguments", "index", "div", "remainder", "trunc", "exp2",
    "log2",
}  # fmt: skip


def dims_of(program: Program) -> dict[str, int]:
    """Dimension name → place among the sizes that are handed to the step."""
    return {name: i for i, name in enumerate(program.dims)}


def hints_of(program: Program) -> dict[sympy.Symbol, int]:
    """Sizes to plan by: those of the example."""
    from irc.core.dims import dim_symbol

    return {dim_symbol(name): dim.hint for name, dim in program.dims.items()}
