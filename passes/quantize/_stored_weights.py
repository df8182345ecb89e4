"""What calibrated weight quantizers share: the promise, writing a layer's stored weight, and checking it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor

from irc.core.contract import Finding, Preserves
from irc.core.formats import Format, Parts, QuantFormat
from irc.core.ops.registry import is_irc_op
from irc.core.paging import release
from irc.core.program import Program
from irc.core.provenance import origin_of
from irc.passes.quantize._round_to_nearest import round_to_nearest
from irc.passes.quantize._weight_layers import WeightLayer

aten = torch.ops.aten

# Largest change of the outputs, relative to their largest value, and largest mean KL divergence in nats a
# token: what a working quantization of small and random models stays below, and a wrong scale does not.
LIMITS = {8: (0.05, 0.01), 7: (0.1, 0.03), 6: (0.2, 0.1), 5: (0.35, 0.25), 4: (0.6, 0.6), 3: (1.2, 2.0), 2: (3.0, 8.0)}
# A calibrated weight moves further than a rounded one, to make up for its neighbours: so much further at most.
_MORE_THAN_ROUNDING = 8.0
# It moves to both sides: a row that is shifted by this many steps on average has a wrong zero point.
_MAX_SHIFT = 0.5
# Steps that a nearest integer may be off: half a step, and the rounding of the arithmetic.
_MAX_STEPS_OFF = 0.5 + 1e-2
# Numbers whose several temporaries are in memory at once.
_CHECKED_AT_ONCE = 1 << 23


def lossy_promise(*chosen: Format | None) -> Preserves:
    """What quantizing weights to those formats may do to the outputs (None: a weight that is left alone)."""
    rtol, max_kl = LIMITS[min(one.precision for one in chosen if one is not None)]
    return Preserves("lossy", rtol=rtol, max_kl=max_kl)


def write_stored_weight(program: Program, layer: WeightLayer, chosen: Format, parts: Parts) -> int:
    """Put the dequantized weight in the weight's place, where it is first used; returns the bytes of its parts.

    Rows that are stored with padding are cut to the layer's width.
    """
    # Where the weight is first used, not where it was read: its full-precision form should live shortly.
    weight, before = program.weight(layer.weight), layer.users[0]
    nodes = [
        None if tensor is None else program.weight_node(f"{layer.name}_{role}", tensor, before=before)
        for role, tensor in parts._asdict().items()
    ]
    if parts.tensor_scale is None:
        nodes.pop()
    options: dict[str, Any] = {} if weight.dtype == chosen.result_dtype(parts.scale) else {"dtype": weight.dtype}
    target = torch.ops.irc.dequantize.default
    restored = program.insert(target, *nodes, before=before, format=str(chosen), **options)
    padded = chosen.logical_shape(tuple(parts.stored.shape))[-1] != layer.width
    if padded:
        restored = program.insert(aten.slice.Tensor, restored, 1, 0, layer.width, before=before)
    if weight.ndim > 2:
        shape = aten.reshape.default if padded else aten.view.default
        restored = program.insert(shape, restored, list(weight.shape), before=before)
    program.replace(layer.weight, restored)
    return parts.num_bytes


def check_stored_weights(
    before: Program, after: Program, expected: Mapping[fx.Node, QuantFormat | None], *, nearest: bool
) -> list[Finding]:
    """Each new dequantized weight stands for one of before, and no row of it is far from that one's row.

    `expected`: the format of each weight of before.
    `nearest`: every integer that is not at the end of its range is the nearest one on the stored grid.
    """
    originals = {node.name: node for node in before.graph.nodes}
    findings = []
    for node in _new_weights(after, originals):
        old = originals.get(origin_of(node) or "")
        if old is None or old.op != "get_attr":
            findings.append(Finding(node.name, "stands for no weight of the program before"))
            continue
        original = before.weight(old).detach()
        problem = _distance_problem(original, after, node, expected.get(old), nearest)
        release(original)
        if problem is not None:
            findings.append(Finding(node.name, f"{problem} of {old.target}"))
    return findings


def _new_weights(after: Program, originals: dict[str, fx.Node]) -> Iterator[fx.Node]:
    for node in after.graph.nodes:
        if node.name not in originals and is_irc_op(node.target, "dequantize"):
            yield node


def _distance_problem(
    original: Tensor, after: Program, node: fx.Node, chosen: QuantFormat | None, nearest: bool
) -> str | None:
    if chosen is None or str(node.kwargs["format"]) != str(chosen):
        return f"has format {node.kwargs['format']} instead of {chosen or 'none'}; a weight"
    stored, scale, zero_point = (after.weight(part) if isinstance(part, fx.Node) else None for part in node.args[:3])
    if stored is None or scale is None or original.device.type == "meta":
        return None
    logical = chosen.logical_shape(tuple(stored.shape))
    if logical != tuple(original.shape):
        return f"has shape {list(logical)} instead of {list(original.shape)}; a weight"
    step = len(original) if chosen.per_tensor else max(1, _CHECKED_AT_ONCE // original.shape[1])
    for start in range(0, len(original), step):
        rows = slice(start, start + step)
        some = (stored, scale, zero_point) if chosen.per_tensor else _rows_of(rows, stored, scale, zero_point)
        problem = _rows_problem(original[rows].float(), *some, chosen, nearest, start)
        if problem is not None:
            return problem
    return None


def _rows_of(rows: slice, stored: Tensor, scale: Tensor, zero: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    return stored[rows], scale[rows], None if zero is None else zero[rows]


def _rows_problem(
    original: Tensor, stored: Tensor, scale: Tensor, zero_point: Tensor | None, chosen: QuantFormat, nearest: bool,
    first: int,
) -> str | None:  # fmt: skip
    """The same of some rows, the first of which is row `first` of the weight."""
    plain = round_to_nearest(original, chosen, torch.float32)
    rounded = chosen.dequantize(plain[0], plain[1], plain[2], torch.float32)
    found = chosen.dequantize(stored, scale, zero_point, torch.float32)
    steps = (found - original).unflatten(-1, (scale.shape[-1], -1)) / scale.float().unsqueeze(-1)
    shift = steps.flatten(1).mean(1).abs().nan_to_num(nan=torch.inf)
    if float(shift.max()) > _MAX_SHIFT:
        return f"is shifted by {float(shift.max()):.2f} steps on average in row {first + int(shift.argmax())}"
    if nearest:
        integers = chosen.unpack(stored).unflatten(-1, (scale.shape[-1], -1))
        inner = (integers > chosen.lowest_stored) & (integers < chosen.high)
        off = torch.where(inner, steps.abs(), 0.0).flatten(1).amax(1).nan_to_num(nan=torch.inf)
        if float(off.max()) > _MAX_STEPS_OFF:
            row = int(off.argmax())
            return f"is off by {float(off[row]):.2f} steps (at most half is right) in row {first + row}"
    floor = original.norm(dim=1) * 2.0 ** -(chosen.bits + 2)
    allowed = _MORE_THAN_ROUNDING * torch.maximum((rounded - original).norm(dim=1), floor)
    ratio = ((found - original).norm(dim=1) / allowed.clamp_min(1e-12)).nan_to_num(nan=torch.inf)
    worst = int(ratio.argmax())
    if float(ratio[worst]) <= 1:
        return None
    return (
        f"is {float(ratio[worst]) * _MORE_THAN_ROUNDING:.1f} times as far off as plain rounding in row"
        f" {first + worst}"
        f" ({_MORE_THAN_ROUNDING:g} times is allowed)"
    )
