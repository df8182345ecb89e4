"""Hyperparameters out of a file's metadata, each asked for by name and held against its type."""

from __future__ import annotations

from typing import Any

from irc.core.errors import StorageError, nearest
from irc.lowering.gguf.architectures import BY_NAME, Architecture
from irc.lowering.gguf.reading import GgufFile

_MAX_LAYERS, _MAX_SIZE = 4096, 1 << 24


class Metadata:
    """Typed access to the keys of one architecture.

    Raises (every method):
        StorageError: the key is missing, or holds something else than it should.
    """

    def __init__(self, file: GgufFile) -> None:
        self.file = file
        name = file.metadata.get("general.architecture")
        if not isinstance(name, str):
            raise StorageError(f"{file.path} does not say its architecture")
        if name not in BY_NAME:
            raise StorageError(
                f"{file.path} is of architecture {name!r}, which irc does not read{nearest(name, BY_NAME)}"
            )
        self.architecture: Architecture = BY_NAME[name]

    def get(self, key: str, default: Any = None) -> Any:
        return self.file.metadata.get(f"{self.architecture.name}.{key}", default)

    def wrong(self, key: str, value: Any, wanted: str) -> StorageError:
        return StorageError(f"{self.file.path}: {self.architecture.name}.{key} is {value!r}, and should be {wanted}")

    def integer(self, key: str, default: int | None = None, *, low: int = 1, high: int = _MAX_SIZE) -> int:
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.wrong(key, value, f"an integer from {low} to {high}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < 1e30:
            raise self.wrong(key, value, "a number")
        return float(value)

    def optional(self, key: str) -> float | None:
        return None if self.get(key) is None else self.number(key)

    def flag(self, key: str, default: bool) -> bool:
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise self.wrong(key, value, "true or false")
        return value

    @property
    def num_layers(self) -> int:
        return self.integer("block_count", high=_MAX_LAYERS)

    def per_layer(self, key: str, default: Any = None) -> list[int]:
        """One integer a layer, from one for all or a list."""
        value = self.get(key, default)
        values = value if isinstance(value, list) else [value] * self.num_layers
        good = all(isinstance(one, int) and not isinstance(one, bool) and 1 <= one <= _MAX_SIZE for one in values)
        if len(values) != self.num_layers or not good:
            raise self.wrong(key, value, f"an integer or {self.num_layers} of them")
        return values

    def windows(self) -> list[int | None]:
        """Sliding window of each layer."""
        count = self.num_layers
        window = self.get("attention.sliding_window")
        if window is None or not self.architecture.window:
            return [None] * count
        width = self.integer("attention.sliding_window")
        pattern = self.get("attention.sliding_window_pattern", 2 if self.architecture.name == "gemma2" else 6)
        if isinstance(pattern, int) and not isinstance(pattern, bool) and pattern >= 1:
            pattern = [index % pattern < pattern - 1 for index in range(count)]
        if not isinstance(pattern, list) or len(pattern) != count:
            raise self.wrong("attention.sliding_window_pattern", pattern, f"{count} flags")
        return [width if bool(local) else None for local in pattern]
