"""Quantized weights in ONNX: `irc.dequantize(stored, …)` → `DequantizeLinear` over the same integers.

1. Before export, each dequantize of stored weights becomes a symbolic ONNX node of the domain `irc`, which
   nothing decomposes or folds.
2. Afterwards that node becomes `DequantizeLinear`: per tensor, per channel, or with blocks along the last axis.

Two 4-bit integers lie in a byte in the same order in both formats, so the bytes are taken as they are: as
UINT4, for signed formats with 8 added to the zero point, as they are stored. Integers of other widths are
8-bit integers in ONNX. A dequantize of values computed at run time is left to its decomposition. Weights in formats
other than integers (floats of 8 and 4 bits, GGUF blocks) are written as plain floats; `check` says so.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
import torch.fx as fx
from torch import Tensor

from irc.core import formats
from irc.core.errors import TargetError
from irc.core.operands import input_node
from irc.core.ops.registry import is_irc_op
from irc.core.program import VAL, Program
from irc.lowering.onnx.fusing import is_reshape

_DOMAIN = "irc"
_NIBBLE_OFFSET = 8
_FLOATS: list[tuple[torch.dtype, ir.DataType]] = [
    (torch.float32, ir.DataType.FLOAT),
    (torch.float16, ir.DataType.FLOAT16),
    (torch.bfloat16, ir.DataType.BFLOAT16),
    (torch.float64, ir.DataType.DOUBLE),
]


def _opaque(
    stored: Tensor, scale: Tensor, zero_point: Tensor | None, format: str, dtype: int, shape: list[int]
) -> Tensor:
    inputs = (stored, scale) if zero_point is None else (stored, scale, zero_point)
    return torch.onnx.ops.symbolic(
        f"{_DOMAIN}::Dequantize",
        inputs,
        {"format": format, "dtype": dtype, "shape": shape},
        dtype=_FLOATS[dtype][0],
        shape=shape,
        version=1,
    )


def stored_weights(program: Program) -> Iterator[tuple[fx.Node, formats.Format]]:
    """Every dequantize of stored weights with its format."""
    for node in list(program.operations()):
        if is_irc_op(node.target, "dequantize") and all(n.op == "get_attr" for n in node.all_input_nodes):
            yield node, formats.parse(str(node.kwargs["format"]))


def fold_other_formats(program: Program) -> None:
    """Weights that `DequantizeLinear` cannot read become plain floats."""
    for node, chosen in stored_weights(program):
        if isinstance(chosen, formats.QuantFormat):
            continue
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: program.weight(n).detach())
        with torch.no_grad():
            value = torch.ops.irc.dequantize(*args, **kwargs)
        program.replace(node, program.weight_node(f"{node.args[0]}_dequantized", value, before=node))
    program.erase_dead()


def keep_opaque(program: Program) -> int:
    """Let every dequantize of stored integers call the opaque operator; returns how many."""
    count = 0
    for node, chosen in stored_weights(program):
        if not isinstance(chosen, formats.QuantFormat):
            continue
        stored, scale, zero_point = node.args[:3]
        dtype: Any = node.kwargs.get("dtype") or program.weight(input_node(node, 1)).dtype
        index = [known for known, _ in _FLOATS].index(dtype)
        shape = list(node.meta[VAL].shape)
        arguments = (stored, scale, zero_point, node.kwargs["format"], index)
        for user in list(node.users):
            # The kernel of a convolution: rows seen as [O, C, ...]. Scales of rows serve it as they are.
            if is_reshape(user) and chosen.group_size is None and user.meta[VAL].shape[0] == shape[0]:
                user.target, user.args, user.kwargs = _opaque, (*arguments, list(user.meta[VAL].shape)), {}
                count += 1
        if node.users:
            node.target, node.args, node.kwargs = _opaque, (*arguments, shape), {}
            count += 1
    return count


def lower_opaque(model: ir.Model) -> None:
    """Replace the nodes of the domain `irc` by `DequantizeLinear`."""
    graph = model.graph
    for node in list(graph):
        if node.domain == _DOMAIN:
            _lower(graph, node)
    unused = [name for name, value in graph.initializers.items() if not value.uses() and not value.is_graph_output()]
    for name in unused:
        del graph.initializers[name]
    model.opset_imports.pop(_DOMAIN, None)


def _lower(graph: ir.Graph, node: ir.Node) -> None:
    stored, scale, zero_point = (*node.inputs, None)[:3]
    assert stored is not None
    assert scale is not None
    chosen = formats.parse(node.attributes["format"].as_string())
    assert isinstance(chosen, formats.QuantFormat)
    wanted = _FLOATS[node.attributes["dtype"].as_int()][1]
    if stored.const_value is None or scale.const_value is None:
        raise TargetError(f"quantized weight {stored.name} is no stored tensor in the ONNX model")
    scales = scale.const_value.numpy()
    if scale.const_value.dtype != wanted and scales.dtype.itemsize < 4:
        scales = scales.astype(np.float32)  # products are rounded once, to the type that is wanted
    zeros = None
    if zero_point is not None and zero_point.const_value is not None:
        zeros = zero_point.const_value.numpy().astype(np.int16)
    shape = tuple(node.attributes["shape"].as_ints())
    attributes: dict[str, Any] = {}
    # Zero points are written even where all are 0: ONNX Runtime's own rewriting of 8-bit weights relies on them.
    if chosen.per_tensor:
        scales, zeros = scales.reshape(()), None if zeros is None else zeros.reshape(())
    elif chosen.group_size is None and scales.size == shape[0]:  # what runtimes know as "per channel"
        scales, zeros = scales.reshape(-1), np.zeros(shape[0], np.int16) if zeros is None else zeros.reshape(-1)
        attributes = {"axis": 0}
    else:
        attributes = {"axis": len(shape) - 1, "block_size": shape[-1] // scales.shape[-1]}
        if zeros is None and not chosen.packs_two:
            zeros = np.zeros(scales.shape, np.int16)
    integers, kind = _integers(stored, shape, chosen)
    if chosen.packs_two and chosen.signed:
        zeros = (np.zeros(scales.shape, np.int16) if zeros is None else zeros) + _NIBBLE_OFFSET
    inputs = [integers, _initializer(graph, f"{stored.name}.scale", ir.Tensor(np.ascontiguousarray(scales)))]
    graph.initializers[integers.name] = integers  # type: ignore[index]  # it was made with a name
    if zeros is not None:
        inputs.append(_initializer(graph, f"{stored.name}.zero_point", _packed(zeros, kind)))
    new = ir.node("DequantizeLinear", inputs, attributes)
    out = new.outputs[0]
    out.name, out.shape, out.type = (
        node.outputs[0].name,
        ir.Shape(shape),
        ir.TensorType(ir.DataType.from_numpy(scales.dtype)),
    )
    made = [new]
    if ir.DataType.from_numpy(scales.dtype) != wanted:
        out.name = f"{node.outputs[0].name}.unrounded"
        made.append(ir.node("Cast", [out], {"to": wanted}))
        out = made[-1].outputs[0]
        out.name, out.shape, out.type = node.outputs[0].name, ir.Shape(shape), ir.TensorType(wanted)
    graph.insert_before(node, made)
    node.outputs[0].replace_all_uses_with(out)
    graph.remove(node, safe=True)


def _integers(stored: ir.Value, shape: tuple[int, ...], chosen: formats.QuantFormat) -> tuple[ir.Value, ir.DataType]:
    assert stored.const_value is not None
    array = stored.const_value.numpy()
    name = f"{stored.name}.integers"
    if chosen.packs_two:
        tensor: Any = ir.PackedTensor(array.reshape(-1), ir.DataType.UINT4, shape=ir.Shape(shape), name=name)
        kind = ir.DataType.UINT4
    else:
        kind = stored.const_value.dtype
        tensor = ir.Tensor(array.reshape(shape), name=name)
    return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(kind), const_value=tensor), kind


def _packed(values: np.ndarray, kind: ir.DataType) -> Any:
    if kind == ir.DataType.UINT4:
        flat = values.astype(np.uint8).reshape(-1)
        flat = np.append(flat, np.zeros(len(flat) % 2, np.uint8))
        return ir.PackedTensor(flat[0::2] | (flat[1::2] << 4), kind, shape=ir.Shape(values.shape))
    return ir.Tensor(values.astype(kind.numpy()))


def _initializer(graph: ir.Graph, name: str, tensor: Any) -> ir.Value:
    chosen, count = name, 1
    while chosen in graph.initializers:
        chosen, count = f"{name}_{count}", count + 1
    tensor.name = chosen
    value = ir.Value(name=chosen, shape=ir.Shape(tensor.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.initializers[chosen] = value
    return value
