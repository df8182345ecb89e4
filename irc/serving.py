"""A compiled model behind HTTP: puts engine, service and application together, and runs them."""

from __future__ import annotations

import importlib
import json
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from irc.compiled import Compiled, Draft
from irc.core.errors import OptionError, StorageError
from irc.core.program import VAL
from irc.runtime.engine import Engine, EngineOptions
from irc.runtime.models import vocabulary_size

if TYPE_CHECKING:
    from fastapi import FastAPI


@dataclass(frozen=True, kw_only=True)
class _Options:
    """See `EngineOptions` and `ServerSettings`; `folder` may hold a chat template (`tokenizer_config.json`)."""

    name: str = "model"
    draft: Draft | None = None
    memory_bytes: int | None = None
    max_sequences: int = 64
    max_batch_tokens: int = 512
    max_requests: int = 1024
    max_new_tokens: int | None = None
    timeout_s: float | None = 600.0
    drain_s: float = 60.0
    api_key: str | None = None
    folder: Path | None = None


class Serving:
    """What `irc serve` runs: `Serving(compiled, name="demo").app` is an ASGI application.

    Raises:
        OptionError: the server's packages are missing, or the model neither generates nor embeds.
    """

    def __init__(self, compiled: Compiled, **options: Any) -> None:
        try:
            for package in ("fastapi", "jinja2", "prometheus_client", "uvicorn"):
                importlib.import_module(package)
        except ImportError as error:
            raise OptionError(f"{error.name} is missing: pip install 'irc-compiler[server]'") from None
        self.options = _Options(**options)
        self._compiled = compiled

    @property
    def app(self) -> FastAPI:
        """A new application, with an engine of its own."""
        from irc.runtime.async_engine import AsyncEngine
        from irc.runtime.server.app import make_app
        from irc.runtime.server.service import Service
        from irc.runtime.server.settings import ServerSettings

        options, compiled = self.options, self._compiled
        settings = ServerSettings(
            name=options.name, api_key=options.api_key, max_requests=options.max_requests,
            max_new_tokens=options.max_new_tokens, timeout_s=options.timeout_s, drain_s=options.drain_s,
        )  # fmt: skip
        embedder = self._embedder()
        if embedder is not None:
            return make_app(None, settings, embedder)
        engine = Engine(
            compiled.paged_model(),
            EngineOptions(
                memory_bytes=options.memory_bytes, max_sequences=options.max_sequences,
                max_batch_tokens=options.max_batch_tokens,
            ),
            compiled.speculation(options.draft),
        )  # fmt: skip
        service = Service(
            AsyncEngine(engine), compiled.tokenizer, settings, end_tokens=compiled.eos, template=self._template()
        )
        return make_app(service, settings)

    def _embedder(self) -> Any:
        """For an encoder: one input of tokens, hidden states [B, S, E] as first output, no cache."""
        from irc.runtime.server.embeddings import Embedder

        program = self._compiled.program
        if self._compiled.artifact.kv_cache is not None:
            return None
        tokens, hidden = program.placeholders, program.outputs[0].meta[VAL]
        width = hidden.shape[-1] if isinstance(hidden, Tensor) and hidden.dim() == 3 else None
        size = vocabulary_size(program)
        if not isinstance(width, int) or width == size:
            return None  # it gives logits

        def run(ids: Tensor) -> Tensor:
            given = [ids if n is tokens[0] else _filled(str(n.target), ids) for n in tokens]
            return self._compiled.artifact.run(*given)[0]

        return Embedder(run, self._compiled.tokenizer, width=width, vocabulary_size=size)

    def _template(self) -> Any:
        from irc.runtime.server.templates import ChatTemplate

        folder = self.options.folder
        path = None if folder is None else folder / "tokenizer_config.json"
        if path is None or not path.is_file():
            return None
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise StorageError(f"{path} is damaged: {error}") from None
        text = config.get("chat_template") if isinstance(config, dict) else None
        names = ("bos_token", "eos_token", "unk_token", "pad_token")
        tokens = {n: _token(config[n]) for n in names if isinstance(config, dict) and config.get(n) is not None}
        return ChatTemplate(text, **tokens) if isinstance(text, str) else None


def _filled(name: str, ids: Tensor) -> Tensor:
    """Another input of an encoder: a mask of ones, token types of zero."""
    if "mask" in name:
        return ids.new_ones(ids.shape)
    if "type" in name:
        return ids.new_zeros(ids.shape)
    raise OptionError(f"the encoder takes {name}, which a server cannot supply")


def _token(value: Any) -> str:
    return str(value["content"]) if isinstance(value, dict) else str(value)


def require_free(host: str, port: int) -> None:
    """Find out, before a model is loaded, that a server can listen there.

    Raises:
        OptionError: the port is taken or needs more rights, or the address is none of this machine.
    """
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise OptionError(f"cannot listen on {host}, port {port}: {error.strerror}") from None


def serve_forever(serving: Serving, *, host: str, port: int) -> None:
    """Serve until a signal; then take nothing new, finish what runs, and end."""
    import gc

    import uvicorn

    # What has been loaded stays: collections that walked it would hold up all streams for a tenth of a second.
    gc.collect()
    gc.freeze()
    config = uvicorn.Config(
        serving.app, host=host, port=port, log_level="info", timeout_graceful_shutdown=int(serving.options.drain_s) or 1
    )
    uvicorn.Server(config).run()
