"""Rotary position embedding in its spellings becomes `irc.rope`. Runs after attention is raised.

Source: Su et al. 2021 (RoFormer), https://arxiv.org/abs/2104.09864
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.fx as fx
from torch import Tensor

from irc.core.contract import Pass, PassContext, PassResult, register_pass
from irc.core.ops import is_irc_op
from irc.core.program import VAL, Program
from irc.core.rewrite import Match, RewriteRule, apply_rules
from irc.passes.canonicalize._rotary_tables import RotaryTables


@register_pass
@dataclass(frozen=True, kw_only=True)
class RaiseRope(Pass):
    """x * cos + rotate_half(x) * sin  →  irc.rope(x, cos, sin): the table keeps one column a pair.

    1. Half-split with tables of full width: `x*cos + cat(-x2, x1)*sin` (Llama).
    2. Half-split with tables of half width: `cat(x1*cos - x2*sin, x2*cos + x1*sin)` (GPT-OSS).
    3. Interleaved with tables of full width: `x*cos + flatten(stack(-odd, even))*sin` (Cohere).
    4. Interleaved with tables of half width: `flatten(stack(even*cos - odd*sin, odd*cos + even*sin))`.
    5. Interleaved in, half-split out (DeepSeek-V3): channels are reordered in front of a half-split rotation.
    6. A product of complex numbers: `view_as_real(view_as_complex(pairs) * polar)` (Llama 4).
    7. Partial: `cat(rope(x[..., :R]), x[..., R:])`.

    A table of full width must hold each angle twice. That is proved from how it is computed
    (`cat(f, f)`), or by evaluating it when it depends on sizes alone.
    Does not raise: full-width tables whose halves may differ; rotation by the opposite angle.
    Preserves: exact up to rounding.
    """

    name: ClassVar[str] = "raise-rope"

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        matches, skips = apply_rules(program, _RULES, ctx)
        if matches:
            _narrow_tables(program)
        return PassResult(program, matches=matches, skips=skips, modified=matches > 0)


def _narrow_tables(program: Program) -> None:
    """Compute half-width tables directly, where the full-width one was built by doubling a narrow one."""
    tables = RotaryTables(program)
    for node in list(program.graph.nodes):
        if is_irc_op(node.target, "rope"):
            for table in node.args[1:3]:
                assert isinstance(table, fx.Node)
                narrow = tables.narrowed(table)
                if narrow is not None:
                    node.replace_input_with(table, narrow)
    program.erase_dead()


# ---------------------------------------------------------------- cases 1 and 2: half-split


def _halves_by_chunk(x: Tensor, half: int) -> tuple[Tensor, Tensor]:
    first, second = x.chunk(2, dim=-1)
    return first, second


def _halves_by_slice(x: Tensor, half: int) -> tuple[Tensor, Tensor]:
    return x[..., :half], x[..., half:]


def _halves_by_split(x: Tensor, half: int) -> tuple[Tensor, Tensor]:
    parts = x.split(half, dim=-1)
    return parts[0], parts[1]


def _halves_by_sizes(x: Tensor, half: int) -> tuple[Tensor, Tensor]:
    first, second = x.split([half, half], dim=-1)
    return first, second


Halves = Callable[[Tensor, int], tuple[Tensor, Tensor]]
_HALVES: list[Halves] = [_halves_by_slice, _halves_by_chunk, _halves_by_split, _halves_by_sizes]


def _full_width(halves: Halves) -> Callable[..., Tensor]:
    if halves is _halves_by_chunk:

        def pattern(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
            first, second = halves(x, 0)
            return x * cos + torch.cat((-second, first), dim=-1) * sin

        return pattern

    def pattern_with_size(x: Tensor, cos: Tensor, sin: Tensor, half: int) -> Tensor:
        first, second = halves(x, half)
        return x * cos + torch.cat((-second, first), dim=-1) * sin

    return pattern_with_size


def _half_width(halves: Halves) -> Callable[..., Tensor]:
    if halves is _halves_by_chunk:

        def pattern(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
            first, second = halves(x, 0)
            return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)

        return pattern

    def pattern_with_size(x: Tensor, cos: Tensor, sin: Tensor, half: int) -> Tensor:
        first, second = halves(x, half)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)

    return pattern_with_size


# ---------------------------------------------------------------- cases 3, 4 and 5: interleaved


def _even_odd_by_slice(x: Tensor) -> tuple[Tensor, Tensor]:
    return x[..., ::2], x[..., 1::2]


def _interleaved_full_width(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    even, odd = _even_odd_by_slice(x)
    return x * cos + torch.stack((-odd, even), dim=-1).flatten(-2) * sin


def _interleaved_full_width_view(x: Tensor, cos: Tensor, sin: Tensor, size: list[int]) -> Tensor:
    even, odd = _even_odd_by_slice(x)
    return x * cos + torch.stack((-odd, even), dim=-1).view(size) * sin


def _interleaved_half_width(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    even, odd = _even_odd_by_slice(x)
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2)


def _interleaved_half_width_view(x: Tensor, cos: Tensor, sin: Tensor, size: list[int]) -> Tensor:
    even, odd = _even_odd_by_slice(x)
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).view(size)


def _pairs(x: Tensor, pair_sizes: list[int]) -> tuple[Tensor, Tensor]:
    pairs = x.view(pair_sizes)
    return pairs[..., 0], pairs[..., 1]


def _unbound_pairs(x: Tensor, pair_sizes: list[int]) -> tuple[Tensor, Tensor]:
    pairs = x.view(pair_sizes).unbind(-1)
    return pairs[0], pairs[1]


def _interleaved_pairs(x: Tensor, cos: Tensor, sin: Tensor, pair_sizes: list[int]) -> Tensor:
    even, odd = _pairs(x, pair_sizes)
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2)


def _interleaved_unbound_pairs(x: Tensor, cos: Tensor, sin: Tensor, pair_sizes: list[int]) -> Tensor:
    even, odd = _unbound_pairs(x, pair_sizes)
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2)


def _deinterleaved(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    even, odd = _even_odd_by_slice(x)
    return torch.cat((even * cos - odd * sin, odd * cos + even * sin), dim=-1)


def _raise_deinterleaved(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return torch.ops.irc.rope(torch.cat((x[..., ::2], x[..., 1::2]), dim=-1), cos, sin)


# ---------------------------------------------------------------- case 6: complex numbers


def _complex(x: Tensor, angles: Tensor, pair_sizes: list[int]) -> Tensor:
    product = torch.view_as_complex(x.view(pair_sizes)) * angles
    return torch.view_as_real(product).flatten(-2)


def _complex_flatten(x: Tensor, angles: Tensor, pair_sizes: list[int], start: int) -> Tensor:
    product = torch.view_as_complex(x.view(pair_sizes)) * angles
    return torch.view_as_real(product).flatten(start)


def _raise_complex(x: Tensor, angles: Tensor) -> Tensor:
    parts = torch.view_as_real(angles)
    return torch.ops.irc.rope(x, parts[..., 0], parts[..., 1], interleaved=True)


# ---------------------------------------------------------------- case 7: partial


def _partial(x: Tensor, cos: Tensor, sin: Tensor, width: int, interleaved: bool) -> Tensor:
    rotated = torch.ops.irc.rope(x[..., :width], cos, sin, interleaved=interleaved)
    return torch.cat((rotated, x[..., width:]), dim=-1)


def _partial_by_split(x: Tensor, cos: Tensor, sin: Tensor, sizes: list[int], interleaved: bool) -> Tensor:
    parts = x.split_with_sizes(sizes, dim=-1)
    return torch.cat((torch.ops.irc.rope(parts[0], cos, sin, interleaved=interleaved), parts[1]), dim=-1)


# ---------------------------------------------------------------- checks and replacements


def _check_full(interleaved: bool) -> Callable[[Match], str | None]:
    def check(match: Match) -> str | None:
        width = match.shape("x")[-1]
        if "half" in match.values and 2 * match["half"] != width:
            return f"it splits {width} channels at {match['half']}, expected {width / 2}"
        tables = RotaryTables(match.program)
        for name in ("cos", "sin"):
            if match.shape(name)[-1:] != (width,):
                return f"{name} has {list(match.shape(name))[-1:]} columns, expected {width}"
            problem = tables.why_not_doubled(match[name], interleaved=interleaved)
            if problem is not None:
                return f"{name}: {problem}"
        return None

    return check


def _check_half(match: Match) -> str | None:
    width = match.shape("x")[-1]
    if "half" in match.values and 2 * match["half"] != width:
        return f"it splits {width} channels at {match['half']}, expected {width / 2}"
    if "pair_sizes" in match.values and _last_two(match) != (width / 2, 2):
        return f"it views {width} channels as {_last_two(match)}, expected pairs"
    for name in ("cos", "sin"):
        if 2 * match.shape(name)[-1] != width:
            return f"{name} has {match.shape(name)[-1]} columns, expected {width / 2}"
    return None


def _last_two(match: Match) -> tuple[object, ...]:
    view = next(node for node in match.nodes if node.all_input_nodes[0] is match["x"] and node.meta[VAL].ndim > 1)
    return match.program.shape_expr(view)[-2:]


def _check_partial(match: Match) -> str | None:
    width = match["width"] if "width" in match.values else match["sizes"][0]
    rotated = 2 * match.shape("cos")[-1]
    return None if width == rotated else f"{rotated} of {width} channels are rotated already"


def _raise_half_split_full(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return torch.ops.irc.rope(x, cos[..., :half], sin[..., :half])


def _raise_interleaved_full(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return torch.ops.irc.rope(x, cos[..., ::2], sin[..., ::2], interleaved=True)


_RULES = [
    RewriteRule(
        name="rope-half-split",
        pattern=[_full_width(halves) for halves in _HALVES],
        check=_check_full(interleaved=False),
        replacement=_raise_half_split_full,
    ),
    RewriteRule(
        name="rope-half-split-narrow",
        pattern=[_half_width(halves) for halves in _HALVES],
        check=_check_half,
        replacement=lambda x, cos, sin: torch.ops.irc.rope(x, cos, sin),
    ),
    RewriteRule(
        name="rope-interleaved",
        pattern=[_interleaved_full_width, _interleaved_full_width_view],
        check=_check_full(interleaved=True),
        replacement=_raise_interleaved_full,
    ),
    RewriteRule(
        name="rope-interleaved-narrow",
        pattern=[
            _interleaved_half_width,
            _interleaved_half_width_view,
            _interleaved_pairs,
            _interleaved_unbound_pairs,
        ],
        check=_check_half,
        replacement=lambda x, cos, sin: torch.ops.irc.rope(x, cos, sin, interleaved=True),
    ),
    RewriteRule(
        name="rope-deinterleaved",
        pattern=_deinterleaved,
        check=_check_half,
        replacement=_raise_deinterleaved,
    ),
    RewriteRule(name="rope-complex", pattern=[_complex, _complex_flatten], replacement=_raise_complex),
    RewriteRule(
        name="rope-partial",
        pattern=[_partial, _partial_by_split],
        check=_check_partial,
        replacement=lambda x, cos, sin, interleaved: torch.ops.irc.rope(x, cos, sin, interleaved=interleaved),
    ),
]
