"""Bugs planted in passes: the real pass runs, then its result is spoiled the way a mistake in its code would."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch.fx as fx
from torch import Tensor

from irc.core.contract import Pass, PassContext, PassResult
from irc.core.ops import is_irc_op
from irc.core.program import Program

Plant = Callable[[Program, list[fx.Node]], fx.Node]


def planted(inner: Pass, plant: Plant, blamed: list[str]) -> Pass:
    """The same pass with a mistake at the end of `run`; the spoiled node's name is put into `blamed`."""

    def run(self: Pass, program: Program, ctx: PassContext) -> PassResult:
        known = {node.name for node in program.graph.nodes}
        result = type(inner).run(self, program, ctx)
        new = [node for node in result.program.graph.nodes if node.name not in known]
        blamed.append(plant(result.program, new).name)
        result.program.graph.lint()
        return dataclasses.replace(result, modified=True)

    cls = dataclass(frozen=True, kw_only=True)(type("Planted", (type(inner),), {"run": run}))
    fields = {f.name: getattr(inner, f.name) for f in dataclasses.fields(inner)}
    planted_pass: Pass = cls(**fields)
    return planted_pass


def op(nodes: list[fx.Node], name: str) -> fx.Node:
    """The first of the nodes whose operation is `irc::name` or `aten::name`."""
    for node in nodes:
        if is_irc_op(node.target, name) or getattr(node.target, "_schema", node).name == f"aten::{name}":
            return node
    raise AssertionError(f"no {name} among {[str(n.target) for n in nodes]}")


def set_argument(name: str, index: int, value: object) -> Plant:
    """A wrong constant, e.g. another eps."""

    def plant(program: Program, new: list[fx.Node]) -> fx.Node:
        node = op(new, name)
        node.args = (*node.args[:index], value, *node.args[index + 1 :])
        return node

    return plant


def set_keyword(name: str, **values: object) -> Plant:
    """A wrong option, e.g. a window that is off by one."""

    def plant(program: Program, new: list[fx.Node]) -> fx.Node:
        node = op(new, name)
        changed = {k: v(node.kwargs[k]) if callable(v) else v for k, v in values.items()}
        node.kwargs = dict(node.kwargs) | changed
        return node

    return plant


def swap_arguments(name: str, a: int, b: int) -> Plant:
    """Two operands the wrong way round."""

    def plant(program: Program, new: list[fx.Node]) -> fx.Node:
        node = op(new, name)
        args = list(node.args)
        args[a], args[b] = args[b], args[a]
        node.args = tuple(args)
        return node

    return plant


def spoil_weight(name: str, index: int, change: Callable[[Tensor], Tensor]) -> Plant:
    """A new weight that was computed wrongly; the operation that reads it is to blame."""

    def plant(program: Program, new: list[fx.Node]) -> fx.Node:
        node = op(new, name)
        weight = node.args[index]
        assert isinstance(weight, fx.Node)
        assert weight.op == "get_attr"
        wrong = program.weight_node(f"{weight.target}_wrong", change(program.weight(weight)), before=node)
        node.replace_input_with(weight, wrong)
        return node

    return plant


def spoil_kept(name: str, index: int, change: Callable[[Tensor], Tensor]) -> Plant:
    """A wrong new weight in an operation that was there before: the `index`-th of that name."""

    def plant(program: Program, new: list[fx.Node]) -> fx.Node:
        named = [n for n in program.operations() if str(n.target) == f"aten.{name}.default"]
        node, weight = named[index], named[index].args[1]
        assert weight in new
        return spoil_weight(name, 1, change)(program, [node])

    return plant


def spoil_constant(change: Callable[[Tensor], Tensor]) -> Plant:
    """A folded constant of the wrong value."""

    def plant(program: Program, new: list[fx.Node]) -> fx.Node:
        node = next(n for n in new if n.op == "get_attr")
        name = program.add_weight("wrong", change(program.weight(node)))
        node.target = name
        return node

    return plant


def bypass(name: str) -> Plant:
    """A live operation removed as if it did nothing; its user now reads another value."""

    def plant(program: Program, new: list[fx.Node]) -> fx.Node:
        node = op(list(program.graph.nodes), name)
        source, user = node.all_input_nodes[0], next(iter(node.users))
        node.replace_all_uses_with(source)
        program.graph.erase_node(node)
        return user

    return plant


def confuse(name: str) -> Plant:
    """Two different operations taken for the same one."""

    def plant(program: Program, new: list[fx.Node]) -> fx.Node:
        same = [n for n in program.graph.nodes if getattr(n.target, "_schema", n).name == f"aten::{name}"]
        first, second = same[0], same[1]
        user = next(iter(second.users))
        second.replace_all_uses_with(first)
        program.graph.erase_node(second)
        return user

    return plant


def swap_halves(program: Program, new: list[fx.Node]) -> fx.Node:
    """A merged linear whose parts are taken in the wrong order: the first wrong part is to blame."""
    split = op(new, "split_with_sizes") if any("split_with_sizes" in str(n.target) for n in new) else op(new, "split")
    items = sorted(split.users, key=lambda n: n.args[1])
    same = [n for n in items if n.meta["val"].shape == items[-1].meta["val"].shape]
    a, b = same[-2], same[-1]
    a.args, b.args = (split, b.args[1]), (split, a.args[1])
    return a


def forget_mask(program: Program, new: list[fx.Node]) -> fx.Node:
    """An operation that the pass had no business with."""
    return set_keyword("attention", mask="full")(program, list(program.graph.nodes))
