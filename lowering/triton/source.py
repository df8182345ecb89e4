"""A schedule as one Python module: its kernels in Triton, and the step that launches them."""

from __future__ import annotations

import keyword
from collections.abc import Sequence
from dataclasses import dataclass, field

from irc.core.program import Program
from irc.lowering.kernels.buffers import ITEM_BYTES, Buffer
from irc.lowering.kernels.fusion import Schedule
from irc.lowering.kernels.kernel import Kernel
from irc.lowering.kernels.memory import Plan, touched
from irc.lowering.kernels.signature import python_size
from irc.lowering.kernels.sites import Memory
from irc.lowering.triton.options import TritonOptions
from irc.lowering.triton.printer import INDEX, print_kernel
from irc.lowering.triton.sites import print_template
from irc.lowering.triton.sites.registry import StepWriter

ALIGNMENT = 256
TORCH_TYPES = {
    "f64": "torch.float64", "f32": "torch.float32", "bf16": "torch.bfloat16", "f16": "torch.float16",
    "i64": "torch.int64", "i32": "torch.int32", "i16": "torch.int16", "i8": "torch.int8", "u8": "torch.uint8",
    "bool": "torch.bool",
}  # fmt: skip


@dataclass
class SourceText:
    """A printed program.

    Attributes:
        text: the Python module.
        num_kernels: kernels printed, after those of equal text became one.
        weights: names of the weights that the step reads.
    """

    text: str
    num_kernels: int
    weights: list[str]


@dataclass
class _Kernels:
    """Kernels by text: those that differ in their buffers only share one."""

    names: dict[str, str] = field(default_factory=dict)
    taken: set[str] = field(default_factory=set)
    texts: list[str] = field(default_factory=list)
    constants: list[str] = field(default_factory=list)

    def constant(self, wanted: str, text: str) -> str:
        """The name of a constant."""
        if text not in self.names:
            self.names[text] = identifier(f"{wanted}_{len(self.constants)}".upper(), self.taken)
            self.constants.append(f"{self.names[text]} = {text}\n")
        return self.names[text]

    def name_of(self, wanted: str, comment: Sequence[str], text: str) -> str:
        """The kernel's name; `NAME` in the text stands for it."""
        if text not in self.names:
            name = self.names[text] = identifier(f"k{len(self.texts)}_{wanted}", self.taken)
            self.texts.append("".join(f"# {line}\n" for line in comment) + text.replace("NAME", name, 1))
        return self.names[text]


def print_program(program: Program, schedule: Schedule, plan: Plan, options: TritonOptions) -> SourceText:
    """The source of a scheduled program."""
    kernels, tensors = _Kernels(), _Tensors(program, schedule, plan)
    writer = StepWriter(
        program, options, tensors.of, tensors.weight, kernels.name_of, kernels.constant
    )  # fmt: skip
    lines: list[str] = []
    for step in schedule.steps:
        if isinstance(step, Kernel):
            printed = print_kernel(step)
            name = kernels.name_of(printed.name, printed.comment, printed.text("NAME"))
            lines.append(printed.call(name, [tensors.argument(a) for a in printed.arguments]))
        else:
            lines += [f"# {origin}" for origin in step.origins[-1:]]
            lines += print_template(step, writer)
    lines += _copies(program, schedule, tensors)
    dims = list(program.dims)
    text = _head(program, sorted(writer.imports)) + "".join(kernels.constants)
    text += "".join(f"\n\n{kernel}" for kernel in kernels.texts)
    text += f"\n\n{_arena(plan, dims)}\n\n{_index(schedule, dims)}\n\n{_step(tensors.lines, lines, dims)}"
    return SourceText(text, len(kernels.texts), tensors.weights)


def _head(program: Program, imports: list[str]) -> str:
    lines = [f'"""Program {program.name}: kernels in Triton, and the step that launches them. Printed by irc."""', "",
             "import torch", "import triton", "import triton.language as tl", "",
             "from irc.lowering.triton.library import elementwise as library", *imports, ""]  # fmt: skip
    return "\n".join(lines)


def _arena(plan: Plan, dims: list[str]) -> str:
    """A function of the sizes: where each slot starts, and how large the arena is."""
    lines = [f"def arena({', '.join(dims)}):", '    """Bytes from the start to each slot, and of all together."""']
    lines.append("    ends = [0]")
    for slot in plan.slots:
        sizes = ", ".join(python_size(size) for size in slot.sizes)
        size = f"max({sizes})" if len(slot.sizes) > 1 else sizes
        lines.append(f"    ends.append(ends[-1] + -(-{size} // {ALIGNMENT}) * {ALIGNMENT})")
    return "\n".join([*lines, "    return ends", ""])


def _index(schedule: Schedule, dims: list[str]) -> str:
    """A function of the sizes: the type of indices, by the largest tensor that a kernel touches."""
    counts: dict[str, None] = {}
    for step in schedule.steps:
        written, read = touched(step)
        numels = [buffer.numel for buffer in (*written, *read)]
        counts |= {python_size(n): None for n in numels if n.free_symbols or n >= 1 << 31}
    largest = f"max(0, {', '.join(counts)})" if counts else "0"
    return "\n".join([
        f"def index_type({', '.join(dims)}):", '    """64 bits where a tensor has 2^31 elements."""',
        f"    return tl.int32 if {largest} < 1 << 31 else tl.int64", "",
    ])  # fmt: skip


def _step(tensors: list[str], lines: list[str], dims: list[str]) -> str:
    arguments = ", ".join(["inputs", "outputs", "weights", "memory", "slots", *dims])
    head = f"def step({arguments}):\n"
    head += '    """One step: from inputs to outputs, with weights by name and an arena of bytes, `memory`."""\n'
    lines = [f"{INDEX.lower()} = index_type({', '.join(dims)})", *tensors, *lines]
    return head + "".join(f"    {line}\n" for line in lines)


class _Tensors:
    """Names of flat tensors over the buffers, as the step declares them."""

    def __init__(self, program: Program, schedule: Schedule, plan: Plan) -> None:
        self._inputs = {name: i for i, name in enumerate(n.name for n in program.placeholders)}
        self._schedule, self._plan = schedule, plan
        self._names: dict[Buffer, str] = {}
        self._taken = {"inputs", "outputs", "weights", "memory", "slots", "torch", "triton", "tl", "library",
                       "attention", "matmul", "matvec", "products", "device_of", "config", "scratch", "index",
                       "index_type",
                       *program.dims}  # fmt: skip
        self.lines: list[str] = []
        self.weights: list[str] = []
        self._weight_names: dict[str, str] = {}

    def of(self, buffer: Buffer) -> str:
        if buffer.kind == "weight":
            return self.weight(buffer.name)
        if buffer not in self._names:
            name = self._names[buffer] = identifier(buffer.name, self._taken)
            self.lines.append(f"{name} = {self._source(buffer)}  # {buffer}")
        return self._names[buffer]

    def weight(self, weight: str) -> str:
        """The name of a weight's tensor, one element after the other."""
        if weight not in self._weight_names:
            name = self._weight_names[weight] = identifier(weight, self._taken)
            self.weights.append(weight)
            self.lines.append(f"{name} = weights[{weight!r}]")
        return self._weight_names[weight]

    def argument(self, value: Buffer | Memory) -> str:
        if isinstance(value, Buffer):
            return self.of(value)
        return self.of(value.buffer) + ("" if value.start == 0 else f"[{python_size(value.start)}:]")

    def _source(self, buffer: Buffer) -> str:
        if buffer.kind == "input":
            return f"inputs[{self._inputs[buffer.name]}].view(-1)"
        if buffer.kind == "output":
            number = next(i for i, b in enumerate(self._schedule.outputs) if b is buffer)
            return f"outputs[{number}].view(-1)"
        place = self._plan.places[buffer]
        size = f"{python_size(buffer.numel)} * {ITEM_BYTES[buffer.dtype]}"
        return f"memory[slots[{place}] : slots[{place}] + {size}].view({TORCH_TYPES[buffer.dtype]})"


def _copies(program: Program, schedule: Schedule, tensors: _Tensors) -> list[str]:
    """Outputs that are inputs, weights, or the same as another output."""
    lines = []
    for i, buffer in enumerate(schedule.outputs):
        if not isinstance(buffer, Buffer) or i in schedule.in_place:
            continue
        first = next(k for k, b in enumerate(schedule.outputs) if b is buffer)
        if buffer.kind == "output" and first == i:
            continue
        lines.append(f"outputs[{i}].view(-1).copy_({tensors.of(buffer)}[: outputs[{i}].numel()])")
    return lines


def identifier(name: str, taken: set[str]) -> str:
    """A Python name, unique among those taken."""
    text = "".join(c if c.isalnum() and c.isascii() else "_" for c in name)
    text = f"n{text}" if not text or text[0].isdigit() or text.startswith("_") else text
    text = f"{text}_" if keyword.iskeyword(text) or text in ("max", "min", "arena", "step", "NAME", "INDEX") else text
    chosen, count = text, 1
    while chosen in taken:
        chosen, count = f"{text}_{count}", count + 1
    taken.add(chosen)
    return chosen
