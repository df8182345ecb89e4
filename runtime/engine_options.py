"""How an engine works, and what it has done."""

from __future__ import annotations

from dataclasses import dataclass

from irc.core.errors import OptionError


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """How an engine works.

    Attributes:
        memory_bytes: most bytes of the paged cache; None: as much as all sequences could need, at most 1 GiB.
        max_batch_tokens: most tokens of a step.
        max_sequences: most sequences that run at once.
        prefill_chunk: most tokens of one prompt in a step; None: as many as the step has left.
        prefix_cache: keep the pages of finished sequences for prompts that begin alike.
    """

    memory_bytes: int | None = None
    max_batch_tokens: int = 512
    max_sequences: int = 64
    prefill_chunk: int | None = None
    prefix_cache: bool = True

    def __post_init__(self) -> None:
        problems = [
            f"{name} must be at least 1, not {value}"
            for name, value in vars(self).items()
            if name != "prefix_cache" and value is not None and value < 1
        ]
        if problems:
            raise OptionError("engine: " + "; ".join(problems))


@dataclass
class EngineStats:
    """Totals since the engine was made. Times are of steps: in the model, choosing tokens, and Python around both."""

    steps: int = 0
    model_ms: float = 0.0
    choosing_ms: float = 0.0
    overhead_ms: float = 0.0
    computed_tokens: int = 0
    new_tokens: int = 0
    finished: int = 0
    failed: int = 0
