"""Operators whose type inference loops: how long, so that hostile text cannot make it loop for ever."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor

from irc.core.typed import VAL

MAX_STEPS = 1 << 16


def too_much_work(target: torch._ops.OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str | None:
    """Why inferring the type of this call would take too long, or None.

    Covers the operators that make a tensor, or take a step, for each unit of some size or number.
    """
    estimate = _STEPS.get(target._schema.name.partition("::")[2])
    if estimate is None:
        return None
    names = [a.name for a in target._schema.arguments]
    given = {a.name: a.default_value for a in target._schema.arguments if a.has_default_value()}
    given |= dict(zip(names, args, strict=False)) | dict(kwargs)
    try:
        steps = estimate(given)
    except (KeyError, TypeError, IndexError, ZeroDivisionError):
        return None  # arguments that do not fit: inference says so
    return None if steps <= MAX_STEPS else f"would make {steps} pieces; at most {MAX_STEPS} are allowed"


def _sizes(value: Any) -> list[int]:
    """Sizes of a tensor node; of a symbolic one, its size at the example inputs."""
    fake = value.meta[VAL] if isinstance(value, fx.Node) else None
    if isinstance(fake, (list, tuple)):
        return [size for item in fake if isinstance(item, Tensor) for size in map(_hint, item.shape)]
    return [_hint(size) for size in fake.shape] if isinstance(fake, Tensor) else []


def _hint(size: Any) -> int:
    return size if isinstance(size, int) else int(size.node.hint or 0)


def _number(value: Any) -> int:
    if isinstance(value, fx.Node):
        value = value.meta[VAL]
    return _hint(value)


def _along(given: Mapping[str, Any]) -> int:
    return _sizes(given["self"])[_number(given.get("dim", 0))]


def _split(given: Mapping[str, Any]) -> int:
    size = given.get("split_size", given.get("split_sizes"))
    return len(size) if isinstance(size, (list, tuple)) else -(-_along(given) // max(1, _number(size)))


def _sections(given: Mapping[str, Any]) -> int:
    for key in ("chunks", "sections"):
        if key in given:
            return _number(given[key])
    return 0


def _largest(given: Mapping[str, Any]) -> int:
    steps = 0
    for value in given.values():
        for item in value if isinstance(value, (list, tuple)) else [value]:
            steps = max([steps, *_sizes(item)])
    return steps


def _repeats(given: Mapping[str, Any]) -> int:
    return max(_number(v) for k, v in given.items() if k in ("n", "num_layers", "r"))


_STEPS: dict[str, Callable[[Mapping[str, Any]], int]] = {
    "split": _split, "split_with_sizes": _split, "unsafe_split": _split, "unsafe_split_with_sizes": _split,
    "split_copy": _split, "split_with_sizes_copy": _split,
    "unbind": _along, "unbind_copy": _along,
    "chunk": _sections, "unsafe_chunk": _sections, "tensor_split": _sections,
    "hsplit": _sections, "vsplit": _sections, "dsplit": _sections,
    "lstm": lambda g: max(_largest(g), _repeats(g)), "gru": lambda g: max(_largest(g), _repeats(g)),
    "rnn_tanh": lambda g: max(_largest(g), _repeats(g)), "rnn_relu": lambda g: max(_largest(g), _repeats(g)),
    "diff": _repeats, "combinations": _repeats, "linalg_multi_dot": _largest, "matrix_exp": _largest,
    "tensor_split_copy": _sections, "align_tensors": _largest, "pad_sequence": _largest,
    "_pad_packed_sequence": _largest, "_pack_padded_sequence": _largest, "ctc_loss": _largest,
}  # fmt: skip
