"""What a program costs: floating point operations and bytes moved, as sympy expressions over its dimensions.

One multiply–add counts as two operations. Bytes are those of each operation's inputs and outputs, as if
nothing were fused or cached; views move nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import sympy
import torch
import torch.fx as fx
from torch import Tensor

from irc.core.dims import dim_symbol
from irc.core.errors import IrcError
from irc.core.ops.registry import find_op
from irc.core.program import VAL, Program, is_size
from irc.core.typed import TypeMemo

Shape = tuple[sympy.Expr, ...]
Arguments = Mapping[str, Any]
ZERO = sympy.Integer(0)

# Operators that compute nothing: they rename, select, place or copy values. Views are known by their schema.
_MOVES = frozenset(
    """
    clone contiguous reshape _to_copy to cat stack concat index gather index_select embedding scatter index_put
    slice_scatter select_scatter copy masked_fill where repeat repeat_interleave constant_pad_nd pad roll flip
    tril triu arange zeros ones full empty zeros_like ones_like full_like empty_like new_zeros new_ones new_full
    new_empty eye scalar_tensor one_hot lift_fresh_copy split chunk unbind split_with_sizes dropout flatten
    meshgrid unflatten _unsafe_view type_as movedim tile hstack vstack
    topk sort argsort max_pool2d max_pool2d_with_indices nonzero expand_copy alias_copy upsample_nearest2d
    """.split()  # noqa: SIM905  (so many names are read more easily without quotes)
)


def node_flops(program: Program, node: fx.Node) -> sympy.Expr:
    """Operations of one node. Elementwise operators and reductions count one for each element they read or make."""
    if node.op != "call_function" or is_size(node) or not isinstance(node.target, torch._ops.OpOverload):
        return ZERO
    arguments = _arguments(program, node)
    definition = find_op(node.target)
    if definition is not None:
        return sympy.sympify(definition.flops(**arguments))
    name = node.target._schema.name.partition("::")[2]
    output = _output_shapes(program, node)
    formula = _FORMULAS.get(name)
    if formula is not None:
        return sympy.sympify(formula(arguments, output))
    if name in _MOVES or _is_view(node.target) or name.startswith("_assert"):
        return ZERO
    read = [_numel(shape) for shape in _input_shapes(program, node)]
    return _largest([*read, *(_numel(shape) for shape in output)], program)


def node_bytes(program: Program, node: fx.Node) -> sympy.Expr:
    """Bytes that one node reads and writes; 0 for views, sizes, inputs and weights."""
    if node.op != "call_function" or is_size(node) or not isinstance(node.target, torch._ops.OpOverload):
        return ZERO
    if _is_view(node.target):
        return ZERO
    name = node.target._schema.name
    inputs = [i.meta.get(VAL) for i in node.all_input_nodes]
    outputs = _tensors(node.meta.get(VAL))
    written = sum((_bytes(program, t) for t in outputs), ZERO)
    if name == "aten::embedding":
        # It reads the rows it returns, and the indices, not the whole table.
        indices = _tensors(node.args[1].meta[VAL]) if isinstance(node.args[1], fx.Node) else []
        return 2 * written + sum((_bytes(program, t) for t in indices), ZERO)
    return written + sum((_bytes(program, t) for value in inputs for t in _tensors(value)), ZERO)


def program_flops(program: Program) -> sympy.Expr:
    """Operations of the whole program."""
    memo = TypeMemo.of(program.fake_mode)
    known: dict[Hashable, sympy.Expr] = {}  # the layers of a model are alike: by operator, constants and types
    counts: Counter[sympy.Expr] = Counter()
    for node in program.graph.nodes:
        key = None
        if node.op == "call_function" and all(VAL in used.meta for used in node.all_input_nodes):
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda used: used.meta[VAL])
            key = memo.key(node.target, args, kwargs)
        flops = known.get(key) if key is not None else None
        if flops is None:
            flops = node_flops(program, node)
            if key is not None:
                known[key] = flops
        counts[flops] += 1
    return sympy.Add(*(times * flops for flops, times in counts.items()))


def program_bytes(program: Program) -> sympy.Expr:
    """Bytes that all operations read and write, as if nothing were fused."""
    return sympy.Add(*(node_bytes(program, node) for node in program.graph.nodes))


def evaluate_cost(expr: sympy.Expr, program: Program, sizes: Mapping[str, int] | None = None) -> int:
    """A cost as a number, at the dimensions' hints, or at `sizes` where those are given.

    Raises:
        IrcError: the cost depends on a size that is no dimension of the program.
    """
    point = {dim_symbol(d.name): sympy.Integer((sizes or {}).get(d.name, d.hint)) for d in program.dims.values()}
    value = sympy.sympify(expr).xreplace(point)
    if value.free_symbols:
        raise IrcError(
            f"the cost {expr} depends on {', '.join(sorted(map(str, value.free_symbols)))}, whose size is unknown"
        )
    return int(value)


# -------------------------------------------------------------------- shapes


def _arguments(program: Program, node: fx.Node) -> dict[str, Any]:
    """The node's arguments by name, tensors as shapes, sizes as expressions; positional ones keep their schema name."""
    assert isinstance(node.target, torch._ops.OpOverload)
    names = [a.name for a in node.target._schema.arguments]
    given = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    return {key: _abstract(program, value) for key, value in given.items()}


def _abstract(program: Program, value: Any) -> Any:
    if isinstance(value, fx.Node):
        return _abstract_value(program, value.meta.get(VAL))
    if isinstance(value, (list, tuple)):
        return [_abstract(program, item) for item in value]
    return value


def _abstract_value(program: Program, value: Any) -> Any:
    if isinstance(value, Tensor):
        return _shape(program, value)
    if isinstance(value, (list, tuple)):
        return [_abstract_value(program, item) for item in value]
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return program.expr(value)
    return value


def _shape(program: Program, tensor: Tensor) -> Shape:
    return tuple(program.expr(size) for size in tensor.shape)


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [t for item in value for t in _tensors(item)] if isinstance(value, (list, tuple)) else []


def _output_shapes(program: Program, node: fx.Node) -> list[Shape]:
    return [_shape(program, t) for t in _tensors(node.meta.get(VAL))]


def _input_shapes(program: Program, node: fx.Node) -> list[Shape]:
    return [_shape(program, t) for i in node.all_input_nodes for t in _tensors(i.meta.get(VAL))]


def _numel(shape: Shape) -> sympy.Expr:
    return sympy.Mul(*shape)


def _bytes(program: Program, tensor: Tensor) -> sympy.Expr:
    return _numel(_shape(program, tensor)) * tensor.element_size()


def _largest(counts: list[sympy.Expr], program: Program) -> sympy.Expr:
    """The count that is largest at the hints (a `Max` of expressions would be unreadable)."""
    return max(counts, key=lambda c: _at_hints(c, program), default=ZERO)


def _at_hints(expr: sympy.Expr, program: Program) -> float:
    point = {dim_symbol(d.name): sympy.Integer(d.hint) for d in program.dims.values()}
    value = expr.xreplace(point)
    return float(value) if value.is_number else 0.0


def _is_view(target: torch._ops.OpOverload) -> bool:
    return any(r.alias_info is not None and not r.alias_info.is_write for r in target._schema.returns)


# -------------------------------------------------------------------- formulas


def _linear(a: Arguments, out: list[Shape]) -> sympy.Expr:
    bias = _numel(out[0]) if a.get("bias") is not None else ZERO
    return 2 * _numel(out[0]) * a["weight"][-1] + bias


def _matrix_product(a: Arguments, out: list[Shape]) -> sympy.Expr:
    inner = a["self"][-1]
    return 2 * _numel(out[0]) * inner


def _added_product(first: str) -> Callable[[Arguments, list[Shape]], sympy.Expr]:
    return lambda a, out: 2 * _numel(out[0]) * a[first][-1] + _numel(out[0])


def _convolution(a: Arguments, out: list[Shape]) -> sympy.Expr:
    weight = a["weight"]
    bias = _numel(out[0]) if a.get("bias") is not None else ZERO
    if a.get("transposed") is True or ("output_padding" in a and a.get("transposed") is not False):
        # Transposed: every input element meets the kernel once.
        source = a.get("input", a.get("self"))
        return 2 * _numel(source) * _numel(weight[1:]) + bias
    # [O, I / groups, kernel…]: each output element takes one filter.
    return 2 * _numel(out[0]) * _numel(weight[1:]) + bias


def _attention(a: Arguments, out: list[Shape]) -> sympy.Expr:
    query, key, value = a["query"], a["key"], a["value"]
    return _numel(query[:-1]) * key[-2] * (2 * query[-1] + 2 * value[-1] + 5)


_FORMULAS: dict[str, Callable[[Arguments, list[Shape]], sympy.Expr]] = {
    "linear": _linear,
    "mm": _matrix_product, "bmm": _matrix_product, "matmul": _matrix_product, "mv": _matrix_product,
    "dot": _matrix_product,
    "addmm": _added_product("mat1"), "baddbmm": _added_product("batch1"), "addmv": _added_product("mat"),
    "convolution": _convolution, "conv1d": _convolution, "conv2d": _convolution, "conv3d": _convolution,
    "conv_transpose1d": lambda a, out: _convolution({**a, "transposed": True}, out),
    "conv_transpose2d": lambda a, out: _convolution({**a, "transposed": True}, out),
    "conv_transpose3d": lambda a, out: _convolution({**a, "transposed": True}, out),
    "scaled_dot_product_attention": _attention,
    "_scaled_dot_product_flash_attention": _attention,
    "_scaled_dot_product_flash_attention_for_cpu": _attention,
    "_scaled_dot_product_efficient_attention": _attention,
    "_scaled_dot_product_cudnn_attention": _attention,
    "softmax": lambda a, out: 5 * _numel(out[0]), "_softmax": lambda a, out: 5 * _numel(out[0]),
    "log_softmax": lambda a, out: 5 * _numel(out[0]), "_log_softmax": lambda a, out: 5 * _numel(out[0]),
    "layer_norm": lambda a, out: 8 * _numel(out[0]), "native_layer_norm": lambda a, out: 8 * _numel(out[0]),
    "group_norm": lambda a, out: 8 * _numel(out[0]), "rms_norm": lambda a, out: 4 * _numel(out[0]),
    "batch_norm": lambda a, out: 2 * _numel(out[0]),
    "outer": lambda a, out: _numel(out[0]),
}  # fmt: skip
