"""Orthogonal matrices of flat entries."""

from __future__ import annotations

import torch
from torch import Tensor


def random_hadamard(size: int, seed: int) -> Tensor:
    """An orthogonal f32[size, size] that spreads every channel over all: a Hadamard matrix times random signs.

    A size that is no power of two, 2^k · m, gets the Hadamard matrix of 2^k in Kronecker product with a random
    orthogonal matrix of m.
    """
    generator = torch.Generator().manual_seed(seed)
    power = size & -size
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while matrix.shape[0] < power:
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), matrix)
    matrix = matrix / power**0.5
    if size != power:
        normal = torch.randn(size // power, size // power, generator=generator, dtype=torch.float64)
        matrix = torch.kron(matrix, torch.linalg.qr(normal).Q.contiguous())
    signs = torch.randint(0, 2, (size,), generator=generator, dtype=torch.float64) * 2 - 1
    return (matrix * signs.unsqueeze(1)).float()
