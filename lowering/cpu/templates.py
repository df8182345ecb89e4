"""How sites become calls of the kernel templates in `irc.lowering.cpp.templates`: one `Emitter` a kind of site."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from irc.core.program import Program
from irc.lowering.cpu.weights import WeightBlock
from irc.lowering.kernels.buffers import Buffer
from irc.lowering.kernels.sites import Matcher, TemplateCall

PointerOf = Callable[[Buffer], str]


@dataclass(frozen=True)
class PrintedTemplate:
    """A call as C++.

    Attributes:
        includes: headers that it needs.
        statement: what every worker runs.
        scratch: C++ expression of the bytes that it needs beside its operands (over `workers` and the sizes); empty:
            none.
    """

    includes: tuple[str, ...]
    statement: str
    scratch: str = ""


Emit = Callable[[TemplateCall, PointerOf, Program, WeightBlock], PrintedTemplate]


@dataclass(frozen=True)
class Emitter:
    """A kind of site: how it is found in a graph, and how its call is printed."""

    kind: str
    match: Matcher
    emit: Emit


_EMITTERS: dict[str, Emitter] = {}


def register_emitter(emitter: Emitter) -> None:
    """Make a kind of site known.

    Raises:
        ValueError: the kind is taken.
    """
    if emitter.kind in _EMITTERS:
        raise ValueError(f"two emitters are called {emitter.kind!r}")
    _EMITTERS[emitter.kind] = emitter


def matchers() -> list[Matcher]:
    """Of all kinds of sites, in the order in which they were registered."""
    return [emitter.match for emitter in _EMITTERS.values()]


def print_template(call: TemplateCall, pointer: PointerOf, program: Program, weights: WeightBlock) -> PrintedTemplate:
    """Print a call."""
    return _EMITTERS[call.site.kind].emit(call, pointer, program, weights)
