from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from irc.core.errors import IrcError, PassError
from irc.core.program import Program
from irc.core.rewrite import Match, RewriteRule
from tests.passes.raising import captured
from tests.passes.running import assert_same, operations, reasons, run_pass

X = torch.linspace(-2, 2, 72).view(3, 4, 6)


def scaled_silu(x: Tensor, scale: float) -> Tensor:
    return x * torch.sigmoid(x * scale)


def test_a_rule_of_three_functions_is_a_pass() -> None:
    def check(match: Match) -> str | None:
        return None if match["scale"] == 1.0 else f"the slope is {match['scale']}, expected 1"

    rule = RewriteRule(name="to-silu", pattern=scaled_silu, replacement=lambda x: F.silu(x), check=check)
    before = captured(lambda x: torch.sigmoid(x * 1.0) * x + x * torch.sigmoid(1.7 * x), (X,))
    result = run_pass(rule, before)
    assert operations(result.program) == {"silu": 1, "mul": 2, "sigmoid": 1, "add": 1}
    assert result.matches == 1
    assert [skip.reason for skip in result.skips] == ["to-silu: the slope is 1.7, expected 1"]
    assert_same(before, result.program, (X[:1, :1],))


def test_equal_constants_do_not_collide() -> None:
    rule = RewriteRule(
        name="two", pattern=lambda x, a=float, b=float: (x + a) * b, replacement=lambda x, a, b: x * b + a * b
    )
    before = captured(lambda x: (x + 3.0) * 3.0, (X,))
    assert_same(before, run_pass(rule, before).program, (X,))
    same = RewriteRule(name="same", pattern=lambda x, a=float: (x + a) * a, replacement=lambda x: x)
    result = run_pass(same, captured(lambda x: (x + 3.0) * 4.0, (X,)))
    assert result.matches == 0


def test_the_largest_pattern_wins_and_spellings_are_alternatives() -> None:
    small = RewriteRule(name="small", pattern=lambda x: torch.sigmoid(x), replacement=lambda x: torch.tanh(x))
    silu = RewriteRule(
        name="silu",
        pattern=[lambda x: x / (1 + torch.exp(-x)), lambda x: x * torch.sigmoid(x)],
        replacement=lambda x: F.silu(x),
    )
    from irc.core.contract import PassContext
    from irc.core.rewrite import apply_rules

    program = captured(lambda x: x * x.sigmoid() + x / (1 + torch.exp(-x)), (X,))
    matches, skips = apply_rules(program, [small, silu], PassContext())
    assert operations(program) == {"silu": 2, "add": 1}
    assert (matches, skips) == (2, [])


def test_several_results() -> None:
    def pattern(x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return torch.sigmoid(second) * first

    rule = RewriteRule(name="to-glu", pattern=pattern, replacement=lambda x: F.glu(x, -1))
    before = captured(lambda x: torch.sigmoid(x.chunk(2, -1)[1]) * x.chunk(2, -1)[0], (X,))
    assert run_pass(rule, before).matches == 0  # two different chunks: other nodes, not merged yet

    def model(x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return first * second.sigmoid()

    result = run_pass(rule, captured(model, (X,)))
    assert operations(result.program) == {"glu": 1}


def test_slices_match_by_what_they_select() -> None:
    rule = RewriteRule(
        name="halves",
        pattern=lambda x, n=int: torch.cat((x[..., n:], x[..., :n]), dim=-1),
        replacement=lambda x, n: torch.roll(x, -n, -1),
    )
    before = captured(lambda x: torch.cat((x[:, :, -4:], x[:, :, :2]), dim=2), (X,))
    result = run_pass(rule, before)
    assert operations(result.program) == {"roll": 1}
    assert_same(before, result.program, (X,))


def test_a_cast_in_the_pattern_fits_where_none_is_needed() -> None:
    rule = RewriteRule(
        name="wide-relu", pattern=lambda x: F.relu(x.float()).to(x.dtype), replacement=lambda x: x.clamp(min=0)
    )
    for dtype in (torch.float32, torch.bfloat16):
        before = captured(lambda x: F.relu(x.float()).to(x.dtype).exp(), (X.to(dtype),))
        result = run_pass(rule, before)
        assert operations(result.program) == {"clamp": 1, "exp": 1}


def test_replacement_of_another_type_is_refused() -> None:
    rule = RewriteRule(name="drop", pattern=lambda x: x * 1.0, replacement=lambda x: x)
    before = captured(lambda x: x.long() * 1.0, (X,))
    result = run_pass(rule, before)
    assert "the replacement gives i64" in reasons(result)
    assert operations(result.program) == operations(before)


def test_extra_users_are_refused_unless_allowed() -> None:
    def model(x: Tensor) -> Tensor:
        inner = x.exp()
        return inner.log() + inner

    pattern, replacement = (lambda x: x.exp().log()), (lambda x: x)
    refused = run_pass(RewriteRule(name="log-exp", pattern=pattern, replacement=replacement), captured(model, (X,)))
    assert "exp is also used by add" in reasons(refused)
    allowed = RewriteRule(name="log-exp", pattern=pattern, replacement=replacement, extra_users=True)
    assert operations(run_pass(allowed, captured(model, (X,))).program) == {"exp": 1, "add": 1}


def test_replacement_may_compute_with_dynamic_sizes() -> None:
    rule = RewriteRule(
        name="flatten", pattern=lambda x: torch.tanh(x), replacement=lambda x: x.reshape(-1, 6).sin().reshape(x.shape)
    )
    result = run_pass(rule, captured(lambda x: x.tanh() * 2, (X,)))
    assert operations(result.program) == {"reshape": 2, "sin": 1, "mul": 1}
    assert_same(captured(lambda x: x.sin() * 2, (X,)), result.program, (X[:2, :3],))


def test_a_rule_that_matches_what_it_built_is_stopped() -> None:
    rule = RewriteRule(name="grow", pattern=lambda x: x.tanh(), replacement=lambda x: x.exp().tanh())
    with pytest.raises(PassError, match="rewrite rule grow keeps matching its own result"):
        rule.run(captured(lambda x: x.tanh(), (X,)).copy(), _context())


def _context() -> object:
    from irc.core.contract import PassContext

    return PassContext()


def test_alternating_rules_are_named() -> None:
    from irc.core.contract import PassContext
    from irc.core.rewrite import apply_rules

    there = RewriteRule(name="there", pattern=lambda x: x.exp(), replacement=lambda x: x.tanh())
    back = RewriteRule(name="back", pattern=lambda x: x.tanh(), replacement=lambda x: x.exp())
    with pytest.raises(PassError, match=r"there and back|back and there"):
        apply_rules(captured(lambda x: x.exp(), (X,)), [there, back], PassContext())


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (lambda x: x if x > 0 else -x, "cannot branch on a tensor"),
        (lambda x: x.frobnicate(), "frobnicate is no ATen operation"),
        (lambda x: x * x.shape[-1], "cannot ask for .shape"),
        (lambda x: x, "must return an operation's result"),
    ],
)
def test_patterns_that_cannot_be(pattern: object, message: str) -> None:
    rule = RewriteRule(name="bad", pattern=pattern, replacement=lambda x: x)
    with pytest.raises(IrcError, match=message):
        rule.run(_small(), _context())


def test_unknown_replacement_parameter() -> None:
    rule = RewriteRule(name="bad", pattern=lambda x: x.exp(), replacement=lambda y: y)
    with pytest.raises(PassError, match="takes y, which the pattern does not have"):
        rule.run(_small(), _context())


def _small() -> Program:
    return captured(lambda x: x.exp(), (X,)).copy()
