"""A small ResNet on scikit-learn's handwritten digits: full precision, INT8, 4 bits after training, 4 bits trained.

    pip install 'irc-compiler[digits]'
    python examples/digits_int8.py                # five seeds, under two minutes on two cores

Every quantized model is a program with Q/DQ; its accuracy is that of the program as it runs. Figures are means over
seeds (each seed: another split, another initialisation), with the single ones beside them.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import irc
from irc.passes import (
    ConvertFakeQuantization,
    FoldConvBatchNorm,
    InsertFakeQuantization,
    QuantizeActivations,
    QuantizeWeights,
)

CHANNELS = 4


class Block(nn.Module):
    """Two 3 × 3 convolutions beside the identity (or a 1 × 1 convolution where sizes change)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)
        changes = inputs != outputs or stride != 1
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride=stride) if changes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(torch.relu(self.norm1(self.conv1(x)))))
        return torch.relu(y + self.shortcut(x))


class DigitsResNet(nn.Module):
    """Images f32[B, 1, 8, 8] → logits f32[B, 10]."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, CHANNELS, 3, padding=1, bias=False), nn.BatchNorm2d(CHANNELS)
        self.blocks = nn.Sequential(
            Block(CHANNELS, CHANNELS, 1), Block(CHANNELS, 2 * CHANNELS, 2), Block(2 * CHANNELS, 4 * CHANNELS, 2)
        )
        self.head = nn.Linear(4 * CHANNELS, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(torch.relu(self.norm(self.stem(x))))
        return self.head(x.mean((2, 3)))


@dataclass(frozen=True)
class Split:
    """Images f32[N, 1, 8, 8] and labels i64[N]."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor


def load_split(seed: int) -> Split:
    """Two thirds of the digits to train on, the rest to test."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(digits.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    test, train = order[: len(order) // 3], order[len(order) // 3 :]
    return Split(images[train], labels[train], images[test], labels[test])


def train(module: nn.Module, split: Split, *, epochs: int, rate: float, seed: int) -> None:
    """An ordinary loop: Adam with a cosine schedule."""
    generator = torch.Generator().manual_seed(seed)
    parameters = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for _ in range(epochs):
        for batch in torch.randperm(len(split.train_x), generator=generator).split(64):
            optimizer.zero_grad()
            F.cross_entropy(module(split.train_x[batch]), split.train_y[batch]).backward()
            optimizer.step()
        schedule.step()


def accuracy(program: irc.Program, split: Split) -> float:
    """Percent of the test images."""
    (logits,) = program.run(split.test_x)
    return 100 * float((logits.argmax(-1) == split.test_y).float().mean())


def one_seed(seed: int, *, epochs: int, qat_epochs: int) -> dict[str, float]:
    """Accuracy of each variant."""
    torch.manual_seed(seed)
    split = load_split(seed)
    model = DigitsResNet()
    train(model, split, epochs=epochs, rate=3e-3, seed=seed)
    program = irc.capture(model.eval(), (split.train_x[:8],), dynamic=({0: "B"},), name="digits")
    data = irc.CalibrationData.of(split.train_x[:256], batch_size=64)

    def run(*passes: irc.passes.Pass, verify: str = "each") -> irc.Program:
        context = irc.PassContext(options={"calibration": data})
        return irc.PassManager(list(passes), ctx=context, verify=verify).run(program).program

    def weights(bits: int, *, indivisible: str = "error") -> QuantizeWeights:
        return QuantizeWeights(
            bits=bits,
            group_size=None,
            include_convolutions=True,
            indivisible=indivisible,
        )

    fold = FoldConvBatchNorm()
    found = {"f32": accuracy(program, split)}
    found["INT8 static"] = accuracy(run(fold, weights(8), QuantizeActivations()), split)
    # Nine taps are no pairs: the stem keeps its weights, as in most 4-bit networks, in both 4-bit variants.
    found["4-bit PTQ"] = accuracy(
        run(fold, weights(4, indivisible="skip"), QuantizeActivations(bits=4), verify="off"), split
    )
    trainable = run(fold, InsertFakeQuantization(bits=4, activation_bits=4), verify="off")
    module = trainable.module()
    train(module, split, epochs=qat_epochs, rate=1e-3, seed=seed)
    trained = trainable.with_weights(module)
    final = irc.PassManager([ConvertFakeQuantization()]).run(trained).program
    assert torch.equal(final.run(split.test_x)[0], trained.run(split.test_x)[0]), "conversion is exact"
    found["4-bit QAT"] = accuracy(final, split)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=25)
    parser.add_argument("--qat-epochs", type=int, default=20)
    given = parser.parse_args()
    torch.set_num_threads(1)  # batches this small run slower on more, much slower where other work shares the cores
    started = time.perf_counter()
    rows = [one_seed(seed, epochs=given.epochs, qat_epochs=given.qat_epochs) for seed in range(given.seeds)]
    print(f"test accuracy on digits, mean of {given.seeds} seeds")
    for name in rows[0]:
        values = [row[name] for row in rows]
        print(f"  {name:<12} {statistics.mean(values):6.2f} %   ({', '.join(f'{v:.2f}' for v in values)})")
    print(f"{time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
