"""`.pt2` files and ExportedPrograms; hostile archives are refused before anything in them runs."""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.export import Dim, ExportedProgram

from irc.core.errors import StorageError
from irc.frontend import capture
from tests.zoo import built, token_ids


@pytest.fixture(scope="module")
def exported() -> ExportedProgram:
    shapes = ({0: Dim.AUTO, 1: Dim.AUTO},)
    return torch.export.export(built("tinypy"), (token_ids(),), dynamic_shapes=shapes, strict=False)


@pytest.fixture(scope="module")
def archive(exported: ExportedProgram, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pt2") / "tiny.pt2"
    torch.export.save(exported, path)
    return path


def test_exported_program(exported: ExportedProgram) -> None:
    program = capture(exported, canonicalize=False)
    assert list(program.dims) == ["B", "S"]
    assert list(capture(exported, dynamic=({0: "N", 1: "L"},), canonicalize=False).dims) == ["N", "L"]
    ids = token_ids(1, 1)
    assert torch.equal(program(ids), built("tinypy")(ids))


def test_archive(archive: Path) -> None:
    program = capture(str(archive), canonicalize=False)
    assert program.name == "tiny"
    assert program.tied == {"lm_head.weight": "embed.weight"}
    assert program.example_inputs is None
    for size in ((1, 1), (2, 20)):
        assert torch.equal(program(token_ids(*size)), built("tinypy")(token_ids(*size)))


class Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


def rewrite(source: Path, target: Path, entry: str, change: Callable[[bytes], bytes]) -> Path:
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as new:
        for name in old.namelist():
            data = old.read(name)
            new.writestr(name, change(data) if name.endswith(entry) else data)
    return target


def edit(path: list[Any], value: Any) -> Callable[[bytes], bytes]:
    def change(data: bytes) -> bytes:
        document = found = json.loads(data)
        for step in path[:-1]:
            found = found[step]
        found[path[-1]] = value
        return json.dumps(document).encode()

    return change


NODE = ["graph_module", "graph", "nodes", 3]


@pytest.mark.parametrize(
    ("entry", "change", "message"),
    [
        ("model.json", edit([*NODE, "target"], "torch.load"), r"calls 'torch.load'"),
        ("model.json", edit([*NODE, "target"], "torch.os.system"), r"calls 'torch.os.system'"),
        ("model.json", edit([*NODE, "target"], "torch.ops.load_library"), r"calls 'torch.ops.load_library'"),
        ("model.json", edit([*NODE, "target"], "torch.ops.aten.from_file.default"), r"from_file"),
        ("model.json", edit([*NODE, "target"], "_operator.attrgetter"), r"attrgetter"),
        ("model.json", edit([*NODE, "expr_str"], "__import__('os').system('true')"), r"not plain arithmetic"),
        ("model.json", edit([*NODE, "expr_str"], "9**9**9999"), r"not plain arithmetic"),
        ("model.json", edit([*NODE, "as_operator"], "torch.load"), r"function 'torch.load'"),
        ("model.json", edit([*NODE, "in_spec"], '[1, {"type": "collections.defaultdict"}]'), r"defaultdict"),
        ("model.json", lambda data: data[:1000], r"not JSON"),
        ("model.json", lambda data: b"{}", r"damaged"),
        (
            "weights_config.json",
            edit(["config", "embed.weight", "use_pickle"], True),
            r"weights 'embed.weight' is stored as a pickle",
        ),
        ("constants_config.json", edit(["config", "x"], {"path_name": "opaque_obj_0"}), r"constants 'x'"),
        ("weight_0", lambda data: data[:8], r"damaged"),
    ],
)
def test_hostile_archives_are_refused(
    archive: Path, tmp_path: Path, entry: str, change: Callable[[bytes], bytes], message: str
) -> None:
    path = rewrite(archive, tmp_path / "bad.pt2", entry, change)
    with pytest.raises(StorageError, match=message):
        capture(path)


def test_pickled_example_inputs_are_not_read(archive: Path, tmp_path: Path) -> None:
    bomb = tmp_path / "exploded"
    path = rewrite(archive, tmp_path / "bomb.pt2", "sample_inputs/model.pt", lambda _: pickle.dumps(Bomb(bomb)))
    capture(path, canonicalize=False)
    assert not bomb.exists()


def test_what_is_no_archive(tmp_path: Path) -> None:
    path = tmp_path / "x.pt2"
    path.write_bytes(b"no archive")
    with pytest.raises(StorageError, match=r"not a \.pt2 archive"):
        capture(path)
