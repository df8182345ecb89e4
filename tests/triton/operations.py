"""What tests of single operations share: programs of many functions of the same inputs, and bounds on their errors."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from irc.core.target import get_target
from irc.frontend import capture

NATIVE = os.environ.get("TRITON_INTERPRET") != "1"
"""Kernels run on a GPU: f32 exponentials are approximate there, and subnormal numbers may become 0."""
Function = Callable[..., Tensor]


class Table(nn.Module):
    """All functions of the same inputs, as one program."""

    def __init__(self, functions: Sequence[Function]) -> None:
        super().__init__()
        self.functions = functions

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(function(*inputs) for function in self.functions)


def run(functions: Sequence[Function], inputs: Sequence[Tensor], *, others: Sequence[Tensor] | None = None,
        dynamic: tuple[dict[int, str], ...] | None = None) -> list[Tensor]:  # fmt: skip
    """What target `triton` makes of the functions: captured with `inputs`, run on `others` (default: the same)."""
    sizes = dynamic or tuple({} for _ in inputs)
    program = capture(Table(functions), tuple(inputs), dynamic=(sizes,), name="operations")
    coverage = get_target("triton").check(program)
    assert coverage.complete, str(coverage)
    assert not coverage.fallbacks, str(coverage)
    return list(get_target("triton").lower(program).run(*(others or inputs)))


def compare(
    functions: Mapping[str, Function], inputs: Sequence[Tensor], ulps: Mapping[str, float] | None = None, *,
    exact_in: torch.dtype | None = None,
) -> None:  # fmt: skip
    """Run the functions on target `triton`, and hold each against PyTorch.

    Args:
        ulps: bound on the error of each in units of the last place; 0 where none is given.
        exact_in: compute what is expected in this type, and round it to the result's.
    """
    found = run(list(functions.values()), inputs)
    wide = [x.to(exact_in) if exact_in is not None and x.is_floating_point() else x for x in inputs]
    wrong = []
    for (name, function), value in zip(functions.items(), found, strict=True):
        expected = function(*wide)
        assert value.dtype == (function(*inputs).dtype), name
        fault = difference(value, expected.to(value.dtype), (ulps or {}).get(name, 0), inputs)
        if fault:
            wrong.append(f"{name}: {fault}")
    assert not wrong, "\n".join(wrong)


def difference(found: Tensor, expected: Tensor, ulps: float, inputs: Sequence[Tensor] = ()) -> str:
    """Where two tensors differ most, if by more than the bound; else empty."""
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return f"{found.dtype}{list(found.shape)} for {expected.dtype}{list(expected.shape)}"
    if not found.is_floating_point():
        error = (found != expected).double()
    else:
        kind, a, b = torch.finfo(found.dtype), found.double(), expected.double()
        same = (a == b) | (a.isnan() & b.isnan())
        error = ((a - b).abs() - kind.tiny * (ulps > 0)).clamp(min=0) / (b.abs() * kind.eps).clamp(min=kind.tiny**2)
        error = torch.where(same, 0.0, torch.where(error.isfinite(), error, float("inf")))
    if not error.numel() or float(error.max()) <= ulps:
        return ""
    at = int(error.argmax())
    places = [x.flatten()[at].item() for x in inputs if x.shape == found.shape]
    return (f"{found.flatten()[at].item()!r} for {expected.flatten()[at].item()!r} at {places}"
            f" ({float(error.max()):.3g} ulp, allowed {ulps:g})")  # fmt: skip
