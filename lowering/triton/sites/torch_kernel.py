"""Products, convolutions and whatever else walks much memory for an element, by PyTorch's own kernels.

What no template takes would be printed as plain loops, which a GPU runs far below its speed.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.fx as fx
from torch import Tensor

from irc.core.program import VAL
from irc.core.target import op_name
from irc.lowering.kernels.definitions import Call, Definer
from irc.lowering.kernels.sites import Site, TemplateCall
from irc.lowering.triton.expressions import STORAGE_TYPES
from irc.lowering.triton.options import TritonOptions
from irc.lowering.triton.sites.registry import SiteKind, StepWriter, register_site

_OPERATIONS = {
    "aten.linear", "aten.matmul", "aten.mm", "aten.bmm", "aten.addmm", "aten.convolution", "aten.conv2d", "aten.conv1d",
}  # fmt: skip


def match(options: TritonOptions, definer: Definer, node: fx.Node) -> Site | None:
    """The site of an operation that PyTorch computes, or None."""
    if op_name(node) not in _OPERATIONS or definer.dtype(node) not in STORAGE_TYPES:
        return None
    call = Call(definer, node)
    if any(isinstance(item, fx.Node) for value in call._arguments.values() for item in _items(value)
           if isinstance(value, (list, tuple))):  # fmt: skip
        return None
    operands = [v for v in call._arguments.values() if isinstance(v, fx.Node) and isinstance(v.meta.get(VAL), Tensor)]
    return Site("torch", node, tuple((operand, "rows") for operand in dict.fromkeys(operands)), op_name(node))


def _items(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def emit(call: TemplateCall, writer: StepWriter) -> list[str]:
    """The operation on tensors over the operands' memory, copied to the result's."""
    node = call.site.node
    assert isinstance(node.target, torch._ops.OpOverload)
    memories = dict(zip((read for read, _ in call.site.reads), call.reads, strict=True))

    def text(value: Any) -> str:
        if isinstance(value, fx.Node):
            return writer.strided(memories[value])
        if isinstance(value, (list, tuple)):
            return f"[{', '.join(text(v) for v in value)}]"
        return repr(value)

    arguments = [text(a) for a in node.args] + [f"{k}={text(v)}" for k, v in node.kwargs.items()]
    result = f"torch.ops.{node.target}({', '.join(arguments)})"
    return [f"{writer.pointer(call.write)}.copy_({result}.reshape(-1))"]


register_site(SiteKind("torch", match, emit, order=90, fallback="computed by PyTorch's kernel: no template takes it"))
