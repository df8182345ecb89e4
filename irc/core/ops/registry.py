"""Registry of `irc::` operators.

Each operator is registered with PyTorch as a composite of ATen calls (its *reference*), so a graph
that holds it runs on every device, differentiates, exports and decomposes without further work.
Beside the reference stand a *fake* function (types and shapes only, no arithmetic) and a *cost*
function; tests hold all three against each other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import sympy
import torch

Shape = tuple[sympy.Expr, ...]
FlopsFunction = Callable[..., sympy.Expr]

_LIBRARY = torch.library.Library("irc", "DEF")
_OPS: dict[str, OpDefinition] = {}


@dataclass(frozen=True)
class OpDefinition:
    """An `irc::` operator.

    Attributes:
        name: name without namespace, e.g. `rms_norm`.
        schema: PyTorch schema text, e.g. `rms_norm(Tensor x, Tensor? weight, float eps) -> Tensor`.
        reference: plain PyTorch implementation; the definition of what the op computes.
        fake: same arguments with fake tensors; returns fake tensors of the result's type and shape.
        flops: called like the op, but with a `Shape` (tuple of sympy sizes) for every tensor; returns
            floating point operations, one multiply–add counted as two.
        source: paper or specification.
    """

    name: str
    schema: str
    reference: Callable[..., Any]
    fake: Callable[..., Any]
    flops: FlopsFunction
    source: str = ""

    @property
    def overload(self) -> torch._ops.OpOverload:
        """The callable that graph nodes have as target: `torch.ops.irc.<name>.default`."""
        return getattr(torch.ops.irc, self.name).default


def define_op(
    schema: str, *, fake: Callable[..., Any], flops: FlopsFunction, source: str = ""
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator on the reference function: registers `torch.ops.irc.<name>`."""

    def register(reference: Callable[..., Any]) -> Callable[..., Any]:
        name = schema.partition("(")[0].strip()
        if name in _OPS:
            raise ValueError(f"irc::{name} is registered twice")
        _LIBRARY.define(schema)
        _LIBRARY.impl(name, reference, "CompositeImplicitAutograd")
        _OPS[name] = OpDefinition(name, schema, reference, fake, flops, source)
        return reference

    return register


def find_op(target: Any) -> OpDefinition | None:
    """The definition behind a node target, or None when it is not an `irc::` op."""
    if isinstance(target, torch._ops.OpOverload) and target.namespace == "irc":
        return _OPS.get(target._schema.name.partition("::")[2])
    return None


def is_irc_op(target: Any, name: str | None = None) -> bool:
    """True for an `irc::` op (of that name, if one is given)."""
    definition = find_op(target)
    return definition is not None and (name is None or definition.name == name)


def all_ops() -> dict[str, OpDefinition]:
    """Every registered operator by name."""
    return dict(sorted(_OPS.items()))
