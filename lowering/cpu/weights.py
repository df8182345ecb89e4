"""The weights of an artifact: one block of bytes, each part aligned, as kernels read them."""

from __future__ import annotations

import contextlib
import mmap
from dataclasses import dataclass, field

import torch
from torch import Tensor

ALIGNMENT = 64


@dataclass
class WeightBlock:
    """Named parts of one block.

    Attributes:
        offsets: part → bytes from the start.
        parts: the tensors, in order.
    """

    offsets: dict[str, int] = field(default_factory=dict)
    parts: dict[str, Tensor] = field(default_factory=dict)
    num_bytes: int = 0

    def add(self, name: str, tensor: Tensor) -> int:
        """Append a tensor; its offset. A name that is known keeps its first tensor."""
        if name not in self.offsets:
            tensor = tensor.detach()
            self.offsets[name] = self.num_bytes
            self.parts[name] = tensor
            size = tensor.numel() * tensor.element_size()
            self.num_bytes += -(-size // ALIGNMENT) * ALIGNMENT
        return self.offsets[name]

    def bytes(self) -> Tensor:
        """u8[num_bytes]; the parts are given up, so that memory holds them once."""
        block = large_memory(max(self.num_bytes, ALIGNMENT))
        for name, offset in self.offsets.items():
            tensor = self.parts.pop(name)
            size = tensor.numel() * tensor.element_size()
            if size:
                block[offset : offset + size] = tensor.contiguous().reshape(-1).view(torch.uint8)
        return block


def large_memory(num_bytes: int) -> Tensor:
    """u8[num_bytes] of zeros, in huge pages where the system has them.

    A step reads all weights: with small pages, finding each page takes a tenth to a third of the time (measured under
    virtualization, where a page is looked up twice).
    """
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without huge pages: small ones do, slower
            memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)
