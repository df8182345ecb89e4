"""Language-model figures on the held-out part of the demo corpus."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from irc.demo.corpus import read_documents

END_OF_TEXT = "<|endoftext|>"
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
    ids: list[int] = []
    for encoding in tokenizer.encode_batch([text + END_OF_TEXT for text in read_documents("validation")]):
        ids.extend(encoding.ids)
    windows = torch.tensor(ids[: len(ids) // length * length]).view(-1, length)
    chosen = torch.linspace(0, windows.shape[0] - 1, min(count, windows.shape[0])).round().long()
    return windows[chosen]


@torch.no_grad()
def evaluate(model: LogitsFunction, windows: Tensor, reference: LogitsFunction, *, batch: int = 4) -> Quality:
    """Compare a model's next-token predictions with the text and with a reference model's."""
    loss = kl = agree = 0.0
    for part in windows.split(batch):
        logits, base = model(part)[:, :-1].float(), reference(part)[:, :-1].float()
        log_p, log_q = base.log_softmax(-1), logits.log_softmax(-1)
        loss += F.nll_loss(log_q.flatten(0, 1), part[:, 1:].flatten(), reduction="sum").item()
        kl += (log_p.exp() * (log_p - log_q)).sum().item()
        agree += (logits.argmax(-1) == base.argmax(-1)).sum().item()
    tokens = windows.shape[0] * (windows.shape[1] - 1)
    return Quality(math.exp(loss / tokens), kl / tokens, agree / tokens)
