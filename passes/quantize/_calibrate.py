"""Static scales from calibration data: one quantizer after the other, each seeing what those before it leave."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor, nn

from irc.core import formats
from irc.core.calibration import calibration_of
from irc.core.contract import PassContext
from irc.core.errors import IrcError, PassError
from irc.core.formats import QuantFormat
from irc.core.lockstep import Lockstep, Values
from irc.core.program import VAL, Program
from irc.passes.quantize.observers import Observer

MakeObserver = Callable[[QuantFormat], Observer]


@dataclass(frozen=True)
class Uncalibrated:
    """A quantize (or fake quantize) whose scale and zero point are still to be found, and whose input it is."""

    node: fx.Node
    where: str


def uncalibrated_parts(program: Program, value: fx.Node, form: QuantFormat, before: fx.Node) -> list[fx.Node | None]:
    """Scale and zero point of the right type for a per-tensor quantizer of `value`, to be calibrated."""
    ones = torch.ones((1,) * value.meta[VAL].ndim, device=value.meta[VAL].device)
    scale = program.weight_node(f"{value.name}_scale_uncalibrated", ones, before=before)
    if form.symmetric:
        return [scale, None]
    zero = torch.zeros_like(ones, dtype=form.zero_point_dtype)
    return [scale, program.weight_node(f"{value.name}_zero_point_uncalibrated", zero, before=before)]


def calibrate(
    program: Program,
    sites: Sequence[Uncalibrated],
    make: MakeObserver,
    ctx: PassContext,
    pass_name: str,
    *,
    trained: bool = False,
    measure: bool = False,
) -> dict[fx.Node, float]:
    """Give each site the scale and zero point that an observer finds over the calibration data.

    `trained`: scales become parameters with a gradient.

    Returns:
        With `measure`: for each site the share that a row of its input loses over these data (root mean square).

    Raises:
        PassError: no data, data that does not fit, or values that are not finite or all zero, naming the layer.
    """
    lost: dict[fx.Node, float] = {}
    if not sites:
        return lost
    batches = calibration_of(ctx, pass_name).inputs_for(program)
    by_node = {site.node: site for site in sites}
    steps = ctx.track("calibrating activations", list(sites))
    run = Lockstep(program, batches)

    def visit(node: fx.Node, values: Values) -> None:
        next(steps)
        source, *parts = node.args[:3]
        assert isinstance(source, fx.Node)
        form = formats.parse(str(node.kwargs["format"]))
        assert isinstance(form, QuantFormat)
        found = _observed(by_node[node], values(source), make(form))
        for part, tensor, role in zip(parts, found, ("scale", "zero_point"), strict=True):
            if isinstance(part, fx.Node) and tensor is not None:
                run.replace(part, _settle(program, part, tensor, f"{source.name}_{role}", trained and role == "scale"))
        if measure:
            lost[node] = _share_lost(values(source), *found, str(form))

    run.run(visit, by_node)
    next(steps, None)
    return lost


def _share_lost(batches: Sequence[Tensor], scale: Tensor, zero_point: Tensor | None, form: str) -> float:
    """Root mean square over all rows (tokens; tokens and heads) of what each loses relative to its own length."""
    total, rows = 0.0, 0
    for value in batches:
        wide = value.detach().float()
        parts = [None if part is None else part.view((1,) * wide.ndim) for part in (scale, zero_point)]
        stored = torch.ops.irc.quantize(wide, *parts, format=form)
        error = torch.ops.irc.dequantize(stored, *parts, format=form) - wide
        lost = error.square().sum(-1, dtype=torch.float64) / wide.square().sum(-1, dtype=torch.float64)
        # A row of zeros loses nothing, one of almost nothing at most all of it.
        total += float(lost.nan_to_num(0.0).clamp(max=1.0).sum())
        rows += lost.numel()
    return (total / rows) ** 0.5


def _observed(site: Uncalibrated, batches: Sequence[Any], observer: Observer) -> tuple[Tensor, Tensor | None]:
    try:
        for batch in batches:
            observer.update(batch)
        return observer.grid()
    except IrcError as error:
        raise PassError(f"calibrating {site.where}: {error}", node=site.node.name) from error


def _settle(program: Program, part: fx.Node, found: Tensor, name: str, trained: bool) -> Tensor:
    """Put a calibrated tensor in a placeholder's place."""
    placeholder = program.weight(part)
    tensor = found.reshape(placeholder.shape).to(placeholder.dtype)
    if trained:
        tensor = nn.Parameter(tensor)
    part.target = program.add_weight(name, tensor)
    return tensor
