"""Metrics that are summed up batch by batch: what is kept is a few numbers, never all logits.

Everything is computed in f32 whatever the model computes in; sums are f64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from irc.core.errors import IrcError, OptionError, nearest
from irc.evaluation.data import EvaluationData, Kind
from irc.evaluation.subjects import flat_rows


@dataclass(frozen=True)
class Batch:
    """One batch's inputs, targets, and outputs of the subject and of the reference."""

    inputs: tuple[Tensor, ...]
    targets: Tensor | None
    outputs: Tensor
    reference: Tensor | None


class Metric:
    """Base of all metrics.

    Attributes:
        name: in results and on the command line.
        title: over its column.
        kinds: of data that it makes sense for.
        needs_reference, needs_targets: what it compares with.
        style: how a value is printed.
    """

    name: ClassVar[str] = ""
    title: ClassVar[str] = ""
    kinds: ClassVar[frozenset[Kind]] = frozenset()
    needs_reference: ClassVar[bool] = False
    needs_targets: ClassVar[bool] = False
    style: ClassVar[str] = ".4f"
    of_reference: ClassVar[float] = 0.0
    """The value of the reference itself."""

    def __init__(self) -> None:
        self.total, self.count = 0.0, 0

    def update(self, batch: Batch) -> None:
        """Take in one batch."""
        raise NotImplementedError

    def value(self) -> float:
        """Over everything so far."""
        return self.total / self.count


class Perplexity(Metric):
    """exp of the mean negative log-likelihood of the next token; each window on its own."""

    name, title, kinds, style = "perplexity", "ppl", frozenset({Kind.TEXT}), ".3f"

    def update(self, batch: Batch) -> None:
        tokens = batch.inputs[0][:, 1:].flatten()
        for logits, wanted in _rows_with(_predicting(batch.outputs), tokens):
            self.total += F.cross_entropy(logits.float(), wanted, reduction="sum").item()
        self.count += tokens.numel()

    def value(self) -> float:
        mean = self.total / self.count
        return math.exp(mean) if mean < 700 else math.inf if mean == mean else math.nan


class Divergence(Metric):
    """Mean KL(reference ‖ subject), in nats a prediction."""

    name, title, kinds, needs_reference = "kl", "KL", frozenset({Kind.TEXT, Kind.CLASSES}), True

    def update(self, batch: Batch) -> None:
        for q, p in zip(*_both(batch), strict=True):
            log_q, log_p = q.float().log_softmax(-1), p.float().log_softmax(-1)
            self.total += F.kl_div(log_q, log_p, log_target=True, reduction="sum").item()
            self.count += len(q)

    def value(self) -> float:
        mean = self.total / self.count
        return max(mean, 0.0) if mean == mean else mean  # rounding may leave it just below


class Agreement(Metric):
    """Share of predictions at which subject and reference prefer the same token or class."""

    name, title, kinds, needs_reference = "top1", "top-1", frozenset({Kind.TEXT, Kind.CLASSES}), True
    style, of_reference = ".2%", 1.0

    def update(self, batch: Batch) -> None:
        for q, p in zip(*_both(batch), strict=True):
            self.total += int((q.argmax(-1) == p.argmax(-1)).sum())
            self.count += len(q)


class Accuracy(Metric):
    """Share of inputs whose likeliest class is the right one."""

    name, title, kinds, needs_targets, style = "accuracy", "accuracy", frozenset({Kind.CLASSES}), True, ".2%"

    def update(self, batch: Batch) -> None:
        assert batch.targets is not None
        self.total += int((batch.outputs.argmax(-1) == batch.targets).sum())
        self.count += len(batch.targets)


class _Pairs(Metric):
    kinds = frozenset({Kind.PAIRS})

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Tensor] = []
        self.wanted: list[Tensor] = []

    def value(self) -> float:
        return rank_correlation(torch.cat(self.found), torch.cat(self.wanted))


class GradeCorrelation(_Pairs):
    """Spearman's correlation between the cosine of each pair and how alike it is."""

    name, title, needs_targets = "spearman", "Spearman", True

    def update(self, batch: Batch) -> None:
        assert batch.targets is not None
        self.found.append(pair_cosines(batch.outputs))
        self.wanted.append(batch.targets.float())


class RankAgreement(_Pairs):
    """Spearman's correlation between the pairs' cosines and the reference's."""

    name, title, needs_reference, of_reference = "rank", "rank vs. ref.", True, 1.0

    def update(self, batch: Batch) -> None:
        assert batch.reference is not None
        self.found.append(pair_cosines(batch.outputs))
        self.wanted.append(pair_cosines(batch.reference))


class CosineDrift(Metric):
    """Mean |cosine of a pair - the reference's|."""

    name, title, kinds, needs_reference = "drift", "cosine drift", frozenset({Kind.PAIRS}), True

    def update(self, batch: Batch) -> None:
        assert batch.reference is not None
        drift = (pair_cosines(batch.outputs) - pair_cosines(batch.reference)).abs()
        self.total += float(drift.sum())
        self.count += len(drift)


_METRICS: tuple[type[Metric], ...] = (
    Perplexity, Accuracy, GradeCorrelation, Divergence, Agreement, RankAgreement, CosineDrift,
)  # fmt: skip
METRICS = {metric.name: metric for metric in _METRICS}


def choose_metrics(
    names: Sequence[str] | None, data: EvaluationData, *, has_reference: bool
) -> dict[str, type[Metric]]:
    """The metrics asked for; None: all that the data and the presence of a reference allow.

    Raises:
        OptionError: names every metric that is unknown or makes no sense here.
    """
    fitting = {
        name: metric
        for name, metric in METRICS.items()
        if data.kind in metric.kinds
        and (has_reference or not metric.needs_reference)
        and (data.targets is not None or not metric.needs_targets)
    }
    if names is None:
        return fitting
    problems = []
    for name in names:
        if name not in METRICS:
            problems.append(f"no metric is called {name!r}{nearest(name, METRICS)}")
        elif data.kind not in METRICS[name].kinds:
            problems.append(f"metric {name!r} makes no sense for {data.kind} ({', '.join(fitting)} do)")
        elif name not in fitting:
            missing = "a reference" if METRICS[name].needs_reference and not has_reference else "targets in the data"
            problems.append(f"metric {name!r} needs {missing}")
    if not names:
        problems.append("no metric was asked for")
    if problems:
        raise OptionError("; ".join(problems))
    return {name: METRICS[name] for name in names}


def check_outputs(outputs: Tensor, inputs: Sequence[Tensor], kind: Kind, who: str) -> None:
    """Raise unless the outputs have the shape that the kind of data asks for.

    Raises:
        IrcError: they do not; nothing can be measured.
    """
    first = inputs[0]
    wanted = tuple(first.shape[:2]) if kind is Kind.TEXT else (len(first),)
    if outputs.ndim != len(wanted) + 1 or tuple(outputs.shape[:-1]) != wanted:
        sizes = ", ".join(map(str, wanted))
        what = {Kind.TEXT: "logits of every token", Kind.CLASSES: "logits", Kind.PAIRS: "embeddings"}[kind]
        raise IrcError(f"{who} gave {list(outputs.shape)}; evaluating {kind} needs {what}, [{sizes}, …]")


def pair_cosines(embeddings: Tensor) -> Tensor:
    """[2N, E] → cosine of samples 2i and 2i + 1: [N]."""
    wide = embeddings.float()
    return F.cosine_similarity(wide[0::2], wide[1::2], dim=-1)


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Spearman's: the correlation of ranks, equal values sharing their mean rank. NaN where one is constant."""
    ranks = torch.stack((_ranks(a), _ranks(b)))
    centred = ranks - ranks.mean(1, keepdim=True)
    norms = centred.norm(dim=1)
    return float((centred[0] @ centred[1]) / (norms[0] * norms[1])) if bool((norms > 0).all()) else math.nan


def _ranks(values: Tensor) -> Tensor:
    _, inverse, counts = torch.unique(values, return_inverse=True, return_counts=True)
    ends = counts.cumsum(0).double()
    return (ends - (counts - 1) / 2)[inverse]


def _predicting(logits: Tensor) -> Tensor:
    """Logits that predict a token of the window: all but the last ones."""
    return logits[:, :-1]


def _rows_with(logits: Tensor, wanted: Tensor) -> Sequence[tuple[Tensor, Tensor]]:
    chunks = flat_rows(logits)
    return list(zip(chunks, wanted.split([len(chunk) for chunk in chunks]), strict=True))


def _both(batch: Batch) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    assert batch.reference is not None
    outputs, reference = batch.outputs, batch.reference
    if outputs.shape != reference.shape:
        raise IrcError(f"the model gave {list(outputs.shape)}, the reference {list(reference.shape)}")
    if outputs.ndim == 3:
        outputs, reference = _predicting(outputs), _predicting(reference)
    return flat_rows(outputs), flat_rows(reference)
