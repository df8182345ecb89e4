"""Loops that become lanes in one piece are one: what one of them computed, the next has in registers."""

from __future__ import annotations

from dataclasses import replace

import sympy

from irc.lowering.kernels.kernel import Combine, Loop, Start, Statement, Store
from irc.lowering.kernels.values import Index, Value, substitute


def joined(body: tuple[Statement, ...], most: int) -> tuple[Statement, ...]:
    """The statements with loops of one length, of at most `most` iterations, as one loop: statement by statement over
    all lanes, they do the same as loop by loop.

    A norm behind a residual sum so has one loop instead of three, and reads neither the sum nor the row again.
    """
    result: list[Statement] = []
    first: Loop | None = None
    for statement in body:
        if isinstance(statement, Start) and first is not None:
            result.insert(result.index(first), statement)
            continue
        if not isinstance(statement, Loop) or not _whole(statement, most):
            first = None
            result.append(statement)
            continue
        if first is None or first.axis.extent != statement.axis.extent:
            first = statement
            result.append(statement)
            continue
        mapping = {statement.axis.symbol: first.axis.symbol}
        longer = replace(first, body=(*first.body, *(_renamed(s, mapping) for s in statement.body)))
        result[result.index(first)] = first = longer
    return tuple(result)


def _whole(loop: Loop, most: int) -> bool:
    """Whether all iterations are lanes at the same time."""
    short = loop.axis.extent.is_Integer and loop.axis.extent <= most and loop.axis.stop is None
    return bool(short and all(isinstance(s, (Combine, Store)) for s in loop.body))


def _renamed(statement: Statement, mapping: dict[sympy.Symbol, sympy.Expr]) -> Statement:
    def new(value: Value | None) -> Value | None:
        return None if value is None else substitute(value, mapping, {})

    if isinstance(statement, Store):
        offset, value = new(statement.offset), new(statement.value)
        assert isinstance(offset, Index)
        assert value is not None
        return Store(statement.buffer, offset, value, new(statement.when))
    assert isinstance(statement, Combine)
    combined = new(statement.value)
    assert combined is not None
    return Combine(statement.name, statement.op, combined, new(statement.position))
