"""The stages of a compilation by name, in order; those that are kept as text are read when they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from irc.core.program import Program


class Stages(Mapping[str, Program]):
    """Programs by stage, in order: given, or made by a function at the first use."""

    def __init__(self, stages: Mapping[str, Program | Callable[[], Program]]) -> None:
        self._stages = dict(stages)

    def __getitem__(self, name: str) -> Program:
        if name not in self._stages:
            raise KeyError(f"there is no stage {name!r}; there are {', '.join(self._stages)}")
        stage = self._stages[name]
        if not isinstance(stage, Program):
            stage = self._stages[name] = stage()
        return stage

    def __iter__(self) -> Iterator[str]:
        return iter(self._stages)

    def __len__(self) -> int:
        return len(self._stages)
