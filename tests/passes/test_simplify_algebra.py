from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from irc.passes import SimplifyAlgebra
from tests.passes.raising import captured, raised
from tests.passes.running import operations, run_pass

X = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(0))


def filled(x: Tensor) -> Tensor:
    out = torch.ops.aten.slice_scatter(torch.zeros_like(x), x[..., :2].exp(), 2, 0, 2)
    return torch.ops.aten.slice_scatter(out, x[..., 2:].tanh(), 2, 2)


LAWS: dict[str, tuple[Callable[[Tensor], Tensor], dict[str, int]]] = {
    "units": (lambda x: ((x + 0) * 1.0 / 1 - 0).exp(), {"exp": 1}),
    "negations": (lambda x: torch.neg(torch.neg(x)).exp(), {"exp": 1}),
    "minus a negation": (lambda x: x - (-x.exp()), {"exp": 1, "add": 1}),
    "constants": (lambda x: x * 2.0 * 0.25, {"mul": 1}),
    "swaps": (lambda x: x.transpose(1, 2).transpose(-1, 1).exp(), {"exp": 1}),
    "permutes": (lambda x: x.permute(2, 0, 1).permute(1, 0, 2), {"permute": 1}),
    "reshapes": (lambda x: x.reshape(x.shape[0], -1).reshape(x.shape[0], x.shape[1], 3, 2), {"reshape": 1}),
    "casts": (lambda x: x.double().float().exp(), {"exp": 1}),
    "filled": (filled, {"slice": 2, "exp": 1, "tanh": 1, "cat": 1, "zeros_like": 1}),
}


@pytest.mark.parametrize("law", LAWS)
def test_every_law(law: str) -> None:
    function, expected = LAWS[law]
    result = raised(SimplifyAlgebra(), captured(function, (X,)), widths=[(6,)])
    found = operations(result.program)
    found.pop("zeros_like", None)
    assert found == {name: count for name, count in expected.items() if name != "zeros_like"}
    assert result.matches > 0


KEPT: dict[str, Callable[[Tensor], Tensor]] = {
    "integers times a float": lambda x: x.long() * 1.0,
    "other swap": lambda x: x.transpose(0, 1).transpose(1, 2),
    "narrowing cast": lambda x: x.half().float(),
    "both products used": lambda x: (x * 2.0) * 3.0 + torch.exp(x * 2.0),
}


@pytest.mark.parametrize("name", [name for name in KEPT if name != "both products used"])
def test_what_no_law_says_is_kept(name: str) -> None:
    before = captured(KEPT[name], (X,))
    result = run_pass(SimplifyAlgebra(), before)
    assert (result.matches, operations(result.program)) == (0, operations(before))


def test_constants_are_merged_only_where_the_inner_product_is_not_needed() -> None:
    def model(x: Tensor) -> Tensor:
        inner = x * 2.0
        return inner * 3.0 + inner.exp()

    assert run_pass(SimplifyAlgebra(), captured(model, (X,))).matches == 0
