"""An ONNX graph as a module: each node runs with PyTorch."""

from __future__ import annotations

import inspect
import re
import types
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import irc.frontend.onnx.operators  # noqa: F401  (registers every operator)
from irc.core.errors import CaptureError, IrcError
from irc.frontend.onnx.calls import Call, Value, find_operator, to_numbers
from irc.frontend.onnx.patterns import DOMAIN, LINEAR, put_together
from irc.frontend.onnx.reading import DTYPES, read_tensor

_FOUR_BITS = ("INT4", "UINT4")
_UNSAFE = re.compile(r"\W+")


class OnnxModule(nn.Module):
    """Runs the nodes of a checked graph; its parameters and buffers are the graph's stored tensors, by their names.

    Raises:
        CaptureError: operators that are not read; lists all of them.
        StorageError: tensors that do not fit their data.
    """

    def __init__(self, model: Any, folder: Path) -> None:
        super().__init__()
        _check_supported(model)
        self._opsets = {
            entry.domain if entry.domain != "ai.onnx" else "": entry.version for entry in model.opset_import
        }
        self._numbers: dict[str, Value] = {}
        self._names: dict[str, str] = {}
        self._four_bits = _four_bit_names(model.graph)
        self._turned = _turned_names(model.graph)
        self._scalars: dict[str, float] = {}
        for tensor in model.graph.initializer:
            read = read_tensor(folder, tensor)
            self._store(tensor.name, read)
            self._scalar(tensor.name, read)
        stored = {tensor.name for tensor in model.graph.initializer}
        self.inputs = [value for value in model.graph.input if value.name not in stored]
        self.input_names = identifiers(value.name for value in self.inputs)
        self._outputs = [value.name for value in model.graph.output]
        self._shapes = {value.name: _shape(value) for value in (*model.graph.input, *model.graph.output)}
        self._nodes = [(node, _attributes(node, folder)) for node in put_together(model.graph)]
        for node, _ in self._nodes:
            if node.domain == DOMAIN and node.op_type == LINEAR:
                self._turn(node)
        for node, attributes in self._nodes:
            if node.op_type == "Constant" and isinstance(attributes.get("value"), Tensor):
                self._scalar(node.output[0], attributes["value"])
        self.forward = _with_signature(self, self.input_names)

    def _store(self, name: str, tensor: Tensor) -> None:
        numbers = to_numbers(tensor)
        if numbers is not None:
            self._numbers[name] = numbers
            return
        owner: nn.Module = self
        *path, leaf = _path(name)
        for step in path:
            if not isinstance(getattr(owner, step, None), nn.Module):
                step = step if not hasattr(owner, step) else f"{step}_"
                owner.add_module(step, nn.Module())
            owner = getattr(owner, step)
        while hasattr(owner, leaf):
            leaf += "_"
        value = nn.Parameter(tensor, requires_grad=False) if tensor.is_floating_point() else tensor
        if isinstance(value, nn.Parameter):
            owner.register_parameter(leaf, value)
        else:
            owner.register_buffer(leaf, value)
        self._names[name] = leaf
        self._owners = getattr(self, "_owners", {}) | {name: (owner,)}

    def _turn(self, node: Any) -> None:
        """Let a linear layer have its matrix as PyTorch stores it, [N, K]."""
        name = node.input[1]
        if f"{name}_turned" not in self._names:
            self._store(f"{name}_turned", getattr(self._owners[name][0], self._names[name]).detach().t().contiguous())
        node.input[1] = f"{name}_turned"

    def _scalar(self, name: str, tensor: Tensor) -> None:
        if tensor.dtype == torch.float32 and tensor.dim() == 0:
            self._scalars[name] = tensor.item()

    def run(self, *inputs: Tensor) -> Any:
        """The outputs: one alone, several as a tuple."""
        values: dict[str, Value] = dict(self._numbers)
        values.update({name: getattr(self._owners[name][0], leaf) for name, leaf in self._names.items()})
        values.update(zip((value.name for value in self.inputs), inputs, strict=True))
        for node, attributes in self._nodes:
            extra = self._extra(node, values)
            results = self._run(node, attributes | extra, [values.get(name) for name in node.input])
            for name, result in zip(node.output, results, strict=False):
                values[name] = result
        outputs = [_as_tensor(values[name], name) for name in self._outputs]
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    def _extra(self, node: Any, values: dict[str, Value]) -> dict[str, Any]:
        """What an operator should know beside its inputs."""
        if node.op_type == "DequantizeLinear" and node.input[0] in self._four_bits:
            return {"irc_four_bits": True}
        if node.op_type == "GroupQueryAttention":
            return {"irc_grows": _grows(self._shapes, node)}
        if node.op_type == "Split":
            return {"irc_outputs": len(node.output)}
        if node.op_type == "MatMul" and node.input[1] in self._turned:
            return {"irc_turned": values.get(self._turned[node.input[1]])}
        return {}

    def _run(self, node: Any, attributes: dict[str, Any], inputs: Sequence[Value | None]) -> tuple[Any, ...]:
        function = find_operator(node.domain, node.op_type)
        assert function is not None
        domain = "" if node.domain == "ai.onnx" else node.domain
        call = Call(node.op_type, node.name or node.output[0], inputs, attributes, self._opsets.get(domain, 1))
        call.scalars = [self._scalars.get(name) for name in node.input]
        try:
            result = function(call)
        except IrcError:
            raise
        except Exception as error:  # whatever PyTorch says about these inputs
            raise CaptureError(f"{node.op_type} {call.name!r} cannot be read: {_first_line(error)}") from error
        return result if isinstance(result, tuple) else (result,)


def _with_signature(module: OnnxModule, names: Sequence[str]) -> Any:
    """`forward` with the graph's input names."""

    def forward(self: OnnxModule, *inputs: Tensor) -> Any:
        return self.run(*inputs)

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    signature = inspect.Signature([inspect.Parameter(name, kind) for name in ("self", *names)])
    setattr(forward, "__signature__", signature)  # noqa: B010  (no attribute of a function's type)
    return types.MethodType(forward, module)


def identifiers(names: Iterable[str]) -> list[str]:
    """Names as Python takes them, each once."""
    found: list[str] = []
    for name in names:
        text = _UNSAFE.sub("_", name).strip("_") or "input"
        text = f"input_{text}" if text[0].isdigit() or text == "self" else text
        while text in found:
            text += "_"
        found.append(text)
    return found


def _path(name: str) -> list[str]:
    """A dotted path of identifiers for any name."""
    return [_UNSAFE.sub("_", part) or "_" for part in name.split(".")] or ["_"]


def _check_supported(model: Any) -> None:
    missing = Counter(
        f"{node.domain}::{node.op_type}" if node.domain not in ("", "ai.onnx") else node.op_type
        for node in model.graph.node
        if find_operator(node.domain, node.op_type) is None
    )
    if missing:
        listed = ", ".join(f"{name} × {count}" for name, count in missing.most_common())
        raise CaptureError(
            f"the graph {model.graph.name!r} has operators that irc does not read: {listed}\n"
            "  try: export the model for inference, with control flow and functions inlined"
        )


def _attributes(node: Any, folder: Path) -> dict[str, Any]:
    import onnx

    found: dict[str, Any] = {}
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.TENSOR:
            tensor = read_tensor(folder, attribute.t)
            numbers = to_numbers(tensor)
            found[attribute.name] = tensor if numbers is None else numbers
            continue
        try:
            value = onnx.helper.get_attribute_value(attribute)
        except ValueError as error:
            raise CaptureError(f"{node.op_type} {node.name!r}: attribute {attribute.name!r}: {error}") from error
        found[attribute.name] = value.decode("utf-8", "replace") if isinstance(value, bytes) else value
        if attribute.name == "to":
            found["to"] = _dtype(node, value)
    return found


def _dtype(node: Any, value: int) -> torch.dtype:
    import onnx

    names = onnx.TensorProto.DataType
    kind = names.Name(value) if value in names.values() else str(value)
    if kind not in DTYPES:
        raise CaptureError(f"{node.op_type} {node.name!r} casts to {kind}, which irc does not read")
    return DTYPES[kind]


def _four_bit_names(graph: Any) -> set[str]:
    import onnx

    wanted = {getattr(onnx.TensorProto, kind) for kind in _FOUR_BITS}
    return {tensor.name for tensor in graph.initializer if tensor.data_type in wanted}


def _turned_names(graph: Any) -> dict[str, str]:
    """Results of transposing a matrix → what was transposed: such a product is a linear layer."""
    found = {}
    for node in graph.node:
        order = next((list(a.ints) for a in node.attribute if a.name == "perm"), None)
        if node.op_type == "Transpose" and order == [1, 0] and node.input and node.output:
            found[node.output[0]] = node.input[0]
    return found


def _shape(value: Any) -> list[Any]:
    """Sizes and names of sizes, as declared; None where nothing is said."""
    dims = value.type.tensor_type.shape.dim
    return [dim.dim_value if dim.HasField("dim_value") else dim.dim_param or None for dim in dims]


def _grows(shapes: Mapping[str, list[Any]], node: Any) -> bool:
    """Whether the keys that an attention gives are declared to be more than those that it gets."""
    past = shapes.get(node.input[3]) if len(node.input) > 3 else None
    present = shapes.get(node.output[1]) if len(node.output) > 1 else None
    return not past or not present or past[2] is None or past[2] != present[2]


def _as_tensor(value: Value, name: str) -> Tensor:
    from irc.frontend.onnx.calls import to_tensor

    if isinstance(value, np.ndarray):
        return to_tensor(value)
    if not isinstance(value, Tensor):
        raise CaptureError(f"output {name!r} is one that irc does not compute")
    return value


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
