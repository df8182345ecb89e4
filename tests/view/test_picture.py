"""What a picture has boxes and lines for."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import irc
from irc.view.picture import _boxes


class Spread(nn.Module):
    """A gate that every step reads."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.gate, self.steps = nn.Linear(4, 4), nn.ModuleList(nn.Linear(4, 4) for _ in range(steps))

    def forward(self, x: Tensor) -> Tensor:
        gate = torch.sigmoid(self.gate(x))
        for step in self.steps:
            x = step(x) * gate
        return x


def test_what_many_read_is_named_beside_each_of_them() -> None:
    for steps in (4, 5):
        boxes = _boxes(irc.capture(Spread(steps), (torch.randn(2, 4),)), None)
        readers = [box for box in boxes.values() if box.lines[0] == "mul"]
        named = [source for box in readers for source in box.inputs if source.startswith("sigmoid of ")]
        drawn = [source for box in readers for source in box.inputs if source == "sigmoid"]
        assert len(readers) == steps
        assert (len(drawn), len(named)) == ((4, 0) if steps == 4 else (0, 5))
        assert all(source in boxes for box in boxes.values() for source in box.inputs)


def test_weights_are_named_within_the_layer() -> None:
    boxes = _boxes(irc.capture(Spread(1), (torch.randn(2, 4),)), "steps.0")
    assert [line.split()[0] for box in boxes.values() for line in box.lines if "weight" in line] == ["weight"]
