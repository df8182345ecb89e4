"""Importance matrices: gathered, written, read, used; damaged ones refused."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
import torch

from irc.core import formats
from irc.core.calibration import CalibrationData
from irc.core.errors import OptionError, StorageError
from irc.lowering.gguf import ImportanceMatrix, export_gguf, importance_matrix
from irc.lowering.gguf.quantizers import quantize_rows
from tests.lowering.gguf.models import ids, program


def matrix() -> ImportanceMatrix:
    return importance_matrix(program("odd"), CalibrationData.of(ids(4)))


def test_sums_are_those_of_the_layers_inputs() -> None:
    found, odd = matrix(), program("odd")
    x = odd.weights["words.weight"][ids(4)]
    normed = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * odd.weights["steps.0.zip.gain"]
    expected = normed.flatten(0, 1).square().sum(0)
    for name in ("attn_q", "attn_k", "attn_v"):
        torch.testing.assert_close(found.sums[f"blk.0.{name}.weight"][0], expected, rtol=1e-5, atol=1e-5)
        assert found.counts[f"blk.0.{name}.weight"].tolist() == [36.0]
    assert {"blk.1.ffn_down.weight", "output.weight"} <= set(found.sums)


def test_file_round_trip(tmp_path: Path) -> None:
    before = matrix()
    after = ImportanceMatrix.load(before.save(tmp_path / "model.imatrix"))
    assert set(after.sums) == set(before.sums)
    for name, sums in before.sums.items():
        assert torch.equal(after.sums[name], sums)
        assert torch.equal(after.counts[name], before.counts[name])
    assert after.datasets == ["tensors"]


def test_the_older_format_is_read(tmp_path: Path) -> None:
    path = tmp_path / "old.dat"
    body = struct.pack("<ii6sii4f", 1, 6, b"blk.0x", 2, 4, 2.0, 4.0, 6.0, 8.0)
    path.write_bytes(body)
    assert ImportanceMatrix.load(path).importance("blk.0x").tolist() == [1.0, 2.0, 3.0, 4.0]
    for damaged in (body[:-3], struct.pack("<i", -1), struct.pack("<ii", 1, 1 << 30), b""):
        path.write_bytes(damaged)
        with pytest.raises(StorageError):
            ImportanceMatrix.load(path)


@pytest.mark.parametrize("kind", ["q2_k", "q3_k", "q4_k", "q5_k", "q6_k"])
def test_super_blocks_lose_less_where_it_counts(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(32, 512, generator=generator)
    importance = torch.rand(512, generator=generator).pow(6) * 100 + 1e-3

    def loss(weights: torch.Tensor | None) -> float:
        stored = quantize_rows(x, kind, weights)
        error = formats.parse(kind).dequantize(stored, None, None, torch.float32) - x
        return float((error.square() * importance).sum())

    assert loss(importance) < 0.98 * loss(None)


def test_another_models_matrix_is_refused(tmp_path: Path) -> None:
    other = ImportanceMatrix({"blk.0.attn_q.weight": torch.ones(1, 3)}, {"blk.0.attn_q.weight": torch.ones(1)})
    with pytest.raises(OptionError, match=r"has \[3\] for blk.0.attn_q.weight"):
        export_gguf(program("odd"), tmp_path / "model.gguf", type="q4_0", imatrix=other)
    with pytest.raises(OptionError, match="of another model"):
        export_gguf(program("odd"), tmp_path / "model.gguf", type="q4_0", imatrix=ImportanceMatrix())
