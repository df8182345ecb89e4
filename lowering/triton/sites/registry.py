"""Kinds of sites: how each is found in a graph, and how its call is printed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import sympy
import torch.fx as fx

from irc.core.errors import OptionError, nearest
from irc.core.program import Program
from irc.lowering.kernels.buffers import Buffer
from irc.lowering.kernels.definitions import Definer
from irc.lowering.kernels.signature import python_size
from irc.lowering.kernels.sites import Matcher, Memory, Site, TemplateCall
from irc.lowering.triton.options import TritonOptions

Match = Callable[[TritonOptions, Definer, fx.Node], Site | None]


@dataclass
class StepWriter:
    """What the text of a step gives to the sites that print their part of it.

    Attributes:
        program: whose step it is.
        options: of the target.
        pointer: the name of a buffer's tensor, one element after the other, in the step.
        weight: the name of a weight's tensor.
        kernel: adds a kernel by the name wanted, comments and text (with the name `NAME`), or finds one of equal text;
            returns its name.
        constant: adds a constant of the module, or finds an equal one; returns its name.
        imports: lines that the module begins with.
    """

    program: Program
    options: TritonOptions
    pointer: Callable[[Buffer], str]
    weight: Callable[[str], str]
    kernel: Callable[[str, Sequence[str], str], str]
    constant: Callable[[str, str], str]
    imports: set[str] = field(default_factory=set)

    def strided(self, memory: Memory) -> str:
        """A tensor of the step over a value in memory, with its shape and strides."""
        shape, strides = (", ".join(self.size(x) for x in xs) for xs in (memory.shape, memory.strides))
        comma = "," if len(memory.shape) == 1 else ""
        return f"torch.as_strided({self.dense(memory)}, ({shape}{comma}), ({strides}{comma}))"

    def dense(self, memory: Memory) -> str:
        """The tensor of a value that lies row by row: from its start on, one element after the other."""
        name = self.pointer(memory.buffer)
        return name if memory.start == 0 else f"{name}[{self.size(memory.start)}:]"

    def argument(self, value: Buffer | Memory) -> str:
        """A pointer of a printed kernel as it is given."""
        return self.pointer(value) if isinstance(value, Buffer) else self.dense(value)

    @staticmethod
    def size(expr: sympy.Expr | int) -> str:
        return python_size(expr)


Emit = Callable[[TemplateCall, StepWriter], list[str]]


@dataclass(frozen=True)
class SiteKind:
    """A template as programs use it.

    Attributes:
        match: the site of a node, or None.
        emit: lines of the step that compute it.
        order: kinds with a lower number are asked first.
        fallback: why a node of this kind counts as a fallback; empty: it does not.
    """

    name: str
    match: Match
    emit: Emit
    order: int = 10
    fallback: str = ""


_KINDS: dict[str, SiteKind] = {}


def register_site(kind: SiteKind) -> None:
    """Make a kind known.

    Raises:
        ValueError: the name is taken.
    """
    if kind.name in _KINDS:
        raise ValueError(f"two kinds of sites are called {kind.name!r}")
    _KINDS[kind.name] = kind


def matchers(options: TritonOptions) -> list[Matcher]:
    """Of all kinds that the options leave, in the order in which they are asked.

    Raises:
        OptionError: an unknown kind is to be printed.
    """
    for name in options.printed:
        if name not in _KINDS:
            raise OptionError(f"no kind of template is called {name!r}{nearest(name, _KINDS)}")
    kinds = sorted(_KINDS.values(), key=lambda k: (k.order, k.name))
    used = [k for k in kinds if k.name not in options.printed and (options.templates or k.fallback)]
    return [partial(kind.match, options) for kind in used]


def print_template(call: TemplateCall, writer: StepWriter) -> list[str]:
    """Lines of the step for a call."""
    return _KINDS[call.site.kind].emit(call, writer)


def fallback_of(site: Site) -> str:
    """Why a site is no kernel of this target's own; empty: it is one."""
    return _KINDS[site.kind].fallback
