"""Layers that are alike share names of index symbols: the same source comes out, and no kernel mixes two of them."""

from __future__ import annotations

import itertools
import re

import pytest
import torch
from torch import Tensor, nn

from irc.core.program import VAL, Program
from irc.core.provenance import module_path
from irc.core.target import get_target
from irc.demo.tinypy import TinyPy, TinyPyConfig
from irc.frontend import capture
from irc.lowering.cpp.printer import print_kernel
from irc.lowering.kernels import fusion
from irc.lowering.kernels.alike import Names, NamesMeet
from irc.lowering.kernels.fusion import make_schedule
from irc.lowering.kernels.kernel import Kernel


def layers(count: int) -> Program:
    torch.manual_seed(0)
    config = TinyPyConfig(
        vocab_size=64, hidden_size=32, num_layers=count, num_heads=4, intermediate_size=48, max_positions=64
    )
    return capture(TinyPy(config).eval(), (torch.zeros(2, 9, dtype=torch.long),), dynamic=({0: "B", 1: "S"},))


def printed(program: Program) -> list[tuple[str, tuple[str, ...], list[str]]]:
    """Each step: its name, what it reads and writes, its text in words (the order of terms goes by names)."""
    found = []
    for step in make_schedule(program).steps:
        assert isinstance(step, Kernel)
        text = print_kernel(step)
        found.append(
            (
                step.name,
                tuple(str(argument) for argument in text.arguments),
                sorted(re.findall(r"\w+|\S", text.text("k"))),
            )
        )
    return found


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For each time that a program was scheduled: whether layers shared names."""
    found: list[bool] = []
    scheduler = fusion._Scheduler
    monkeypatch.setattr(fusion, "_Scheduler", lambda p, m, n: found.append(bool(n)) or scheduler(p, m, n))
    return found


def test_shared_names_give_the_source_of_own_names(tried: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    program = layers(4)
    names = Names.of(program)
    nodes = list(program.operations())
    shared = [node for node in nodes if names.of_node(node) != node.name]
    assert len(shared) >= len(nodes) // 2  # two to three layers of four
    with_shared = printed(program)
    assert tried == [True]  # no kernel had two nodes of one name
    monkeypatch.setattr(Names, "of", staticmethod(lambda program: Names()))
    assert with_shared == printed(program)
    assert tried == [True, False]


def test_alike_are_nodes_that_do_the_same_and_no_two_of_a_layer() -> None:
    program = layers(4)
    names = Names.of(program)
    for node in program.operations():
        other = program.node(names.of_node(node))
        assert (node.target, node.meta[VAL].shape) == (other.target, other.meta[VAL].shape)
    for layer in range(4):
        own = [names.of_node(n) for n in program.operations() if module_path(n).startswith(f"layers.{layer}.")]
        assert len(set(own)) == len(own) > 0


class Chain(nn.Module):
    """The same eight elementwise operations again and again: all of it is one kernel."""

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(4):
            x = torch.relu(torch.sin(x) * 2 + 1).exp().neg().tanh() - 3
        return x


def test_numbers_of_alike_layers() -> None:
    program = layers(3)
    artifact = get_target("cpu").lower(program, {"threads": 2, "flags": ("-O1",), "templates": False})
    artifact.verify(program).require()


def test_nodes_of_one_name_in_one_kernel_keep_their_own_names(tried: list[bool]) -> None:
    program = capture(Chain(), (torch.randn(3, 5),))
    names = Names.of(program)
    assert names
    nodes = [node.name for node in program.operations()]
    with pytest.raises(NamesMeet):
        names.meet(nodes)
    names.meet(nodes[:8])
    printed(program)
    assert tried == [True, False]  # tried with shared names, done with their own


@pytest.mark.parametrize(
    "modules",
    [
        [nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)],
        # Again and again the same operations, on other sizes.
        [module for width in range(4, 16) for module in (nn.Linear(width, width + 1), nn.ReLU())],
        # What repeats is shorter than any layer; and one operation that comes again far behind.
        [nn.ReLU(), nn.Sigmoid()] * 3,
        [nn.Linear(a, b) for a, b in itertools.pairwise([*range(4, 12), 4, 5, *range(20, 30)])],
    ],
)
def test_programs_without_layers_share_nothing(modules: list[nn.Module]) -> None:
    assert not Names.of(capture(nn.Sequential(*modules).eval(), (torch.randn(2, 4),)))
