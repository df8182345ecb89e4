"""What printers give: C++ functions that all workers call, and what templates do with their results."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import sympy

from irc.lowering.kernels.buffers import Buffer
from irc.lowering.kernels.sites import Memory


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
        seconds: what a compiler takes for it, roughly, beside reading its headers.
    """

    name: str
    comment: tuple[str, ...]
    parameters: tuple[str, ...]
    body: str
    arguments: tuple[Buffer | Memory | str, ...]
    sizes: tuple[sympy.Symbol, ...]
    includes: tuple[str, ...] = ()
    scratch: str = ""
    seconds: float = 0.15

    @property
    def key(self) -> str:
        """Equal for functions that do the same."""
        return f"{self.parameters}{self.sizes}{self.body}"

    def text(self, name: str) -> str:
        """The whole function under a name."""
        comment = "".join(f"// {line}\n" for line in self.comment)
        return f"{comment}{self._head(name)} {{\n{self.body}}}\n"

    def declaration(self, name: str) -> str:
        return f"{self._head(name)};\n"

    def _head(self, name: str) -> str:
        parameters = [*self.parameters, *(f"int64_t {size.name}" for size in self.sizes)]
        return f"void {name}(irc::Worker& worker, {', '.join(parameters)})"

    def call(self, name: str, arguments: Sequence[str], worker: str = "worker") -> str:
        return f"{name}({worker}, {', '.join((*arguments, *(size.name for size in self.sizes)))});"


@dataclass(frozen=True)
class PrintedEpilogue:
    """What a template does with its result, as a C++ lambda `(int64_t m, int64_t n0, int64_t n1, const float* values)`.

    Attributes:
        text: the lambda; with `takes_sums` the declaration of an `epilogue` that takes sums from the registers.
        parameters, arguments, sizes: what it uses, as of `PrintedFunction`.
    """

    text: str
    parameters: tuple[str, ...]
    arguments: tuple[Buffer | str, ...]
    sizes: tuple[sympy.Symbol, ...]
    takes_sums: bool = False
