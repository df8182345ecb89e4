"""Language-model figures on the held-out part of the demo corpus."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tokenizers import Tokenizer
from torch import Tensor

from irc.evaluation import evaluate as evaluate_model
from irc.evaluation.datasets import END_OF_TEXT as END_OF_TEXT
from irc.evaluation.datasets import held_out_text

LogitsFunction = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Quality:
    """Figures of one model on held-out text.

    Attributes:
        perplexity: exp of the mean negative log-likelihood, nats a token.
        kl: mean KL(reference ‖ model), nats a token.
        top1: share of positions at which both prefer the same token.
    """

    perplexity: float
    kl: float
    top1: float


def held_out_windows(tokenizer: Tokenizer, *, length: int, count: int) -> Tensor:
    """Consecutive windows i64[count, length], taken evenly over the held-out files."""
    return held_out_text(tokenizer, length=length, count=count).inputs[0]


def evaluate(model: LogitsFunction, windows: Tensor, reference: LogitsFunction, *, batch: int = 4) -> Quality:
    """Compare a model's next-token predictions with the text and with a reference model's."""
    found = evaluate_model(model, windows, reference=reference, batch_size=batch, progress=False)
    return Quality(found["perplexity"], found["kl"], found["top1"])
