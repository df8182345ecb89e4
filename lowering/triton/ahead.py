"""Compiling a program's kernels for a GPU that is not here: finds what the interpreter lets pass, and what code costs.

The step runs on tensors without memory (PyTorch's meta device), with its kernels exchanged for recorders, so the types
of all arguments are those of a real call.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from irc.core.errors import TargetError
from irc.lowering.kernels.signature import Signature
from irc.lowering.triton.module import import_module, interpreting

_TYPES = {
    torch.float64: "fp64", torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.int64: "i64",
    torch.int32: "i32", torch.int16: "i16", torch.int8: "i8", torch.uint8: "u8", torch.bool: "i1",
    torch.float8_e4m3fn: "fp8e4nv", torch.float8_e5m2: "fp8e5",
}  # fmt: skip
_OPTIONS = ("num_warps", "num_stages")
_LIBRARY = "irc.lowering.triton.library"
_WITH_KERNELS = ("attention",)  # modules of the library that templates launch kernels of


@dataclass(frozen=True)
class CompiledKernel:
    """A kernel as compiled for a GPU.

    Attributes:
        name: in the program's module.
        ptx: its code.
        shared_bytes: shared memory of a program.
        warps: of a program.
    """

    name: str
    ptx: str
    shared_bytes: int
    warps: int


def compile_ahead(source: str, signature: Signature, weights: dict[str, Tensor], sizes: Sequence[int],
                  capability: int = 90) -> list[CompiledKernel]:  # fmt: skip
    """Compile every kernel that a step of these sizes launches.

    Args:
        source: of a program, as target `triton` prints it.
        sizes: of its dimensions, in order.
        capability: of the GPU, e.g. 80 or 90.

    Raises:
        TargetError: Triton runs its interpreter in this process, which cannot compile.
        triton.CompilationError: a kernel does not compile.
    """
    if interpreting():
        raise TargetError("kernels cannot be compiled where TRITON_INTERPRET is set")
    from triton.backends.compiler import GPUTarget

    target = GPUTarget("cuda", capability, 32)
    launches = record(import_module(source), signature, weights, sizes)
    compiled: dict[str, CompiledKernel] = {}
    for launch in launches:
        if launch.key not in compiled:
            compiled[launch.key] = launch.compile(target)
    return list(compiled.values())


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel: arguments by name, with what is not theirs (warps, stages)."""

    name: str
    function: Any
    arguments: dict[str, Any]
    options: dict[str, int]

    @property
    def key(self) -> str:
        kinds, constants, _ = self._specialised()
        return f"{self.name}{kinds}{constants}{self.options}"

    def _specialised(self) -> tuple[dict[str, Any], dict[tuple[int, ...], Any], dict[tuple[int, ...], Any]]:
        """(type of each argument, values of those that are constant, attributes), as a call would have them."""
        constant = {p.name for p in self.function.params if p.is_constexpr}
        general = {p.name for p in self.function.params if p.do_not_specialize}
        kinds: dict[str, Any] = {}
        constants: dict[tuple[int, ...], Any] = {}
        attributes: dict[tuple[int, ...], Any] = {}

        def kind(value: Any, path: tuple[int, ...]) -> Any:
            if isinstance(value, tuple):
                return tuple(kind(x, (*path, i)) for i, x in enumerate(value))
            if value is None or (isinstance(value, int) and value == 1):
                constants[path] = value
                return "constexpr"
            if isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0):
                attributes[path] = [["tt.divisibility", 16]]
            return f"*{_TYPES[value.dtype]}" if isinstance(value, Tensor) else _number_type(value)

        for place, (name, value) in enumerate(self.arguments.items()):
            if name in constant:
                kinds[name], constants[(place,)] = "constexpr", value
            elif name in general and isinstance(value, int):
                kinds[name] = _number_type(value)
            else:
                kinds[name] = kind(value, (place,))
        return kinds, constants, attributes

    def compile(self, target: Any) -> CompiledKernel:
        """The kernel for a GPU, specialised as a call with these arguments would have it."""
        import triton
        from triton.compiler import ASTSource

        kinds, constants, attributes = self._specialised()
        source = ASTSource(self.function, kinds, constexprs=constants, attrs=attributes)
        made = triton.compile(source, target=target, options=self.options)
        return CompiledKernel(self.name, made.asm["ptx"], made.metadata.shared, made.metadata.num_warps)


def record(module: ModuleType, signature: Signature, weights: dict[str, Tensor], sizes: Sequence[int]) -> list[Launch]:
    """The launches of a step of these sizes, none of which happens."""
    launches: list[Launch] = []
    places = [module, *(importlib.import_module(f"{_LIBRARY}.{name}") for name in _WITH_KERNELS)]
    kernels = [(place, name, value) for place in places for name, value in vars(place).items()
               if hasattr(value, "arg_names")]  # fmt: skip
    for place, name, function in kernels:
        setattr(place, name, _Recorder(name, function, launches))
    try:
        inputs = [torch.empty(shape, dtype=kind, device="meta")
                  for shape, (_, kind) in zip(signature.shapes(sizes), signature.inputs, strict=True)]  # fmt: skip
        outputs: list[Any] = []
        for shape, kind, source in zip(signature.results(sizes), signature.outputs, signature.in_place, strict=True):
            fresh = None if kind is None else torch.empty(shape, dtype=kind, device="meta")
            outputs.append(inputs[source] if source is not None else fresh)
        slots = module.arena(*sizes)
        memory = torch.empty(max(slots[-1], 1), dtype=torch.uint8, device="meta")
        flat = {name: weight.to("meta").reshape(-1) for name, weight in weights.items()}
        module.step(inputs, outputs, flat, memory, slots, *sizes)
    finally:
        for place, name, function in kernels:
            setattr(place, name, function)
    return launches


class _Recorder:
    """Takes a kernel's place, and remembers how it was launched."""

    def __init__(self, name: str, function: Any, launches: list[Launch]) -> None:
        self._name, self._function, self._launches = name, function, launches

    def __getitem__(self, grid: tuple[int, ...]) -> _Recorder:
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        options = {name: kwargs.pop(name) for name in _OPTIONS if name in kwargs}
        bound = inspect.signature(self._function.fn).bind(*args, **kwargs)
        bound.apply_defaults()
        self._launches.append(Launch(self._name, self._function, dict(bound.arguments), options))


def _number_type(value: float | int) -> str:
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(1 << 31) <= value < 1 << 31 else "i64"
