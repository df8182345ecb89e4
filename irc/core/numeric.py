"""Numeric verification: does a program still compute what it did before a pass?

Outputs of the program before the pass are taken before the pass runs and kept. Nothing a pass could
have touched is computed again for the comparison.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import Tensor

from irc.core.contract import PassResult, Preserves
from irc.core.dims import Dim, dim_symbol
from irc.core.errors import IrcError
from irc.core.program import VAL, Program, describe

_HALF_SLACK = 4
"""Roundings of a half type that an exact pass may move a value by, at the largest magnitude."""
_LOGITS_MIN = 32
_KL_CHUNK = 1 << 22
_OTHER_SIZE = 7
"""A small odd size for the second set of inputs."""


@dataclass(frozen=True)
class Difference:
    """How one output differs.

    Attributes:
        output: its index.
        problem: a difference that no tolerance covers (type, shape, new NaN), or an empty string.
        absolute, relative: largest |after - before|, and that over the largest |before|.
        position: index of the largest difference.
        kl, top1: for logits.
    """

    output: int
    problem: str = ""
    absolute: float = 0.0
    relative: float = 0.0
    position: tuple[int, ...] = ()
    kl: float | None = None
    top1: float | None = None


@dataclass
class Comparison:
    """All outputs of two stages, over all sets of inputs."""

    differences: list[Difference] = field(default_factory=list)

    @property
    def absolute(self) -> float:
        return max((d.absolute for d in self.differences), default=0.0)

    @property
    def relative(self) -> float:
        return max((d.relative for d in self.differences), default=0.0)

    @property
    def kl(self) -> float | None:
        return max((d.kl for d in self.differences if d.kl is not None), default=None)

    @property
    def top1(self) -> float | None:
        return min((d.top1 for d in self.differences if d.top1 is not None), default=None)

    def violations(self, promise: Preserves, allowed: float) -> list[tuple[Difference, str]]:
        """Differences that break the promise, each in words."""
        found = []
        for one in self.differences:
            if one.problem:
                found.append((one, f"output {one.output} {one.problem}"))
            elif not one.relative <= allowed:
                found.append(
                    (one, f"output {one.output} differs by {one.relative:.1e} relative, {allowed:.1e} is allowed")
                )
            elif promise.max_kl is not None and one.kl is not None and not one.kl <= promise.max_kl:
                found.append(
                    (one, f"output {one.output} has KL {one.kl:.1e} nats a token, {promise.max_kl:.1e} is allowed")
                )
        return found


def allowed_error(promise: Preserves, program: Program) -> float:
    """The relative error a promise allows in this program: its own, plus the rounding of half types."""
    if promise.kind != "exact":
        return promise.rtol
    eps = coarsest_eps(program)
    return promise.rtol if eps <= torch.finfo(torch.float32).eps else promise.rtol + _HALF_SLACK * eps


def coarsest_eps(program: Program) -> float:
    """Rounding step of the coarsest floating type that the program computes in."""
    found = torch.finfo(torch.float32).eps
    for node in program.operations():
        value = node.meta.get(VAL)
        if isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16):
            found = max(found, torch.finfo(value.dtype).eps)
    return found


def run_outputs(program: Program, inputs: Sequence[Any]) -> list[Any]:
    """Flat outputs, none of which shares memory with a weight or an input."""
    shared = {storage(t) for t in (*program.weights.values(), *inputs) if isinstance(t, Tensor)}
    return [out.clone() if isinstance(out, Tensor) and storage(out) in shared else out for out in program.run(*inputs)]


def storage(tensor: Tensor) -> int:
    """Address of a tensor's memory."""
    return tensor.untyped_storage().data_ptr()


def compare_outputs(before: Sequence[Any], after: Sequence[Any]) -> Comparison:
    """Compare flat outputs one by one."""
    if len(before) != len(after):
        return Comparison([Difference(0, problem=f"is one of {len(after)} outputs, before there were {len(before)}")])
    return Comparison([compare_values(a, b, output=i) for i, (a, b) in enumerate(zip(before, after, strict=True))])


def compare_stages(
    before: Sequence[Any], after: Program, result: PassResult | None, inputs: Sequence[Any]
) -> tuple[Comparison, list[Any] | None]:
    """Run the program after a pass on the old inputs and compare with the kept outputs.

    The second value is the new program's outputs, or None where its signature changed (then its
    `replay` was run instead).
    """
    if result is not None and result.replay is not None:
        with torch.no_grad():
            return compare_outputs(before, result.replay(after, inputs)), None
    outputs = run_outputs(after, inputs)
    return compare_outputs(before, outputs), outputs


def compare_values(before: Any, after: Any, output: int = 0) -> Difference:
    """The difference of two values of one output (or node)."""
    if not isinstance(before, Tensor) or not isinstance(after, Tensor):
        same = type(before) is type(after) and before == after
        return Difference(output, problem="" if same else f"was {before!r} and is {after!r}")
    if before.dtype != after.dtype or before.shape != after.shape:
        return Difference(output, problem=f"was {describe(before)} and is {describe(after)}")
    if before.numel() == 0:
        return Difference(output)
    if not (before.dtype.is_floating_point or before.dtype.is_complex):
        return _compare_integers(before, after, output)
    return _compare_floats(before, after, output)


def _compare_integers(before: Tensor, after: Tensor, output: int) -> Difference:
    wrong = before != after
    count = int(wrong.sum())
    if not count:
        return Difference(output)
    position = _position(wrong.to(torch.uint8))
    problem = (
        f"has {count} of {before.numel()} values wrong: at {list(position)}"
        f" it was {before[position].item()} and is {after[position].item()}"
    )
    return Difference(output, problem=problem, position=position)


def _compare_floats(before: Tensor, after: Tensor, output: int) -> Difference:
    wide = torch.complex128 if before.dtype.is_complex else torch.float64
    if not before.dtype.is_complex and before.dtype != torch.float64:
        wide = torch.float32
    a, b = before.to(wide), after.to(wide)
    # Equal infinities (masks) and NaN at the same places are no difference.
    same = (a == b) | (a.isnan() & b.isnan())
    odd = ~same & ~(a.isfinite() & b.isfinite())
    if bool(odd.any()):
        position = _position(odd.to(torch.uint8))
        problem = f"was {a[position].item()} and is {b[position].item()} at {list(position)}"
        return Difference(output, problem=problem, absolute=math.inf, relative=math.inf, position=position)
    error = torch.where(same, 0.0, (b - a).abs()) if not before.dtype.is_complex else (b - a).abs().nan_to_num(0.0)
    largest = a.abs().nan_to_num(0.0, posinf=0.0).max().item()
    position = _position(error)
    absolute = error[position].item()
    relative = absolute / largest if largest > 0 else (math.inf if absolute > 0 else 0.0)
    kl, top1 = logits_metrics(a, b) if looks_like_logits(before) else (None, None)
    return Difference(output, "", absolute, relative, position, kl, top1)


def _position(values: Tensor) -> tuple[int, ...]:
    flat = int(values.flatten().argmax())
    return tuple(int(i) for i in torch.unravel_index(torch.tensor(flat), values.shape))


def looks_like_logits(value: Tensor) -> bool:
    """A float [B, S, V] with a wide last axis."""
    return value.dim() == 3 and value.is_floating_point() and value.shape[-1] >= _LOGITS_MIN


def logits_metrics(before: Tensor, after: Tensor) -> tuple[float, float]:
    """Mean KL(before ‖ after) in nats a token, and the share of tokens with the same best entry."""
    before, after = before.flatten(0, -2), after.flatten(0, -2)
    rows = max(1, _KL_CHUNK // before.shape[-1])
    divergence, same = 0.0, 0
    for a, b in zip(before.split(rows), after.split(rows), strict=True):
        p, q = a.double().log_softmax(-1), b.double().log_softmax(-1)
        divergence += float((p.exp() * (p - q)).nan_to_num(0.0).sum())
        same += int((a.argmax(-1) == b.argmax(-1)).sum())
    return max(divergence / len(before), 0.0), same / len(before)


# -------------------------------------------------------------------- inputs at other sizes


def other_sizes(program: Program) -> list[dict[str, int]]:
    """Sizes to check a dynamic program at besides its example's, in order of preference.

    Best: 1 for the first dimension (the batch, mostly) and a small odd one for the others. Where the program
    does not run at those (indices that point beyond a shorter input): 1 for the first, the rest as they were.
    """
    dims = list(program.dims.values())
    if not dims:
        return []
    small = {dim.name: _within(dim, _OTHER_SIZE) for dim in dims}
    small |= {dim.name: _within(dim, dim.hint + 2) for dim in dims if small[dim.name] == dim.hint}
    first = {dims[0].name: _within(dims[0], 1)}
    return [small | first, {dim.name: dim.hint for dim in dims} | first]


def _within(dim: Dim, size: int) -> int:
    return max(dim.minimum, size if dim.maximum is None else min(size, dim.maximum))


def inputs_at(program: Program, inputs: Sequence[Any], sizes: dict[str, int]) -> tuple[Any, ...]:
    """Inputs of the given sizes made from seen ones: cropped, and where they must grow, entries repeated.

    Cropping keeps what values mean (ids in range, ascending positions, a causal pattern in a mask).

    Raises:
        IrcError: a size is not an expression over the program's dimensions.
    """
    made: list[Any] = []
    for node, value in zip(program.placeholders, inputs, strict=True):
        if isinstance(value, Tensor):
            shape = tuple(_size_at(program, size, sizes) for size in node.meta[VAL].shape)
            made.append(_resized(value, shape))
        elif isinstance(node.meta[VAL], torch.SymInt):
            made.append(_size_at(program, node.meta[VAL], sizes))
        else:
            made.append(value)
    return tuple(made)


def _size_at(program: Program, size: int | torch.SymInt, sizes: dict[str, int]) -> int:
    value = program.expr(size).subs({dim_symbol(name): sympy.Integer(n) for name, n in sizes.items()})
    if not value.is_Integer:
        raise IrcError(f"size {value} of an input is not given by the dimensions {', '.join(sizes)}")
    return int(value)


def _resized(value: Tensor, shape: tuple[int, ...]) -> Tensor:
    for axis, (old, new) in enumerate(zip(value.shape, shape, strict=True)):
        if new != old:
            value = value.index_select(axis, torch.arange(new, device=value.device) % old)
    return value.clone()
