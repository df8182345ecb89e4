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
        shared_bytes: shared memory of each of them that a program can have.
    """

    multiprocessors: int = 132
    shared_bytes: int = 227 << 10


@functools.cache
def device_of(device: torch.device) -> Device:
    """The size of a GPU; of an H100 where there is none (in the interpreter, or for code compiled ahead)."""
    if device.type != "cuda":
        return Device()
    found = torch.cuda.get_device_properties(device)
    shared = getattr(found, "shared_memory_per_block_optin", Device.shared_bytes)
    return Device(found.multi_processor_count, shared)
