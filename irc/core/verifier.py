"""Check every rule of the IR and report all that are broken at once.

The rules: each node is defined before its use and belongs to the graph; only inputs, weights, operators and
size arithmetic; arguments fit the operator's schema; types are what the operations give; weights exist, are dense
tensors of a known type; ties and aliases point at something of the same type; outputs fit the output structure;
every operation knows where it came from.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor

from irc.core import typed
from irc.core.contract import Finding
from irc.core.errors import IrcError, VerificationError
from irc.core.listing.printer import operation_text
from irc.core.listing.values import is_dim_name, type_text
from irc.core.program import VAL, Program, describe, dtype_name, is_size
from irc.core.provenance import location, module_path, sources_of
from irc.core.schema import argument_problems, refusal
from irc.core.sizes import is_size_function
from irc.core.text.parser import same_size

_NODE_KINDS = ("placeholder", "get_attr", "call_function", "output")


def verify(program: Program, *, provenance: bool = False) -> None:
    """Check that a program keeps the rules of the IR: structure, types, weights. Numbers are not compared.

    Args:
        provenance: also demand that every operation knows its source, as it does after capture.

    Raises:
        VerificationError: with every broken rule.
    """
    findings = find_problems(program, provenance=provenance)
    if not findings:
        return
    lines = []
    nodes = {node.name: node for node in program.graph.nodes}
    for finding in findings:
        lines.append(f"{finding.node}: {finding.problem}")
        node = nodes.get(finding.node)
        if node is None:
            continue
        if node.op == "call_function":
            try:
                lines.append(f"    {operation_text(program, node)}")
            except (IrcError, AttributeError, TypeError, KeyError) as error:
                lines.append(f"    (the node cannot be printed: {error})")
        where = " ".join(filter(None, (module_path(node), location(node))))
        if where:
            lines.append(f"    from {where}")
    count = f"{len(findings)} broken rule{'s' * (len(findings) > 1)}"
    raise VerificationError(f"program {program.name} has {count}\n" + "\n".join(lines), node=findings[0].node)


def find_problems(program: Program, *, provenance: bool = False) -> list[Finding]:
    """Every broken rule, in graph order, with the name of the node it is about (the program's, if none)."""
    structure = list(_structure(program))
    findings = structure + list(_weights(program)) + list(_signature(program))
    broken = {finding.node for finding in structure}
    findings += list(_types(program, broken))
    if provenance:
        for node in program.operations():
            if not sources_of(node):
                findings.append(Finding(node.name, "does not know which captured operation it comes from"))
    order = {node.name: index for index, node in enumerate(program.graph.nodes)}
    return sorted(findings, key=lambda f: order.get(f.node, -1))


# -------------------------------------------------------------------- structure


def _structure(program: Program) -> Iterator[Finding]:
    seen: set[fx.Node] = set()
    names: set[str] = set()
    outputs, started = 0, False
    for node in program.graph.nodes:
        if node.op not in _NODE_KINDS:
            yield Finding(node.name, f"a program has no {node.op} nodes")
        if node.name in names:
            yield Finding(node.name, "two nodes have this name")
        names.add(node.name)
        for used in node.all_input_nodes:
            if used not in seen:
                gone = used._erased or used.graph is not program.graph
                problem = "which is not in the graph" if gone else "which is defined after it"
                yield Finding(node.name, f"uses %{used.name}, {problem}")
        seen.add(node)
        if node.op == "placeholder" and started:
            yield Finding(node.name, "an input after an operation")
        started = started or node.op == "call_function"
        outputs += node.op == "output"
        if node.op == "call_function":
            yield from _call(node)
    if outputs != 1:
        yield Finding(program.name, f"a program has one output node, this has {outputs}")


def _call(node: fx.Node) -> Iterator[Finding]:
    if node.target is operator.getitem:
        yield from _getitem(node)
    elif isinstance(node.target, torch._ops.OpOverload) and not is_size_function(node.target):
        reason = refusal(node.target)
        if reason is not None:
            yield Finding(node.name, reason)
        for problem in argument_problems(node.target, node.args, node.kwargs):
            yield Finding(node.name, f"{node.target} {problem}")
    elif not is_size_function(node.target):
        yield Finding(node.name, f"calls {node.target}, which is no operator and no size arithmetic")
    elif VAL in node.meta and not is_size(node):
        yield Finding(node.name, f"calls {node.target} on tensors; use the operator of aten")


def _getitem(node: fx.Node) -> Iterator[Finding]:
    if len(node.args) != 2 or not isinstance(node.args[0], fx.Node) or not isinstance(node.args[1], int):
        yield Finding(node.name, "must take one result, by number, of an operation with several")
        return
    results = node.args[0].meta.get(VAL)
    if not isinstance(results, (tuple, list)):
        yield Finding(node.name, f"takes a result of %{node.args[0].name}, which has only one")
    elif not 0 <= node.args[1] < len(results):
        yield Finding(node.name, f"takes result {node.args[1]} of the {len(results)} of %{node.args[0].name}")


# -------------------------------------------------------------------- weights, inputs, outputs


def _weights(program: Program) -> Iterator[Finding]:
    names = set()
    for node in program.graph.find_nodes(op="get_attr"):
        try:
            tensor = program.weight(node)
        except VerificationError as error:
            yield Finding(node.name, str(error))
            continue
        names.add(str(node.target))
        if tensor.layout != torch.strided:
            yield Finding(node.name, f"weight {node.target} is {tensor.layout}; weights are dense")
            continue
        try:
            dtype_name(tensor.dtype)
        except KeyError:
            yield Finding(node.name, f"weight {node.target} has type {tensor.dtype}, which programs do not have")
    for alias, name in program.tied.items():
        if alias in names:
            yield Finding(program.name, f"{alias} is tied to {name} and a weight of its own")


def _signature(program: Program) -> Iterator[Finding]:
    for name, dim in program.dims.items():
        if name != dim.name or not is_dim_name(name):
            yield Finding(program.name, f"a dimension cannot be called {name!r} (its own name: {dim.name!r})")
    targets = program.input_names
    for name in {n for n in targets if targets.count(n) > 1}:
        yield Finding(program.name, f"two inputs are called {name!r}")
    try:
        outputs = program.outputs
    except (RuntimeError, AssertionError, IndexError, StopIteration):
        return  # no output node: reported with the structure
    places = program.out_spec.num_leaves
    if places != len(outputs):
        yield Finding(program.name, f"{len(outputs)} outputs for the {places} places of the output structure")
    if program.in_spec.num_leaves < len(targets):
        yield Finding(
            program.name, f"{len(targets)} inputs for the {program.in_spec.num_leaves} places of the input structure"
        )
    if program.example_inputs is not None and len(program.example_inputs) != len(targets):
        yield Finding(program.name, f"{len(program.example_inputs)} example inputs for {len(targets)} inputs")
    for out, into in program.aliases.items():
        yield from _alias(program, outputs, out, into)


def _alias(program: Program, outputs: list[Any], out: int, into: int) -> Iterator[Finding]:
    inputs = program.placeholders
    if not (0 <= out < len(outputs) and 0 <= into < len(inputs)):
        yield Finding(program.name, f"alias of output {out} and input {into}: there is no such output or input")
        return
    value = outputs[out]
    given = value.meta.get(VAL) if isinstance(value, fx.Node) else value
    expected = inputs[into].meta.get(VAL)
    if not _same(program, given, expected):
        yield Finding(
            program.name,
            f"output {out} ({_shown(program, given)}) continues input {into} ({_shown(program, expected)}):"
            " both must have one type",
        )


# -------------------------------------------------------------------- types


def _types(program: Program, broken: set[str]) -> Iterator[Finding]:
    """Recompute every type from the inputs' and compare; a node whose inputs have no type is left out."""
    values: dict[fx.Node, Any] = {}
    with torch.no_grad():
        for node in program.graph.nodes:
            if node.op == "output":
                continue
            known = all(used in values for used in node.all_input_nodes)
            if VAL not in node.meta:
                yield Finding(node.name, "has no type (`meta['val']`): insert nodes with program.insert")
            if node.name in broken or not known:
                continue
            if typed.holds(node):
                values[node] = node.meta[VAL]
                continue
            try:
                values[node] = program._infer(node, values)
            except VerificationError as error:
                if node.op != "get_attr":  # a missing weight is reported as such
                    yield Finding(node.name, str(error))
                continue
            if VAL in node.meta and not _same(program, node.meta[VAL], values[node]):
                yield Finding(
                    node.name,
                    f"is typed {_shown(program, node.meta[VAL])}, but gives {_shown(program, values[node])}",
                )
                continue
            if VAL in node.meta:
                if typed.alike(node.meta[VAL], values[node]):
                    typed.record(node)
                # What follows is computed from the recorded value, so that one symbol stays one symbol.
                values[node] = node.meta[VAL]


def _same(program: Program, a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        if a.dtype != b.dtype or a.dim() != b.dim() or a.device != b.device:
            return False
        return all(_same(program, x, y) for x, y in zip(a.shape, b.shape, strict=True))
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
        return len(a) == len(b) and all(_same(program, x, y) for x, y in zip(a, b, strict=True))
    if a is None or b is None or isinstance(a, (Tensor, tuple, list)) or isinstance(b, (Tensor, tuple, list)):
        return a is None and b is None
    if type(a) is int and type(b) is int:
        return a == b
    return same_size(program, program.expr(a), b)


def _shown(program: Program, value: Any) -> str:
    try:
        return type_text(program, value)
    except (IrcError, KeyError):
        return describe(value)
