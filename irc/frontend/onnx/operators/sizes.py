"""Sizes and constants: what shape arithmetic is made of, on numbers where all is known, else on tensors."""

from __future__ import annotations

import operator as python
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from irc.core.errors import CaptureError
from irc.frontend.onnx.calls import Call, Numbers, as_numbers, operator

_MOST_NUMBERS = 4096


@operator("Shape")
def shape(call: Call) -> Numbers:
    """Sizes as numbers, so that the tracer keeps them symbolic."""
    sizes = list(call.tensor(0).shape)
    return as_numbers(sizes[call.attribute("start", 0) : call.attribute("end")])


@operator("Size")
def size(call: Call) -> Numbers:
    """Number of elements."""
    return as_numbers(call.tensor(0).numel())


@operator("Constant")
def constant(call: Call) -> Any:
    """The value is read with the file; one of the attribute forms for small ones."""
    for name in ("value", "value_float", "value_int", "value_floats", "value_ints"):
        given = call.attribute(name)
        if given is None:
            continue
        if isinstance(given, (Tensor, np.ndarray)):
            return given
        if name in ("value_int", "value_ints"):
            return as_numbers(given)
        return torch.tensor(given, dtype=torch.float32)
    raise CaptureError(f"Constant {call.name!r} has no value that irc reads: {sorted(call.attributes)}")


@operator("ConstantOfShape")
def constant_of_shape(call: Call) -> Any:
    """A tensor of one number, 0.0 unless given."""
    given = call.attribute("value")
    sizes = call.ints(0)
    if isinstance(given, np.ndarray):
        fixed = all(isinstance(s, int) for s in sizes)
        if fixed and len(sizes) <= 1 and int(np.prod([1, *sizes])) <= _MOST_NUMBERS:
            return np.full([int(s) for s in sizes], given.ravel()[0], dtype=object)
        first = given.ravel()[0]
        dtype = torch.bool if isinstance(first, bool) else torch.int64
        return torch.full(sizes, first, dtype=dtype)
    fill = torch.zeros(1) if given is None else given
    return torch.full(sizes, fill.flatten()[0].item(), dtype=fill.dtype)


@operator("Range")
def range_(call: Call) -> Any:
    """start, start + step, … below the limit."""
    if call.known:
        start, limit, step = (call.numbers(i).item() for i in range(3))
        return torch.arange(start, limit, step, dtype=torch.int64)
    raise CaptureError(f"Range {call.name!r}: its bounds are computed from values at run time")


def _binary(name: str, numbers: Callable[[Any, Any], Any], tensors: Callable[[Tensor, Tensor], Tensor]) -> None:
    @operator(name)
    def run(call: Call) -> Any:
        if call.known:
            left, right = np.broadcast_arrays(call.numbers(0), call.numbers(1))
            values = [numbers(a, b) for a, b in zip(left.ravel(), right.ravel(), strict=True)]
            return as_numbers(values).reshape(left.shape)
        first, second = call.operand(0), call.operand(1)
        # PyTorch's functions want a tensor first.
        return tensors(first if isinstance(first, Tensor) else call.tensor(0), second)


def _divided(left: Any, right: Any) -> Any:
    """ONNX divides integers towards zero."""
    if isinstance(left, int) and isinstance(right, int):
        if right == 0:
            raise CaptureError("the graph divides a size by zero")
        return int(abs(left) // abs(right)) * (1 if (left >= 0) == (right >= 0) else -1)
    return left // right


def _same(left: Any, right: Any) -> Any:
    # A size is never negative: no guard is needed to know that it is not -1.
    if (isinstance(left, torch.SymInt) and isinstance(right, int) and right < 0) or (
        isinstance(right, torch.SymInt) and isinstance(left, int) and left < 0
    ):
        return False
    return left == right


def _divide(left: Tensor, right: Tensor | float) -> Tensor:
    if left.is_floating_point():
        return left / right
    return torch.div(left, right, rounding_mode="trunc")


_binary("Add", python.add, torch.add)
_binary("Sub", python.sub, torch.sub)
_binary("Mul", python.mul, torch.mul)
_binary("Div", _divided, _divide)
_binary("Equal", _same, torch.eq)
_binary("Greater", python.gt, torch.gt)
_binary("GreaterOrEqual", python.ge, torch.ge)
_binary("Less", python.lt, torch.lt)
_binary("LessOrEqual", python.le, torch.le)


@operator("Where")
def where(call: Call) -> Any:
    """The first where the condition holds, else the second."""
    if call.known:
        chosen, left, right = np.broadcast_arrays(*(call.numbers(i) for i in range(3)))
        if all(isinstance(c, (bool, np.bool_)) for c in chosen.ravel()):
            picked = [a if c else b for c, a, b in zip(chosen.ravel(), left.ravel(), right.ravel(), strict=True)]
            return as_numbers(picked).reshape(chosen.shape)
    return torch.where(call.tensor(0).bool(), call.tensor(1), call.tensor(2))


@operator("Gather")
def gather(call: Call) -> Any:
    """Rows along an axis; table lookups become embeddings."""
    axis = call.attribute("axis", 0)
    if call.known and all(isinstance(i, int) for i in call.ints(1)):
        index = call.numbers(1)
        return _array(
            np.take(call.numbers(0), [int(i) for i in index.ravel()], axis=axis), call.numbers(0), index, axis
        )
    x = call.tensor(0)
    axis %= x.dim()
    if isinstance_numbers(call, 1) and call.numbers(1).size == 1:
        index = call.numbers(1)
        taken = x.select(axis, int(index.item()))
        return taken if index.ndim == 0 else taken.unsqueeze(axis)
    indices = call.tensor(1)
    if axis == 0 and x.dim() == 2 and x.is_floating_point():
        return torch.nn.functional.embedding(indices.long(), x)
    flat = x.index_select(axis, indices.flatten().long())
    return flat.unflatten(axis, tuple(indices.shape)) if indices.dim() != 1 else flat


def isinstance_numbers(call: Call, index: int) -> bool:
    """True when an input is known as numbers."""
    try:
        call.numbers(index)
    except CaptureError:
        return False
    return True


def _array(taken: Any, data: Numbers, index: Numbers, axis: int) -> Numbers:
    result = np.empty(np.shape(taken), dtype=object)
    result[...] = taken
    return result.reshape(data.shape[:axis] + index.shape + data.shape[axis + 1 :])


@operator("Concat")
def concat(call: Call) -> Any:
    """Joined along an axis."""
    axis = call.attribute("axis", 0)
    if call.known:
        return np.concatenate([call.numbers(i) for i in range(len(call))], axis=axis)
    return torch.cat(call.tensors(), dim=axis)


@operator("Unsqueeze")
def unsqueeze(call: Call) -> Any:
    """Axes of size 1."""
    axes = call.axes("axes", 1) or []
    if call.known:
        return np.expand_dims(call.numbers(0), tuple(axes))
    x = call.tensor(0)
    rank = x.dim() + len(axes)
    for axis in sorted(a % rank for a in axes):
        x = x.unsqueeze(axis)
    return x


@operator("Squeeze")
def squeeze(call: Call) -> Any:
    """Without axes of size 1."""
    axes = call.axes("axes", 1)
    if isinstance_numbers(call, 0):
        return np.squeeze(call.numbers(0), tuple(axes) if axes is not None else None)
    x = call.tensor(0)
    return x.squeeze() if axes is None else x.squeeze(tuple(axes))


@operator("Reshape")
def reshape(call: Call) -> Any:
    """0 keeps a size, -1 is what remains."""
    sizes = call.ints(1)
    if isinstance_numbers(call, 0) and all(isinstance(s, int) for s in sizes):
        return call.numbers(0).reshape([int(s) for s in sizes])
    x = call.tensor(0)
    if not call.attribute("allowzero", 0):
        sizes = [x.shape[i] if isinstance(s, int) and s == 0 else s for i, s in enumerate(sizes)]
    return x.reshape(sizes)


@operator("Slice")
def slice_(call: Call) -> Any:
    """x[start:end:step] along axes."""
    if call.opset < 10:
        raise CaptureError("Slice of operator sets before 10 is not read: convert the model to a newer one")
    starts, ends = call.ints(1), call.ints(2)
    axes = [int(a) for a in call.ints(3)] if call.has(3) else list(range(len(starts)))
    steps = [int(s) for s in call.ints(4)] if call.has(4) else [1] * len(starts)
    # Cutting numbers at a symbolic size would fix it.
    if isinstance_numbers(call, 0) and not any(isinstance(n, torch.SymInt) for n in (*starts, *ends)):
        picked: list[Any] = [slice(None)] * call.numbers(0).ndim
        for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
            picked[axis] = slice(int(start), int(end), step)
        return call.numbers(0)[tuple(picked)]
    x = call.tensor(0)
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        if step == -1 and start in (-1,) and isinstance(end, int) and end <= -(1 << 31):
            x = x.flip(axis)
            continue
        if step < 1:
            raise CaptureError(f"Slice {call.name!r} goes backwards by {step}, which irc does not read")
        x = torch.ops.aten.slice.Tensor(x, axis, start, end, step)
    return x


@operator("Expand")
def expand(call: Call) -> Tensor:
    """Broadcast both ways: a size of 1 in the shape keeps the tensor's own."""
    x, sizes = call.tensor(0), call.ints(1)
    missing = len(sizes) - x.dim()
    own = [1] * missing + list(x.shape) if missing > 0 else list(x.shape)
    sizes = [1] * (len(own) - len(sizes)) + sizes
    return x.expand([o if isinstance(s, int) and s == 1 else s for s, o in zip(sizes, own, strict=True)])


@operator("Tile")
def tile(call: Call) -> Tensor:
    """Repeated along each axis."""
    return call.tensor(0).repeat(call.ints(1))


@operator("Cast", "CastLike")
def cast(call: Call) -> Any:
    """To another type; numbers stay numbers as long as they are integers."""
    if call.op == "CastLike":
        return call.tensor(0).to(call.tensor(1).dtype)
    dtype = call.attribute("to")
    if call.known and dtype in (torch.int64, torch.int32):
        return call.numbers(0)
    return call.tensor(0).to(dtype)


@operator("Identity", "Dropout")
def identity(call: Call) -> Any:
    """The value itself."""
    if isinstance_numbers(call, 0):
        return call.numbers(0)
    return call.tensor(0)


@operator("ReduceProd")
def reduce_prod(call: Call) -> Any:
    """Product over axes."""
    if isinstance_numbers(call, 0) and call.numbers(0).ndim == 1:
        product: Any = 1
        for number in call.ints(0):
            product = product * number
        return as_numbers([product] if call.attribute("keepdims", 1) else product)
    axes = call.axes("axes", 1)
    x = call.tensor(0)
    for axis in sorted((a % x.dim() for a in axes or range(x.dim())), reverse=True):
        x = x.prod(axis, keepdim=bool(call.attribute("keepdims", 1)))
    return x
