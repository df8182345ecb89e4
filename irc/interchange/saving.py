"""From a program with quantized weights to a checkpoint that other tools load."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor, nn

from irc.core import formats
from irc.core.errors import StorageError
from irc.core.formats import Parts
from irc.core.operands import input_node
from irc.core.ops.registry import is_irc_op
from irc.core.program import Program
from irc.interchange.folder import as_config, write_folder
from irc.interchange.layout import QuantizedWeight, Refusal
from irc.interchange.layouts import find_layout
from irc.passes.fuse._layers import arguments

aten = torch.ops.aten
_STORED, _WEIGHT = "_stored", ".weight"


def save_quantized(
    program: Program,
    folder: str | Path,
    layout: str = "compressed-tensors",
    *,
    config: Any = None,
    names: Mapping[str, str] | None = None,
    only: Collection[str] | None = None,
) -> None:
    """Write the program's weights as a checkpoint: quantized linear layers in a layout, everything else as it is.

    Args:
        layout: `compressed-tensors` (integers packed, fp8 as it is), `int-quantized` (its int8 form), `gptq`, `gptq_v2`
            or `awq`.
        config: the model's Hugging Face configuration (object, mapping, file or folder), copied into `config.json`.
        names: names of stored tensors in the program → names of the weights that they stand for, where these are not
            `<weight>_stored`.
        only: names that the model's state dict has. Given, each weight must be one of them, others (tables that
            passes made) are left out, and what is missing is an error. Not given: parameters, and names that end in
            `.weight` or `.bias`.

    Raises:
        StorageError: something cannot be said in this layout (all of it is listed), or a full disk.
        OptionError: an unknown layout.
    """
    kind = find_layout(layout)
    on_meta = sorted(name for name, tensor in program.weights.items() if tensor.device.type == "meta")
    if on_meta:
        raise StorageError(f"program {program.name} has no values for {len(on_meta)} weights (first: {on_meta[0]})")
    weights, problems = _quantized_weights(program, names or {})
    problems += _activations(program)
    plain = _plain_weights(program, only)
    if only is not None:
        problems += _differences(program, weights, plain, only)
    kept = sorted(name.removesuffix(_WEIGHT) for name in _full_precision_linears(program))
    tensors: dict[str, Tensor] = dict(plain)
    try:
        chosen, quantization = kind.plan(weights, kept)
    except Refusal as refusal:
        problems.append(str(refusal))
    else:
        for module, weight in weights.items():
            try:
                tensors |= {f"{module}.{name}": tensor for name, tensor in chosen.pack(weight).items()}
            except Refusal as refusal:
                problems.append(f"{module}: {refusal}")
    if problems:
        raise StorageError(f"program {program.name} cannot be written as {layout}:\n  " + "\n  ".join(problems))
    write_folder(Path(folder), {**as_config(config), "quantization_config": quantization}, tensors)


def _quantized_weights(program: Program, names: Mapping[str, str]) -> tuple[dict[str, QuantizedWeight], list[str]]:
    """Dequantized weights of linear layers by module, and what is wrong with others."""
    found: dict[str, QuantizedWeight] = {}
    problems = []
    for node in program.operations():
        if not is_irc_op(node.target, "dequantize") or _is_activation(node):
            continue
        stored = str(input_node(node).target)
        name = names.get(stored, stored.removesuffix(_STORED) if stored.endswith(_STORED) else "")
        if not name.endswith(_WEIGHT):
            problems.append(f"{stored} stands for no weight that is known: give its name in names={{...}}")
            continue
        module = name.removesuffix(_WEIGHT)
        if module in found:
            problems.append(f"{module}: it is stored twice")
            continue
        try:
            found[module] = _weight_of(program, node)
        except Refusal as refusal:
            problems.append(f"{module}: {refusal}")
    return found, problems


def _weight_of(program: Program, node: fx.Node) -> QuantizedWeight:
    parts = [program.weight(part).detach() if isinstance(part, fx.Node) else None for part in node.args]
    stored = parts[0]
    assert stored is not None
    result, order = node, None
    users = list(node.users)
    if len(users) == 1 and users[0].target is aten.index_select.default:
        axis, index = users[0].args[1:]
        if axis != 1 or not isinstance(index, fx.Node) or index.op != "get_attr":
            raise Refusal("its columns are selected by something computed")
        result, order = users[0], program.weight(index).detach()
    for user in result.users:
        if not (user.target is aten.linear.default or is_irc_op(user.target, "linear_activation")):
            raise Refusal(f"it is used by {user.name}, {user.target}, which is no linear layer")
        if arguments(user)["weight"] is not result:
            raise Refusal(f"it is not the weight of {user.name}")
    return QuantizedWeight(Parts(stored, *parts[1:]), formats.parse(str(node.kwargs["format"])), order)


def _is_activation(node: fx.Node) -> bool:
    return any(used.op != "get_attr" for used in node.all_input_nodes)


def _activations(program: Program) -> list[str]:
    """Quantized activations: a checkpoint of weights alone would compute other numbers."""
    return [
        f"{node.name} quantizes an activation, which is not written"
        for node in program.operations()
        if is_irc_op(node.target, "quantize") or (is_irc_op(node.target, "dequantize") and _is_activation(node))
    ]


def _plain_weights(program: Program, only: Collection[str] | None) -> dict[str, Tensor]:
    parts = {
        str(part.target)
        for node in program.operations()
        if is_irc_op(node.target, "dequantize")
        for part in (*node.all_input_nodes, *_orders(node))
    }
    plain = {name: tensor for name, tensor in program.weights.items() if name not in parts}
    if only is not None:
        return {name: tensor for name, tensor in plain.items() if name in only}
    return {name: tensor for name, tensor in plain.items() if is_parameter(name, tensor)}


def is_parameter(name: str, tensor: Tensor) -> bool:
    """Whether a weight is the model's own, not a table that was computed."""
    return isinstance(tensor, nn.Parameter) or name.endswith((_WEIGHT, ".bias"))


def _orders(node: fx.Node) -> list[fx.Node]:
    picks = [user for user in node.users if user.target is aten.index_select.default]
    return [used for pick in picks for used in pick.all_input_nodes if used.op == "get_attr"]


def _differences(
    program: Program, weights: Mapping[str, QuantizedWeight], plain: Mapping[str, Tensor], only: Collection[str]
) -> list[str]:
    """Weights that the model does not have, and those of the model that are not there."""
    have = {*plain, *(module + _WEIGHT for module in weights)}
    strangers = sorted(module for module in weights if module + _WEIGHT not in only)
    absent = sorted(set(only) - have - set(program.tied))
    return [
        *(f"{module}{_WEIGHT} is no weight of the model" for module in strangers),
        *(f"{name} of the model is not in the program" for name in absent),
    ]


def _full_precision_linears(program: Program) -> set[str]:
    """Weights of linear layers that are not quantized, under all of their names."""
    found = set()
    for node in program.operations():
        if node.target is aten.linear.default or is_irc_op(node.target, "linear_activation"):
            weight = arguments(node)["weight"]
            if isinstance(weight, fx.Node) and weight.op == "get_attr":
                name = str(weight.target)
                aliases = [alias for alias, target in program.tied.items() if target == name]
                # A table that also serves as the head: the head is the linear layer.
                found |= set(aliases) if aliases else {name}
    return {name for name in found if name.endswith(_WEIGHT)}
