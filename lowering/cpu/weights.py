"""The weights of an artifact: one block of bytes, each part aligned, as kernels read them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from irc.core.errors import TargetError
from irc.core.memory import large_memory

ALIGNMENT = 64


@dataclass
class WeightBlock:
    """Named parts of one block.

    Attributes:
        offsets: part → bytes from the start.
        sizes: part → its bytes.
        parts: what makes the tensors, in order: given their place in the block, in it or elsewhere.
    """

    offsets: dict[str, int] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    parts: dict[str, Callable[[Tensor], Tensor]] = field(default_factory=dict)
    num_bytes: int = 0

    def add(self, name: str, tensor: Tensor) -> int:
        """Append a tensor; its offset. A name that is known keeps its first tensor."""
        tensor = tensor.detach()
        return self.add_made(name, tensor.numel() * tensor.element_size(), lambda _: tensor)

    def add_made(self, name: str, num_bytes: int, make: Callable[[Tensor], Tensor]) -> int:
        """Append a tensor of that size that is made when the block is: its place is known before."""
        if name not in self.offsets:
            self.offsets[name], self.sizes[name], self.parts[name] = self.num_bytes, num_bytes, make
            self.num_bytes += -(-num_bytes // ALIGNMENT) * ALIGNMENT
        return self.offsets[name]

    def bytes(self) -> Tensor:
        """u8[num_bytes]; the parts are given up, so that memory holds them once.

        Raises:
            TargetError: a part is not as large as it was said to be.
        """
        block = large_memory(max(self.num_bytes, ALIGNMENT))
        for name, offset in self.offsets.items():
            place = block[offset : offset + self.sizes[name]]
            made = self.parts.pop(name)(place)
            if made is place:
                continue
            data = made.contiguous().reshape(-1).view(torch.uint8)
            if data.numel() != place.numel():
                raise TargetError(f"{name} has {data.numel()} bytes, its place {place.numel()}")
            place.copy_(data)
        return block
