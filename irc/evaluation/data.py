"""Evaluation data: inputs of a program, what should come out, and so which metrics make sense."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor

from irc.core.calibration import CalibrationData
from irc.core.errors import OptionError


class Kind(StrEnum):
    """What the samples are."""

    TEXT = "text"
    """Windows of token ids i64[N, L]; the program gives logits [B, L, V]."""
    CLASSES = "classes"
    """Inputs with the right class of each; the program gives logits [B, C]."""
    PAIRS = "pairs"
    """Samples 2i and 2i + 1 belong together; the program gives embeddings [B, E]."""


@dataclass(frozen=True)
class EvaluationData:
    """Samples to evaluate on.

    Attributes:
        kind: what they are.
        inputs: one tensor for every input of the program, samples along the first dimension.
        targets: classes i64[N], or how alike each pair is f32[N / 2]; None: not known.
        description: for reports.
    """

    kind: Kind
    inputs: tuple[Tensor, ...]
    targets: Tensor | None = None
    description: str = "tensors"

    def __post_init__(self) -> None:
        problems = []
        lengths = [len(value) for value in self.inputs]
        if not lengths or not lengths[0]:
            problems.append("it is empty")
        elif len(set(lengths)) != 1:
            problems.append(f"the inputs hold different numbers of samples: {lengths}")
        elif self.kind is Kind.TEXT:
            ids = self.inputs[0]
            if len(self.inputs) != 1 or ids.ndim != 2 or ids.is_floating_point() or ids.shape[1] < 2:
                problems.append(f"text is one tensor of token ids [N, L ≥ 2], not {_shapes(self.inputs)}")
        elif self.kind is Kind.CLASSES and (self.targets is None or tuple(self.targets.shape) != (lengths[0],)):
            found = None if self.targets is None else list(self.targets.shape)
            problems.append(f"{lengths[0]} inputs need as many classes, not targets of shape {found}")
        elif self.kind is Kind.PAIRS:
            if lengths[0] % 2:
                problems.append(f"pairs are an even number of samples, not {lengths[0]}")
            if self.targets is not None and tuple(self.targets.shape) != (lengths[0] // 2,):
                problems.append(f"{lengths[0] // 2} pairs need as many grades, not {list(self.targets.shape)}")
        if problems:
            raise OptionError(f"evaluation data ({self.description}): " + "; ".join(problems))

    @property
    def num_samples(self) -> int:
        """Windows, inputs or sentences."""
        return len(self.inputs[0])

    def batches(self, size: int) -> Iterator[tuple[tuple[Tensor, ...], Tensor | None]]:
        """Inputs and targets of `size` samples at a time (a pair is never torn apart)."""
        size = size + size % 2 if self.kind is Kind.PAIRS else size
        for start in range(0, self.num_samples, size):
            part = tuple(value[start : start + size] for value in self.inputs)
            targets = self.targets
            if targets is not None:
                scale = 2 if self.kind is Kind.PAIRS else 1
                targets = targets[start // scale : (start + size) // scale]
            yield part, targets

    @staticmethod
    def of(source: Any) -> EvaluationData:
        """From token windows i64[N, L], a pair (inputs, classes), or calibration data that holds token windows.

        Raises:
            OptionError: it is none of these.
        """
        if isinstance(source, EvaluationData):
            return source
        if isinstance(source, CalibrationData):
            if any(len(batch) != 1 for batch in source.batches):
                raise OptionError("calibration data with several inputs says nothing about what should come out")
            windows = torch.cat([batch[0] for batch in source.batches])
            return EvaluationData(Kind.TEXT, (windows,), description=source.description)
        if isinstance(source, Tensor):
            return EvaluationData(Kind.TEXT, (source,), description=f"{len(source)} windows")
        if isinstance(source, Sequence) and len(source) == 2 and all(isinstance(part, Tensor) for part in source):
            return EvaluationData(Kind.CLASSES, (source[0],), source[1], description=f"{len(source[0])} inputs")
        raise OptionError(
            "evaluate on token windows i64[N, L], a pair (inputs, classes), or what irc.evaluation.datasets gives;"
            f" not on a {type(source).__name__}"
        )


def _shapes(inputs: Sequence[Tensor]) -> str:
    return ", ".join(f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}" for value in inputs)
