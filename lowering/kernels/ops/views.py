"""Operations that show or pick elements of their operands: reshapes, slices, concatenation, gathers, constants."""

from __future__ import annotations

from typing import Any

import sympy

from irc.lowering.kernels.definitions import At, Call, apply, convert, defines, literal, settle
from irc.lowering.kernels.indexing import ZERO, reshape_index, simplify
from irc.lowering.kernels.values import REGISTER, Literal, Value


@defines("aten.clone", "aten.contiguous", "aten.alias", "aten.detach", "aten.lift_fresh_copy", "aten.dropout",
         "aten.to.dtype_layout", kind="view")  # fmt: skip
def same(call: Call, index: At) -> Value:
    """self (dropout: in evaluation)."""
    first = next(iter(call._arguments))
    return settle(call.operand(first).at(index), call.dtype)


@defines("aten.reshape", "aten.view", "aten._unsafe_view", "aten.flatten.using_ints", "aten.unflatten.int", kind="view")
def reshape(call: Call, index: At) -> Value:
    """The same elements in row-major order under another shape."""
    x = call.operand("self")
    return x.at(tuple(reshape_index(index, call.shape, x.shape, call.ranges)))


@defines("aten.permute", kind="view")
def permute(call: Call, index: At) -> Value:
    """Axis i of the result is axis dims[i] of self."""
    x = call.operand("self")
    source: list[sympy.Expr] = [ZERO] * len(index)
    for i, axis in zip(index, call.raw("dims"), strict=True):
        source[int(axis) % len(index)] = i
    return x.at(tuple(source))


@defines("aten.transpose.int", kind="view")
def transpose(call: Call, index: At) -> Value:
    """Two axes exchanged."""
    source, rank = list(index), len(index)
    a, b = call.axis("dim0", rank), call.axis("dim1", rank)
    if rank:
        source[a], source[b] = source[b], source[a]
    return call.operand("self").at(tuple(source))


@defines("aten.t", kind="view")
def t(call: Call, index: At) -> Value:
    """The transpose of a matrix."""
    return call.operand("self").at(tuple(reversed(index)))


@defines("aten.expand", "aten.broadcast_to", "aten.expand_as", kind="view")
def expand(call: Call, index: At) -> Value:
    """Axes of one element repeated."""
    return call.operand("self").spread(index)


@defines("aten.unsqueeze", kind="view")
def unsqueeze(call: Call, index: At) -> Value:
    """An axis of one element inserted."""
    axis = call.axis("dim", len(index))
    return call.operand("self").at(index[:axis] + index[axis + 1 :])


@defines("aten.squeeze", "aten.squeeze.dim", "aten.squeeze.dims", kind="view")
def squeeze(call: Call, index: At) -> Value:
    """Axes of one element dropped."""
    x = call.operand("self")
    return x.at(tuple(reshape_index(index, call.shape, x.shape, call.ranges)))


@defines("aten.slice.Tensor", kind="view")
def slice_(call: Call, index: At) -> Value:
    """self[..., start::step, ...]."""
    x = call.operand("self")
    axis = call.axis("dim", len(index))
    start = _bounded(call.raw("start"), x.shape[axis])
    return x.at((*index[:axis], index[axis] * call.raw("step") + start, *index[axis + 1 :]))


def _bounded(start: Any, size: sympy.Expr) -> sympy.Expr:
    """A slice's start counted from the front and kept within the axis."""
    if start is None:
        return ZERO
    start = sympy.sympify(start)
    if start.is_negative:
        start = sympy.Max(start + size, 0) if not (start + size).is_nonnegative else start + size
    if start.is_Integer and size.is_Integer:
        return min(start, size)
    return start


@defines("aten.select.int", kind="view")
def select(call: Call, index: At) -> Value:
    """self[..., index, ...]."""
    x = call.operand("self")
    axis = call.axis("dim", len(x.shape))
    at = sympy.sympify(call.raw("index"))
    at = at + x.shape[axis] if at.is_negative else at
    return x.at((*index[:axis], at, *index[axis:]))


@defines("aten.split.Tensor", "aten.split_with_sizes", "aten.chunk", "aten.unbind.int", kind="view")
def split(call: Call, index: At) -> Value:
    """One piece of several along an axis."""
    x = call.operand("self")
    assert call.output is not None
    axis = call.axis("dim", len(x.shape))
    if "unbind" in str(call.node.target):
        return x.at((*index[:axis], sympy.Integer(call.output), *index[axis:]))
    start = sum((_sizes(call, i)[axis] for i in range(call.output)), ZERO)
    return x.at((*index[:axis], index[axis] + start, *index[axis + 1 :]))


def _sizes(call: Call, output: int) -> At:
    piece = call.node.meta["val"][output]
    return tuple(call.definer.program.expr(size) for size in piece.shape)


@defines("aten.flip", kind="view")
def flip(call: Call, index: At) -> Value:
    """Axes reversed."""
    x, source = call.operand("self"), list(index)
    for dim in call.raw("dims"):
        axis = int(dim) % len(index)
        source[axis] = x.shape[axis] - 1 - index[axis]
    return x.at(tuple(source))


@defines("aten.repeat", kind="view")
def repeat(call: Call, index: At) -> Value:
    """self tiled."""
    from torch.utils._sympy.functions import Mod

    x = call.operand("self")
    own = index[len(index) - len(x.shape) :]
    return x.at(tuple(ZERO if size == 1 else simplify(Mod(i, size), call.ranges)
                      for i, size in zip(own, x.shape, strict=True)))  # fmt: skip


@defines("aten.repeat_interleave.self_int", kind="view", refuses=lambda c: None if c.has("dim") else "no dim")
def repeat_interleave(call: Call, index: At) -> Value:
    """Each element of an axis several times."""
    from torch.utils._sympy.functions import FloorDiv

    axis = call.axis("dim", len(index))
    source = simplify(FloorDiv(index[axis], call.raw("repeats")), call.ranges)
    return call.operand("self").at((*index[:axis], source, *index[axis + 1 :]))


@defines("aten.cat", "aten.concat", "aten.stack", kind="pointwise")
def cat(call: Call, index: At) -> Value:
    """Tensors behind one another along an axis (stack: along a new one)."""
    parts = call.operands("tensors")
    axis = call.axis("dim", len(index))
    stack = "stack" in str(call.node.target)
    starts, start = [], ZERO
    for part in parts:
        starts.append(start)
        start = start + (1 if stack else part.shape[axis])
    value: Value | None = None
    # From the last part to the first: what lies behind a part's end is a later part's.
    for part, first in reversed(list(zip(parts, starts, strict=True))):
        inside = () if stack else (simplify(index[axis] - first, call.ranges),)
        here = settle(part.at((*index[:axis], *inside, *index[axis + 1 :])), call.dtype)
        stop = call.definer.number(first + (1 if stack else part.shape[axis]))
        later = apply("ge", call.definer.number(index[axis]), stop, dtype="bool")
        value = here if value is None else apply("guard", later, value, here, dtype=here.dtype)
    assert value is not None
    return value


def _why_not_pad(call: Call) -> str | None:
    mode = call._arguments.get("mode", "constant")
    return None if mode == "constant" else f"padding mode {mode}"


@defines("aten.constant_pad_nd", "aten.pad", kind="pointwise", refuses=_why_not_pad)
def constant_pad(call: Call, index: At) -> Value:
    """self with constants around it."""
    x, pads = call.operand("self"), call.raw("pad")
    source, inside = list(index), None
    for k in range(len(pads) // 2):
        axis = len(index) - 1 - k
        source[axis] = index[axis] - pads[2 * k]
        for condition in _range_checks(call, source[axis], x.shape[axis]):
            inside = condition if inside is None else apply("logical_and", inside, condition)
    value = x.at(tuple(source))
    fill = literal(call.raw("value") or 0, call.dtype)
    return value if inside is None else apply("guard", inside, value, fill, dtype=value.dtype)


def _range_checks(call: Call, at: sympy.Expr, size: sympy.Expr) -> list[Value]:
    number = call.definer.number(at)
    return [apply("ge", number, literal(0), dtype="bool"),
            apply("lt", number, call.definer.number(sympy.sympify(size)), dtype="bool")]  # fmt: skip


@defines("aten.arange", "aten.arange.start", "aten.arange.start_step", kind="view")
def arange(call: Call, index: At) -> Value:
    """start + i · step."""
    start = call._sizes(call._arguments.get("start")) or 0
    step = call._sizes(call._arguments.get("step")) or 1
    if all(not isinstance(v, float) for v in (start, step)):
        return settle(call.definer.number(sympy.sympify(start) + index[0] * step), call.dtype)
    dtype = REGISTER[call.dtype]
    scaled = apply("mul", convert(call.definer.number(index[0]), dtype), literal(step, call.dtype))
    return apply("add", scaled, literal(start, call.dtype))


_CONSTANTS = ("full", "full_like", "scalar_tensor", "zeros", "ones", "zeros_like", "ones_like", "new_zeros", "new_ones",
              "new_full", "empty_like")  # fmt: skip


@defines(*(f"aten.{name}" for name in _CONSTANTS), kind="view")
def full(call: Call, index: At) -> Value:
    """One number everywhere."""
    name = call.node.target._schema.name
    if "fill_value" in call._arguments:
        return settle(call.operand("fill_value").at(()), call.dtype)
    if name.endswith("scalar_tensor"):
        return settle(call.operand("s").at(()), call.dtype)
    return literal(1 if "ones" in name else 0, call.dtype)


@defines("aten.tril", "aten.triu", kind="pointwise")
def triangle(call: Call, index: At) -> Value:
    """The lower or upper triangle, zeros elsewhere."""
    x = call.operand("self").at(index)
    column, row = (call.definer.number(i) for i in (index[-1] - int(call.raw("diagonal")), index[-2]))
    keep = apply("le" if "tril" in str(call.node.target) else "ge", column, row, dtype="bool")
    return apply("where", keep, x, literal(0, call.dtype), dtype=x.dtype)


# ---------------------------------------------------------------- gathers


def from_end(call: Call, position: Value, size: sympy.Expr) -> sympy.Expr:
    """A position that may be negative as an index."""
    position = convert(position, "i64")
    if not isinstance(position, Literal):
        wrapped = apply("add", position, call.definer.number(size))
        negative = apply("lt", position, literal(0), dtype="bool")
        position = apply("where", negative, wrapped, position, dtype="i64")
    elif position.value < 0:
        return size + int(position.value)
    return call.definer.gathered(position, size)


@defines("aten.embedding", kind="pointwise")
def embedding(call: Call, index: At) -> Value:
    """weight[indices]."""
    weight, indices = call.operand("weight"), call.operand("indices")
    row = call.definer.gathered(convert(indices.at(index[:-1]), "i64"), weight.shape[0])
    return weight.at((row, index[-1]))


@defines("aten.index_select", kind="pointwise")
def index_select(call: Call, index: At) -> Value:
    """self[..., index, ...] along an axis."""
    x, axis = call.operand("self"), call.axis("dim", len(index))
    at = call.definer.gathered(convert(call.operand("index").at((index[axis],)), "i64"), x.shape[axis])
    return x.at((*index[:axis], at, *index[axis + 1 :]))


@defines("aten.gather", kind="pointwise")
def gather_(call: Call, index: At) -> Value:
    """self[..., index[...], ...] along an axis."""
    x, axis = call.operand("self"), call.axis("dim", len(index))
    at = call.definer.gathered(convert(call.operand("index").at(index), "i64"), x.shape[axis])
    return x.at((*index[:axis], at, *index[axis + 1 :]))


def _why_not_index(call: Call) -> str | None:
    given = [call.as_operand(i) for i in call._arguments["indices"] if i is not None]
    return "a mask as index" if any(i.dtype == "bool" for i in given) else None


@defines("aten.index.Tensor", kind="pointwise", refuses=_why_not_index)
def index_tensor(call: Call, index: At) -> Value:
    """self[i, j, ...] with tensors of positions, as NumPy places them."""
    x = call.operand("self")
    given = [None if i is None else call.as_operand(i) for i in call._arguments["indices"]]
    given += [None] * (len(x.shape) - len(given))
    places = [axis for axis, item in enumerate(given) if item is not None]
    rank = max(len(item.shape) for item in given if item is not None)
    adjacent = places == list(range(places[0], places[-1] + 1))
    first = places[0] if adjacent else 0
    common, rest = index[first : first + rank], list(index[:first] + index[first + rank :])
    source = []
    for axis, item in enumerate(given):
        source.append(rest.pop(0) if item is None else from_end(call, item.spread(common), x.shape[axis]))
    return x.at(tuple(source))
