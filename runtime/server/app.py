"""The application: routes, key, limits, life from start to graceful end."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import HTMLResponse, StreamingResponse

from irc.runtime.requests import Request as EngineRequest
from irc.runtime.server.answers import DONE, Answer, embedding, event
from irc.runtime.server.embeddings import Embedder
from irc.runtime.server.errors import ApiError, install
from irc.runtime.server.gates import BodyLimit, Entrance
from irc.runtime.server.page import render_page
from irc.runtime.server.schemas import ChatRequest, CompletionRequest, EmbeddingRequest, Generation
from irc.runtime.server.service import Service, as_error
from irc.runtime.server.settings import ServerSettings


def make_app(service: Service | None, settings: ServerSettings, embedder: Embedder | None = None) -> FastAPI:
    """The application over a service (language models), an embedder (encoders), or both."""

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        if service is not None:
            service.engine.start()
        yield
        if service is not None:
            await service.engine.close(timeout=settings.drain_s)

    app = FastAPI(title="irc", lifespan=lifespan, docs_url=None, redoc_url=None)
    install(app)
    app.state.service = service
    _add_common(app, service, settings)
    if service is not None:
        _add_generation(app, service)
    if embedder is not None:
        _add_embeddings(app, embedder, settings)
    app.add_middleware(Entrance, api_key=settings.api_key, metrics=service.metrics if service is not None else None)
    app.add_middleware(BodyLimit, limit=settings.max_body_bytes)
    return app


def _add_common(app: FastAPI, service: Service | None, settings: ServerSettings) -> None:
    created = int(time.time())

    @app.get("/health")
    async def health() -> Response:
        healthy = service is None or service.engine.healthy
        return Response('{"status": "%s"}' % ("ok" if healthy else "stopping"), 200 if healthy else 503,
                        media_type="application/json")  # fmt: skip

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text() if service is not None else b"", media_type="text/plain; version=0.0.4")

    html = render_page(
        settings.name, generates=service is not None, chat=service is not None and service.template.taught,
        key=settings.api_key is not None,
    )  # fmt: skip

    @app.get("/")
    async def page() -> HTMLResponse:
        return HTMLResponse(html)

    def described() -> dict[str, Any]:
        return {"id": settings.name, "object": "model", "created": created, "owned_by": "irc"}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [described()]}

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> dict[str, Any]:
        if name != settings.name:
            raise ApiError(404, f"no model is called {name!r}; this server has {settings.name!r}", "model")
        return described()


def _add_generation(app: FastAPI, service: Service) -> None:
    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request) -> Any:
        service.check_model(body.model)
        if body.best_of not in (None, body.n):
            raise ApiError(400, f"best_of={body.best_of} must equal n={body.n}: all samples are returned", "best_of")
        prompts = service.ids_of(body.prompt)
        made = service.requests(
            body, prompts, max_tokens=body.max_tokens, logprobs=body.logprobs, client=_client(request)
        )
        answer = Answer(service, chat=False, prompt_tokens=sum(map(len, prompts)), logprobs=body.logprobs is not None)
        return await _answered(service, body, request, made, answer)

    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest, request: Request) -> Any:
        service.check_model(body.model)
        if body.top_logprobs is not None and not body.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs", "top_logprobs")
        text = service.template.render([{"role": m.role, "content": m.text} for m in body.messages])
        prompts = service.ids_of(text)
        room = service.model.max_length - len(prompts[0]) + 1
        wanted = body.max_completion_tokens or body.max_tokens or max(min(room, 256), 1)
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        made = service.requests(body, prompts, max_tokens=wanted, logprobs=logprobs, client=_client(request))
        answer = Answer(service, chat=True, prompt_tokens=len(prompts[0]), logprobs=body.logprobs)
        return await _answered(service, body, request, made, answer)


def _client(request: Request) -> str:
    return request.client.host if request.client is not None else ""


async def _answered(
    service: Service, body: Generation, request: Request, made: Sequence[EngineRequest], answer: Answer
) -> Any:
    if body.stream:
        usage = body.stream_options is not None and body.stream_options.include_usage
        return StreamingResponse(_events(service, made, answer, usage=usage), media_type="text/event-stream")
    work = asyncio.create_task(service.collected(made))
    gone = asyncio.create_task(_disconnected(request))
    try:
        await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            return Response(status_code=499)  # nobody reads it
        return answer.whole(work.result())
    finally:
        for task in (work, gone):
            task.cancel()
        await asyncio.gather(work, gone, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while not await request.is_disconnected():
        await asyncio.sleep(0.1)


async def _events(
    service: Service, made: Sequence[EngineRequest], answer: Answer, *, usage: bool
) -> AsyncIterator[str]:
    try:
        async with contextlib.aclosing(service.pieces(made)) as pieces:
            async for piece in pieces:
                if piece.output.text or piece.output.token_ids or piece.finish_reason:
                    yield event(answer.part(piece))
        if usage:
            yield event(answer.end())
        yield DONE
    except Exception as error:
        yield event(as_error(error).body())


def _add_embeddings(app: FastAPI, embedder: Embedder, settings: ServerSettings) -> None:
    @app.post("/v1/embeddings")
    async def embeddings(body: EmbeddingRequest) -> Any:
        if body.model not in ("", settings.name):
            raise ApiError(404, f"no model is called {body.model!r}; this server has {settings.name!r}", "model")
        rows = embedder.ids_of(body.input)
        if body.dimensions is not None and body.dimensions > embedder.width:
            raise ApiError(400, f"dimensions is {body.dimensions}; the model gives {embedder.width}", "dimensions")
        vectors = await embedder.embed(rows)
        data = [embedding(i, v[: body.dimensions], body.encoding_format) for i, v in enumerate(vectors)]
        count = sum(map(len, rows))
        usage = {"prompt_tokens": count, "total_tokens": count}
        return {"object": "list", "data": data, "model": settings.name, "usage": usage}
