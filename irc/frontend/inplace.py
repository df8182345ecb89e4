"""In-place operations that export leaves in the graph → their functional forms, every other op kept whole.

`run_decompositions({})` also removes in-place operations, but splits matmul, batch norm and other ops on
the way. It is needed only where a written tensor is seen through another view; `plan` says when.
"""

from __future__ import annotations

import torch
import torch.fx as fx
from torch import Tensor
from torch._ops import OpOverload

from irc.core.operands import input_node

_IMPLICIT = torch._C.DispatchKey.CompositeImplicitAutograd


def mutates(node: fx.Node) -> bool:
    """True for a call that writes into an argument."""
    return isinstance(node.target, OpOverload) and node.target._schema.is_mutable


def plan(graph_module: fx.GraphModule) -> dict[fx.Node, OpOverload] | None:
    """Functional form of every in-place call; None if a call cannot be replaced on its own.

    A call can be replaced if it writes into its first argument only, that is no input and no weight, and
    nothing made before the call that may share its memory is used after it.
    """
    if any(_has_mutation(child) for name, child in graph_module.named_modules() if name):
        return None
    found: dict[fx.Node, OpOverload] = {}
    roots: dict[fx.Node, fx.Node] = {}
    position = {node: i for i, node in enumerate(graph_module.graph.nodes)}
    same: dict[fx.Node, fx.Node] = {}  # result of an in-place call → the tensor it wrote into
    for node in graph_module.graph.nodes:
        roots[node] = _root(node, roots)
        if not mutates(node):
            continue
        functional = _functional(node.target)
        written = node.args[0] if node.args else None
        if functional is None or not isinstance(written, fx.Node):
            return None
        if _promotes(node):
            return None  # the functional form would widen the result
        owner = same.get(written, written)
        same[node] = owner
        if roots[written].op != "call_function" or _is_seen_elsewhere(node, owner, roots, position, same):
            return None
        found[node] = functional
    return found


def _has_mutation(module: torch.nn.Module) -> bool:
    return isinstance(module, fx.GraphModule) and any(mutates(node) for node in module.graph.nodes)


def _promotes(call: fx.Node) -> bool:
    types = [n.meta["val"].dtype for n in call.all_input_nodes if isinstance(n.meta.get("val"), Tensor)]
    written = input_node(call).meta["val"].dtype
    return any(torch.promote_types(written, other) != written for other in types)


def _is_seen_elsewhere(
    call: fx.Node,
    owner: fx.Node,
    roots: dict[fx.Node, fx.Node],
    position: dict[fx.Node, int],
    same: dict[fx.Node, fx.Node],
) -> bool:
    """True if a value that may share the written memory, under another name, is used after the call."""
    for node, root in roots.items():
        if root is not roots[owner] or node is owner or same.get(node) is owner:
            continue
        if any(position[user] > position[call] for user in node.users):
            return True
    return False


def _root(node: fx.Node, roots: dict[fx.Node, fx.Node]) -> fx.Node:
    """The node whose memory the node's value may live in."""
    source = next((arg for arg in node.args if isinstance(arg, fx.Node)), None)
    if source is None or node.op != "call_function" or not _may_alias(node):
        return node
    return roots[source]


def _may_alias(node: fx.Node) -> bool:
    target = node.target
    if not isinstance(target, OpOverload):
        return True  # getitem of several results, control flow
    if not any("Tensor" in str(result.type) for result in target._schema.returns):
        return False
    if any(result.alias_info is not None for result in target._schema.returns):
        return True
    # reshape, contiguous, to, dropout: may give their input back without the schema saying so.
    value, source = node.meta.get("val"), node.args[0] if node.args else None
    if not target.has_kernel_for_dispatch_key(_IMPLICIT):
        return False
    return not (
        isinstance(value, Tensor)
        and isinstance(source, fx.Node)
        and isinstance(source.meta.get("val"), Tensor)
        and value.untyped_storage()._cdata != source.meta["val"].untyped_storage()._cdata
    )


def _functional(target: object) -> OpOverload | None:
    """`aten.add_.Tensor` → `aten.add.Tensor`; None if the op has no such form or writes elsewhere too."""
    assert isinstance(target, OpOverload)
    arguments = target._schema.arguments
    written = [i for i, a in enumerate(arguments) if a.alias_info is not None and a.alias_info.is_write]
    namespace, _, name = target._schema.name.partition("::")
    packet = getattr(getattr(torch.ops, namespace), name.removesuffix("_"), None)
    if written != [0] or not name.endswith("_") or packet is None:
        return None
    if target._overloadname not in packet.overloads():
        return None
    functional = getattr(packet, target._overloadname)
    return None if functional._schema.is_mutable else functional
