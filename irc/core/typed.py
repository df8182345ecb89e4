"""Remember that a node's recorded type was computed, so that nobody computes it again.

PyTorch's shape functions take about a millisecond an operation, and every pass types and verifies the whole
program. A type follows from the operator, the constants and the types of the inputs; where all of these are
the very same objects as when it was computed, it still holds. Copies of a program share those objects.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.fx as fx
from torch import Tensor

VAL = "val"
_PROOF = "irc_typed"
# Compared by value; anything else (tensors, symbolic sizes: comparing those adds guards) by identity.
_PLAIN = (bool, int, float, complex, str, torch.dtype, torch.device, torch.layout, torch.memory_format)
_SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)


def record(node: fx.Node) -> None:
    """Note that `meta["val"]` of an operation is what its operator gives for its inputs' present types."""
    if node.op == "call_function" and all(VAL in used.meta for used in node.all_input_nodes):
        inputs = fx.map_arg((node.args, node.kwargs), lambda used: used.meta[VAL])
        node.meta[_PROOF] = (node.target, inputs, node.meta[VAL])


def holds(node: fx.Node) -> bool:
    """Whether `meta["val"]` was computed by this call from the types its inputs have now."""
    proof = node.meta.get(_PROOF)
    if proof is None or node.op != "call_function":
        return False
    target, (args, kwargs), result = proof
    return (
        node.target is target
        and node.meta.get(VAL) is result
        and _identical(node.args, args)
        and _identical(node.kwargs, kwargs)
    )


def alike(a: Any, b: Any) -> bool:
    """Whether two types are one and the same in every respect, layout in memory included; adds no guards."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        plain = (a.dtype, a.device, a.layout, a.dim()) == (b.dtype, b.device, b.layout, b.dim())
        return plain and alike(_numbers(a), _numbers(b))
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
        return len(a) == len(b) and all(alike(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, _SYMBOLIC) and type(a) is type(b):
        return bool(a.node.expr == b.node.expr)
    return a is b or (isinstance(a, _PLAIN) and type(a) is type(b) and a == b)


def _numbers(tensor: Tensor) -> tuple[Any, ...]:
    return (*tensor.shape, *tensor.stride(), tensor.storage_offset()) if tensor.layout == torch.strided else ()


def _identical(now: Any, then: Any) -> bool:
    if isinstance(now, fx.Node):
        return VAL in now.meta and now.meta[VAL] is then
    if isinstance(now, (tuple, list)):
        same_length = isinstance(then, (tuple, list)) and len(now) == len(then)
        return same_length and all(_identical(a, b) for a, b in zip(now, then, strict=True))
    if isinstance(now, dict):
        return isinstance(then, dict) and now.keys() == then.keys() and all(_identical(now[k], then[k]) for k in now)
    return now is then or (isinstance(now, _PLAIN) and type(now) is type(then) and now == then)
