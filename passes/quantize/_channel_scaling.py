"""The frame of passes that scale channels: calibrate, choose factors for each group, move them into the weights."""

from __future__ import annotations

from collections.abc import Callable

import torch.fx as fx
from torch import Tensor

from irc.core.calibration import calibration_of
from irc.core.contract import PassContext, PassResult, Skip
from irc.core.lockstep import Lockstep, Values
from irc.core.program import Program
from irc.passes._weights import erase_replaced_weights
from irc.passes.quantize._gram import InputStatistics, input_statistics
from irc.passes.quantize._scale_groups import ScaleGroup, find_scale_groups

Choose = Callable[[ScaleGroup, InputStatistics, list[Tensor]], Tensor]


def scale_channels(program: Program, ctx: PassContext, pass_name: str, choose: Choose) -> PassResult:
    """Scale every group by the factors f32[K] that `choose(group, statistics, consumers' weights)` gives for it.

    The factors are folded first, so that heads which share a value channel share its factor.
    """
    batches = calibration_of(ctx, pass_name).inputs_for(program)
    found = list(find_scale_groups(program))
    skips = [group for group in found if isinstance(group, Skip)]
    groups = [group for group in found if isinstance(group, ScaleGroup) and ctx.allow(group.value)]
    by_consumer = {group.consumers[0]: group for group in groups}
    factors: dict[fx.Node, Tensor] = {}
    progress = ctx.track(pass_name, groups)

    def visit(node: fx.Node, values: Values) -> None:
        next(progress)
        group = by_consumer[node]
        statistics = input_statistics(node, values(group.value), pass_name)
        weights = [program.weight(user.args[1]).detach().float() for user in group.consumers]
        factors[group.value] = group.spread(group.fold(choose(group, statistics, weights)))

    Lockstep(program, batches).run(visit, by_consumer)
    for _ in progress:
        pass
    for group in groups:
        group.apply(program, factors[group.value])
    moved = {name: move for group in groups for name, move in group.moves(factors[group.value]).items()}
    moved |= erase_replaced_weights(program)
    return PassResult(program, matches=len(groups), skips=skips, modified=bool(groups), moved=moved)
