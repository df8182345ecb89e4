"""Super-blocks: the compiled code and PyTorch's operations give the bytes that llama.cpp gives."""

import hashlib

import pytest
import torch

from irc.core import formats
from irc.lowering.gguf import super_blocks
from irc.lowering.gguf.quantizers import search_rows

# Of llama.cpp's ggml_quantize_chunk for `numbers()`, without and with `importance()`.
_BYTES = {
    "q2_k": ("09ae1ce8e1be5298", "7845e37cbb5b7ee4"),
    "q3_k": ("42bc916f1d35401c", "e2d658d4a7025aaa"),
    "q4_k": ("0c2cf8aafe521778", "d70faa4c3d7a16b9"),
    "q5_k": ("71c97ceae17ed817", "7992ec49019a2a64"),
    "q6_k": ("8e85b2fd5e811ca9", "1b405ed434ba93a8"),
}


def numbers() -> torch.Tensor:
    """f32 [20, 1024] of exact integers, the same everywhere; with zeros, flat, one-sided, huge and tiny stretches."""
    state = torch.arange(20 * 1024, dtype=torch.int64)
    mixed = (state * 2654435761 + 12345) % 65521
    x = ((mixed * mixed % 65521).float() - 32760).view(20, 1024) * 2.0**-20
    x[0], x[1, :256] = 0, 0.5
    x[2, ::7] = 0
    x[3], x[4] = x[3].abs(), -x[4].abs()
    x[5, 5], x[6, :300], x[6, 310:330] = 30, 0, 1e-5
    x[7] *= 2.0**-40
    x[8] *= 2.0**-90
    x[9] = (mixed[:1024] % 7 - 3).float()
    x[10] *= 2.0**20
    return x


def importance() -> torch.Tensor:
    return ((torch.arange(1024) * 7919 % 1021).float() + 1) * 2.0**-10


@pytest.mark.parametrize("kind", super_blocks.KINDS)
@pytest.mark.parametrize("weighted", [False, True])
def test_bytes_are_llama_cpps(kind: str, weighted: bool) -> None:
    stored = search_rows(numbers(), kind, importance() if weighted else None)
    assert hashlib.sha256(stored.numpy().tobytes()).hexdigest()[:16] == _BYTES[kind][weighted]


@pytest.mark.skipif(not super_blocks.available(), reason="no C++ compiler")
@pytest.mark.parametrize("kind", super_blocks.KINDS)
@pytest.mark.parametrize("weighted", [False, True])
def test_compiled_code_gives_the_same_bytes(kind: str, weighted: bool) -> None:
    x = torch.cat((numbers(), torch.randn(11, 1024, generator=torch.Generator().manual_seed(0))))
    weights = importance() if weighted else None
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):  # 3 threads: parts of 10 and 11 rows
            torch.set_num_threads(threads)
            stored = super_blocks.quantize(x, kind, weights)
            assert torch.equal(stored, search_rows(x, kind, weights))
    finally:
        torch.set_num_threads(before)
    # An odd number of blocks: two of 32-number groups share a vector.
    assert torch.equal(super_blocks.quantize(x[11:12, :256], kind), search_rows(x[11:12, :256], kind))
    assert formats.parse(kind).dequantize(stored, None, None, torch.float32).shape == x.shape
