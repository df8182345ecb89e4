"""What a request passes before the application: its key and its size are looked at, and its answer is counted.

Plain ASGI, as every token of a stream goes through here: a middleware of requests and responses would hand each of them
from task to task.
"""

from __future__ import annotations

import hmac
import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from irc.runtime.server.errors import ApiError
from irc.runtime.server.metrics import Metrics

_OPEN_PATHS = ("/health", "/", "/metrics")


class Entrance:
    """Lets those in who have the key, if there is one, and tells the metrics of every answer."""

    def __init__(self, app: ASGIApp, api_key: str | None, metrics: Metrics | None) -> None:
        self._app, self._api_key, self._metrics = app, api_key, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status = time.perf_counter(), 500

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            if self._api_key is None or scope["path"] in _OPEN_PATHS or self._has_key(scope):
                await self._app(scope, receive, noted)
            else:
                refusal = ApiError(401, "the API key is missing or wrong", code="invalid_api_key")
                await refusal.response()(scope, receive, noted)
        finally:
            if self._metrics is not None:
                self._metrics.answered(getattr(scope.get("route"), "path", "other"), status, started)

    def _has_key(self, scope: Scope) -> bool:
        given = dict(scope["headers"]).get(b"authorization", b"").removeprefix(b"Bearer ")
        return hmac.compare_digest(given, (self._api_key or "").encode())


class BodyLimit:
    """Refuses bodies that are too large, whether they say so or not."""

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self._app, self._limit = app, limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        refusal = ApiError(413, f"the body is larger than {self._limit} bytes").response()
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if not declared.isdigit() or int(declared) > self._limit:
            await refusal(scope, receive, send)
            return
        chunks, size, more = list[bytes](), 0, scope["method"] in ("POST", "PUT", "PATCH")
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            chunks.append(message.get("body", b""))
            size += len(chunks[-1])
            if size > self._limit:
                await refusal(scope, receive, send)
                return
            more = message.get("more_body", False)
        given: Message | None = {"type": "http.request", "body": b"".join(chunks), "more_body": False}

        async def replayed() -> Message:
            nonlocal given
            if given is not None:
                message, given = given, None
                return message
            return await receive()

        await self._app(scope, replayed, send)
