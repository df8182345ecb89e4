from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from irc.core.program import Program
from irc.frontend import capture
from irc.passes import DropNoise, RaiseRope
from tests.passes.raising import Function, captured, raised
from tests.passes.running import assert_same, operations, reasons, run_pass

H, D = 2, 8
FREQUENCIES = 10000.0 ** -(torch.arange(0, D, 2) / D)
Table = Callable[[Tensor], Tensor]


def angles(x: Tensor, frequencies: Tensor) -> Tensor:
    """[S, len(frequencies)], from the size of x alone."""
    return torch.outer(torch.arange(x.shape[1], dtype=torch.float32), frequencies)


def heads_first(x: Tensor) -> Tensor:
    return x.transpose(1, 2)  # [B, S, H, D] → [B, H, S, D]


def llama(x: Tensor, f: Tensor) -> Tensor:
    q, a = heads_first(x), angles(x, f)
    table = torch.cat((a, a), dim=-1)
    half = q.shape[-1] // 2
    return q * table.cos() + torch.cat((-q[..., half:], q[..., :half]), dim=-1) * table.sin()


def chunked(x: Tensor, f: Tensor) -> Tensor:
    q, a = heads_first(x), angles(x, f)
    first, second = q.chunk(2, dim=-1)
    return torch.cat((-second, first), -1) * a.repeat(1, 2).sin() + a.repeat(1, 2).cos() * q


def narrow(x: Tensor, f: Tensor) -> Tensor:
    q, a = heads_first(x), angles(x, f)
    first, second = torch.chunk(q, 2, dim=-1)
    cos, sin = a.cos(), a.sin()
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def interleaved(x: Tensor, f: Tensor) -> Tensor:
    q, a = heads_first(x), angles(x, f)
    table = torch.repeat_interleave(a, 2, dim=-1)
    return q * table.cos() + torch.stack((-q[..., 1::2], q[..., ::2]), dim=-1).flatten(-2) * table.sin()


def pairs(x: Tensor, f: Tensor) -> Tensor:
    q, a = heads_first(x), angles(x, f)
    even, odd = q.reshape(*q.shape[:-1], -1, 2).unbind(-1)
    cos, sin = a.cos(), a.sin()
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)


def complex_numbers(x: Tensor, f: Tensor) -> Tensor:
    polar = torch.view_as_complex(torch.stack((f.cos(), f.sin()), dim=-1))
    q = torch.view_as_complex(x.reshape(x.shape[0], 4, H, -1, 2))
    return torch.view_as_real(q * polar).flatten(3)


def deepseek(x: Tensor, f: Tensor) -> Tensor:
    q, a = heads_first(x), angles(x, f)
    even, odd = q[..., ::2], q[..., 1::2]
    cos, sin = a.cos(), a.sin()
    return torch.cat((even * cos - odd * sin, odd * cos + even * sin), dim=-1)


SPELLINGS = {
    "llama": (llama, False), "chunked": (chunked, False), "narrow": (narrow, False),
    "interleaved": (interleaved, True), "pairs": (pairs, True),
    "deepseek": (deepseek, False),
}  # fmt: skip


def program(function: Callable[[Tensor, Tensor], Tensor]) -> Program:
    return captured(function, (torch.randn(3, 4, H, D, generator=torch.Generator().manual_seed(0)),), FREQUENCIES)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling(spelling: str) -> None:
    function, pairs_are_neighbours = SPELLINGS[spelling]
    result = raised(RaiseRope(), program(function), widths=[(H, D)])
    assert (result.matches, list(result.skips)) == (1, [])
    found = operations(result.program)
    assert found["rope"] == 1
    assert found["stack"] == found["neg"] == 0
    rope = next(node for node in result.program.operations() if "rope" in str(node.target))
    assert rope.kwargs.get("interleaved", False) is pairs_are_neighbours
    assert rope.args[1].meta["val"].shape[-1] == D // 2


def test_complex_numbers() -> None:
    x = torch.randn(3, 4, H, D, generator=torch.Generator().manual_seed(0))
    model = Function(complex_numbers, FREQUENCIES)
    before = run_pass(DropNoise(), capture(model, (x,), dynamic=(({0: "B"},),), canonicalize=False)).program
    result = run_pass(RaiseRope(), before)
    assert result.matches == 1
    assert operations(result.program)["rope"] == 1
    for batch in (1, 3, 5):
        assert_same(before, result.program, (torch.randn(batch, 4, H, D),))


def test_tables_are_computed_narrow() -> None:
    result = run_pass(RaiseRope(), program(llama))
    assert operations(result.program) == {"transpose": 1, "arange": 1, "outer": 1, "cos": 1, "sin": 1, "rope": 1}


def test_partial_rotation_is_one_op() -> None:
    def stablelm(x: Tensor, f: Tensor) -> Tensor:
        q, a = heads_first(x), angles(x, f[:2])
        table = torch.cat((a, a), dim=-1)
        rotated, rest = q[..., :4], q[..., 4:]
        rotated = rotated * table.cos() + torch.cat((-rotated[..., 2:], rotated[..., :2]), dim=-1) * table.sin()
        return torch.cat((rotated, rest), dim=-1)

    result = raised(RaiseRope(), program(stablelm), widths=[(H, D)])
    found = operations(result.program)
    assert (found["rope"], found["cat"]) == (1, 0)


REFUSED: dict[str, tuple[Callable[[Tensor, Tensor, Tensor], Tensor], str]] = {
    "halves differ": (lambda q, a, b: _rotate(q, torch.cat((a, 2 * a), -1), torch.cat((a, 2 * a), -1)), "differ"),
    "opposite angle": (lambda q, a, b: q * torch.cat((a, a), -1).cos() + torch.cat((q[..., 4:], -q[..., :4]), -1)
                       * torch.cat((a, a), -1).sin(), "expected neg"),
    "wrong split": (lambda q, a, b: q * torch.cat((a, a), -1).cos() + torch.cat((-q[..., 3:], q[..., :3]), -1)
                    * torch.cat((a, a), -1).sin(), "splits 8 channels at 3, expected 4"),
}  # fmt: skip


def _rotate(q: Tensor, cos_angles: Tensor, sin_angles: Tensor) -> Tensor:
    return q * cos_angles.cos() + torch.cat((-q[..., 4:], q[..., :4]), dim=-1) * sin_angles.sin()


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_with_the_reason(name: str) -> None:
    function, reason = REFUSED[name]
    before = program(lambda x, f: function(heads_first(x), angles(x, f), angles(x, f)))
    result = run_pass(RaiseRope(), before)
    assert result.matches == 0
    assert reason in reasons(result)
    assert operations(result.program) == operations(before)


def test_a_table_that_depends_on_data_is_refused_unless_its_structure_proves_it() -> None:
    x = torch.randn(3, 4, H, D)
    given = captured(lambda x, t: _rotate(heads_first(x), t, t), (x, torch.randn(1, D)))
    assert "it depends on data" in reasons(run_pass(RaiseRope(), given))
    doubled = captured(
        lambda x, t: _rotate(heads_first(x), torch.cat((t, t), -1), torch.cat((t, t), -1)), (x, torch.randn(1, D // 2))
    )
    assert run_pass(RaiseRope(), doubled).matches == 1
