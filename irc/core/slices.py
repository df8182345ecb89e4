"""Which values depend on data, and evaluation of those that depend on sizes alone.

Masks, position ids and rotary tables are computed from sizes, constants and weights but from no input
value. Such a *size-only* value can be evaluated at any sizes without running the model, which is how
masks are recognised by meaning instead of by spelling.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import sympy
import torch
import torch.fx as fx

from irc.core.errors import IrcError
from irc.core.program import VAL, Program, is_size


def data_dependent(program: Program, roots: Iterable[fx.Node] | None = None) -> set[fx.Node]:
    """Nodes whose value depends on the value of an input (of `roots`, default: all placeholders).

    A size of an input is no such dependence: sizes are symbolic and known without data.
    """
    tainted = set(program.placeholders if roots is None else roots)
    for node in program.graph.nodes:
        if node.op == "call_function" and not is_size(node) and any(i in tainted for i in node.all_input_nodes):
            tainted.add(node)
    return tainted


def evaluate_at(program: Program, nodes: Iterable[fx.Node], sizes: Mapping[str, int]) -> list[Any]:
    """Values of size-only nodes with the named dimensions set to `sizes`.

    Raises:
        IrcError: a node depends on an input's value or on a weight without data, or a dimension has no size.
    """
    wanted = list(nodes)
    needed = _backward_slice(wanted)
    values: dict[fx.Node, Any] = {}
    with torch.no_grad():
        for node in program.graph.nodes:
            if node not in needed:
                continue
            if is_size(node):
                values[node] = evaluate_size(program, node.meta[VAL], sizes)
            elif node.op == "get_attr":
                values[node] = program.weight(node)
                if values[node].device.type == "meta":
                    raise IrcError(f"weight {node.target!r} is on the meta device and has no values: load it first")
            elif node.op == "placeholder":
                raise IrcError(f"{wanted[0].name} depends on the value of input {node.name}")
            else:
                args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
                values[node] = node.target(*args, **kwargs)
    return [values[node] for node in wanted]


def evaluate_size(program: Program, size: Any, sizes: Mapping[str, int]) -> Any:
    """A symbolic size as a number, with the named dimensions set to `sizes`."""
    if not isinstance(size, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return size
    expr = size.node.expr
    names = {dim.symbol: dim.name for dim in program.dims.values()}
    missing = sorted(names.get(s, str(s)) for s in expr.free_symbols if names.get(s) not in sizes)
    if missing:
        raise IrcError(f"no size given for dimension {', '.join(missing)}")
    value = expr.xreplace({s: sympy.Integer(sizes[names[s]]) for s in expr.free_symbols})
    if isinstance(size, torch.SymBool):
        return bool(value)
    return int(value) if isinstance(size, torch.SymInt) else float(value)


def _backward_slice(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """The nodes and all they are computed from, stopping at sizes (they are known symbolically)."""
    found: set[fx.Node] = set()
    pending = list(nodes)
    while pending:
        node = pending.pop()
        if node in found:
            continue
        found.add(node)
        if not is_size(node):
            pending.extend(node.all_input_nodes)
    return found


def integer_constants(nodes: Iterable[fx.Node]) -> set[int]:
    """Every integer literal in the backward slice: probe masks beyond the largest of them."""
    constants: set[int] = set()

    def collect(value: Any) -> None:
        if isinstance(value, int) and not isinstance(value, bool):
            constants.add(value)
        elif isinstance(value, (list, tuple)):
            for item in value:
                collect(item)
        elif isinstance(value, dict):
            for item in value.values():
                collect(item)

    for node in _backward_slice(nodes):
        collect(node.args)
        collect(node.kwargs)
    return constants


__all__ = ["data_dependent", "evaluate_at", "evaluate_size", "integer_constants"]
