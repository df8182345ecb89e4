"""Named symbolic dimensions: the sizes of a program that are not fixed.

Each dimension is a backed symbol of a torch `ShapeEnv`, so PyTorch's own shape functions compute
with it; the program gives it a name (`B`, `S`, …) for people and for the text form.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import sympy
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

from irc.core.errors import VerificationError

Size = int | float | bool | torch.SymInt | torch.SymFloat | torch.SymBool


@dataclass(frozen=True)
class Dim:
    """A dynamic dimension.

    `size` is the symbolic integer, `hint` the size that the example inputs had; `minimum` and
    `maximum` (None: unbounded) bound the sizes the program may be run at.
    """

    name: str
    size: torch.SymInt
    hint: int
    minimum: int = 1
    maximum: int | None = None

    @property
    def symbol(self) -> sympy.Symbol:
        """The ShapeEnv's own symbol behind `size`.

        Raises:
            VerificationError: an operation fixed the dimension, by combining it with one of another size.
        """
        expr = self.size.node.expr
        if not expr.is_Symbol:
            raise VerificationError(f"dimension {self.name} has been fixed at {expr}: an operation needs that size")
        return expr


def new_fake_mode() -> FakeTensorMode:
    """A mode in which tensors have types and symbolic sizes but no data."""
    mode = FakeTensorMode(shape_env=ShapeEnv(duck_shape=False), allow_non_fake_inputs=True)
    # PyTorch's own memory of types makes each result again to see whether it may be kept, which takes as long as
    # computing it where sizes are symbolic. `TypeMemo` remembers more.
    mode.cache_enabled = False
    return mode


def new_dim(fake_mode: FakeTensorMode, name: str, hint: int, *, minimum: int = 1, maximum: int | None = None) -> Dim:
    """A fresh dynamic dimension called `name`.

    The ShapeEnv assumes a size of at least 2, so that broadcasting is decided once; programs are
    nevertheless run at size 1, which the tests of every captured model prove to be right.
    """
    # Imported here: it takes two seconds, which a program that only runs saved artifacts need not spend.
    from torch._dynamo.source import ConstantSource

    shape_env = fake_mode.shape_env
    assert shape_env is not None
    source = ConstantSource(f"irc_dim_{name}")
    safe_hint = max(hint, 2)
    symbol = shape_env.create_symbol(safe_hint, source, dynamic_dim=DimDynamic.DYNAMIC, constraint_dim=None)
    size = shape_env.create_symintnode(symbol, hint=safe_hint, source=source)
    assert isinstance(size, torch.SymInt)
    return Dim(name, size, safe_hint, minimum, maximum)


def size_expr(size: Size, dims: dict[str, Dim]) -> sympy.Expr:
    """A size as a sympy expression over symbols that carry the program's dimension names."""
    if not isinstance(size, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return sympy.sympify(size)
    expr = size.node.expr
    names = {dim.symbol: dim_symbol(dim.name) for dim in dims.values()}
    if expr.is_Symbol:
        return names.get(expr, expr)
    return expr.xreplace({s: names[s] for s in expr.free_symbols if s in names})


def dim_symbol(name: str) -> sympy.Symbol:
    """The sympy symbol for a named dimension, as cost and shape expressions use it."""
    return _symbol(name)


@functools.cache
def _symbol(name: str) -> sympy.Symbol:
    return sympy.Symbol(name, integer=True, positive=True)
