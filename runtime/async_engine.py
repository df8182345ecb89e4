"""The engine for asyncio: one thread runs steps, coroutines hand in requests and receive what comes out.

A client that goes away ends its request. An error in a step ends no other request: the engine starts again and computes
what ran once more; only when that keeps failing are all ended with the error. A worker thread that dies is replaced.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from irc.core.errors import IrcError
from irc.runtime.engine import Engine
from irc.runtime.requests import Output, Request
from irc.runtime.results import FinishReason

_MOST_FAILURES = 3


@dataclass(eq=False)
class _Client:
    """Who waits for a request's outputs."""

    request: Request
    loop: asyncio.AbstractEventLoop
    queue: asyncio.Queue[Output] = field(default_factory=asyncio.Queue)
    number: int | None = None
    open_samples: int = 0


class AsyncEngine:
    """Runs an engine in a thread."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.num_restarts = 0
        self._inbox: deque[tuple[str, _Client]] = deque()
        self._wake = threading.Event()
        self._clients: dict[int, _Client] = {}
        self._closing = False
        self._thread: threading.Thread | None = None

    # ---------------------------------------------------------------- for coroutines

    def start(self) -> None:
        """Start the worker."""
        self._thread = threading.Thread(target=self._work, name="irc-engine", daemon=True)
        self._thread.start()

    @property
    def healthy(self) -> bool:
        return self._thread is not None and self._thread.is_alive() and not self._closing

    @property
    def num_open(self) -> int:
        """Requests that are not finished."""
        return len(self._clients) + sum(kind == "add" for kind, _ in list(self._inbox))

    async def stream(self, request: Request) -> AsyncIterator[Output]:
        """The request's outputs as they come, until all samples have ended. Leaving early cancels it.

        Raises:
            OptionError: the engine can never serve it.
            IrcError: the engine is closing.
        """
        self.engine.require(request)
        if self._closing:
            raise IrcError("the engine is shutting down")
        client = _Client(request, asyncio.get_running_loop(), open_samples=request.num_samples)
        self._tell("add", client)
        try:
            while client.open_samples:
                output = await client.queue.get()
                client.open_samples -= output.finish_reason is not None
                yield output
        finally:
            if client.open_samples:
                self._tell("cancel", client)

    async def close(self, *, timeout: float | None = None) -> bool:
        """Take no more requests, finish those that run, and stop; False when `timeout` seconds did not suffice."""
        self._closing = True
        self._wake.set()
        thread = self._thread
        if thread is None:
            return True
        await asyncio.get_running_loop().run_in_executor(None, thread.join, timeout)
        return not thread.is_alive()

    def _tell(self, what: str, client: _Client) -> None:
        self._inbox.append((what, client))
        self._wake.set()

    # ---------------------------------------------------------------- the worker

    def _work(self) -> None:
        try:
            self._loop()
        except BaseException:
            # Whatever killed this thread, the requests live on in the next one.
            self.num_restarts += 1
            self.engine.restart()
            self.start()
            raise

    def _loop(self) -> None:
        failures = 0
        while True:
            self._wake.clear()
            self._read_inbox()
            if not self.engine.has_work:
                if self._closing and not self._inbox:
                    return
                self._wake.wait(timeout=1.0)
                continue
            try:
                outputs = self.engine.step()
                failures = 0
            except Exception as error:
                failures += 1
                self.num_restarts += 1
                outputs = self._give_up(error) if failures >= _MOST_FAILURES else []
                self.engine.restart()
            self._deliver(outputs)

    def _read_inbox(self) -> None:
        while self._inbox:
            what, client = self._inbox.popleft()
            if what == "add":
                client.number = self.engine.add(client.request)
                self._clients[client.number] = client
            elif client.number is not None:
                self._clients.pop(client.number, None)
                self.engine.cancel(client.number)

    def _give_up(self, error: Exception) -> list[Output]:
        """End all requests that run."""
        made = []
        for sequence in list(self.engine.scheduler.running) + list(self.engine.scheduler.waiting):
            for sample in range(sequence.sample, sequence.sample + 1 + sequence.pending_samples):
                made.append(Output(sequence.request_id, sample, [], finish_reason=FinishReason.ERROR,
                                   error=f"{type(error).__name__}: {error}"))  # fmt: skip
        for number in {output.request_id for output in made}:
            self.engine.cancel(number)
        return made

    def _deliver(self, outputs: list[Output]) -> None:
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[_Client, Output]]] = {}
        for output in outputs:
            client = self._clients.get(output.request_id)
            if client is not None:
                by_loop.setdefault(client.loop, []).append((client, output))
        live = self.engine.live
        for number in [n for n in {o.request_id for o in outputs} if n not in live]:
            self._clients.pop(number, None)
        for loop, given in by_loop.items():
            _put(loop, given)


def _put(loop: asyncio.AbstractEventLoop, outputs: list[tuple[_Client, Output]]) -> None:
    def put() -> None:
        for client, output in outputs:
            client.queue.put_nowait(output)

    try:
        loop.call_soon_threadsafe(put)
    except RuntimeError:
        if not loop.is_closed():  # a loop that is gone needs nothing any more
            raise
