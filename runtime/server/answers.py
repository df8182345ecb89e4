"""Answers in the interface's form: completions and chat, whole and in pieces."""

from __future__ import annotations

import base64
import json
import math
import secrets
import time
from collections.abc import Sequence
from typing import Any

from irc.runtime.requests import TokenLogprobs
from irc.runtime.server.service import Choice, Piece, Service

_LEAST = -9999.0
"""Stands for the logarithm of zero, which JSON does not have."""


class Answer:
    """What all parts of one answer share."""

    def __init__(self, service: Service, *, chat: bool, prompt_tokens: int, logprobs: bool) -> None:
        self._service, self._chat, self._logprobs = service, chat, logprobs
        self._prompt_tokens = prompt_tokens
        self._id = ("chatcmpl-" if chat else "cmpl-") + secrets.token_hex(12)
        self._created = int(time.time())
        self._offsets: dict[int, int] = {}
        self._begun: set[int] = set()
        self._completion_tokens = 0

    def whole(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """The answer to a request that does not stream."""
        made = []
        for choice in choices:
            self._completion_tokens += len(choice.token_ids)
            one: dict[str, Any] = {"index": choice.index, "finish_reason": choice.finish_reason}
            if self._chat:
                one["message"] = {"role": "assistant", "content": choice.text, "refusal": None}
            else:
                one["text"] = choice.text
            one["logprobs"] = self._logprobs_of(choice.index, choice.logprobs)
            made.append(one)
        return self._envelope("chat.completion" if self._chat else "text_completion", made) | {"usage": self.usage()}

    def part(self, piece: Piece) -> dict[str, Any]:
        """One event of a stream."""
        self._completion_tokens += len(piece.output.token_ids)
        one: dict[str, Any] = {"index": piece.index, "finish_reason": piece.finish_reason}
        if self._chat:
            role = {} if piece.index in self._begun else {"role": "assistant"}
            self._begun.add(piece.index)
            one["delta"] = role | {"content": piece.output.text}
        else:
            one["text"] = piece.output.text
        one["logprobs"] = self._logprobs_of(piece.index, piece.output.logprobs)
        return self._envelope("chat.completion.chunk" if self._chat else "text_completion", [one])

    def end(self) -> dict[str, Any]:
        """The last event of a stream that was asked for its usage."""
        kind = "chat.completion.chunk" if self._chat else "text_completion"
        return self._envelope(kind, []) | {"usage": self.usage()}

    def usage(self) -> dict[str, int]:
        """Tokens so far."""
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": self._completion_tokens,
            "total_tokens": self._prompt_tokens + self._completion_tokens,
        }

    def _envelope(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self._id, "object": kind, "created": self._created, "model": self._service.settings.name,
            "choices": choices,
        }  # fmt: skip

    def _logprobs_of(self, index: int, found: Sequence[TokenLogprobs]) -> dict[str, Any] | None:
        if not self._logprobs:
            return None
        text = self._service.token_text
        if self._chat:
            return {"content": [self._chat_logprob(one) for one in found], "refusal": None}
        tokens = [text(one.token_id) for one in found]
        offsets, at = [], self._offsets.get(index, 0)
        for token in tokens:
            offsets.append(at)
            at += len(token)
        self._offsets[index] = at
        return {
            "tokens": tokens, "token_logprobs": [_finite(one.logprob) for one in found],
            "top_logprobs": [{text(t): _finite(p) for t, p in one.top} for one in found], "text_offset": offsets,
        }  # fmt: skip

    def _chat_logprob(self, one: TokenLogprobs) -> dict[str, Any]:
        def entry(token: int, logprob: float) -> dict[str, Any]:
            text = self._service.token_text(token)
            return {"token": text, "logprob": _finite(logprob), "bytes": list(text.encode())}

        return entry(one.token_id, one.logprob) | {"top_logprobs": [entry(t, p) for t, p in one.top]}


def _finite(value: float) -> float:
    return value if math.isfinite(value) else _LEAST


def event(data: dict[str, Any]) -> str:
    """A server-sent event."""
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"


DONE = "data: [DONE]\n\n"


def embedding(index: int, values: Sequence[float], form: str) -> dict[str, Any]:
    """One entry of the answer to /v1/embeddings."""
    encoded: Any = list(values)
    if form == "base64":
        import numpy as np

        encoded = base64.b64encode(np.asarray(values, dtype="<f4").tobytes()).decode()
    return {"object": "embedding", "index": index, "embedding": encoded}
