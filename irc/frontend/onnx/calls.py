"""One node of an ONNX graph being run: its inputs, its attributes, and the registry of operators.

Sizes are integers, not tensors, to PyTorch's tracer. So every value that is computed from shapes and constants alone
is kept as a NumPy array of integers (`numbers`), whose entries may be symbolic; it becomes a tensor only where one is
asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from irc.core.errors import CaptureError

Numbers = np.ndarray
Value = Any  # Tensor or Numbers
_MOST_NUMBERS = 4096
_DOMAINS = {"": "", "ai.onnx": "", "com.microsoft": "com.microsoft"}


class Call:
    """What an operator sees: inputs by index, attributes by name, and the opset of its domain."""

    def __init__(
        self, op: str, name: str, inputs: Sequence[Value | None], attributes: dict[str, Any], opset: int
    ) -> None:
        self.op, self.name, self.attributes, self.opset = op, name, attributes, opset
        self._inputs = list(inputs)
        self.scalars: list[float | None] = [None] * len(self._inputs)

    def __len__(self) -> int:
        return len(self._inputs)

    def has(self, index: int) -> bool:
        """True when that optional input is there."""
        return index < len(self._inputs) and self._inputs[index] is not None

    def tensor(self, index: int) -> Tensor:
        """An input as a tensor."""
        if not self.has(index):
            raise CaptureError(f"{self.op} {self.name!r} lacks its input {index}")
        value: Value = self._inputs[index]
        return value if isinstance(value, Tensor) else to_tensor(value)

    def operand(self, index: int) -> Any:
        """An input of an element-wise operator: constants without dimensions as Python numbers."""
        found = self.scalars[index] if index < len(self.scalars) else None
        return self.tensor(index) if found is None else found

    def tensors(self) -> list[Tensor]:
        """All inputs that are there, as tensors."""
        return [self.tensor(i) for i in range(len(self)) if self.has(i)]

    def maybe(self, index: int) -> Tensor | None:
        """An optional input as a tensor."""
        return self.tensor(index) if self.has(index) else None

    def numbers(self, index: int) -> Numbers:
        """An input that is known when the program is made, or a size.

        Raises:
            CaptureError: it depends on the values of inputs.
        """
        value = self._inputs[index] if self.has(index) else None
        if isinstance(value, np.ndarray):
            return value
        raise CaptureError(
            f"{self.op} {self.name!r}: its input {index} is computed from values at run time;"
            " irc takes sizes and constants"
        )

    def ints(self, index: int) -> list[Any]:
        """Numbers as a list."""
        return list(self.numbers(index).ravel())

    @property
    def known(self) -> bool:
        """True when all inputs are sizes or constants."""
        return all(value is None or isinstance(value, np.ndarray) for value in self._inputs)

    def attribute(self, name: str, default: Any = None) -> Any:
        """An attribute, or its default."""
        return self.attributes.get(name, default)

    def axes(self, attribute: str, index: int) -> list[int] | None:
        """Axes, which older operator sets have as an attribute and newer ones as an input; None: not given."""
        if self.has(index):
            return [int(axis) for axis in self.ints(index)]
        given = self.attribute(attribute)
        return None if given is None else [int(axis) for axis in given]


def to_tensor(numbers: Numbers) -> Tensor:
    """Numbers as a tensor of i64 or bool; symbolic ones stay symbolic."""
    flat = list(numbers.ravel())
    if not any(isinstance(n, (torch.SymInt, torch.SymBool)) for n in flat):
        kind = torch.bool if flat and all(isinstance(n, (bool, np.bool_)) for n in flat) else torch.int64
        return torch.tensor([bool(n) if kind == torch.bool else int(n) for n in flat], dtype=kind).reshape(
            numbers.shape
        )
    parts = [torch.full((), n, dtype=torch.int64) for n in flat]
    return torch.stack(parts).reshape(numbers.shape)


def to_numbers(tensor: Tensor) -> Numbers | None:
    """A constant as numbers, if it is small and holds integers."""
    if tensor.dtype not in (torch.int64, torch.int32, torch.bool) or tensor.numel() > _MOST_NUMBERS or tensor.dim() > 2:
        return None
    return as_numbers(tensor.tolist()).reshape(tuple(tensor.shape))


def as_numbers(values: Any) -> Numbers:
    """Integers, symbolic or not, as an array."""
    return np.array(values, dtype=object)


Operator = Callable[[Call], Any]
_OPERATORS: dict[tuple[str, str], Operator] = {}


def operator(*names: str, domain: str = "") -> Callable[[Operator], Operator]:
    """Decorator: registers a function for operators of those names."""

    def register(function: Operator) -> Operator:
        for name in names:
            if (domain, name) in _OPERATORS:
                raise ValueError(f"ONNX operator {name} is registered twice")
            _OPERATORS[domain, name] = function
        return function

    return register


def find_operator(domain: str, name: str) -> Operator | None:
    """The function of an operator, or None."""
    return _OPERATORS.get((_DOMAINS.get(domain, domain), name))


def known_operators() -> list[str]:
    """Names of all operators, with domains other than ONNX's own in front."""
    return sorted(f"{domain}::{name}" if domain else name for domain, name in _OPERATORS)
