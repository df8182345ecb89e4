"""Text in, text out: tokenizers of two libraries behind one face, and text as it becomes final."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from irc.core.errors import OptionError

_INCOMPLETE = "�"


class TextCodec:
    """A tokenizer: `tokenizers.Tokenizer`, one of transformers, or anything with the same `encode` and `decode`."""

    def __init__(self, tokenizer: Any) -> None:
        missing = [name for name in ("encode", "decode") if not callable(getattr(tokenizer, name, None))]
        if missing:
            raise OptionError(f"a {type(tokenizer).__name__} is no tokenizer: it has no {' and no '.join(missing)}")
        self.tokenizer = tokenizer

    def encode(self, text: str) -> list[int]:
        encoded = self.tokenizer.encode(text)
        return list(getattr(encoded, "ids", encoded))

    def decode(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids)))

    def end_tokens(self) -> frozenset[int]:
        """End-of-sequence tokens that the tokenizer knows: `eos_token_id`, else its only special token."""
        known = getattr(self.tokenizer, "eos_token_id", None)
        if known is not None:
            return frozenset([known] if isinstance(known, int) else known)
        added = getattr(self.tokenizer, "get_added_tokens_decoder", None)
        special = [index for index, token in added().items() if token.special] if callable(added) else []
        return frozenset(special) if len(special) == 1 else frozenset()


class TextStream:
    """Turns tokens, one by one, into text that will not change any more, and finds stop texts in it.

    Text is held back while its last character is incomplete and while it may be the start of a stop text.
    """

    def __init__(self, codec: TextCodec, stops: Sequence[str] = ()) -> None:
        self._codec, self._stops = codec, tuple(stops)
        self._ids: list[int] = []
        # Decoding restarts a little before the new tokens: some tokenizers treat the first token specially.
        self._start = self._read = 0
        self._held = ""
        self.text = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """Text that became final with this token."""
        self._ids.append(token)
        return self._emit(self._new_text(final=False), final=False)

    def finish(self) -> str:
        """Whatever was still held back."""
        return "" if self.stopped else self._emit(self._new_text(final=True), final=True)

    def _new_text(self, *, final: bool) -> str:
        known = self._codec.decode(self._ids[self._start : self._read])
        text = self._codec.decode(self._ids[self._start :])
        if not final and (len(text) <= len(known) or text.endswith(_INCOMPLETE)):
            return ""
        self._start, self._read = self._read, len(self._ids)
        return text[len(known) :]

    def _emit(self, piece: str, *, final: bool) -> str:
        self._held += piece
        found = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            self.stopped, end = True, min(found)
        else:
            end = len(self._held) - (0 if final else self._possible_stop())
        out, self._held = self._held[:end], self._held[end:]
        self.text += out
        return out

    def _possible_stop(self) -> int:
        """Length of the longest end of the held text that a stop text begins with."""
        longest = max((len(stop) - 1 for stop in self._stops), default=0)
        for length in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stops):
                return length
        return 0
