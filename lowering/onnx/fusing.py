"""Several operations → one ONNX operator: the registry of fusions.

A fusion only finds (matches, and skips with their reasons) and only writes what it found; finding changes nothing, so
that a report costs no weights. The graph nodes that it writes call builders, as translations do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor

from irc.core.contract import Skip
from irc.core.operands import apply_op, int_argument
from irc.core.program import VAL, Program
from irc.lowering.onnx.registry import Setting, bound

aten = torch.ops.aten


@dataclass(frozen=True)
class Match:
    """One place that a fusion can rewrite.

    Attributes:
        root: the node whose value the operator gives.
        parts: what the fusion needs to write it.
        covers: the nodes that the operator stands for.
    """

    root: fx.Node
    parts: dict[str, Any] = field(default_factory=dict)
    covers: tuple[fx.Node, ...] = ()


Find = Callable[[Setting, Program], "Iterator[Match | Skip]"]
Write = Callable[[Setting, Program, Match], None]


@dataclass(frozen=True)
class Fusion:
    """A registered fusion; `order` says which ones see the graph first."""

    onnx_op: str
    order: int
    flavours: tuple[str, ...]
    find: Find
    write: Write


_FUSIONS: dict[str, Fusion] = {}


def register_fusion(onnx_op: str, find: Find, write: Write, *, order: int, flavours: Sequence[str] = ("ort",)) -> None:
    """Make a fusion known."""
    if onnx_op in _FUSIONS:
        raise ValueError(f"two fusions make {onnx_op}")
    _FUSIONS[onnx_op] = Fusion(onnx_op, order, tuple(flavours), find, write)


def fusions(setting: Setting) -> list[Fusion]:
    """The fusions of a flavour, in order."""
    return sorted((f for f in _FUSIONS.values() if setting.flavour in f.flavours), key=lambda f: f.order)


def fuse(setting: Setting, program: Program) -> None:
    """Edits the program: every match of every fusion becomes its operator."""
    for fusion in fusions(setting):
        for match in [found for found in fusion.find(setting, program) if isinstance(found, Match)]:
            fusion.write(setting, program, match)
        program.erase_dead()


def call(
    program: Program, setting: Setting, build: Callable[..., Any], *args: Any, before: fx.Node, **kwargs: Any
) -> fx.Node:
    """A typed graph node that calls a builder."""
    with program.graph.inserting_before(before):
        node = program.graph.create_node("call_function", bound(setting, build), args, kwargs, name=build.__name__)
    values = fx.map_arg((args, kwargs), lambda n: n.meta[VAL])
    with torch.no_grad(), program.fake_mode:
        node.meta[VAL] = apply_op(node, *values[0], **values[1])
    return node


def weight_of(program: Program, node: Any) -> Tensor | None:
    """The stored tensor behind a node, or None when the node is computed."""
    return program.weight(node).detach() if isinstance(node, fx.Node) and node.op == "get_attr" else None


def only_user(node: fx.Node) -> fx.Node | None:
    """The single user of a node, or None."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def swaps_heads(node: Any) -> bool:
    """True for `transpose(x, 1, 2)` of four dimensions."""
    return (
        isinstance(node, fx.Node)
        and node.target is aten.transpose.int
        and node.meta[VAL].dim() == 4
        and {int_argument(node, n) % 4 for n in (1, 2)} == {1, 2}
    )


def is_reshape(node: Any) -> bool:
    """True for a view or reshape."""
    return isinstance(node, fx.Node) and node.target in (aten.view.default, aten.reshape.default)
