"""From a quantized checkpoint to a program: its integers and scales as they are, in front of each linear layer."""

from __future__ import annotations

import fnmatch
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor, nn

from irc.core.contract import Skip
from irc.core.errors import IrcError, StorageError, nearest
from irc.core.program import VAL, Program
from irc.core.provenance import mark_stage_start, track
from irc.interchange.folder import as_config, read_folder
from irc.interchange.layout import Layout, QuantizedWeight, Refusal
from irc.interchange.layouts import find_layout
from irc.interchange.saving import is_parameter
from irc.passes.quantize._weight_layers import WeightLayer, find_weight_layers

aten = torch.ops.aten
_WEIGHT = ".weight"


def load_quantized(
    source: str | Path | Mapping[str, Tensor],
    program: Program,
    *,
    config: Any = None,
    ignore: Collection[str] = (),
    weights_only: bool = False,
) -> Program:
    """A copy of a captured program with the weights of a quantized checkpoint of the same model.

    Args:
        source: a folder with `config.json` and `model.safetensors` (or its shards), or a state dict.
        config: the model's configuration or its `quantization_config`; needed for a state dict.
        ignore: patterns (`*.inv_freq`) of tensors in the checkpoint that the program has no use for.
        weights_only: read the weights of a checkpoint whose activations are quantized too, and leave these alone.

    Raises:
        StorageError: a damaged file, or a checkpoint that is not of this model or says what a program cannot; all
            offenders are listed.
    """
    layout, state, where = _open(source, config, weights_only)
    problems: list[str] = []
    quantized = _read_layers(layout, state, program, problems)
    used = {f"{module}.{name}" for module in quantized for name in layout.tensors}
    rest = {name: tensor for name, tensor in state.items() if name not in used}
    plain = _read_plain(rest, quantized, program, ignore, problems)
    given = {*plain, *(_real_name(program, module + _WEIGHT) for module in quantized)}
    for name, tensor in program.weights.items():
        if name not in given and is_parameter(name, tensor):
            problems.append(f"{name}: the program has it, the checkpoint does not")
    if problems:
        raise StorageError(f"{where} does not fit program {program.name}:\n  " + "\n  ".join(problems))
    result = program.copy(replace_weights=plain)
    mark_stage_start(result.graph)
    with track(result.graph_module):
        for module, (layer, weight) in quantized.items():
            assert layer is not None
            assert weight is not None
            _put(result, result.node(layer.weight.name), layer, module, weight)
    result.erase_dead()
    return result


def _open(
    source: str | Path | Mapping[str, Tensor], config: Any, weights_only: bool
) -> tuple[Layout, Mapping[str, Tensor], str]:
    if isinstance(source, (str, Path)):
        found, state = read_folder(Path(source))
        where = f"checkpoint {source}"
    else:
        found, state, where = {}, dict(source), "the state dict"
        wrong = [str(name) for name, tensor in state.items() if not isinstance(tensor, Tensor)]
        if wrong:
            raise StorageError(f"{where} holds {len(wrong)} entries that are no tensors (first: {wrong[0]})")
    if config is not None:
        found = as_config(config)
    settings = found.get("quantization_config", found)
    if not isinstance(settings, Mapping) or "quant_method" not in settings:
        raise StorageError(f"{where} has no quantization_config with a quant_method")
    method = settings["quant_method"]
    try:
        kind = find_layout(method if isinstance(method, str) else repr(method))
    except IrcError:
        known = ("compressed-tensors", "gptq", "awq")
        raise StorageError(f"{where} has quant_method {method!r}{nearest(str(method), known)}") from None
    try:
        return kind.read(settings, weights_only), state, where
    except Refusal as refusal:
        raise StorageError(f"{where}: its quantization_config cannot be read: {refusal}") from None


Layers = dict[str, tuple[WeightLayer | None, QuantizedWeight | None]]


def _read_layers(layout: Layout, state: Mapping[str, Tensor], program: Program, problems: list[str]) -> Layers:
    """The quantized layers of a checkpoint by module; None where a problem was noted."""
    layers: dict[str, WeightLayer | Skip] = {}
    for layer in find_weight_layers(program, embeddings=False, convolutions=False):
        if isinstance(layer, Skip):
            continue
        if layer.name in layers:
            problems.append(f"{layer.name}: the program reads it in several places")
        layers[layer.name] = layer
    modules = sorted({name.rpartition(".")[0] for name in state if name.rpartition(".")[2] in layout.marks})
    if not modules:
        problems.append("the checkpoint has no quantized layer")
    found: Layers = {}
    for module in modules:
        name = _real_name(program, module + _WEIGHT)
        layer = layers.get(name)
        found[module] = (None, None)
        if not isinstance(layer, WeightLayer):
            known = name in program.weights
            why = "is not the weight of a linear layer alone" if known else "is not in the program"
            problems.append(f"{module}: {name} {why}{'' if known else nearest(name, layers)}")
            continue
        tensors = {role: state[f"{module}.{role}"] for role in layout.tensors if f"{module}.{role}" in state}
        try:
            found[module] = (layer, layout.unpack(module, tensors, (layer.num_rows, layer.width)))
        except Refusal as refusal:
            problems.append(f"{module}: {refusal}")
    return found


def _read_plain(
    rest: Mapping[str, Tensor],
    quantized: Layers,
    program: Program,
    ignore: Collection[str],
    problems: list[str],
) -> dict[str, Tensor]:
    """The tensors that are not quantized, as the program's own weights."""
    weights = program.weights
    plain: dict[str, Tensor] = {}
    taken = {_real_name(program, module + _WEIGHT) for module in quantized}
    for name, tensor in rest.items():
        real = _real_name(program, name)
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in ignore):
            continue
        if real not in weights:
            problems.append(f"{name}: the checkpoint has it, the program does not")
        elif real in taken:
            problems.append(f"{name}: it is there both quantized and not")
        elif tuple(tensor.shape) != tuple(weights[real].shape):
            problems.append(f"{name}: it has shape {list(tensor.shape)}, the program's {list(weights[real].shape)}")
        elif not _widens(tensor.dtype, weights[real].dtype):
            problems.append(f"{name}: {tensor.dtype} cannot become the program's {weights[real].dtype} without loss")
        elif real in plain and not torch.equal(plain[real], tensor.to(weights[real].dtype)):
            problems.append(f"{name}: it is tied to {real} in the program, and differs in the checkpoint")
        else:
            made = tensor.to(weights[real].dtype)
            plain[real] = nn.Parameter(made, False) if isinstance(weights[real], nn.Parameter) else made
    return plain


def _widens(given: torch.dtype, wanted: torch.dtype) -> bool:
    """Whether every number of one type is one of the other."""
    return given == wanted or (
        given.is_floating_point and wanted.is_floating_point and torch.promote_types(given, wanted) == wanted
    )


def _real_name(program: Program, name: str) -> str:
    return program.tied.get(name, name)


def _put(program: Program, old: fx.Node, layer: WeightLayer, module: str, weight: QuantizedWeight) -> None:
    """A dequantized weight in a weight's place."""
    before = next(node for node in program.graph.nodes if node in old.users)
    dtype = old.meta[VAL].dtype
    parts = list(weight.parts[:3]) if weight.parts.tensor_scale is None else list(weight.parts)
    roles = weight.parts._fields
    nodes = [
        None if part is None else program.weight_node(f"{layer.name}_{role}", part, before=before)
        for role, part in zip(roles, parts, strict=False)
    ]
    options = {} if weight.format.result_dtype(weight.parts.scale) == dtype else {"dtype": dtype}
    target = torch.ops.irc.dequantize.default
    made = program.insert(target, *nodes, before=before, format=str(weight.format), **options)
    if weight.order is not None:
        order = program.weight_node(f"{layer.name}_order", weight.order, before=before)
        made = program.insert(aten.index_select.default, made, 1, order, before=before)
    program.replace(old, made)
