"""Rotary frequencies out of cos and sin tables, and the base and factors that GGUF describes them by."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.fx as fx
from torch import Tensor

from irc.core.errors import IrcError, TargetError
from irc.core.operands import input_node
from irc.core.program import VAL, Program
from irc.core.slices import evaluate_at
from irc.lowering.gguf.description import Rope

aten = torch.ops.aten
_CASTS = (aten.to.dtype, aten._to_copy.default)
_NARROW = (torch.bfloat16, torch.float16)
_PROBE = 64
_DRIFT = 3e-6  # of an angle, relative to the position: what rounding to f32 adds


def read_rope(program: Program, node: fx.Node, cache: dict[tuple[fx.Node, ...], Rope]) -> Rope:
    """The rotation of an `irc.rope` node.

    Raises:
        TargetError: its angles are no multiples of the position.
    """
    cos, sin = node.args[1], node.args[2]
    assert isinstance(cos, fx.Node)
    assert isinstance(sin, fx.Node)
    interleaved = bool(node.kwargs.get("interleaved", False))
    if (cos, sin) not in cache:
        frequencies, magnitude = _frequencies(program, cos, sin)
        cache[cos, sin] = Rope(False, frequencies, magnitude)
    found = cache[cos, sin]
    return Rope(interleaved, found.frequencies, found.magnitude)


def _frequencies(program: Program, cos: fx.Node, sin: fx.Node) -> tuple[Tensor, float]:
    length = min([_PROBE, *(dim.maximum for dim in program.dims.values() if dim.maximum is not None)])
    sizes = {name: max(length if name in _length_dims(program, cos) else 1, dim.minimum)
             for name, dim in program.dims.items()}  # fmt: skip
    try:
        whole, exact = _unrounded(program, [cos, sin])
        cos_table, sin_table = evaluate_at(whole, exact, sizes)
    except IrcError as error:
        raise TargetError(f"the rotary angles of {cos.name} are no function of the position alone: {error}") from error
    cos_SR, sin_SR = (_as_table(table, cos.name) for table in (cos_table, sin_table))
    magnitude = float((cos_SR[0].square() + sin_SR[0].square()).sqrt()[0])
    frequencies = torch.atan2(sin_SR[1], cos_SR[1]) if len(cos_SR) > 1 else torch.zeros(cos_SR.shape[-1])
    frequencies = torch.where(frequencies < 0, frequencies + 2 * math.pi, frequencies)
    positions = torch.arange(len(cos_SR), dtype=torch.float64)
    angles = positions.unsqueeze(1) * frequencies
    allowed = (2e-6 + _DRIFT * positions.unsqueeze(1)) * max(1.0, magnitude)
    errors = torch.maximum((magnitude * angles.cos() - cos_SR).abs(), (magnitude * angles.sin() - sin_SR).abs())
    if bool((errors > allowed).any()):
        position = int((errors > allowed).any(1).nonzero()[0])
        raise TargetError(
            f"the rotary angles of {cos.name} are no multiples of the position: from position {position} on they differ"
            f" by {float(errors[position].max()):.1e}"
        )
    return _stored_frequencies(program, cos, frequencies), 1.0 if abs(magnitude - 1) < 1e-6 else magnitude


def _unrounded(program: Program, nodes: list[fx.Node]) -> tuple[Program, list[fx.Node]]:
    """The same values before a program of 16-bit numbers rounds them: then nothing about slow pairs can be seen."""
    casts = {node.name for node in ancestors(nodes) if node.target in _CASTS and node.meta[VAL].dtype in _NARROW}
    if not casts:
        return program, nodes
    own = program.copy()
    exact = [own.node(node.name) for node in nodes]
    for name in casts:
        cast = own.node(name)
        exact = [input_node(cast) if node is cast else node for node in exact]
        cast.replace_all_uses_with(input_node(cast))
    return own, exact


def ancestors(nodes: list[fx.Node]) -> Iterator[fx.Node]:
    """The nodes themselves and all that they are computed from."""
    pending, seen = list(nodes), set()
    while pending:
        node = pending.pop()
        if node not in seen:
            seen.add(node)
            pending.extend(node.all_input_nodes)
            yield node


def _stored_frequencies(program: Program, cos: fx.Node, found: Tensor) -> Tensor:
    """The program's own table of frequencies where it has one: what cos and sin say is rounded twice."""
    for node in ancestors([cos]):
        if node.op == "get_attr":
            table = program.weight(node).detach().flatten()
            if table.numel() == found.numel() and table.is_floating_point():
                table = table.double()
                if bool(((table - found).abs() <= 1e-5 * found + 1e-9).all()):
                    return table
    return found


def _length_dims(program: Program, node: fx.Node) -> set[str]:
    names = {str(symbol) for size in program.shape_expr(node) for symbol in size.free_symbols}
    return {name for name in program.dims if name in names}


def _as_table(table: Tensor, name: str) -> Tensor:
    """[S, R] of a table whose other sizes are 1."""
    sizes = [size for size in table.shape[:-1] if size != 1]
    if len(sizes) > 1:
        raise TargetError(f"the rotary table {name} is not one for all sequences and heads: {list(table.shape)}")
    return table.reshape(sizes[0] if sizes else 1, table.shape[-1]).double()


@dataclass(frozen=True)
class Frequencies:
    """Frequencies as llama.cpp computes them: base^(-2 j / R) / (scaling · factors[j])."""

    base: float
    scaling: float = 1.0
    factors: Tensor | None = None


def explain_frequencies(frequencies: Tensor) -> Frequencies:
    """The plainest description: a base alone, with a linear factor, or with one factor a pair (Llama 3, LongRoPE)."""
    pairs = frequencies.numel()
    if pairs < 2:
        scale = float(frequencies[0]) if pairs else 1.0
        return Frequencies(10000.0, 1.0 / scale if abs(scale - 1) > 1e-6 else 1.0)
    exponents = torch.arange(pairs, dtype=torch.float64) / pairs
    if bool((frequencies <= 0).any()):
        return Frequencies(10000.0, 1.0, _factors(frequencies, 10000.0))
    logs = frequencies.log()
    slope = float((logs[-1] - logs[0]) / (exponents[-1] - exponents[0]))
    base, scaling = _rounded(math.exp(-slope)), math.exp(-float(logs[0]))
    scaling = 1.0 if abs(scaling - 1) < 2e-6 else _rounded(scaling)
    if bool(((base**-exponents / scaling / frequencies - 1).abs() < 5e-6).all()):
        return Frequencies(base, scaling)
    # The fastest pairs are never rescaled: they give the base.
    base = _rounded(float((frequencies[0] / frequencies[1]) ** pairs))
    return Frequencies(base, 1.0, _factors(frequencies, base))


def _factors(frequencies: Tensor, base: float) -> Tensor:
    pairs = frequencies.numel()
    plain = base ** -(torch.arange(pairs, dtype=torch.float64) / pairs)
    # A pair that does not turn: a factor so large that its angle is nothing.
    factors = torch.where(frequencies > 0, plain / frequencies, torch.tensor(1e30, dtype=torch.float64))
    return factors.float()


def _rounded(value: float) -> float:
    """The short number that `value` was rounded from, if there is one nearby."""
    for digits in range(1, 8):
        short = float(f"{value:.{digits}g}")
        if abs(short / value - 1) < 1e-5 if digits < 4 else abs(short / value - 1) < 1e-6:
            return short
    return value
