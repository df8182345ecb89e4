"""Files as programs: exactly what was written, and no trust in what a file says."""

from __future__ import annotations

import random
import struct
from pathlib import Path

import pytest
import torch

from irc.core.errors import IrcError, StorageError
from irc.core.formats import parse
from irc.lowering.gguf import export_gguf, from_gguf
from irc.lowering.gguf.importing import build_module
from irc.lowering.gguf.reading import read_file
from irc.passes.quantize.quantize_weights import QuantizeWeights
from tests.lowering.gguf.models import ids, program


@pytest.mark.parametrize("name", ["odd", "plain", "pruned"])
def test_export_import_run_is_exact(name: str, tmp_path: Path) -> None:
    source = program(name)
    path = export_gguf(source, tmp_path / "model.gguf").path
    module = build_module(read_file(path))
    for batch, length in ((1, 1), (2, 9), (3, 5)):
        given = ids(batch, length)
        torch.testing.assert_close(module(given), source.run(given)[0], rtol=0, atol=2e-6)


def test_imported_program_exports_to_the_same_tensors(tmp_path: Path) -> None:
    first = export_gguf(program("odd"), tmp_path / "first.gguf", type="q8_0").path
    again = from_gguf(first)
    assert sum("dequantize" in str(node.target) for node in again.operations()) == 16
    second = export_gguf(again, tmp_path / "second.gguf").path
    before, after = read_file(first), read_file(second)
    assert list(before.tensors) == list(after.tensors)
    for name, tensor in before.tensors.items():
        assert tensor.kind == after.tensors[name].kind, name
        assert torch.equal(tensor.data, after.tensors[name].data), name
    given = ids(3, 5)
    torch.testing.assert_close(from_gguf(second).run(given)[0], again.run(given)[0], rtol=0, atol=0)


def test_quantized_weights_keep_their_numbers(tmp_path: Path) -> None:
    from irc.core.manager import PassManager

    passes = [QuantizeWeights(bits=4, group_size=32, scale_dtype="f16")]
    quantized = PassManager(passes, verify="off").run(program("odd")).program
    written = export_gguf(quantized, tmp_path / "model.gguf")
    assert written.types["blk.0.attn_q.weight"] == "q4_0"
    # Integers and scales are those of the program; irc multiplies them in f16, a GGUF reader in f32.
    node = next(node for node in quantized.operations() if "everything" in str(node.args[0]))
    stored, scale = (quantized.weight(node.args[index]) for index in (0, 1))
    value = next(tensor for name, tensor in read_file(written.path).tensors.items() if name == "blk.0.attn_v.weight")
    split = parse("q4_0").split(value.data)
    expected = parse(str(node.kwargs["format"])).unpack(stored)[:32]
    assert torch.equal(split.integers.flatten(1), expected)
    assert torch.equal(split.scales.flatten(1), scale[:32].float())
    given = ids()
    found = build_module(read_file(written.path))(given)
    torch.testing.assert_close(found, quantized.run(given)[0], rtol=0, atol=2e-3)


# ------------------------------------------------------------------ hostile files


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return export_gguf(program("odd"), tmp_path_factory.mktemp("gguf") / "good.gguf", type="q8_0").path.read_bytes()


def read(data: bytes, folder: Path) -> None:
    path = folder / "hostile.gguf"
    path.write_bytes(data)
    build_module(read_file(path))


def test_truncated_file_at_every_part(good: bytes, tmp_path: Path) -> None:
    for length in (0, 3, 8, 23, 30, 100, 700, 2000, len(good) // 2, len(good) - 40):
        with pytest.raises(StorageError, match="hostile"):
            read(good[:length], tmp_path)


@pytest.mark.parametrize(("at", "what"), [(8, "tensors"), (16, "values")])
def test_huge_counts_are_refused_without_work(at: int, what: str, good: bytes, tmp_path: Path) -> None:
    for count in (1 << 63, 1 << 40, len(good)):
        with pytest.raises(StorageError, match=f"{count} {what}"):
            read(good[:at] + struct.pack("<Q", count) + good[at + 8 :], tmp_path)


def test_offsets_and_shapes_beyond_the_file(good: bytes, tmp_path: Path) -> None:
    name = b"output.weight"
    at = good.index(name) + len(name)
    # name, u32 dims, u64 sizes × 2, u32 type, u64 offset
    for start, value, match in ((4, 1 << 50, "shape"), (12, 1 << 17, "would lie at bytes"), (24, 1 << 60, "would lie")):
        with pytest.raises(StorageError, match=match):
            read(good[: at + start] + struct.pack("<Q", value) + good[at + start + 8 :], tmp_path)
    with pytest.raises(StorageError, match="of type 77"):
        read(good[: at + 20] + struct.pack("<I", 77) + good[at + 24 :], tmp_path)


def test_random_damage_is_an_error_or_reads(good: bytes, tmp_path: Path) -> None:
    rng = random.Random(0)
    header = good.index(b"output_norm.weight") + 100
    refused = 0
    for _ in range(250):
        data = bytearray(good)
        for _ in range(rng.randint(1, 4)):
            data[rng.randrange(4, header)] = rng.choice((0, 1, 7, 255, rng.randrange(256)))
        try:
            read(bytes(data), tmp_path)
        except IrcError:
            refused += 1
    assert refused > 100
