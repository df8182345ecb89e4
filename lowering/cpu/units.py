"""A program's functions in units that compilers work on side by side.

Templates take most of a build: each kind is read and instantiated once, in the unit that holds its functions. The text
stays one: compiled as it is, it is the whole program; compiled with `IRC_UNIT` defined, it is the unit of that number,
as `irc.lowering.cpp.build` does it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from irc.lowering.cpp.function import PrintedFunction

UNITS = 2
# From so many functions on, a kind of template is instantiated in every unit: they take longer than reading it twice.
_MANY = 8
# Rough seconds of a build: the step, and reading a kind of template.
_STEP_COST, _KIND_COST = 0.4, 0.5


@dataclass
class Unit:
    """Functions by name that are compiled together, the headers that they need, and a guess at their cost."""

    functions: list[tuple[str, PrintedFunction]] = field(default_factory=list)
    includes: list[str] = field(default_factory=list)
    cost: float = 0.0

    def add(self, functions: Sequence[tuple[str, PrintedFunction]], cost: float) -> None:
        self.functions += functions
        self.cost += cost
        for _, function in functions:
            self.includes += [name for name in function.includes if name not in self.includes]

    def text(self) -> str:
        return "\n".join(function.text(name) for name, function in self.functions)


def in_units(functions: Sequence[tuple[str, PrintedFunction]]) -> list[Unit]:
    """The functions in units of about the same cost, the first with the step. One unit if that is enough."""
    kinds: dict[tuple[str, ...], list[tuple[str, PrintedFunction]]] = {}
    for name, function in functions:
        kinds.setdefault(function.includes, []).append((name, function))
    loops = kinds.pop((), [])
    if len(kinds) < 2 and sum(len(own) for own in kinds.values()) < _MANY:
        whole = Unit()
        whole.add(functions, 0.0)
        return [whole]
    units = [Unit(cost=_STEP_COST), *(Unit() for _ in range(UNITS - 1))]
    for own in sorted(kinds.values(), key=_cost, reverse=True):
        if len(own) >= _MANY:
            for number, unit in enumerate(units):
                unit.add(own[number::UNITS], _cost(own[number::UNITS]))
        elif any("irc::" in function.scratch for _, function in own):
            units[0].add(own, _cost(own))  # the step calls what its headers define
        else:
            min(units, key=lambda unit: unit.cost).add(own, _cost(own))
    for one in loops:
        min(units, key=lambda unit: unit.cost).add([one], one[1].seconds)
    return units


def _cost(functions: Sequence[tuple[str, PrintedFunction]]) -> float:
    return _KIND_COST + sum(function.seconds for _, function in functions)


def print_units(units: Sequence[Unit], main: str, includes: Sequence[str]) -> str:
    """The functions of all units and, in that of number 0, the text that calls them, with the headers that it needs."""
    if len(units) == 1:
        own = _includes([*includes, *units[0].includes])
        return f"{own}\nnamespace {{\n\n{units[0].text()}\n}}  // namespace\n\n{main}"
    declared = "".join(function.declaration(name) for unit in units for name, function in unit.functions)
    text = f"\nnamespace program {{\n\n{declared}\n}}  // namespace program\n"
    for number in reversed(range(len(units))):
        unit = units[number]
        own = _includes([*(includes if number == 0 else ()), *unit.includes])
        text += f"\n#if !defined(IRC_UNIT) || IRC_UNIT == {number}\n{own}\nnamespace program {{\n\n{unit.text()}\n"
        text += "}  // namespace program\n" + (f"\nusing namespace program;\n\n{main}" if number == 0 else "")
        text += "#endif\n"
    return text


def _includes(names: Sequence[str]) -> str:
    return "".join(f'#include "{name}"\n' for name in dict.fromkeys(names))
