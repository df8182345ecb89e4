"""Small programs that the tests of targets and of the runtime share."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from irc.core.manager import PassManager
from irc.core.program import Program
from irc.demo.tinypy import TinyPy, TinyPyConfig
from irc.frontend import capture

VOCABULARY = 64
PROMPTS = [[1, 5, 9], [7, 2], [3, 11, 4, 60, 8, 21, 40]]


@functools.cache
def language_model() -> TinyPy:
    """A tiny random decoder whose next token is not simply the last one."""
    torch.manual_seed(0)
    config = TinyPyConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_layers=1, num_heads=4, intermediate_size=64, max_positions=64
    )
    model = TinyPy(config).eval()
    model.lm_head.weight = nn.Parameter(torch.randn(VOCABULARY, 32))
    return model


def tokens(batch: int = 2, length: int = 9) -> Tensor:
    return torch.randint(0, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(1))


@functools.cache
def decoder() -> Program:
    """The decoder without a cache; shared, do not change it."""
    return capture(language_model(), (tokens(),), dynamic=({0: "B", 1: "S"},), name="tiny")


@functools.cache
def step(passes: str = "insert-kv-cache{max-length=32}") -> Program:
    """A step program made from it; shared, do not change it."""
    return PassManager(passes, verify="off").run(decoder()).program


@functools.cache
def cnn() -> Program:
    """A small CNN with a dynamic batch."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(128, 5)
    ).eval()
    return capture(model, (torch.randn(2, 3, 8, 8),), dynamic=({0: "B"},), name="cnn")
