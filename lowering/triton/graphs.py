"""Steps as CUDA graphs: launching some hundred kernels one by one takes longer than a small step does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Launch = Callable[[Sequence[Tensor]], list[Any]]


class GraphStep:
    """A step for inputs of fixed shapes, with caches that are written in place.

    The first call launches kernels one by one, which compiles them; the second one is captured, and from then on the
    capture is replayed. So a shape that comes once, as that of most prompts, costs no capture.
    """

    def __init__(self, launch: Launch, caches: Sequence[Tensor]) -> None:
        self._launch, self._caches = launch, list(caches)
        self._calls = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: list[Tensor] = []
        self._logits: Tensor | None = None

    def run(self, inputs: Sequence[Tensor]) -> Tensor:
        """The logits; caches are written."""
        device = self._caches[0].device
        if self._graph is None:
            self._calls += 1
            if self._calls == 1:
                given = [x.to(device).contiguous() for x in inputs]
                logits: Tensor = self._launch([*given, *self._caches])[0]
                return logits
            self._capture(inputs, device)
        else:
            for own, x in zip(self._inputs, inputs, strict=True):
                own.copy_(x, non_blocking=True)
        assert self._graph is not None
        assert self._logits is not None
        self._graph.replay()
        return self._logits.clone()

    def _capture(self, inputs: Sequence[Tensor], device: torch.device) -> None:
        """Record the launches, without running them."""
        self._inputs = [x.to(device).contiguous().clone() for x in inputs]
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize(device)
        with torch.cuda.graph(graph):
            self._logits = self._launch([*self._inputs, *self._caches])[0]
        self._graph = graph
