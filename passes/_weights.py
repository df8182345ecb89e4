"""Helpers of passes that replace weights: who uses a weight, what a new one is called, which types changed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import torch
import torch.fx as fx
from torch import Tensor, nn

from irc.core.errors import VerificationError
from irc.core.program import VAL, Program

aten = torch.ops.aten


def weight_uses(program: Program) -> Counter[str]:
    """How many operations use each weight, over all of its `get_attr` nodes."""
    uses: Counter[str] = Counter()
    for node in program.graph.find_nodes(op="get_attr"):
        uses[str(node.target)] += len(node.users)
    return uses


def tie_of(program: Program, node: fx.Node, uses: Counter[str]) -> str | None:
    """Why a weight node is tied (several users, or several names in the model), or None if it is not."""
    name = str(node.target)
    aliases = sorted(alias for alias, target in program.tied.items() if target == name)
    if aliases:
        return f"weight {name} is tied to {', '.join(aliases)}"
    if uses[name] > 1:
        return f"weight {name} is shared by {uses[name]} operations"
    return None


def trainable_like(tensor: Tensor, *originals: Tensor) -> Tensor:
    """The tensor as a parameter if all originals are parameters, so that `program.module()` still trains it."""
    if not tensor.is_floating_point() or not all(isinstance(w, nn.Parameter) for w in originals):
        return tensor
    return nn.Parameter(tensor, requires_grad=any(w.requires_grad for w in originals))


def erase_replaced_weights(program: Program) -> dict[str, None]:
    """Remove what nothing uses any more; the weights among it by name, as `PassResult.moved` wants them.

    A weight that took a factor is another on purpose: a wrong one shows at the operation that uses it.
    """
    before = {node.name for node in program.graph.find_nodes(op="get_attr")}
    program.erase_dead()
    return dict.fromkeys(before - {node.name for node in program.graph.find_nodes(op="get_attr")})


def merged_name(names: Iterable[str]) -> str:
    """One name for weights joined from several: `a.q.weight, a.k.weight` → `a.q_k.weight`."""
    distinct = list(dict.fromkeys(names))
    if len(distinct) == 1:
        return f"{distinct[0]}_merged"
    parts = [name.split(".") for name in distinct]
    shortest = min(len(p) for p in parts)
    head = next((i for i in range(shortest) if len({p[i] for p in parts}) > 1), shortest)
    tail = next((i for i in range(shortest - head) if len({p[-1 - i] for p in parts}) > 1), shortest - head)
    middle = ["_".join(p[head : len(p) - tail]) for p in parts]
    last = parts[0][len(parts[0]) - tail :]
    return ".".join([*parts[0][:head], "_".join(filter(None, middle)), *last])


def retype_from(program: Program, changed: Iterable[fx.Node]) -> None:
    """Bring the types after changed nodes up to date, as far as anything differs.

    A value that takes another's place may be strided where that was contiguous. The strides of what
    follows change with it, and an `aten.view` that no longer fits becomes the `aten.reshape` it stood for.
    """
    stale = set(changed)
    for node in program.graph.nodes:
        if node.op != "call_function" or stale.isdisjoint(node.all_input_nodes):
            continue
        old = node.meta.get(VAL)
        try:
            program.infer_type(node)
        except VerificationError:
            if node.target is not aten.view.default:
                raise
            node.target = aten.reshape.default
            program.infer_type(node)
        if not _same_type(old, node.meta[VAL]):
            stale.add(node)


def _same_type(old: object, new: object) -> bool:
    if isinstance(old, Tensor) and isinstance(new, Tensor):
        # Compared as text: asking symbolic sizes whether they are equal would add guards.
        return old.dtype == new.dtype and str((old.shape, old.stride())) == str((new.shape, new.stride()))
    if isinstance(old, (tuple, list)) and isinstance(new, (tuple, list)):
        return len(old) == len(new) and all(map(_same_type, old, new))
    return str(old) == str(new)
