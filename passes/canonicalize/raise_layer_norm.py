"""LayerNorm written out by hand becomes `aten.layer_norm`. Runs after noise is dropped, before RMSNorm is raised.

Source: Ba et al. 2016, https://arxiv.org/abs/1607.06450
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from irc.core.contract import Pass, PassContext, PassResult, register_pass
from irc.core.program import Program
from irc.core.rewrite import Match, RewriteRule, apply_rules


@register_pass
@dataclass(frozen=True, kw_only=True)
class RaiseLayerNorm(Pass):
    """(x - mean(x)) * rsqrt(var(x) + eps) * w + b  →  aten.layer_norm(x, [E], w, b, eps).

    1. The variance as `(x - mean)²` averaged, or as `var` without Bessel's correction.
    2. The scale as `* rsqrt(v)`, `/ sqrt(v)` or `* v.pow(-0.5)`.
    3. Weight and bias of shape [E], either or both absent; computed in f32 for half types.

    Does not raise: statistics over other dimensions than the last; the corrected variance; `/ (std + eps)`.
    Preserves: exact up to rounding.
    """

    name: ClassVar[str] = "raise-layer-norm"

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        matches, skips = apply_rules(program, _RULES, ctx)
        return PassResult(program, matches=matches, skips=skips, modified=matches > 0)


def _centered(x: Tensor) -> Tensor:
    return x - x.mean(-1, keepdim=True)


_VARIANCES: list[Callable[[Tensor], Tensor]] = [
    lambda x: _centered(x).pow(2).mean(-1, keepdim=True),
    lambda x: (_centered(x) * _centered(x)).mean(-1, keepdim=True),
    lambda x: torch.var(x, -1, unbiased=False, keepdim=True),
    lambda x: torch.var(x, -1, correction=0, keepdim=True),
]


def _spellings() -> list[Callable[..., Tensor]]:
    def patterns(variance: Callable[[Tensor], Tensor]) -> list[Callable[..., Tensor]]:
        def times_rsqrt(x: Tensor, eps: float) -> Tensor:
            return _centered(x) * torch.rsqrt(variance(x) + eps)

        def over_sqrt(x: Tensor, eps: float) -> Tensor:
            return _centered(x) / torch.sqrt(variance(x) + eps)

        def times_power(x: Tensor, eps: float) -> Tensor:
            return _centered(x) * (variance(x) + eps).pow(-0.5)

        return [times_rsqrt, over_sqrt, times_power]

    return [pattern for variance in _VARIANCES for pattern in patterns(variance)]


def _plain(x: Tensor, eps: float) -> Tensor:
    return torch.ops.aten.layer_norm(x, (x.shape[-1],), None, None, eps)


def _rounded(x: Tensor, sizes: list[int], weight: object, bias: object, eps: float) -> Tensor:
    return torch.ops.aten.layer_norm(x.to(torch.float32), sizes, weight, bias, eps).to(x.dtype)


def _weighted(x: Tensor, sizes: list[int], weight: Tensor, eps: float) -> Tensor:
    return torch.ops.aten.layer_norm(x, sizes, None, None, eps) * weight


def _biased(x: Tensor, sizes: list[int], weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return torch.ops.aten.layer_norm(x, sizes, weight, None, eps) + bias


def _biased_without_weight(x: Tensor, sizes: list[int], bias: Tensor, eps: float) -> Tensor:
    return torch.ops.aten.layer_norm(x, sizes, None, None, eps) + bias


def _check_input(match: Match) -> str | None:
    if not match.tensor("x").is_floating_point():
        return f"x is {match.dtype('x')}, not a floating point type"
    if not isinstance(match.tensor("x").shape[-1], int):
        return f"the last dimension, {match.shape('x')[-1]}, is not a fixed size"
    return None


def _check_affine(name: str) -> Callable[[Match], str | None]:
    def check(match: Match) -> str | None:
        x, parameter = match.shape("x"), match.shape(name)
        if match.dtype(name) != match.dtype("x"):
            return f"the {name} is {match.dtype(name)}, x is {match.dtype('x')}"
        if list(match.values["sizes"]) != [x[-1]] or tuple(parameter) != (x[-1],):
            # A residual added to a norm is no near miss.
            return f"the {name} has shape {list(parameter)}, expected [{x[-1]}]" if len(parameter) < len(x) else ""
        return None

    return check


_RULES = [
    RewriteRule(name="layer-norm", pattern=_spellings(), check=_check_input, replacement=_plain),
    RewriteRule(
        name="layer-norm-weight",
        pattern=_weighted,
        check=_check_affine("weight"),
        replacement=lambda x, sizes, weight, eps: torch.ops.aten.layer_norm(x, sizes, weight, None, eps),
    ),
    RewriteRule(
        name="layer-norm-bias",
        pattern=[_biased],
        check=_check_affine("bias"),
        replacement=lambda x, sizes, weight, bias, eps: torch.ops.aten.layer_norm(x, sizes, weight, bias, eps),
    ),
    RewriteRule(
        name="layer-norm-bias-only",
        pattern=_biased_without_weight,
        check=_check_affine("bias"),
        replacement=lambda x, sizes, bias, eps: torch.ops.aten.layer_norm(x, sizes, None, bias, eps),
    ),
]
