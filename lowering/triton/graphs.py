"""Steps as CUDA graphs: launching some hundred kernels one by one takes longer than a small step does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Launch = Callable[[Sequence[Tensor]], list[Any]]


class GraphStep:
    """A step for inputs of fixed shapes, with caches at fixed addresses that are written in place.

    The first call launches kernels one by one, which compiles them; the second one is captured, and from then on the
    capture is replayed. So a shape that comes once, as that of most prompts, costs no capture.

    Caches are the caller's: they are not kept alive here, and others at the same addresses do as well.
    """

    def __init__(self, launch: Launch, arena: Callable[[], Tensor]) -> None:
        """`launch`: runs the step's kernels; `arena`: the memory that they have used for temporary values."""
        self._launch, self._arena = launch, arena
        self._called = False
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: list[Tensor] = []
        self._logits: Tensor | None = None
        self._memory: Tensor | None = None

    def run(self, inputs: Sequence[Tensor], caches: Sequence[Tensor]) -> Tensor:
        """The logits; caches are written."""
        device = caches[0].device
        if not self._called:
            self._called = True
            given = [x.to(device).contiguous() for x in inputs]
            logits: Tensor = self._launch([*given, *caches])[0]
            return logits
        if self._graph is None:
            self._capture(inputs, caches)
        else:
            for own, x in zip(self._inputs, inputs, strict=True):
                own.copy_(x, non_blocking=True)
        assert self._graph is not None
        assert self._logits is not None
        self._graph.replay()
        return self._logits.clone()

    def _capture(self, inputs: Sequence[Tensor], caches: Sequence[Tensor]) -> None:
        """Record the launches, without running them."""
        device = caches[0].device
        self._inputs = [x.to(device).contiguous().clone() for x in inputs]
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize(device)
        # Other threads (of a server, say) may go on meanwhile.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self._logits = self._launch([*self._inputs, *caches])[0]
        # A larger step makes a new arena; the graph goes on with the one that it has seen.
        self._graph, self._memory = graph, self._arena()
