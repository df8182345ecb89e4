"""Operations that PyTorch computes: products and convolutions that no template takes, and whatever has no definition.

Products would be printed as plain loops, which a GPU runs far below its speed; what has no definition by element (a
sort, the largest k) could not be printed at all. Either is reported as a fallback.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor

from irc.core.program import VAL
from irc.core.target import op_name
from irc.lowering.kernels.definitions import Call, Definer, definition_of
from irc.lowering.kernels.sites import Site, TemplateCall
from irc.lowering.kernels.stored import WRITES
from irc.lowering.triton.expressions import STORAGE_TYPES
from irc.lowering.triton.options import TritonOptions
from irc.lowering.triton.sites.registry import SiteKind, StepWriter, register_site

_OPERATIONS = {
    "aten.linear", "aten.matmul", "aten.mm", "aten.bmm", "aten.addmm", "aten.convolution", "aten.conv2d", "aten.conv1d",
}  # fmt: skip


def match(options: TritonOptions, definer: Definer, node: fx.Node) -> Site | None:
    """The site of an operation that PyTorch computes, or of one of its results, or None."""
    made, value = _operation(node), node.meta.get(VAL)
    if made is None or not isinstance(value, Tensor) or value.is_complex():
        return None
    if definer.dtype(node) not in STORAGE_TYPES or not _wanted(definer, node, made):
        return None
    operands = [n for n in made.all_input_nodes if isinstance(n.meta.get(VAL), Tensor)]
    if any(definer.dtype(n) not in STORAGE_TYPES for n in operands if not n.meta[VAL].is_complex()):
        return None
    if any(n.meta[VAL].is_complex() for n in operands):
        return None
    return Site("torch", node, tuple((operand, "rows") for operand in dict.fromkeys(operands)), op_name(made))


def _operation(node: fx.Node) -> fx.Node | None:
    """The operation that computes a node: its own, or that of which it is one result."""
    source = node.args[0] if node.target is operator.getitem else node
    if not isinstance(source, fx.Node) or not isinstance(source.target, torch._ops.OpOverload):
        return None
    return None if source.target._schema.is_mutable else source


def _wanted(definer: Definer, node: fx.Node, made: fx.Node) -> bool:
    definition = definition_of(node)
    if op_name(made) in _OPERATIONS:
        return True
    if op_name(made) in WRITES:
        return False
    return definition is None or definition.refuses(Call(definer, node)) is not None


def emit(call: TemplateCall, writer: StepWriter) -> list[str]:
    """The operation on tensors over the operands' memory, copied to the result's."""
    node = call.site.node
    made = _operation(node)
    assert made is not None
    memories = dict(zip((read for read, _ in call.site.reads), call.reads, strict=True))

    def text(value: Any) -> str:
        if isinstance(value, fx.Node):
            known = memories.get(value)
            return writer.size(writer.program.expr(value.meta[VAL])) if known is None else writer.strided(known)
        if isinstance(value, (list, tuple)):
            return f"[{', '.join(text(v) for v in value)}]"
        if isinstance(value, torch.device):
            return "memory.device"
        return repr(value)

    arguments = [text(a) for a in made.args] + [f"{k}={text(v)}" for k, v in made.kwargs.items()]
    result = f"torch.ops.{made.target}({', '.join(arguments)})"
    if made is not node:
        result += f"[{node.args[1]}]"
    return [f"{writer.pointer(call.write)}.copy_({result}.reshape(-1))"]


register_site(SiteKind("torch", match, emit, order=90, fallback="computed by PyTorch: no kernel takes it"))
