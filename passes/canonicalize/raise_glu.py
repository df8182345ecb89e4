"""The gated half of an MLP becomes `irc.glu`. Runs after attention and RoPE are raised.

Source: Shazeer 2020, https://arxiv.org/abs/2002.05202
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from irc.core.contract import Pass, PassContext, PassResult, register_pass
from irc.core.program import Program
from irc.core.rewrite import Match, RewriteRule, apply_rules


@register_pass
@dataclass(frozen=True, kw_only=True)
class RaiseGlu(Pass):
    """activation(gate) * up  →  irc.glu(gate, up, activation).

    1. The activation written as an op: silu, gelu (exact or tanh), relu, sigmoid; also `F.glu`.
    2. silu written as `x * sigmoid(x)`; gelu in its tanh form written with `tanh` and `x³`; both become
       one op also where nothing is gated.
    3. `x * sigmoid(1.702 x)` (`quick_gelu`).

    Does not raise: gate and up of different shapes (a squeeze-and-excitation scale, say); a swish with
    another slope; an activation that is used elsewhere too.
    Preserves: exact up to rounding.
    """

    name: ClassVar[str] = "raise-glu"

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        matches, skips = apply_rules(program, _RULES, ctx)
        return PassResult(program, matches=matches, skips=skips, modified=matches > 0)


def _glu(activation: str) -> Callable[[Tensor, Tensor], Tensor]:
    def replacement(gate: Tensor, up: Tensor) -> Tensor:
        return torch.ops.irc.glu(gate, up, activation=activation)

    return replacement


def _check_shapes(match: Match) -> str | None:
    gate, up = match.shape("gate"), match.shape("up")
    if gate != up:
        return f"gate {list(gate)} and up {list(up)} have different shapes"
    return None


def _check_sigmoid(match: Match) -> str | None:
    # x * sigmoid(1.702 x) is an activation of its own: nothing is gated.
    gate, up = match["gate"], match["up"]
    is_scaled = gate.target is torch.ops.aten.mul.Tensor and up in gate.args
    return "" if is_scaled else _check_shapes(match)


def _check_slope(match: Match) -> str | None:
    if not math.isclose(match["slope"], 1.702, rel_tol=1e-6):
        return f"a swish of slope {match['slope']}; only 1 (silu) and 1.702 (quick_gelu) have a name"
    return _check_shapes(match) if "up" in match.values else None


# ---------------------------------------------------------------- case 2: activations written out


def _tanh_gelu(x: Tensor, scale: float, cubic: float) -> Tensor:
    return 0.5 * x * (1.0 + torch.tanh(scale * (x + cubic * x.pow(3))))


def _tanh_gelu_outer_half(x: Tensor, scale: float, cubic: float) -> Tensor:
    return 0.5 * (x * (1.0 + torch.tanh(scale * (x + cubic * x.pow(3)))))


def _tanh_gelu_factored(x: Tensor, scale: float, cubic: float) -> Tensor:
    return 0.5 * x * (1.0 + torch.tanh(x * scale * (1.0 + cubic * x * x)))


def _erf_gelu(x: Tensor, root: float) -> Tensor:
    return x * 0.5 * (1.0 + torch.erf(x / root))


def _check_tanh_gelu(match: Match) -> str | None:
    if math.isclose(match["scale"], math.sqrt(2 / math.pi), rel_tol=1e-5) and math.isclose(match["cubic"], 0.044715):
        return None
    return f"constants {match['scale']} and {match['cubic']}, expected sqrt(2/pi) and 0.044715"


def _check_erf_gelu(match: Match) -> str | None:
    return None if math.isclose(match["root"], math.sqrt(2), rel_tol=1e-6) else f"erf(x / {match['root']})"


_RULES = [
    RewriteRule(
        name="silu",
        pattern=lambda x: x * torch.sigmoid(x),
        replacement=lambda x: F.silu(x),
    ),
    RewriteRule(
        name="gelu-tanh",
        pattern=[_tanh_gelu, _tanh_gelu_outer_half, _tanh_gelu_factored],
        check=_check_tanh_gelu,
        replacement=lambda x: F.gelu(x, approximate="tanh"),
    ),
    RewriteRule(name="gelu-erf", pattern=_erf_gelu, check=_check_erf_gelu, replacement=lambda x: F.gelu(x)),
    RewriteRule(
        name="swiglu",
        pattern=[lambda gate, up: F.silu(gate) * up, lambda gate, up: gate * (torch.sigmoid(gate) * up)],
        check=_check_shapes,
        replacement=_glu("silu"),
    ),
    RewriteRule(
        name="geglu",
        pattern=lambda gate, up: F.gelu(gate) * up,
        check=_check_shapes,
        replacement=_glu("gelu"),
    ),
    RewriteRule(
        name="geglu-tanh",
        pattern=lambda gate, up: F.gelu(gate, approximate="tanh") * up,
        check=_check_shapes,
        replacement=_glu("gelu_tanh"),
    ),
    RewriteRule(
        name="quick-geglu",
        pattern=[
            lambda gate, up, slope=float: gate * torch.sigmoid(gate * slope) * up,
            lambda gate, up, slope=float: gate * (torch.sigmoid(gate * slope) * up),
        ],
        check=_check_slope,
        replacement=_glu("quick_gelu"),
    ),
    RewriteRule(
        name="reglu",
        pattern=lambda gate, up: F.relu(gate) * up,
        check=_check_shapes,
        replacement=_glu("relu"),
    ),
    RewriteRule(
        name="sigmoid-glu",
        pattern=lambda gate, up: torch.sigmoid(gate) * up,
        check=_check_sigmoid,
        replacement=_glu("sigmoid"),
    ),
    RewriteRule(
        name="library-glu",
        pattern=lambda x, dim=int: F.glu(x, dim),
        replacement=lambda x, dim: _split_glu(x, dim),
    ),
]


def _split_glu(x: Tensor, dim: int) -> Tensor:
    up, gate = x.chunk(2, dim)
    return torch.ops.irc.glu(gate, up, activation="sigmoid")
