"""ExportedProgram → Program: lifted weights become `get_attr` nodes, export's symbols named dimensions.

Control regions that only switch gradients or autocast off are inlined; an effect that a program cannot
express (a buffer or an input that is written) is refused.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind, OutputKind

from irc.core import dims, provenance
from irc.core.carrier import build_graph_module
from irc.core.errors import CaptureError
from irc.core.operands import input_node
from irc.core.program import VAL, Program
from irc.frontend import inplace, provenance_reader
from irc.frontend.naming import DimNamer


@dataclass(frozen=True)
class Naming:
    """How names of the exported wrapper map to names of the user's model.

    Attributes:
        prefix: module path of the user's model inside what was exported ("" if it is that itself).
        shared: model's own weight names by tensor identity, to find the tied ones.
    """

    prefix: str = ""

    def strip(self, path: str) -> str:
        """A dotted path without the wrapper's part."""
        if self.prefix and path == self.prefix:
            return ""
        return path.removeprefix(f"{self.prefix}.") if self.prefix else path


def import_exported(
    exported: ExportedProgram,
    *,
    name: str,
    namer: DimNamer,
    example_inputs: list[Any] | None,
    naming: Naming | None = None,
) -> Program:
    """The program that an ExportedProgram describes.

    Args:
        exported: result of `torch.export.export`, functional.
        name: of the program.
        namer: gives each symbolic input size its name.
        example_inputs: flat, one a user input (constants included), or None for those stored.
        naming: how to get back to the user's names.

    Raises:
        CaptureError: the program has effects or control flow that the IR has no form for.
    """
    naming = naming or Naming()
    _refuse_effects(exported)
    importer = _Importer(exported, naming)
    graph = importer.copy()
    fake_mode = dims.new_fake_mode()
    named = namer.assign(dict(zip(importer.kept_inputs, importer.inputs, strict=True)), fake_mode)
    if example_inputs is None and exported.example_inputs is not None:
        example_inputs = pytree.tree_leaves(exported.example_inputs)
    kept = importer.kept_inputs
    program = Program(
        graph_module=build_graph_module(graph, importer.weights, name),
        name=name,
        dims=named,
        fake_mode=fake_mode,
        in_spec=exported.call_spec.in_spec,
        out_spec=exported.call_spec.out_spec,
        example_inputs=None if example_inputs is None else tuple(example_inputs[i] for i in kept),
        tied=importer.tied,
    )
    if importer.constants:
        program.metadata["constant_inputs"] = importer.constants
    for node in program.graph.find_nodes(op="get_attr"):
        if not node.users:
            program.graph.erase_node(node)
    program.infer_types()
    return program


def _refuse_effects(exported: ExportedProgram) -> None:
    for spec in exported.graph_signature.output_specs:
        if spec.kind is OutputKind.BUFFER_MUTATION:
            raise CaptureError(
                f"the model writes its buffer {spec.target!r} in forward, which a program cannot express\n"
                "  try: model.eval() (batch norm and counters), or return the new value and pass it back in"
            )
        if spec.kind is OutputKind.USER_INPUT_MUTATION:
            raise CaptureError(
                f"the model writes into its input {spec.target!r} in forward\n"
                "  try: clone it inside forward before changing it, or model.eval() if it is a running statistic"
            )


class _Importer:
    """One walk over the exported graph."""

    def __init__(self, exported: ExportedProgram, naming: Naming) -> None:
        self.exported = exported
        self.naming = naming
        self.graph = fx.Graph()
        self.inputs: list[fx.Node] = []
        self.kept_inputs: list[int] = []
        self.constants: dict[str, Any] = {}
        self.weights: dict[str, Tensor] = {}
        self.tied: dict[str, str] = {}
        self._by_identity: dict[Any, str] = {}
        self._weight_nodes: dict[str, fx.Node] = {}
        self._collect_weights()

    def _collect_weights(self) -> None:
        """Name every tensor once; further names of the same tensor are recorded as tied."""
        for source in (self.exported.state_dict, self.exported.constants):
            for raw_name, tensor in source.items():
                if not isinstance(tensor, Tensor):
                    continue
                name, key = self.naming.strip(raw_name), _identity(tensor)
                if key in self._by_identity:
                    if name != self._by_identity[key]:
                        self.tied[name] = self._by_identity[key]
                    continue
                self._by_identity[key] = name
                self.weights[name] = tensor

    def copy(self) -> fx.Graph:
        signature = self.exported.graph_signature
        specs = {spec.arg.name: spec for spec in signature.input_specs if hasattr(spec.arg, "name")}
        user_outputs = [i for i, s in enumerate(signature.output_specs) if s.kind is OutputKind.USER_OUTPUT]
        mapping: dict[fx.Node, Any] = {}
        in_place = inplace.plan(self.exported.graph_module) or {}
        placeholders = self.exported.graph.find_nodes(op="placeholder")
        user_inputs = [n for n in placeholders if specs[n.name].kind is InputKind.USER_INPUT]
        for flat_index, node in enumerate(user_inputs):
            mapping[node] = self._user_input(node, specs[node.name].arg, flat_index)
        for node in placeholders:
            if node not in mapping:
                mapping[node] = self._weight(node, specs[node.name])
        for node in self.exported.graph.nodes:
            if node.op == "placeholder":
                continue
            if node.op == "output":
                flat = list(node.args[0])
                self.graph.output(fx.map_arg([flat[i] for i in user_outputs], mapping.__getitem__))
            else:
                mapping[node] = self._operation(node, mapping, self.exported.graph_module, in_place.get(node))
                if node in in_place:
                    _rebind(mapping, node)
        return self.graph

    def _user_input(self, node: fx.Node, arg: Any, flat_index: int) -> Any:
        if isinstance(arg, ConstantArgument) or not isinstance(node.meta.get("val"), (Tensor, torch.SymInt)):
            value = arg.value if isinstance(arg, ConstantArgument) else node.meta.get("val")
            if value is not None and not isinstance(value, (bool, int, float, str)):
                raise CaptureError(
                    f"input {node.name} is a {type(value).__name__}, which a program cannot take\n"
                    "  try: set it in the module's constructor"
                )
            self.constants[str(flat_index)] = value
            return value
        copied = self.graph.placeholder(str(node.target))
        copied.meta[VAL] = node.meta["val"]
        self.inputs.append(copied)
        self.kept_inputs.append(flat_index)
        return copied

    def _weight(self, node: fx.Node, spec: Any) -> fx.Node:
        if spec.kind not in (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR):
            raise CaptureError(f"the model needs {spec.target!r}, a {spec.kind.name.lower()}, which the IR cannot hold")
        raw = spec.target
        tensor = self.exported.state_dict.get(raw, self.exported.constants.get(raw))
        if not isinstance(tensor, Tensor):
            raise CaptureError(f"weight {raw!r} is missing from the exported program")
        name = self._by_identity[_identity(tensor)]
        if name not in self._weight_nodes:
            self._weight_nodes[name] = self.graph.get_attr(name)
        return self._weight_nodes[name]

    def _operation(self, node: fx.Node, mapping: dict[fx.Node, Any], owner: nn.Module, functional: Any = None) -> Any:
        if node.op == "get_attr":
            attribute = getattr(owner, str(node.target))
            if isinstance(attribute, fx.GraphModule):
                return attribute
            raise CaptureError(f"node {node.name} reads {node.target!r}, a {type(attribute).__name__}")
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            return self._inline(node, mapping)
        args: Any
        args, kwargs = fx.map_arg((node.args, node.kwargs), mapping.__getitem__)
        if node.target is getattr and not isinstance(args[0], fx.Node):
            return getattr(*args)
        if node.op != "call_function":
            raise CaptureError(f"node {node.name} is a {node.op}, which a program cannot hold")
        if isinstance(args, tuple) and node.target is operator.getitem and isinstance(args[0], (list, tuple)):
            return args[0][args[1]]  # output of an inlined region
        # A model without data is captured for where its weights will be loaded.
        args, kwargs = fx.node.map_aggregate((args, kwargs), _with_data)
        copied = self.graph.create_node("call_function", functional or node.target, args, kwargs, name=node.name)
        copied.meta[provenance.SOURCES_KEY] = frozenset(
            {
                provenance.Source(
                    node.name, self.naming.strip(provenance_reader.module_of(node)), provenance_reader.location_of(node)
                )
            }
        )
        return copied

    def _inline(self, node: fx.Node, mapping: dict[fx.Node, Any]) -> Any:
        """Copy the body of a region that only switches gradients or autocast."""
        assert isinstance(node.target, torch._ops.HigherOrderOperator)
        kind = node.target.name()
        args: list[Any] = [mapping[a] if isinstance(a, fx.Node) else a for a in node.args]
        if kind == "wrap_with_set_grad_enabled":
            body, operands = args[1], args[2:]
        elif kind == "wrap_with_autocast":
            if args[2]:
                raise CaptureError(
                    f"{provenance_reader.location_of(node)}: the model switches autocast on in forward\n"
                    "  try: convert the weights (model.to(torch.bfloat16)) instead of autocast"
                )
            body, operands = args[4], args[5:]
        else:
            raise CaptureError(
                f"{provenance_reader.location_of(node)}: the model uses the control flow operator {kind!r},"
                " which the IR has no form for\n  try: an unrolled loop, or torch.where instead of a branch"
            )
        inner: dict[fx.Node, Any] = {}
        remaining = iter(operands)
        for inner_node in body.graph.nodes:
            if inner_node.op == "placeholder":
                inner[inner_node] = next(remaining)
            elif inner_node.op == "output":
                return fx.map_arg(inner_node.args[0], inner.__getitem__)
            else:
                inner[inner_node] = self._operation(inner_node, inner, body)
        raise CaptureError(f"region {node.name} has no output")


def _with_data(argument: Any) -> Any:
    meta = isinstance(argument, torch.device) and argument.type == "meta"
    return torch.device("cpu") if meta else argument


def _rebind(mapping: dict[fx.Node, Any], call: fx.Node) -> None:
    """After an in-place call, every name of the written tensor means the result."""
    old, new = mapping[input_node(call)], mapping[call]
    for node, value in mapping.items():
        if value is old:
            mapping[node] = new


def _identity(tensor: Tensor) -> Any:
    """Equal for two names of one weight: the same memory seen the same way."""
    if tensor.device.type == "meta" or tensor.numel() == 0:
        return id(tensor)
    return (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)


def weight_aliases(names: Mapping[str, Tensor], used: Mapping[str, Tensor]) -> dict[str, str]:
    """Names that a state dict has besides those used, for weights that are the same tensor: alias → used name."""
    by_identity = {_identity(tensor): name for name, tensor in used.items()}
    found: dict[str, str] = {}
    for name, tensor in names.items():
        owner = by_identity.get(_identity(tensor))
        if owner is not None and owner != name:
            found[name] = owner
    return found
