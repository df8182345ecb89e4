"""Sums of a sensitivity run, kept in a JSON file as they come, so that a killed run goes on where it was."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from irc.core.errors import OptionError, StorageError

_FORMAT = 1


class DamageStore:
    """Sums by layer, over the batches that the layer has seen, which come in order.

    Args:
        key: what the sums belong to; a file with another key is refused.
        path: where they are kept; None: nowhere.
    """

    def __init__(self, key: Mapping[str, Any], path: Path | None) -> None:
        self._key = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        self._path = path
        self._layers: dict[str, dict[str, Any]] = {}
        if path is not None and path.exists():
            self._layers = self._read(path)

    def has(self, layer: str, batch: int) -> bool:
        """Whether the layer has seen that batch."""
        return bool(self._layers.get(layer, {}).get("batches", 0) > batch)

    def add(self, batch: int, found: Mapping[str, tuple[Mapping[str, float], int]]) -> None:
        """Add one batch of some layers: their sums, and how many predictions these are over; then write the file."""
        for layer, (sums, positions) in found.items():
            entry = self._layers.setdefault(layer, {"batches": 0, "positions": 0, "sums": {}})
            if entry["batches"] != batch:
                raise OptionError(f"layer {layer} has seen {entry['batches']} batches, and batch {batch} comes next")
            entry["batches"] += 1
            entry["positions"] += positions
            for name, value in sums.items():
                entry["sums"][name] = entry["sums"].get(name, 0.0) + value
        self._write(None)

    def sums(self, layer: str) -> tuple[dict[str, float], int]:
        """Sums of a layer and the number of predictions they are over."""
        entry = self._layers[layer]
        return entry["sums"], entry["positions"]

    def finish(self, result: Mapping[str, Any]) -> None:
        """Write the final result beside the sums."""
        self._write(result)

    def _write(self, result: Mapping[str, Any] | None) -> None:
        if self._path is None:
            return
        content = {"format": _FORMAT, "key": self._key, "layers": self._layers, "result": result}
        write_json(content, self._path)

    def _read(self, path: Path) -> dict[str, dict[str, Any]]:
        content = read_json(path)
        if content.get("key") != self._key:
            raise OptionError(
                f"{path} holds results of another program, data, metric or formats: choose another file, or delete it"
            )
        layers = content.get("layers")
        if not isinstance(layers, dict) or not all(map(_is_entry, layers.values())):
            raise StorageError(f"{path} is damaged: delete it to start again")
        return layers


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        StorageError: the file is missing, or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise StorageError(f"{path} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise StorageError(f"{path} holds no JSON object")
    return content


def write_json(content: Mapping[str, Any], path: Path) -> None:
    """Write aside and rename, so that there is never half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, aside = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(content, file, indent=1)
            file.write("\n")
        os.replace(aside, path)
    except BaseException:
        Path(aside).unlink(missing_ok=True)
        raise


def _is_entry(entry: Any) -> bool:
    return (
        isinstance(entry, dict)
        and type(entry.get("batches")) is int
        and type(entry.get("positions")) is int
        and isinstance(entry.get("sums"), dict)
        and all(isinstance(value, (int, float)) for value in entry["sums"].values())
    )
