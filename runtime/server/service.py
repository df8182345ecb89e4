"""From the interface's requests to the engine's, and back: what completions and chat have in common."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from irc.core.errors import IrcError, OptionError
from irc.core.paged import PagedModel
from irc.runtime.async_engine import AsyncEngine
from irc.runtime.requests import Constraint, Output, Request, TokenLogprobs, request_key
from irc.runtime.results import FinishReason
from irc.runtime.sampling import Sampling
from irc.runtime.server.errors import ApiError
from irc.runtime.server.metrics import Metrics
from irc.runtime.server.schemas import Generation, ResponseFormat
from irc.runtime.server.settings import ServerSettings
from irc.runtime.server.templates import ChatTemplate
from irc.runtime.structured import Grammars
from irc.runtime.text import TextCodec, TextStream

_REASONS = {
    FinishReason.EOS: "stop", FinishReason.STOP: "stop", FinishReason.LENGTH: "length",
    FinishReason.CACHE_FULL: "length",
}  # fmt: skip


@dataclass
class Choice:
    """One sample as it grows."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: str | None = None


@dataclass(frozen=True)
class Piece:
    """What came for one choice."""

    index: int
    output: Output
    finish_reason: str | None


class Service:
    """Everything that the routes need."""

    def __init__(
        self,
        engine: AsyncEngine,
        tokenizer: Any,
        settings: ServerSettings,
        *,
        end_tokens: frozenset[int] | None = None,
        template: ChatTemplate | None = None,
    ) -> None:
        self.engine, self.settings, self.metrics = engine, settings, Metrics(engine)
        self.codec = TextCodec(tokenizer)
        self.template = template or ChatTemplate()
        self.end_tokens = self.codec.end_tokens() if end_tokens is None else end_tokens
        self.created = int(time.time())
        self._grammars: Grammars | None = None

    @property
    def model(self) -> PagedModel:
        return self.engine.engine.model

    # ---------------------------------------------------------------- requests

    def check_model(self, name: str) -> None:
        """Raise for a model that is not here."""
        if name not in ("", self.settings.name):
            raise ApiError(404, f"no model is called {name!r}; this server has {self.settings.name!r}", "model")

    def ids_of(self, prompt: Any) -> list[list[int]]:
        """Prompts (a text, ids, or a list of either) as lists of ids."""
        if isinstance(prompt, str):
            return [self.codec.encode(prompt)]
        if prompt and isinstance(prompt[0], int):
            return [list(prompt)]
        return [self.codec.encode(one) if isinstance(one, str) else list(one) for one in prompt]

    def requests(
        self, body: Generation, prompts: Sequence[Sequence[int]], *, max_tokens: int, logprobs: int | None, client: str
    ) -> list[Request]:
        """The engine's requests for a body, one a prompt.

        Raises:
            ApiError, OptionError: something cannot be served; names the field.
        """
        self._check_limits(body, len(prompts), max_tokens)
        sampling = Sampling(
            temperature=body.temperature, top_p=body.top_p, top_k=body.top_k, min_p=body.min_p,
            typical_p=body.typical_p, repetition_penalty=body.repetition_penalty,
            presence_penalty=body.presence_penalty, frequency_penalty=body.frequency_penalty,
            logit_bias=self._bias(body),
        )  # fmt: skip
        seed = secrets.randbits(63) if body.seed is None else body.seed
        stops = [body.stop] if isinstance(body.stop, str) else list(body.stop or ())
        if "" in stops:
            raise ApiError(400, "a stop text must not be empty", "stop")
        constraint = self._constraint(body.response_format)
        deadline = None if self.settings.timeout_s is None else time.monotonic() + self.settings.timeout_s
        made = [
            Request(
                prompt=prompt, max_new_tokens=max_tokens, sampling=sampling,
                key=request_key(seed, index, tuple(prompt)), end_tokens=self.end_tokens,
                text=lambda: TextStream(self.codec, stops), constraint=constraint, num_samples=body.n,
                logprobs=logprobs, priority=body.priority, client=body.user or client, deadline=deadline,
            )
            for index, prompt in enumerate(prompts)
        ]  # fmt: skip
        for request in made:
            self.engine.engine.require(request)
        return made

    def _check_limits(self, body: Generation, num_prompts: int, max_tokens: int) -> None:
        most = self.settings.max_new_tokens
        if most is not None and max_tokens > most:
            raise ApiError(400, f"max_tokens is {max_tokens}; this server gives at most {most}", "max_tokens")
        if body.n * num_prompts > self.settings.max_samples:
            raise ApiError(
                400, f"{num_prompts} prompts with n={body.n} are more than {self.settings.max_samples} samples", "n"
            )
        if not self.engine.healthy:
            raise ApiError(503, "the server is shutting down")
        if self.engine.num_open + num_prompts > self.settings.max_requests:
            raise ApiError(429, f"{self.engine.num_open} requests are open; try again later")

    @staticmethod
    def _bias(body: Generation) -> tuple[tuple[int, float], ...]:
        try:
            pairs = [(int(token), value) for token, value in (body.logit_bias or {}).items()]
        except ValueError:
            raise ApiError(400, "the keys of logit_bias are token ids", "logit_bias") from None
        if any(token < 0 for token, _ in pairs):
            raise ApiError(400, "the keys of logit_bias are token ids, which are not negative", "logit_bias")
        return tuple(sorted(pairs))

    def _constraint(self, form: ResponseFormat | None) -> Callable[[], Constraint] | None:
        if form is None or form.type == "text":
            return None
        if self._grammars is None:
            self._grammars = Grammars(self.codec.tokenizer, self.model.vocabulary_size, self.end_tokens)
        given: Any = {"json_object": {"type": "object"}, "regex": form.regex, "grammar": form.grammar}.get(form.type)
        if form.type == "json_schema":
            given = form.json_schema.schema_ if form.json_schema is not None else None
        if given is None:
            raise ApiError(
                400, f"response_format of type {form.type} needs {form.type}", f"response_format.{form.type}"
            )
        kind: Any = "json_schema" if form.type == "json_object" else form.type
        try:
            return self._grammars.of(kind, given)
        except OptionError as error:
            raise ApiError(400, str(error), "response_format") from None

    # ---------------------------------------------------------------- answers

    async def pieces(self, requests: Sequence[Request]) -> AsyncIterator[Piece]:
        """Everything that comes for the requests, as it comes; leaving early cancels all of them.

        Raises:
            ApiError: a sample failed, or its time was up.
        """
        queue: asyncio.Queue[Piece | BaseException | None] = asyncio.Queue()

        async def read(number: int, request: Request) -> None:
            stream = self.engine.stream(request)
            try:
                async for output in stream:
                    await queue.put(self._piece(number, request, output))
                await queue.put(None)
            except Exception as error:
                await queue.put(error)
            finally:
                await stream.aclose()

        tasks = [asyncio.create_task(read(n, request)) for n, request in enumerate(requests)]
        left = len(tasks)
        try:
            while left:
                item = await queue.get()
                if isinstance(item, BaseException):
                    raise item
                if item is None:
                    left -= 1
                else:
                    yield item
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _piece(self, number: int, request: Request, output: Output) -> Piece:
        self.metrics.saw(output)
        if output.finish_reason is FinishReason.ERROR:
            raise ApiError(500, f"this request failed: {output.error}")
        if output.finish_reason is FinishReason.DEADLINE:
            raise ApiError(408, f"the request took longer than {self.settings.timeout_s} s")
        index = number * request.num_samples + output.sample
        reason = None if output.finish_reason is None else _REASONS[output.finish_reason]
        return Piece(index, output, reason)

    async def collected(self, requests: Sequence[Request]) -> list[Choice]:
        """All choices, complete."""
        choices = [Choice(i) for i in range(sum(request.num_samples for request in requests))]
        async for piece in self.pieces(requests):
            choice = choices[piece.index]
            choice.text += piece.output.text
            choice.token_ids += piece.output.token_ids
            choice.logprobs += piece.output.logprobs
            choice.finish_reason = piece.finish_reason
        return choices

    def token_text(self, token: int) -> str:
        """One token as text."""
        return self.codec.decode([token])


def as_error(error: Exception) -> ApiError:
    """Any error as one that can be told within a stream that has begun."""
    if isinstance(error, ApiError):
        return error
    return ApiError(400 if isinstance(error, OptionError) else 503 if isinstance(error, IrcError) else 500, str(error))
