"""`TypedGraph`: what a program consists of. An FX graph over shared, immutable weights, typed at every node.

What only reads programs (printing, hashing, writing) takes one of these; `irc.core.program` adds what programs do.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
import torch.fx as fx
import torch.utils._pytree as pytree
from torch import Tensor
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode

from irc.core import typed
from irc.core.carrier import attach, has_attr, look_up
from irc.core.dims import Dim, Size, size_expr
from irc.core.dtypes import describe, dtype_text
from irc.core.errors import IrcError, VerificationError, nearest
from irc.core.ops.registry import find_op
from irc.core.typed import VAL as VAL


@dataclass
class TypedGraph:
    """A graph with its weights and types.

    Attributes:
        graph_module: carrier; its graph is the program, its attributes the weights. Passes edit
            `program.graph_module.graph` with ordinary FX calls.
        name: for people and file names.
        dims: dynamic dimensions by name.
        fake_mode: mode of all `meta["val"]`; shared by every stage that came from one capture.
        in_spec: pytree of `(args, kwargs)` that the flat inputs (placeholders) come from.
        out_spec: pytree that the flat outputs are put back into.
        example_inputs: flat example inputs, one a placeholder, or None.
        aliases: output index → input index, where an output is the next state of an input (caches).
        metadata: JSON values that describe the program (for example `{"kv_cache": {...}}`).
        tied: other names of weights, as the model's state dict had them: alias → name in the graph.
    """

    graph_module: fx.GraphModule
    name: str
    dims: dict[str, Dim]
    fake_mode: FakeTensorMode
    in_spec: pytree.TreeSpec
    out_spec: pytree.TreeSpec
    example_inputs: tuple[Any, ...] | None = None
    aliases: dict[int, int] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)
    tied: dict[str, str] = field(default_factory=dict)

    # ---------------------------------------------------------------- structure

    @property
    def graph(self) -> fx.Graph:
        return self.graph_module.graph

    @property
    def placeholders(self) -> list[fx.Node]:
        """Input nodes in order."""
        return self.graph.find_nodes(op="placeholder")

    @property
    def input_names(self) -> list[str]:
        return [str(node.target) for node in self.placeholders]

    @property
    def output_node(self) -> fx.Node:
        return self.graph.output_node()

    @property
    def outputs(self) -> list[Any]:
        """Flat outputs: nodes, or constants that the model returns."""
        result = self.output_node.args[0]
        return list(result) if isinstance(result, (tuple, list)) else [result]

    @property
    def weights(self) -> dict[str, Tensor]:
        """Weights that the graph uses, by name, in order of first use. Read-only by contract."""
        found: dict[str, Tensor] = {}
        for node in self.graph.find_nodes(op="get_attr"):
            if str(node.target) not in found:
                found[str(node.target)] = self.weight(node)
        return found

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights in use; storage shared by two names counts once."""
        return sum({id(w): w.numel() * w.element_size() for w in self.weights.values()}.values())

    @property
    def num_nodes(self) -> int:
        """Operations: nodes without inputs, weights, size arithmetic and the output."""
        return sum(1 for _ in self.operations())

    def operations(self) -> Iterator[fx.Node]:
        """Nodes that compute tensors, in order."""
        for node in self.graph.nodes:
            if node.op == "call_function" and not is_size(node) and node.target is not operator.getitem:
                yield node

    def node(self, name: str) -> fx.Node:
        """The node of that name; raises `IrcError` with the nearest names."""
        for node in self.graph.nodes:
            if node.name == name:
                return node
        raise IrcError(f"program {self.name} has no node {name!r}{nearest(name, [n.name for n in self.graph.nodes])}")

    # ---------------------------------------------------------------- weights

    def weight(self, node_or_name: fx.Node | str) -> Tensor:
        """Tensor of a `get_attr` node or of a weight name."""
        target = str(node_or_name.target) if isinstance(node_or_name, fx.Node) else node_or_name
        try:
            value = look_up(self.graph_module, target)
        except AttributeError:
            raise VerificationError(f"program {self.name} has no weight {target!r}") from None
        if not isinstance(value, Tensor):
            raise VerificationError(f"{target!r} in program {self.name} is a {type(value).__name__}, not a tensor")
        return value

    def add_weight(self, name: str, tensor: Tensor) -> str:
        """Register a new weight and return its name: `name`, made unique if that is taken.

        Existing weights are never overwritten: another stage may share them.
        """
        chosen, count = name, 1
        while has_attr(self.graph_module, chosen):
            chosen, count = f"{name}_{count}", count + 1
        attach(self.graph_module, chosen, tensor)
        return chosen

    def weight_node(self, name: str, tensor: Tensor, *, before: fx.Node) -> fx.Node:
        """Register a new weight and insert a typed `get_attr` node for it in front of `before`."""
        target = self.add_weight(name, tensor)
        with self.graph.inserting_before(before):
            node = self.graph.get_attr(target)
        node.meta[VAL] = self.fake(tensor)
        return node

    def insert(self, target: Any, *args: Any, before: fx.Node, name: str | None = None, **kwargs: Any) -> fx.Node:
        """Insert a typed operation in front of `before`: the easy way to add a node in a pass.

        `target` is an op overload such as `torch.ops.irc.rms_norm.default`; arguments are nodes or constants.
        """
        readable = (
            name
            or str(getattr(getattr(target, "_schema", None), "name", getattr(target, "__name__", "node"))).rpartition(
                "::"
            )[2]
        )
        with self.graph.inserting_before(before):
            node = self.graph.create_node("call_function", target, args, kwargs, name=readable)
        self.infer_type(node)
        return node

    def replace(self, old: fx.Node, new: fx.Node) -> None:
        """Make every user of `old` use `new`, and remove `old`. Both must have the same type."""
        old.replace_all_uses_with(new)
        self.graph.erase_node(old)

    def fake(self, tensor: Tensor) -> Tensor:
        """The fake (type only, static sizes) of a real tensor."""
        with self.fake_mode:
            return torch.empty_strided(
                tuple(tensor.shape), tensor.stride(), dtype=tensor.dtype, device=_real_device(tensor)
            )

    # ---------------------------------------------------------------- types

    def shape_expr(self, node: fx.Node) -> tuple[sympy.Expr, ...]:
        """Sizes of a tensor node over the program's named dimensions."""
        return tuple(size_expr(size, self.dims) for size in node.meta[VAL].shape)

    def expr(self, size: Size) -> sympy.Expr:
        """A size (int or symbolic) over the program's named dimensions."""
        return size_expr(size, self.dims)

    def type_text(self, node: fx.Node) -> str:
        """`f32[B, S, 16]`, over the program's named dimensions."""
        value = node.meta.get(VAL)
        if not isinstance(value, Tensor):
            return describe(value)
        return f"{dtype_text(value.dtype)}[{', '.join(map(str, self.shape_expr(node)))}]"

    def infer_types(self) -> None:
        """Recompute `meta["val"]` of every node from inputs and weights.

        What was computed before from the same types (see `irc.core.typed`) is kept.

        Raises:
            VerificationError: an operation rejects its inputs' types or shapes.
        """
        for node in self.graph.nodes:
            if node.op != "output":
                self.infer_type(node)

    def infer_type(self, node: fx.Node) -> None:
        """Set `meta["val"]` of one node from its inputs' types (call it after inserting a node by hand)."""
        if typed.holds(node):
            return
        untyped = [used.name for used in node.all_input_nodes if VAL not in used.meta]
        if untyped:
            raise VerificationError(
                f"{node.name} = {node.target} uses %{untyped[0]}, which has no type", node=node.name
            )
        values = {n: n.meta[VAL] for n in node.all_input_nodes}
        with torch.no_grad():
            found = self._infer(node, values)
        # An equal type stays the same object: what was computed from it then holds as well.
        if not (VAL in node.meta and typed.alike(node.meta[VAL], found)):
            node.meta[VAL] = found
        typed.record(node)

    def _infer(self, node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
        if node.op == "placeholder":
            if VAL not in node.meta:
                raise VerificationError(f"input {node.name} of program {self.name} has no type")
            return node.meta[VAL]
        known: Any
        if node.op == "get_attr":
            tensor, known = self.weight(node), node.meta.get(VAL)
            same = isinstance(known, Tensor) and known.shape == tensor.shape and known.dtype == tensor.dtype
            return known if same else self.fake(tensor)
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: values[n])
        if node.op == "output":
            return args[0]
        memo = typed.TypeMemo.of(self.fake_mode)
        key = memo.key(node.target, args, kwargs)
        known = memo.get(key)
        if known is None:
            known = self._compute_type(node, args, kwargs)
            memo.keep(key, args, kwargs, known)
        return known

    def _compute_type(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        definition = find_op(node.target)
        try:
            # PyTorch's shape functions in Python keep symbolic sizes where some of those in C++ fix them.
            with enable_python_dispatcher(), self.fake_mode:
                if definition is not None:
                    return definition.fake(*args, **kwargs)
                assert callable(node.target)
                return node.target(*args, **kwargs)
        except Exception as error:
            raise VerificationError(
                f"{node.name} = {node.target}: its inputs do not fit: {error}\n"
                f"  inputs: {[describe(v) for v in pytree.tree_leaves((args, kwargs))]}"
            ) from error


def is_size(node: fx.Node) -> bool:
    """True for a node whose value is a size (symbolic integer, float or bool), not a tensor."""
    return isinstance(node.meta.get(VAL), (int, float, bool, torch.SymInt, torch.SymFloat, torch.SymBool))


def _real_device(tensor: Tensor) -> torch.device:
    # Fakes of meta weights must look like tensors that compute: on the device they will be loaded to.
    return torch.device("cpu") if tensor.device.type == "meta" else tensor.device
