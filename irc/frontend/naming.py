"""Names for symbolic sizes: export's own symbols (`s77`) become the program's dimensions (`B`, `S`)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
import torch.fx as fx
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._sympy.numbers import int_oo

from irc.core.dims import Dim, new_dim
from irc.core.errors import CaptureError

Position = tuple[int, int]
"""Where a size is: flat index of the input, dimension (-1: the input is itself a size)."""


@dataclass
class DimNamer:
    """Assigns names to the symbolic sizes of the inputs.

    Attributes:
        wanted: name asked for, or suggested, for a size.
        bounds: export's range of each symbol.
        strict: names were asked for by the caller: a size that is no symbol any more is an error.
        notes: what happened to sizes that could not be dynamic; for metadata["capture"].
    """

    wanted: dict[Position, str]
    bounds: dict[sympy.Symbol, Any] = field(default_factory=dict)
    strict: bool = False
    notes: list[str] = field(default_factory=list)

    def assign(self, inputs: dict[int, fx.Node], fake_mode: FakeTensorMode) -> dict[str, Dim]:
        """Replace the inputs' types by types over fresh named dimensions, which are returned."""
        symbols = self._name_symbols(inputs)
        named: dict[str, Dim] = {}
        replacement: dict[sympy.Symbol, sympy.Expr] = {}
        for symbol, (name, hint) in symbols.items():
            if name not in named:
                low, high = self._range(symbol)
                named[name] = new_dim(fake_mode, name, hint, minimum=low, maximum=high)
            replacement[symbol] = named[name].symbol
        for node in inputs.values():
            node.meta["val"] = _retype(node.meta["val"], replacement, fake_mode)
        return named

    def _name_symbols(self, inputs: dict[int, fx.Node]) -> dict[sympy.Symbol, tuple[str, int]]:
        found: dict[sympy.Symbol, tuple[str, int]] = {}
        taken: set[str] = set(self.wanted.values())
        pending: list[tuple[sympy.Symbol, int]] = []
        for index, node in inputs.items():
            value = node.meta["val"]
            sizes = list(enumerate(value.shape)) if isinstance(value, Tensor) else [(-1, value)]
            for dim, size in sizes:
                name = self.wanted.get((index, dim))
                free = _free_symbols(size)
                if not free:
                    if name is not None:
                        self._note_static(node, dim, name, size)
                    continue
                for symbol in free:
                    if name is None or len(free) > 1:
                        pending.append((symbol, _hint(size, symbol)))
                    elif symbol not in found:
                        found[symbol] = (name, _hint(size, symbol))
                    elif found[symbol][0] != name and self.strict:
                        raise CaptureError(
                            f"dimensions {found[symbol][0]!r} and {name!r} must be equal in this model"
                            f" (dimension {dim} of {node.name})\n  try: give both the same name"
                        )
        self._split_shared_names(found, taken)
        for symbol, hint in pending:
            if symbol not in found:
                found[symbol] = (_fresh("D", taken), hint)
        return found

    def _split_shared_names(self, found: dict[sympy.Symbol, tuple[str, int]], taken: set[str]) -> None:
        """Suggested names only: two sizes that the model does not require to be equal get two names."""
        if self.strict:
            return
        seen: set[str] = set()
        for symbol, (name, hint) in found.items():
            if name in seen:
                found[symbol] = (_fresh(name, taken), hint)
            seen.add(found[symbol][0])

    def _note_static(self, node: fx.Node, dim: int, name: str, size: Any) -> None:
        reason = f"dimension {dim} of input {node.name} ({name}) is fixed at {size}: tracing specialised it"
        if self.strict:
            raise CaptureError(
                f"{reason} (the code branches on this size, loops over it or turns it into a Python number)\n"
                f"  try: leave {name} out of `dynamic`, or rewrite that code with tensor operations"
            )
        self.notes.append(reason)

    def _range(self, symbol: sympy.Symbol) -> tuple[int, int | None]:
        bounds = self.bounds.get(symbol)
        if bounds is None:
            return 1, None
        low = int(bounds.lower) if bounds.lower not in (-int_oo, int_oo) else 1
        high = None if bounds.upper == int_oo or int(bounds.upper) >= 2**62 else int(bounds.upper)
        # Export assumes at least 2 where it only means "not decided at 0 and 1".
        return (1 if low <= 2 else low), high


def _free_symbols(size: Any) -> list[sympy.Symbol]:
    if not isinstance(size, torch.SymInt):
        return []
    return sorted(size.node.expr.free_symbols, key=str)


def _hint(size: Any, symbol: sympy.Symbol) -> int:
    if size.node.expr == symbol:
        return int(size.node.hint)
    return int(size.node.shape_env.backed_var_to_val[symbol])


def _fresh(base: str, taken: set[str]) -> str:
    name, count = base, 1
    while name in taken:
        name, count = f"{base}{count}", count + 1
    taken.add(name)
    return name


def _retype(value: Any, replacement: dict[sympy.Symbol, sympy.Expr], fake_mode: FakeTensorMode) -> Any:
    """The same type over the new symbols."""
    shape_env = fake_mode.shape_env
    assert shape_env is not None

    def convert(size: Any) -> Any:
        if not _free_symbols(size):
            return int(size)
        return shape_env.create_symintnode(size.node.expr.xreplace(replacement), hint=int(size.node.hint))

    if not isinstance(value, Tensor):
        return convert(value)
    with fake_mode:
        return torch.empty(tuple(convert(s) for s in value.shape), dtype=value.dtype, device=value.device)
