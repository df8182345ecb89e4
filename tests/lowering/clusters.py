"""Random programs for the kernel IR: graphs of elementwise operations, views and reductions with several outputs."""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from irc.core.program import Program
from irc.frontend import capture

_UNARY: list[Callable[[Tensor], Tensor]] = [
    torch.tanh, torch.sigmoid, torch.relu, torch.abs, F.silu, F.gelu, lambda x: x * 0.5 + 1, lambda x: x.clamp(-1, 1),
    lambda x: torch.exp(x.clamp(max=2)), lambda x: torch.where(x > 0, x, 0.1 * x), lambda x: -x, lambda x: x.erf(),
    lambda x: x.floor(), lambda x: (x * 4).round() / 4, lambda x: x.to(torch.float64).to(torch.float32) * 1.25,
    lambda x: x.masked_fill(x < -1, 0.25), lambda x: x.to(torch.bfloat16).to(torch.float32), lambda x: x.sign() * x * x,
    lambda x: F.hardswish(x), lambda x: F.leaky_relu(x, 0.2), lambda x: x.half().float(), lambda x: (x > 0.1).float(),
]  # fmt: skip
_BINARY: list[Callable[[Tensor, Tensor], Tensor]] = [
    torch.add, torch.sub, torch.mul, torch.maximum, torch.minimum, lambda a, b: a / (b.abs() + 1),
    lambda a, b: torch.where(a > b, a, b * 0.5), lambda a, b: a + 0.5 * b,
]  # fmt: skip
_REDUCE: list[Callable[[Tensor, int, bool], Tensor]] = [
    lambda x, d, k: x.sum(d, keepdim=k), lambda x, d, k: x.mean(d, keepdim=k), lambda x, d, k: x.amax(d, keepdim=k),
    lambda x, d, k: x.amin(d, keepdim=k), lambda x, d, k: x.var(d, keepdim=k, correction=0),
    lambda x, d, k: x.argmax(d, keepdim=k).float(), lambda x, d, k: x.max(d, keepdim=k).values,
    lambda x, d, k: (x > 0).any(d, keepdim=k).float(),
]  # fmt: skip
_ROWS: list[Callable[[Tensor, int], Tensor]] = [
    lambda x, d: x.softmax(d), lambda x, d: x.log_softmax(d), lambda x, d: F.layer_norm(x, x.shape[-1:]),
    lambda x, d: torch.ops.irc.rms_norm(x, None, 1e-5), lambda x, d: x.cumsum(d) / 8,
    lambda x, d: x - x.mean(d, keepdim=True),
]  # fmt: skip


Step = tuple[Callable[..., Tensor], tuple[int, ...]]


class Cluster(nn.Module):
    """A random graph over two inputs: a list of functions with the numbers of their operands."""

    def __init__(self, seed: int, steps: int, x: Tensor, y: Tensor) -> None:
        super().__init__()
        draw, values = random.Random(seed), [x, y]
        self.plan: list[Step] = []
        for _ in range(steps):
            function, operands = _drawn(draw, values)
            self.plan.append((function, operands))
            values.append(function(*(values[i] for i in operands)))
        self.kept = [*draw.sample(range(2, len(values) - 1), min(3, steps - 1)), len(values) - 1]

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        values = [x, y]
        for function, operands in self.plan:
            values.append(function(*(values[i] for i in operands)))
        return tuple(values[i] for i in self.kept)


def _drawn(draw: random.Random, values: list[Tensor]) -> Step:
    """A function and its operands, made for the values that are there (the newest preferred)."""
    at = len(values) - 1 if draw.random() < 0.6 else draw.randrange(len(values))
    x, kind = values[at], draw.random()
    if kind < 0.3 or x.dim() == 0:
        return draw.choice(_UNARY), (at,)
    if kind < 0.55:
        fitting = [i for i, v in enumerate(values) if _broadcasts(v, x)]
        return draw.choice(_BINARY), (at, draw.choice(fitting))
    if kind < 0.65:
        reduce, dim, keep = draw.choice(_REDUCE), draw.randrange(x.dim()), draw.random() < 0.7
        return lambda x: reduce(x, dim, keep), (at,)
    if kind < 0.75:
        row, dim = draw.choice(_ROWS), draw.randrange(x.dim())
        return lambda x: row(x, dim), (at,)
    return _view(draw, x), (at,)


def _broadcasts(a: Tensor, b: Tensor) -> bool:
    return a.dim() <= b.dim() and all(p in (1, q) for p, q in zip(reversed(a.shape), reversed(b.shape), strict=False))


def _view(draw: random.Random, x: Tensor) -> Callable[[Tensor], Tensor]:
    axis, last, rank = draw.randrange(x.dim()), x.shape[-1], x.dim()
    choices: list[Callable[[Tensor], Tensor]] = [
        lambda x: x.transpose(axis, -1), lambda x: x.flip(axis), lambda x: x[..., ::2],
    ]  # fmt: skip
    if rank < 4:
        choices += [lambda x: x.unsqueeze(axis), lambda x: torch.cat([x, x * 0.5], axis),
                    lambda x: torch.stack([x, x + 1], axis)]  # fmt: skip
    if rank > 1:
        choices += [lambda x: F.pad(x, (1, 2), value=0.5), lambda x: x.select(axis, 0), lambda x: x.flatten(-2)]
    if last % 2 == 0:
        choices += [lambda x: x.chunk(2, -1)[1], lambda x: x.unflatten(-1, (2, last // 2))]
    if last > 2:
        choices.append(lambda x: x[..., 1:])
    return draw.choice(choices)


def random_program(seed: int, *, steps: int = 12, dynamic: bool = True) -> tuple[Program, tuple[Tensor, Tensor]]:
    """(a random program, example inputs); its first dimension is dynamic, if wanted."""
    generator = torch.Generator().manual_seed(seed)
    draw = random.Random(seed)
    rows, width = draw.choice([3, 5, 7]), draw.choice([4, 6, 10, 16, 33])
    middle = draw.choice([2, 4, 5])
    x = torch.randn(rows, middle, width, generator=generator)
    y = torch.randn(rows, 1, width, generator=generator)
    sizes = ({0: "B"}, {0: "B"}) if dynamic else None
    return capture(Cluster(seed, steps, x, y), (x, y), dynamic=sizes, name=f"cluster{seed}"), (x, y)
