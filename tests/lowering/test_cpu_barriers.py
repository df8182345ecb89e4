"""Where the workers of a step meet, and what each computes for itself with one token."""

from __future__ import annotations

import sympy
import torch

from irc.core.dims import dim_symbol
from irc.lowering.cpu.barriers import Step, find_private, with_barriers
from irc.lowering.cpu.source import hints_of
from irc.lowering.kernels.fusion import make_schedule
from irc.lowering.kernels.kernel import Kernel
from irc.lowering.kernels.memory import plan_memory
from irc.lowering.kernels.prepare import fold_constants
from tests.lowering import steps


def barriers(*wanted: tuple[str, str], private: str = "") -> list[str]:
    """The barriers in front of steps given as (writes, reads), a letter a memory."""
    made = [Step([], name, set(writes), set(reads)) for name, (writes, reads) in zip("stuvw", wanted, strict=False)]
    lines, _, _ = with_barriers(made, set(private))
    return [line.strip() for line in lines]


def test_a_barrier_where_another_worker_may_not_be_done() -> None:
    assert barriers(("a", ""), ("b", "a")) == ["s", "worker.barrier();", "t"]
    assert barriers(("a", "x"), ("x", "")) == ["s", "worker.barrier();", "t"]
    assert barriers(("a", ""), ("a", "")) == ["s", "worker.barrier();", "t"]
    assert barriers(("a", "x"), ("b", "x")) == ["s", "t"]


def test_private_memory_needs_no_barrier_while_workers_are_alone() -> None:
    # a shared, p private: s makes a; t makes p from a; u reads p and makes b; v makes p again.
    found = barriers(("a", ""), ("p", "a"), ("b", "p"), ("p", "b"), private="p")
    assert found == ["s", "worker.barrier();", "t", "if (!alone) worker.barrier();", "u", "worker.barrier();", "v"]
    # One that is needed only because the other kind of step met later.
    found = barriers(("a", ""), ("p", ""), ("q", "p"), ("b", "a"), private="pq")
    assert found == ["s", "t", "if (!alone) worker.barrier();", "u", "if (alone) worker.barrier();", "v"]


def test_one_row_kernels_are_private_and_share_no_memory_with_others() -> None:
    program, _ = fold_constants(steps.step(), [])
    schedule = make_schedule(program, [])
    private = find_private(schedule)
    assert private.kernels
    b, s = dim_symbol("B"), dim_symbol("S")
    assert sympy.expand(b * s) in private.rows
    for step in schedule.steps:
        if isinstance(step, Kernel) and step.name in private.kernels:
            assert all(buffer.kind == "temporary" for buffer in step.writes)
    plan = plan_memory(schedule, hints_of(program), private.buffers)
    for buffer, place in plan.places.items():
        assert plan.slots[place].private == (buffer in private.buffers)


def test_steps_of_one_token_equal_the_same_tokens_together() -> None:
    from irc.core.target import get_target

    artifact = get_target("cpu").lower(steps.step(), {"threads": 2, "flags": ("-O1",)})
    tokens = steps.tokens(1, 5)
    together = artifact.new_caches(1)
    positions = torch.arange(5).unsqueeze(0)
    wanted = artifact.step(together, tokens, positions, positions)
    caches = artifact.new_caches(1)
    for i in range(5):
        one = torch.tensor([[i]])
        found = artifact.step(caches, tokens[:, i : i + 1].contiguous(), one, torch.tensor([[0]]))
        assert torch.allclose(found[:, 0], wanted[:, i], atol=1e-5)
