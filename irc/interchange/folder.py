"""The folder of a checkpoint: `config.json`, and `model.safetensors` or its shards. Nothing in it is trusted."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from irc.core.errors import OptionError, StorageError

CONFIG, TENSORS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
_MAX_JSON = 1 << 26


def read_folder(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Configuration and tensors by name."""
    config = read_json(folder / CONFIG)
    shards = [TENSORS]
    if not (folder / TENSORS).exists() and (folder / INDEX).exists():
        mapping = read_json(folder / INDEX).get("weight_map")
        if not isinstance(mapping, dict) or not all(_plain_name(name) for name in mapping.values()):
            raise StorageError(f"{folder / INDEX} has no weight_map of file names beside it")
        shards = sorted(set(mapping.values()))
    tensors: dict[str, Tensor] = {}
    for shard in shards:
        try:
            part = load_file(folder / shard)
        except (OSError, SafetensorError) as error:
            raise StorageError(f"cannot read {folder / shard}: {error}") from error
        twice = sorted(set(part) & set(tensors))
        if twice:
            raise StorageError(f"{folder / shard} holds {twice[0]}, which another file holds too")
        tensors |= part
    return config, tensors


def _plain_name(name: object) -> bool:
    return isinstance(name, str) and Path(name).name == name and name.endswith(".safetensors")


def read_json(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _MAX_JSON:
            raise StorageError(f"{path} has {path.stat().st_size} bytes, more than a configuration needs")
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise StorageError(f"cannot read {path}: {error}") from error
    if not isinstance(found, dict):
        raise StorageError(f"{path} holds no JSON object")
    return found


def as_config(config: Any) -> dict[str, Any]:
    """A Hugging Face configuration: an object with `to_dict`, a mapping, a file or a folder with `config.json`."""
    if config is None:
        return {}
    if isinstance(config, Mapping):
        return dict(config)
    if isinstance(config, (str, Path)):
        path = Path(config)
        return read_json(path / CONFIG if path.is_dir() else path)
    if hasattr(config, "to_dict"):
        return dict(config.to_dict())
    raise OptionError(f"config is a mapping, a path or an object with to_dict, not {type(config).__name__}")


def write_folder(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write both files aside and move them into place; other files in the folder (a tokenizer) stay."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".irc-", dir=folder) as aside:
            # A tensor that is a view, or shares its storage, cannot be written as it is.
            plain = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
            save_file(plain, Path(aside) / TENSORS, metadata={"format": "pt"})
            text = json.dumps(config, indent=2, sort_keys=True)
            (Path(aside) / CONFIG).write_text(text + "\n", encoding="utf-8")
            for name in (TENSORS, CONFIG):
                os.replace(Path(aside) / name, folder / name)
    except (OSError, SafetensorError) as error:
        raise StorageError(f"cannot write {folder}: {error}") from error
    except TypeError as error:
        raise OptionError(f"the configuration cannot be written as JSON: {error}") from error
