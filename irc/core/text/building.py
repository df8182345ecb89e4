"""From the declarations of a text to a program that has inputs and weights, but no operations yet."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor, nn

from irc.core.carrier import Carrier, build_graph_module
from irc.core.content_hash import META_HASH, content_hash, copy_hash, declare_hash
from irc.core.dims import new_dim, new_fake_mode
from irc.core.errors import IrcError, nearest
from irc.core.program import VAL, Program, describe
from irc.core.sizes import symbolic_size
from irc.core.text.header import Header, WeightDeclaration
from irc.core.text.reader import Reader, SizeType, TensorType

_STEP = re.compile(r"[A-Za-z0-9_]+", re.ASCII)
_MODULE_NAMES = frozenset(dir(nn.Module()))
_ROOT_NAMES = frozenset(dir(Carrier({}, fx.Graph())))

Nodes = dict[str, fx.Node]


def build_program(
    reader: Reader, header: Header, given: Mapping[str, Tensor] | None, reserved: set[str]
) -> tuple[Program, Nodes, Nodes]:
    """The program, its inputs by node name, its weight nodes by weight name.

    `reserved`: node names that operations of the text will take.

    Raises:
        ParseError: declarations that contradict each other or the given weights.
    """
    mode = new_fake_mode()
    dims = {
        name: new_dim(mode, name, hint, minimum=low, maximum=high) for name, (hint, low, high) in header.dims.items()
    }
    graph = fx.Graph()
    inputs: Nodes = {}
    for declared in header.inputs:
        if declared.name in inputs:
            raise reader.error(f"input %{declared.name} is declared twice", declared.token)
        inputs[declared.name] = graph.create_node("placeholder", declared.target, name=declared.name)
    _check_names(reader, header)
    tensors = _weights(reader, header, given)
    weights = {name: graph.create_node("get_attr", name, name=_free_name(name, reserved)) for name in header.weights}
    program = Program(
        graph_module=build_graph_module(graph, tensors, header.name),
        name=header.name,
        dims=dims,
        fake_mode=mode,
        in_spec=header.specs["in_spec"],
        out_spec=header.out_spec,
        metadata=header.metadata,
        tied=header.tied,
    )
    for declared in header.inputs:
        value = _fake(reader, program, declared.type, declared.token)
        inputs[declared.name].meta[VAL] = value
    for name, weight in header.weights.items():
        weights[name].meta[VAL] = (
            program.fake(tensors[name])
            if tensors[name].device.type != "meta"
            else _fake(reader, program, weight.type, weight.token)
        )
    return program, inputs, weights


def _free_name(weight: str, reserved: set[str]) -> str:
    stem = re.sub(r"\W", "_", weight, flags=re.ASCII)
    name, count = stem, 0
    while name in reserved:
        count += 1
        name = f"{stem}_w{count}"
    return name


def _check_names(reader: Reader, header: Header) -> None:
    """Weight names become attributes of modules: refuse those that would hide or reach anything else."""
    for name, declared in header.weights.items():
        steps = name.split(".")
        taken = steps[0] in _ROOT_NAMES or any(step in _MODULE_NAMES for step in steps)
        if taken or not all(_STEP.fullmatch(step) for step in steps):
            raise reader.error(f"a weight cannot be called {name!r}", declared.token)
        for length in range(1, len(steps)):
            if ".".join(steps[:length]) in header.weights:
                raise reader.error(f"weight {name!r} lies inside of another weight", declared.token)


def _weights(reader: Reader, header: Header, given: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    if given is None:
        return {name: _on_meta(declared) for name, declared in header.weights.items()}
    missing = [name for name in header.weights if name not in given]
    if missing:
        hints = [f"{name}{_short(nearest(name, given))}" for name in missing[:8]]
        more = f" and {len(missing) - 8} more" if len(missing) > 8 else ""
        raise reader.error(f"no weights given for {', '.join(hints)}{more}", header.weights[missing[0]].token)
    return {name: _checked(reader, name, declared, given[name]) for name, declared in header.weights.items()}


def _short(hint: str) -> str:
    return hint if len(hint) < 200 else ""


def _on_meta(declared: WeightDeclaration) -> Tensor:
    shape, strides = declared.type.shape, declared.type.strides
    if strides is None:
        tensor = torch.empty(shape, dtype=declared.type.dtype, device="meta")
    else:
        tensor = torch.empty_strided(shape, strides, dtype=declared.type.dtype, device="meta")
    tensor = _as_kind(declared.kind, tensor)
    if declared.digest != META_HASH:
        declare_hash(tensor, declared.digest)
    return tensor


def _checked(reader: Reader, name: str, declared: WeightDeclaration, tensor: Any) -> Tensor:
    if not isinstance(tensor, Tensor):
        raise reader.error(f"weight {name!r} is a {type(tensor).__name__}, not a tensor", declared.token)
    if tensor.dtype != declared.type.dtype or tuple(tensor.shape) != declared.type.shape:
        raise reader.error(f"weight {name!r}: given {describe(tensor)}, declared otherwise", declared.token)
    digest = content_hash(tensor)
    if META_HASH not in (digest, declared.digest) and digest != declared.digest:
        raise reader.error(f"weight {name!r} has other values than declared (sha256:{digest})", declared.token)
    result = _as_kind(declared.kind, _laid_out(tensor, declared.type.strides))
    copy_hash(tensor, result)
    return result


def _laid_out(tensor: Tensor, strides: tuple[Any, ...] | None) -> Tensor:
    """The tensor with its dimensions in the declared order in memory (a file holds them row by row).

    Strides that are no order of a dense tensor (a slice of a larger one) are not made again: values are
    what counts.
    """
    if strides is None or tensor.stride() == tuple(strides) or tensor.device.type == "meta":
        return tensor
    order = sorted(range(tensor.dim()), key=lambda dim: -int(strides[dim]))
    inverse = [order.index(dim) for dim in range(tensor.dim())]
    turned = tensor.detach().permute(order).contiguous().permute(inverse)
    if turned.stride() != tuple(strides):
        return tensor
    return nn.Parameter(turned, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else turned


def _as_kind(kind: str, tensor: Tensor) -> Tensor:
    """The tensor as parameter or buffer, as declared; storage is shared."""
    if kind == "buffer":
        return tensor.detach() if isinstance(tensor, nn.Parameter) else tensor
    if isinstance(tensor, nn.Parameter) and tensor.requires_grad == (kind == "param"):
        return tensor
    return nn.Parameter(tensor.detach(), requires_grad=kind == "param")


def _fake(reader: Reader, program: Program, declared: Any, token: Any) -> Any:
    """The value that stands for an input or a weight without data."""
    if isinstance(declared, SizeType):
        return _size(reader, program, declared.value, token)
    if not isinstance(declared, TensorType):
        raise reader.error("an input must be a tensor or a size", token)
    shape = [_size(reader, program, s, token) for s in declared.shape]
    strides = None if declared.strides is None else [_size(reader, program, s, token) for s in declared.strides]
    try:
        with program.fake_mode:
            if strides is None:
                return torch.empty(shape, dtype=declared.dtype, device=declared.device or "cpu")
            return torch.empty_strided(shape, strides, dtype=declared.dtype, device=declared.device or "cpu")
    except (RuntimeError, ValueError, TypeError, OverflowError, AssertionError) as error:
        raise reader.error(f"no tensor can have this type: {error}", token) from error


def _size(reader: Reader, program: Program, value: Any, token: Any) -> Any:
    try:
        return symbolic_size(value, program.dims)
    except (IrcError, ArithmeticError, TypeError, ValueError) as error:
        raise reader.error(f"this size cannot be computed: {error}", token) from error
