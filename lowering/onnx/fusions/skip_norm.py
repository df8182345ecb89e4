"""s = a + b; rms_norm(s, w) → `SkipSimplifiedLayerNormalization`, which gives the sum as well."""

from __future__ import annotations

import operator
from collections.abc import Iterator

import torch
import torch.fx as fx
from torch import Tensor

from irc.core.contract import Skip
from irc.core.ops.registry import is_irc_op
from irc.core.program import VAL, Program
from irc.lowering.onnx import installed
from irc.lowering.onnx.fusing import Match, call, register_fusion
from irc.lowering.onnx.registry import Setting

_OP = "SkipSimplifiedLayerNormalization"


def find(setting: Setting, program: Program) -> Iterator[Match | Skip]:
    """Norms of a sum of two tensors of one shape."""
    taken: set[fx.Node] = set()
    for node in program.operations():
        total = node.args[0] if is_irc_op(node.target, "rms_norm") else None
        if not isinstance(total, fx.Node) or total.target is not torch.ops.aten.add.Tensor or total in taken:
            continue
        reason = _why_not(program, node, total)
        if reason is not None:
            yield Skip.at(node, f"{_OP}: {reason}")
            continue
        taken.add(total)
        yield Match(node, {"sum": total}, (node, total))


def _why_not(program: Program, node: fx.Node, total: fx.Node) -> str | None:
    weight = node.args[1]
    parts = [part for part in total.args[:2] if isinstance(part, fx.Node)]
    if not isinstance(weight, fx.Node) or weight.op != "get_attr":
        return "its weight is no stored tensor"
    if len(parts) < 2 or not all(isinstance(part.meta[VAL], Tensor) for part in parts):
        return "adds a constant"
    if total.kwargs.get("alpha", 1) != 1:
        return "adds a multiple"
    values = [n.meta[VAL] for n in (*parts, weight)]
    if {value.dtype for value in values} != {torch.float32}:
        return "is used for f32 only"
    shapes = {program.shape_expr(part) for part in parts}
    if len(shapes) != 1 or values[0].dim() not in (2, 3):
        return "takes two tensors of one shape, in two or three dimensions"
    if not installed.has_kernel(_OP, installed.CONTRIB, 1):
        return "this ONNX Runtime has no kernel for it"
    return None


def write(setting: Setting, program: Program, match: Match) -> None:
    """Edits the program: sum and norm become outputs of one operator, at the place of the sum."""
    node, total = match.root, match.parts["sum"]
    with program.graph.inserting_before(total):
        weight = program.graph.get_attr(str(node.args[1].target))
        weight.meta[VAL] = node.args[1].meta[VAL]
    both = call(program, setting, skip_norm, *total.args[:2], weight, float(node.args[2]), before=total)
    for index, old in enumerate((node, total)):
        with program.graph.inserting_before(total):
            new = program.graph.call_function(operator.getitem, (both, index))
        new.meta[VAL] = old.meta[VAL]
        old.replace_all_uses_with(new, delete_user_cb=lambda user: user is not node)
    program.graph.erase_node(node)
    program.graph.erase_node(total)


def skip_norm(setting: Setting, left: Tensor, right: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(norm of the sum, the sum)."""
    outputs = torch.onnx.ops.symbolic_multi_out(
        f"{installed.CONTRIB}::{_OP}",
        (left, right, weight),
        {"epsilon": eps},
        # The second and third are statistics for training.
        dtypes=(left.dtype,) * 4,
        shapes=(left.shape, (1,), (1,), left.shape),
        version=1,
    )
    return outputs[0], outputs[3]


register_fusion(_OP, find, write, order=30)
