"""RMSNorm in all its spellings becomes `irc.rms_norm`. Runs after noise is dropped, before attention is raised.

Source: Zhang & Sennrich 2019, https://arxiv.org/abs/1910.07467
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
class RaiseRmsNorm(Pass):
    """x * rsqrt(mean(x²) + eps) * w  →  irc.rms_norm(x, w, eps).

    1. The square as `x.pow(2)`, `x * x` or `x.square()`.
    2. The scale as `x * rsqrt(v)`, `x / sqrt(v)`, `x * (1 / sqrt(v))` or `x * v.pow(-0.5)`.
    3. Computed in f32 for half types; the weight applied after the cast back (Llama) or before (Gemma,
       OLMo2), or no weight. `1 + w` (Gemma) is the weight, and constant folding makes it one.
    4. `torch.nn.RMSNorm` (`aten.rms_norm`) over the last dimension.

    Does not raise: a mean over other dimensions than the last; an eps that is a tensor; a weight that is not [E].
    Preserves: exact up to rounding.
    """

    name: ClassVar[str] = "raise-rms-norm"

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        matches, skips = apply_rules(program, _RULES, ctx)
        return PassResult(program, matches=matches, skips=skips, modified=matches > 0)


# ---------------------------------------------------------------- the normalization itself: cases 1 and 2

_SQUARES: list[Callable[[Tensor], Tensor]] = [lambda x: x.pow(2), lambda x: x * x]


def _spellings() -> list[Callable[..., Tensor]]:
    def patterns(square: Callable[[Tensor], Tensor]) -> list[Callable[..., Tensor]]:
        def variance(x: Tensor, eps: float) -> Tensor:
            return square(x).mean(-1, keepdim=True) + eps

        def times_rsqrt(x: Tensor, eps: float) -> Tensor:
            return x * torch.rsqrt(variance(x, eps))

        def over_sqrt(x: Tensor, eps: float) -> Tensor:
            return x / torch.sqrt(variance(x, eps))

        def times_inverse(x: Tensor, eps: float) -> Tensor:
            return x * (1.0 / torch.sqrt(variance(x, eps)))

        def times_reciprocal(x: Tensor, eps: float) -> Tensor:
            return x * torch.reciprocal(torch.sqrt(variance(x, eps)))

        def times_power(x: Tensor, eps: float) -> Tensor:
            return x * variance(x, eps).pow(-0.5)

        return [times_rsqrt, over_sqrt, times_inverse, times_reciprocal, times_power]

    return [pattern for square in _SQUARES for pattern in patterns(square)]


# ---------------------------------------------------------------- casts and weights around it: case 3


def _normed(x: Tensor, eps: float) -> Tensor:
    return torch.ops.irc.rms_norm(x.float(), None, eps)


def _rounded(x: Tensor, eps: float) -> Tensor:
    return torch.ops.irc.rms_norm(x.to(torch.float32), None, eps).to(x.dtype)


def _weight_after_cast(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return torch.ops.irc.rms_norm(x, None, eps) * weight


def _weight_cast_to_f32(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return (_normed(x, eps) * weight.float()).to(x.dtype)


def _weight_promoted(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return (_normed(x, eps) * weight).to(x.dtype)


def _library_norm(x: Tensor, sizes: list[int], weight: Tensor, eps: object) -> Tensor:
    return torch.ops.aten.rms_norm(x, sizes, weight, eps)


def _library_norm_without_weight(x: Tensor, sizes: list[int], eps: object) -> Tensor:
    return torch.ops.aten.rms_norm(x, sizes, None, eps)


def _raise_library_norm(x: Tensor, weight: Tensor, eps: float | None) -> Tensor:
    return torch.ops.irc.rms_norm(x, weight, _default_eps(x, eps), weight_in_f32=True)


def _raise_library_norm_without_weight(x: Tensor, eps: float | None) -> Tensor:
    return torch.ops.irc.rms_norm(x, None, _default_eps(x, eps))


def _default_eps(x: Tensor, eps: float | None) -> float:
    return torch.finfo(x.dtype).eps if eps is None else eps


def _check_floating(match: Match) -> str | None:
    return None if match.tensor("x").is_floating_point() else f"x is {match.dtype('x')}, not a floating point type"


def _check_weight(match: Match) -> str | None:
    x, weight = match.shape("x"), match.shape("weight")
    if len(weight) != 1 or weight[0] != x[-1]:
        return f"the weight has shape {list(weight)}, expected [{x[-1]}]"
    return _check_floating(match)


def _check_half(match: Match) -> str | None:
    return None if match.dtype("x") in (torch.float16, torch.bfloat16) else ""


def _check_half_weight(match: Match) -> str | None:
    return _check_half(match) if _check_half(match) is not None else _check_weight(match)


def _check_sizes(match: Match) -> str | None:
    sizes = match["sizes"]
    return None if len(sizes) == 1 else f"it normalizes over {len(sizes)} dimensions, expected the last one"


_RULES = [
    RewriteRule(
        name="rms-norm",
        pattern=_spellings(),
        check=_check_floating,
        replacement=lambda x, eps: torch.ops.irc.rms_norm(x, None, eps),
    ),
    RewriteRule(
        name="rms-norm-weight-in-f32",
        pattern=[_weight_cast_to_f32, _weight_promoted],
        check=_check_half_weight,
        replacement=lambda x, weight, eps: torch.ops.irc.rms_norm(x, weight, eps, weight_in_f32=True),
    ),
    RewriteRule(
        name="rms-norm-weight",
        pattern=_weight_after_cast,
        check=_check_weight,
        replacement=lambda x, weight, eps: torch.ops.irc.rms_norm(x, weight, eps),
    ),
    RewriteRule(
        name="rms-norm-rounded",
        pattern=_rounded,
        check=_check_half,
        replacement=lambda x, eps: torch.ops.irc.rms_norm(x, None, eps),
    ),
    RewriteRule(
        name="library-rms-norm",
        pattern=_library_norm,
        check=_check_sizes,
        replacement=_raise_library_norm,
    ),
    RewriteRule(
        name="library-rms-norm-without-weight",
        pattern=_library_norm_without_weight,
        check=_check_sizes,
        replacement=_raise_library_norm_without_weight,
    ),
]
