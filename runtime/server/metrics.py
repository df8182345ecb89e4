"""Figures for Prometheus: what the engine has done and has to do, and how long clients wait."""

from __future__ import annotations

import time
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from irc.runtime.async_engine import AsyncEngine
from irc.runtime.requests import Output

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class Metrics:
    """All figures of one server."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine
        self.registry = CollectorRegistry()
        self.registry.register(self)
        self._finished = Counter("irc_samples", "Samples that have ended", ["reason"], registry=self.registry)
        self._http = Counter("irc_http_requests", "HTTP requests", ["path", "status"], registry=self.registry)
        self._latency = Histogram(
            "irc_http_request_seconds", "Time until a response is complete", ["path"], buckets=_SECONDS,
            registry=self.registry,
        )  # fmt: skip

    def saw(self, output: Output) -> None:
        """An output went to its client."""
        if output.finish_reason is not None:
            self._finished.labels(output.finish_reason.value).inc()

    def answered(self, path: str, status: int, started: float) -> None:
        """A response is complete."""
        self._http.labels(path, str(status)).inc()
        self._latency.labels(path).observe(time.perf_counter() - started)

    def collect(self) -> Iterator[Metric]:
        """The engine's figures as they are now."""
        engine = self._engine.engine
        stats, blocks = engine.stats, engine.blocks
        yield GaugeMetricFamily("irc_requests_running", "Sequences that run", value=engine.num_running)
        yield GaugeMetricFamily("irc_requests_waiting", "Sequences that wait", value=engine.num_waiting)
        yield GaugeMetricFamily("irc_cache_blocks", "Blocks of the cache", value=engine.num_blocks)
        yield GaugeMetricFamily("irc_cache_blocks_used", "Blocks that sequences hold", value=blocks.num_used)
        yield GaugeMetricFamily("irc_cache_blocks_cached", "Blocks kept for prefixes", value=blocks.num_cached)
        counters = {
            "irc_steps": ("Steps", stats.steps), "irc_tokens_computed": ("Tokens computed", stats.computed_tokens),
            "irc_tokens_generated": ("Tokens generated", stats.new_tokens),
            "irc_preemptions": ("Sequences stopped for want of memory", engine.scheduler.num_preemptions),
            "irc_prefix_tokens": ("Tokens found in the prefix cache", engine.scheduler.prefix_hits),
            "irc_model_seconds": ("Time in the model", stats.model_ms / 1e3),
            "irc_overhead_seconds": ("Time of steps around the model", stats.overhead_ms / 1e3),
            "irc_engine_restarts": ("Times the engine started again", self._engine.num_restarts),
        }  # fmt: skip
        if engine.speculation is not None:
            guessed = engine.speculation.stats
            counters["irc_draft_tokens"] = ("Tokens guessed", guessed.drafted)
            counters["irc_draft_tokens_accepted"] = ("Guessed tokens that stood", guessed.accepted)
        for name, (text, value) in counters.items():
            yield CounterMetricFamily(name, text, value=value)

    def text(self) -> bytes:
        """The page."""
        return generate_latest(self.registry)
