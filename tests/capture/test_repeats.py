"""Layers that are alike are traced once, and only where that is right."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from irc.core.hashing import structural_hash
from irc.core.program import Program
from irc.core.provenance import module_path
from irc.frontend import capture, exporter, repeats
from tests.zoo import ZOO, built

COUNT = 3


class Block(nn.Module):
    """A small layer that knows its number, and by default does not use it."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number
        self.up, self.down = nn.Linear(6, 10), nn.Linear(10, 6)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return x + scale * self.down(F.gelu(self.up(x)))


class ReadsItsNumber(Block):
    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return super().forward(x, scale * (self.number + 1))


class Counts(Block):
    """State of its own that changes from call to call."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.calls = [0]

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        self.calls[0] += 1
        return super().forward(x, scale)


class WritesItsArgument(Block):
    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        x += 1.0
        return super().forward(x, scale)


class WritesItsOwn(Block):
    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        y = self.up(x)
        y += 1.0
        return x + self.down(y)


class Leaks(Block):
    """Hands something to the outside behind the back of its result."""

    seen: tuple[Tensor, ...] = ()

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        y = self.up(x)
        Leaks.seen = (*Leaks.seen, y)
        return x + self.down(y)


class Stack(nn.Module):
    def __init__(self, kind: type[Block], scales: tuple[float, ...] = (1.0,) * COUNT) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(kind(i) for i in range(COUNT))
        self.scales = scales

    def forward(self, x: Tensor) -> Tensor:
        x = x * 2
        Leaks.seen = ()
        for layer, scale in zip(self.layers, self.scales, strict=True):
            y = layer(x, scale)
            x = y + 0.1 * x
        return x + sum(y.mean() for y in Leaks.seen)


@pytest.fixture
def repeated(monkeypatch: pytest.MonkeyPatch) -> list[repeats.Repeats]:
    """What happened in each export."""
    found: list[repeats.Repeats] = []
    original = repeats.recorded

    @contextlib.contextmanager
    def recorded(model: nn.Module) -> Iterator[repeats.Repeats]:
        with original(model) as state:
            found.append(state)
            yield state

    monkeypatch.setattr(exporter.repeats, "recorded", recorded)
    return found


def traced_plainly(model: nn.Module, inputs: Any, **options: Any) -> Program:
    """The program of a model all of whose layers are traced."""

    @contextlib.contextmanager
    def nothing(model: nn.Module) -> Iterator[repeats.Repeats]:
        yield repeats.Repeats([])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exporter.repeats, "recorded", nothing)
        return capture(model, inputs, **options)


@pytest.mark.parametrize(
    ("kind", "scales", "expected"),
    [
        (Block, (1.0, 1.0, 1.0), 2),
        (Block, (1.0, 0.5, 1.0), 1),  # another argument: traced itself
        (ReadsItsNumber, (1.0, 1.0, 1.0), 0),
        (Counts, (1.0, 1.0, 1.0), 0),
        (WritesItsOwn, (1.0, 1.0, 1.0), 2),
        (WritesItsArgument, (1.0, 1.0, 1.0), 2),
    ],
)
def test_only_what_would_be_traced_the_same_is_repeated(
    kind: type[Block], scales: tuple[float, ...], expected: int, repeated: list[repeats.Repeats]
) -> None:
    model, x = Stack(kind, scales).eval(), torch.randn(4, 6)
    program = capture(model, (x,), dynamic=({0: "B"},))
    assert [state.repeated for state in repeated] == [expected]
    other = torch.randn(7, 6)
    torch.testing.assert_close(program(other), model(other))
    assert structural_hash(program) == structural_hash(traced_plainly(model, (x,), dynamic=({0: "B"},)))


def test_what_cannot_be_copied_is_traced_again(repeated: list[repeats.Repeats]) -> None:
    model, x = Stack(Leaks).eval(), torch.randn(4, 6)
    program = capture(model, (x,))
    assert repeated[0].repeated == 2
    torch.testing.assert_close(program(x), model(x))


class InstallsAHook(Stack):
    """Only once it runs, as libraries do that collect what layers give."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.layers[1].up._forward_hooks:
            self.layers[1].up.register_forward_hook(lambda module, given, result: result * 3)
        return super().forward(x)


@pytest.mark.parametrize("kind", [Stack, InstallsAHook])
def test_a_block_with_a_hook_is_traced(kind: type[Stack], repeated: list[repeats.Repeats]) -> None:
    model, x = kind(Block).eval(), torch.randn(4, 6)
    if kind is Stack:
        model.layers[1].up.register_forward_hook(lambda module, given, result: result * 3)
    program = capture(model, (x,))
    assert repeated[0].repeated == 1
    torch.testing.assert_close(program(x), model(x))


def test_blocks_that_share_a_weight_keep_sharing_it(repeated: list[repeats.Repeats]) -> None:
    model, x = Stack(Block).eval(), torch.randn(4, 6)
    model.layers[2].up.weight = model.layers[0].up.weight
    program = capture(model, (x,))
    assert repeated[0].repeated == 2
    torch.testing.assert_close(program(x), model(x))
    assert program.tied == {"layers.2.up.weight": "layers.0.up.weight"}


def test_copies_come_from_their_own_module_and_the_model_is_left_alone() -> None:
    model, x = Stack(Block).eval(), torch.randn(4, 6)
    program = capture(model, (x,))
    paths = [module_path(node) for node in program.operations() if "linear" in str(node.target)]
    assert paths == [f"layers.{i}.{part}" for i in range(COUNT) for part in ("up", "down")]
    assert not any("forward" in layer.__dict__ for layer in model.layers)
    assert not hasattr(Block, "number")


def test_a_model_of_the_zoo_is_as_if_traced_whole() -> None:
    name = "resnet"
    entry, model = ZOO[name], built(name)
    inputs = entry.inputs(model)
    program = capture(model, inputs, dynamic=entry.dynamic, name=name)
    assert structural_hash(program) == structural_hash(traced_plainly(model, inputs, dynamic=entry.dynamic, name=name))
