"""`evaluate` and `compare`: run models over data batch by batch, and measure them against what should come out."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from irc.core.contract import Progress
from irc.core.errors import OptionError, nearest
from irc.evaluation.data import EvaluationData
from irc.evaluation.metrics import Batch, Metric, check_outputs, choose_metrics
from irc.evaluation.results import Comparison, Evaluation
from irc.evaluation.subjects import Subject, subject
from irc.view.progress import shown_progress


def evaluate(
    model: Any,
    data: Any,
    *,
    reference: Any = None,
    metrics: Sequence[str] | None = None,
    batch_size: int = 4,
    name: str | None = None,
    progress: Progress | bool | None = None,
) -> Evaluation:
    """How well a program, compiled model, module or function does on some data.

    Args:
        model: a step program (with a key-value cache) is run with fresh caches.
        data: token windows i64[N, L], a pair (inputs, classes), or what `irc.evaluation.datasets` gives.
        reference: the unquantized model, for KL divergence and agreement.
        metrics: names; None: all that make sense for the data.
        batch_size: samples at a time, the only thing that memory grows with.
        progress: as for `irc.compile`.

    Raises:
        OptionError: the data is empty or of no known kind; lists metrics that are unknown or make no sense.
        IrcError: the outputs do not have the shape that the data needs.
    """
    chosen = name or getattr(model, "name", None) or getattr(getattr(model, "program", None), "name", None)
    label = chosen if isinstance(chosen, str) else type(model).__name__
    return compare(
        {label: model}, data, reference=reference, metrics=metrics, batch_size=batch_size, progress=progress
    )[label]


@torch.no_grad()
def compare(
    models: Mapping[str, Any],
    data: Any,
    *,
    reference: Any = None,
    metrics: Sequence[str] | None = None,
    batch_size: int = 4,
    progress: Progress | bool | None = None,
) -> Comparison:
    """`evaluate` for several models; the reference runs once for all. `reference` may name one of the models."""
    samples = EvaluationData.of(data)
    if batch_size < 1:
        raise OptionError(f"batch_size must be at least 1, not {batch_size}")
    if not models:
        raise OptionError("there is nothing to evaluate")
    if isinstance(reference, str) and reference not in models:
        raise OptionError(f"the reference {reference!r} is none of the models{nearest(reference, models)}")
    own = reference if isinstance(reference, str) else next((n for n, m in models.items() if m is reference), None)
    classes = choose_metrics(metrics, samples, has_reference=reference is not None)
    runs = {name: _Run(name, subject(model), classes, is_reference=name == own) for name, model in models.items()}
    base = runs[own] if own is not None else None
    if base is None and reference is not None and any(one.needs_reference for one in classes.values()):
        base = _Run("the reference", subject(reference), {}, is_reference=True)
    with ExitStack() as stack:
        report = stack.enter_context(shown_progress(progress))
        for run in {id(run): run for run in (*runs.values(), *([base] if base else []))}.values():
            stack.enter_context(run.subject.ready())
        done, total = 0, samples.num_samples
        for inputs, targets in samples.batches(batch_size):
            if report is not None:
                report("evaluating", done, total)
            expected = base.outputs(inputs, samples) if base is not None else None
            for run in runs.values():
                found = expected if run is base and expected is not None else run.outputs(inputs, samples)
                run.update(Batch(inputs, targets, found, expected))
            done += len(inputs[0])
        if report is not None:
            report("evaluating", total, total)
    return Comparison([run.result(samples) for run in runs.values()])


class _Run:
    """One model on its way through the data."""

    def __init__(self, name: str, running: Subject, metrics: Mapping[str, type[Metric]], *, is_reference: bool) -> None:
        self.name, self.subject, self.seconds = name, running, 0.0
        # What is compared with itself is known beforehand.
        self.known = {n: m.of_reference for n, m in metrics.items() if is_reference and m.needs_reference}
        self.metrics = {n: m() for n, m in metrics.items() if n not in self.known}
        self.order = list(metrics)

    def outputs(self, inputs: tuple[Tensor, ...], data: EvaluationData) -> Tensor:
        started = time.perf_counter()
        found = self.subject.call(*inputs)
        self.seconds += time.perf_counter() - started
        check_outputs(found, inputs, data.kind, self.name)
        return found

    def update(self, batch: Batch) -> None:
        for metric in self.metrics.values():
            metric.update(batch)

    def result(self, data: EvaluationData) -> Evaluation:
        values = self.known | {name: metric.value() for name, metric in self.metrics.items()}
        one = self.subject
        return Evaluation(
            name=self.name, metrics={name: values[name] for name in self.order}, data=data.description,
            num_samples=data.num_samples, weight_bytes=one.weight_bytes,
            size_bytes=None if one.weight_bits is None else -(-one.weight_bits // 8),
            bits_per_weight=one.bits_per_weight, seconds=self.seconds,
        )  # fmt: skip
