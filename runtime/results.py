"""What generation gives back: text, token ids, why it stopped, how long it took."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from irc.runtime.speculation.stats import SpeculationStats


class FinishReason(StrEnum):
    """Why a sequence ended."""

    EOS = "eos"
    """The model gave an end-of-sequence token."""
    STOP = "stop"
    """A stop text or stop token appeared."""
    LENGTH = "length"
    """`max_new_tokens` were generated."""
    CACHE_FULL = "cache-full"
    """The sequence reached the length that the cache holds."""
    CANCELLED = "cancelled"
    """Nobody wants it any more."""
    DEADLINE = "deadline"
    """Its time was up."""
    ERROR = "error"
    """Something failed while it ran; other requests went on."""


@dataclass
class Stats:
    """Times of one call of `generate`.

    Attributes:
        prompt_tokens, new_tokens: of all sequences together.
        prefill_ms: until the first token of every sequence.
        decode_ms: all further steps.
        decode_steps: how many there were.
        decode_tokens: tokens made in them.
    """

    prompt_tokens: int = 0
    new_tokens: int = 0
    prefill_ms: float = 0.0
    decode_ms: float = 0.0
    decode_steps: int = 0
    decode_tokens: int = 0

    @property
    def decode_tokens_per_second(self) -> float | None:
        """None when nothing was decoded after the first token."""
        return self.decode_tokens / self.decode_ms * 1e3 if self.decode_ms > 0 else None

    @property
    def prefill_tokens_per_second(self) -> float | None:
        return self.prompt_tokens / self.prefill_ms * 1e3 if self.prefill_ms > 0 else None

    def __str__(self) -> str:
        text = f"prefill {self.prompt_tokens} tokens in {self.prefill_ms:.0f} ms"
        speed = self.decode_tokens_per_second
        if speed is not None:
            text += f", decode {self.decode_tokens} tokens in {self.decode_ms:.0f} ms ({speed:.1f} tok/s)"
        return text


@dataclass
class GenerationResult:
    """The outcome of `generate`.

    Attributes:
        token_ids: new tokens of each prompt, without the prompt; an end-of-sequence token is not included.
        texts: new text of each prompt, cut at a stop text; empty list without a tokenizer.
        finish_reasons: of each prompt.
        stats: times.
        single: the prompt was one text or one flat list of ids.
        notices: what the user should know (generation without a cache, say).
        speculation: what speculative decoding did, or None.
    """

    token_ids: list[list[int]]
    finish_reasons: list[FinishReason]
    stats: Stats
    texts: list[str] = field(default_factory=list)
    single: bool = False
    notices: list[str] = field(default_factory=list)
    speculation: SpeculationStats | None = None

    @property
    def text(self) -> str | list[str]:
        """New text: a string for one prompt given as such, else a list.

        Raises:
            AttributeError: there was no tokenizer to make text with.
        """
        if not self.texts:
            raise AttributeError("this result has token ids only: compile or generate with a tokenizer to get text")
        return self.texts[0] if self.single else list(self.texts)
