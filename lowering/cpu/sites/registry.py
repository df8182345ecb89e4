"""Kinds of sites: how each is found in a graph, and how its call is printed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch.fx as fx

from irc.core.errors import OptionError, nearest
from irc.core.program import Program
from irc.lowering.cpp.function import PrintedFunction
from irc.lowering.cpu.options import CpuOptions
from irc.lowering.cpu.weights import WeightBlock
from irc.lowering.kernels.definitions import Definer
from irc.lowering.kernels.sites import Matcher, Site, TemplateCall

Match = Callable[[CpuOptions, Definer, fx.Node], Site | None]
Emit = Callable[[TemplateCall, Program, WeightBlock], PrintedFunction]


@dataclass(frozen=True)
class SiteKind:
    """A template of `irc.lowering.cpp.templates` as programs use it.

    Attributes:
        match: the site of a node, or None.
        emit: the function that runs it; packs the weights that it needs.
        order: kinds with a lower number are asked first.
    """

    name: str
    match: Match
    emit: Emit
    order: int = 10


_KINDS: dict[str, SiteKind] = {}


def register_site(kind: SiteKind) -> None:
    """Make a kind known.

    Raises:
        ValueError: the name is taken.
    """
    if kind.name in _KINDS:
        raise ValueError(f"two kinds of sites are called {kind.name!r}")
    _KINDS[kind.name] = kind


def matchers(options: CpuOptions) -> list[Matcher]:
    """Of all kinds that the options leave, in the order in which they are asked.

    Raises:
        OptionError: an unknown kind is to be printed.
    """
    for name in options.printed:
        if name not in _KINDS:
            raise OptionError(f"no kind of template is called {name!r}{nearest(name, _KINDS)}")
    kinds = sorted(_KINDS.values(), key=lambda k: (k.order, k.name))
    return [partial(kind.match, options) for kind in kinds if kind.name not in options.printed]


def print_template(call: TemplateCall, program: Program, weights: WeightBlock) -> PrintedFunction:
    """The function of a call."""
    return _KINDS[call.site.kind].emit(call, program, weights)
