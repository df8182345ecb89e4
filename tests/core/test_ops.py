"""Every `irc::` operator: schema, reference, fake, cost and gradients against each other."""

from __future__ import annotations

import pytest
import sympy
import torch
import torch.utils._pytree as pytree
from torch import Tensor

from irc.core.dims import dim_symbol, new_dim, new_fake_mode, size_expr
from irc.core.ops import OpDefinition, all_ops, define_op, find_op, is_irc_op
from tests.core.op_examples import DYNAMIC, EXAMPLES, Example

CASES = [
    pytest.param(all_ops()[name], example, id=f"{name}-{index}")
    for name, examples in EXAMPLES.items()
    for index, example in enumerate(examples)
    if name in all_ops()
]
each_case = pytest.mark.parametrize(("op", "example"), CASES)


def test_every_operator_has_examples() -> None:
    assert set(EXAMPLES) == set(all_ops())
    assert all(any(e.flops is not None for e in examples) for examples in EXAMPLES.values())


# -------------------------------------------------------------------- registry


def test_registry_finds_operators_by_target() -> None:
    target = torch.ops.irc.rms_norm.default
    assert find_op(target) is all_ops()["rms_norm"]
    assert find_op(target).overload is target
    assert is_irc_op(target, "rms_norm")
    assert not is_irc_op(target, "rope")
    assert find_op(torch.ops.aten.relu.default) is None
    assert find_op(torch.relu) is None


def test_an_operator_is_registered_once() -> None:
    with pytest.raises(ValueError, match=r"irc::rope is registered twice"):
        define_op("rope(Tensor x) -> Tensor", fake=torch.empty_like, flops=lambda x: sympy.Integer(0))(torch.neg)


@each_case
def test_schema_takes_the_reference_arguments(op: OpDefinition, example: Example) -> None:
    """The operator called through PyTorch is the reference, argument for argument; it writes into none of them."""
    before = pytree.tree_map_only(Tensor, Tensor.clone, example.args)
    through = op.overload(*example.args, **example.kwargs)
    torch.testing.assert_close(through, op.reference(*example.args, **example.kwargs), rtol=0, atol=0)
    torch.testing.assert_close(example.args, before, rtol=0, atol=0)


# -------------------------------------------------------------------- types


class Fakes:
    """Fake tensors of an example, their sizes in `DYNAMIC` symbols if wanted: as a capture with B and S gives them."""

    def __init__(self, example: Example, *, dynamic: bool) -> None:
        self.mode = new_fake_mode()
        self.dims = {name: new_dim(self.mode, name, size) for size, name in DYNAMIC.items()} if dynamic else {}
        self.args, self.kwargs = pytree.tree_map_only(Tensor, self._fake, (example.args, example.kwargs))

    def _fake(self, x: Tensor) -> Tensor:
        shape = [self.dims[DYNAMIC[s]].size if self.dims and s in DYNAMIC else s for s in x.shape]
        with self.mode:
            return torch.empty(shape, dtype=x.dtype)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@each_case
def test_fake_has_the_type_of_the_reference(op: OpDefinition, example: Example, dynamic: bool) -> None:
    fakes = Fakes(example, dynamic=dynamic)
    with fakes.mode:
        made = op.fake(*fakes.args, **fakes.kwargs)
    for dim in fakes.dims.values():
        assert dim.size.node.expr.is_Symbol, f"the fake function fixes {dim.name}"
    real = op.reference(*example.args, **example.kwargs)
    assert made.dtype == real.dtype
    assert made.device == real.device
    point = {dim_symbol(name): sympy.Integer(size) for size, name in DYNAMIC.items()} if dynamic else {}
    assert [int(size_expr(s, fakes.dims).xreplace(point)) for s in made.shape] == list(real.shape)


@each_case
def test_reference_runs_on_fake_tensors(op: OpDefinition, example: Example) -> None:
    """Export and tracing see the reference's own type, without data (a loop over blocks may fix its sizes)."""
    fakes = Fakes(example, dynamic=not example.only_weights)
    with fakes.mode:
        traced = op.reference(*fakes.args, **fakes.kwargs)
    real = op.reference(*example.args, **example.kwargs)
    assert (traced.dtype, traced.device, traced.shape) == (real.dtype, real.device, real.shape)


# -------------------------------------------------------------------- cost


@each_case
def test_flops_count(op: OpDefinition, example: Example) -> None:
    def static(x: Tensor) -> tuple[sympy.Integer, ...]:
        return tuple(sympy.Integer(size) for size in x.shape)

    def symbolic(x: Tensor) -> tuple[sympy.Expr, ...]:
        return tuple(dim_symbol(DYNAMIC[s]) if s in DYNAMIC else sympy.Integer(s) for s in x.shape)

    counts = []
    for shape in (static, symbolic):
        args, kwargs = pytree.tree_map_only(Tensor, shape, (example.args, example.kwargs))
        expr = sympy.sympify(op.flops(*args, **kwargs))
        assert isinstance(expr, sympy.Expr)
        counts.append(expr.xreplace({dim_symbol(name): sympy.Integer(size) for size, name in DYNAMIC.items()}))
    assert counts[0] == counts[1]
    assert counts[0].is_Integer
    assert counts[0] >= 0
    if example.flops is not None:
        assert counts[0] == example.flops


# -------------------------------------------------------------------- gradients


@pytest.mark.parametrize(("op", "example"), [case for case in CASES if case.values[1].differentiable])
def test_gradients_flow(op: OpDefinition, example: Example) -> None:
    leaves, spec = pytree.tree_flatten((example.args, example.kwargs))
    wide = [x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in leaves]
    places = [i for i, x in enumerate(wide) if isinstance(x, Tensor) and x.is_floating_point()]

    def run(*inputs: Tensor) -> Tensor:
        given = dict(zip(places, inputs, strict=True))
        args, kwargs = pytree.tree_unflatten([given.get(i, x) for i, x in enumerate(wide)], spec)
        return op.overload(*args, **kwargs)

    inputs = [wide[i].clone().requires_grad_() for i in places]
    # One projection of the Jacobian: finite differences of every entry would take minutes.
    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)
