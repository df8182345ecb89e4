from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from irc.core.errors import IrcError, StorageError
from irc.core.hashing import structural_hash
from irc.core.provenance import sources_of
from irc.core.storage import GRAPH, MANIFEST, WEIGHTS, load, save
from tests.core.programs import TEXT, small


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save(small(), tmp_path / "p")
    return tmp_path / "p"


def _rewrite(folder: Path, name: str, data: bytes) -> None:
    """Change a file and make the manifest agree, as a forger would."""
    (folder / name).write_bytes(data)
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (folder / MANIFEST).write_text(json.dumps(manifest))


def test_round_trip(folder: Path) -> None:
    program, other = small(), load(folder)
    assert str(other) == str(program)
    assert structural_hash(other) == structural_hash(program)
    for a, b in zip(program.example_inputs, other.example_inputs, strict=True):
        assert torch.equal(a, b)
    for a, b in zip(program.run(*program.example_inputs), other.run(*other.example_inputs), strict=True):
        assert torch.equal(a, b)
    for node in program.operations():
        assert sources_of(other.node(node.name)) == sources_of(node)


def test_saving_again_replaces_and_leaves_nothing_behind(folder: Path) -> None:
    save(load(folder), folder)
    load(folder)
    assert [p.name for p in folder.parent.iterdir()] == ["p"]


def test_other_folders_are_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("x")
    with pytest.raises(StorageError, match=r"precious\.txt"):
        save(small(), tmp_path)
    assert (tmp_path / "precious.txt").exists()


def test_meta_weights_cannot_be_saved(tmp_path: Path) -> None:
    from irc.core.text import parse

    with pytest.raises(StorageError, match="no values"):
        save(parse(TEXT), tmp_path / "p")
    assert not list(tmp_path.iterdir())


def test_strided_weights_come_back(tmp_path: Path) -> None:
    program = small()
    strided = torch.randn(8, 16).t()
    save(program.with_weights({"embed.weight": strided}), tmp_path / "p")
    assert torch.equal(load(tmp_path / "p").weights["embed.weight"], strided)


@pytest.mark.parametrize("name", [GRAPH, WEIGHTS, MANIFEST])
def test_missing_file(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(StorageError):
        load(folder)


def test_changed_byte_is_noticed(folder: Path) -> None:
    data = bytearray((folder / WEIGHTS).read_bytes())
    data[-1] ^= 1
    (folder / WEIGHTS).write_bytes(data)
    with pytest.raises(StorageError, match="sha256"):
        load(folder)
    _rewrite(folder, WEIGHTS, bytes(data))
    with pytest.raises(IrcError, match="other values"):
        load(folder)


HEADERS: list[Any] = [
    {}, [], {"table": 1}, {"table": {"dtype": "F32", "shape": [1 << 60], "data_offsets": [0, 4]}},
    {"table": {"dtype": "F32", "shape": [2], "data_offsets": [0, 1 << 50]}},
    {"table": {"dtype": "F32", "shape": [-2], "data_offsets": [4, 0]}},
    {"table": {"dtype": "XX", "shape": [1], "data_offsets": [0, 4]}},
]  # fmt: skip


@pytest.mark.parametrize("header", HEADERS, ids=range(len(HEADERS)))
def test_lying_safetensors(folder: Path, header: Any) -> None:
    raw = json.dumps(header).encode()
    _rewrite(folder, WEIGHTS, struct.pack("<Q", len(raw)) + raw + b"\0" * 4)
    with pytest.raises(IrcError):
        load(folder)


@pytest.mark.parametrize("data", [b"", b"\xff" * 8, struct.pack("<Q", 1 << 62), b"\x02" + b"\0" * 7 + b"[" * 9])
def test_truncated_safetensors(folder: Path, data: bytes) -> None:
    _rewrite(folder, WEIGHTS, data)
    with pytest.raises(IrcError):
        load(folder)


values = st.recursive(
    st.none() | st.integers(-5, 5) | st.text(max_size=5),
    lambda c: st.lists(c, max_size=3) | st.dictionaries(st.text(max_size=5), c, max_size=3),
    max_leaves=6,
)


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.sampled_from(["format", "files", "example_inputs", "provenance"]), values)
def test_hostile_manifest(tmp_path_factory: pytest.TempPathFactory, key: str, value: Any) -> None:
    folder = tmp_path_factory.mktemp("hostile") / "p"
    save(small(), folder)
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest[key] = value
    (folder / MANIFEST).write_text(json.dumps(manifest))
    try:
        load(folder)
    except IrcError:
        return
    assert key in ("example_inputs", "provenance")
