"""From a program to a Python function: constants folded, weights placed, cache writes made in place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor

from irc.core.operands import apply_op, input_node
from irc.core.ops.cache import as_bytes
from irc.core.ops.registry import find_op, is_irc_op
from irc.core.program import VAL, Program
from irc.lowering.reference import pages

aten = torch.ops.aten


@dataclass
class Executable:
    """A compiled graph.

    Attributes:
        run: flat inputs → flat outputs. With `in_place`, caches given as inputs are written into.
        weight_bytes: bytes of all weights as they lie in memory.
        notes: what was done to the graph.
    """

    run: Callable[..., list[Any]]
    weight_bytes: int
    notes: list[str] = field(default_factory=list)


def build(program: Program, *, device: torch.device, fold_dequantize: bool, in_place: bool) -> Executable:
    """Compile a program's graph for a device. The program stays as it is."""
    own, notes = program.copy(), list[str]()
    if fold_dequantize:
        folded = _fold_dequantize(own)
        if folded:
            notes.append(f"{folded} quantized weights are dequantized once, when the program is loaded")
    if in_place:
        functional = _write_in_place(own) + _plan_pages(own)
        if functional:
            notes.append(f"caches that are copied at every step, because others read them too: {', '.join(functional)}")
    _place(own, device)
    own.erase_dead()
    weight_bytes = own.weight_bytes
    _call_references(own.graph)
    own.graph.set_codegen(fx.graph.CodeGen())
    own.graph_module.recompile()
    module = own.graph_module

    def run(*inputs: Any) -> list[Any]:
        with torch.inference_mode():
            result = module(*inputs)
        return list(result) if isinstance(result, (tuple, list)) else [result]

    return Executable(run, weight_bytes, notes)


def _fold_dequantize(program: Program) -> int:
    """Replace dequantize(stored weights) by what it gives; returns how many."""
    count = 0
    for node in list(program.operations()):
        if not is_irc_op(node.target, "dequantize"):
            continue
        if not all(used.op == "get_attr" for used in node.all_input_nodes):
            continue
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: program.weight(n).detach())
        with torch.no_grad():
            value = apply_op(node, *args, **kwargs)
        weight = program.weight_node(f"{input_node(node).target}_dequantized", value, before=node)
        program.replace(node, weight)
        count += 1
    program.erase_dead()
    return count


def write_in_place(cache: Tensor, value: Tensor, positions: Tensor) -> Tensor:
    """`irc::cache_write` into the cache itself."""
    index = positions.unsqueeze(1).unsqueeze(-1).expand(-1, value.shape[1], -1, value.shape[3])
    as_bytes(cache).scatter_(2, index, as_bytes(value.to(cache.dtype)))
    return cache


def _write_in_place(program: Program) -> list[str]:
    """Let cache writes whose result continues their input write into it; returns the caches where they may not."""
    placeholders, outputs, refused = program.placeholders, program.outputs, []
    for output, source in program.aliases.items():
        write, cache = outputs[output], placeholders[source]
        if isinstance(write, fx.Node) and is_irc_op(write.target, "paged_cache_write"):
            continue
        owned = isinstance(write, fx.Node) and is_irc_op(write.target, "cache_write") and write.args[0] is cache
        if owned and set(cache.users) == {write}:
            write.target = write_in_place
        else:
            refused.append(str(cache.target))
    return refused


def _plan_pages(program: Program) -> list[str]:
    """Let attentions over pages share one plan of the step, and writes go into the pages; returns those that may not.

    Only programs in which all attentions and writes use the same tables, positions and slots are rewritten: those that
    cache insertion makes.
    """
    writes = [n for n in program.operations() if is_irc_op(n.target, "paged_cache_write")]
    reads = [n for n in program.operations() if is_irc_op(n.target, "paged_attention")]
    caches = [node.args[0] for node in writes]
    if not reads:
        return []
    alone = all(isinstance(c, fx.Node) and c.op == "placeholder" and len(c.users) == 1 for c in caches)
    shared = {tuple(node.args[3:6]) for node in reads}
    slots = {node.args[2] for node in writes}
    if not alone or len(shared) != 1 or len(slots) != 1:
        return [str(c) for c in caches]
    graph, inputs = program.graph, (*shared.pop(), slots.pop())
    with graph.inserting_before(writes[0]):
        block_size = int(input_node(writes[0]).meta[VAL].shape[1])
        plan = graph.call_function(pages.plan_step, (*inputs, block_size))
    for node in writes:
        node.target, node.args = pages.write_pages, (node.args[0], node.args[1], plan)
    for node in reads:
        for operand in {n for n in node.args[1:3] if isinstance(n, fx.Node) and n not in writes}:
            if is_irc_op(operand.target, "dequantize"):
                operand.target = pages.stored_pages
            elif operand.target is aten._to_copy.default:
                operand.target = pages.converted_pages
        node.target, node.args = pages.attend_pages, (*node.args[:3], plan)
    return []


def _place(program: Program, device: torch.device) -> None:
    """Move weights, and constants made inside the graph, to a device."""
    for name, tensor in program.weights.items():
        if tensor.device != device:
            _set(program.graph_module, name, tensor.detach().to(device))
    for node in program.graph.nodes:
        if node.op == "call_function":
            node.args = _on(device, node.args)
            node.kwargs = _on(device, dict(node.kwargs))


def _set(module: torch.nn.Module, target: str, tensor: Tensor) -> None:
    *path, leaf = target.split(".")
    for step in path:
        module = getattr(module, step)
    delattr(module, leaf)
    module.register_buffer(leaf, tensor)


def _on(device: torch.device, value: Any) -> Any:
    if isinstance(value, torch.device):
        return device
    if isinstance(value, (tuple, list)):
        return type(value)(_on(device, item) for item in value)
    if isinstance(value, dict):
        return {key: _on(device, item) for key, item in value.items()}
    return value


def _call_references(graph: fx.Graph) -> None:
    """Call the reference functions of irc ops directly: the dispatcher would only find them again."""
    for node in graph.nodes:
        definition = find_op(node.target)
        if definition is not None:
            node.target = definition.reference
