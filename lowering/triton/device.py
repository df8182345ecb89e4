"""What block sizes are chosen by: the size of the GPU."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Device:
    """A GPU, as far as launches depend on it.

    Attributes:
        multiprocessors: that run programs at the same time.
        capability: generation of its code, e.g. 80 or 90.
    """

    multiprocessors: int = 132
    capability: int = 90


@functools.cache
def device_of(device: torch.device) -> Device:
    """The size of a GPU; of an H100 where there is none (in the interpreter, or for code compiled ahead)."""
    if device.type != "cuda":
        return Device()
    found = torch.cuda.get_device_properties(device)
    return Device(found.multi_processor_count, 10 * found.major + found.minor)
