"""What a sequence's new tokens mean: text, log-probabilities, and whether they end it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from irc.runtime.requests import Output, SequenceState, TokenLogprobs
from irc.runtime.results import FinishReason


def continued(
    sequence: SequenceState, tokens: Sequence[int], logits: Tensor, row: int, output: Output, max_length: int
) -> FinishReason | None:
    """Add tokens one by one until one ends the sequence, and say in `output` what came of each; why it ended.

    Args:
        logits: [R, V]; row `row` + i is what token i was chosen from.
        max_length: most positions of a sequence.
    """
    request = sequence.request
    for index, token in enumerate(tokens):
        if token in sequence.ends:
            output.end_token = token
            return FinishReason.EOS if token in request.end_tokens else FinishReason.STOP
        sequence.ids.append(token)
        output.token_ids.append(token)
        if request.logprobs is not None:
            output.logprobs = (*output.logprobs, _logprobs(logits[row + index], token, request.logprobs))
        if sequence.text is not None:
            output.text += sequence.text.push(token)
        reason = _reason(sequence, token, max_length)
        if reason is not None:
            return reason
    return None


def _reason(sequence: SequenceState, token: int, max_length: int) -> FinishReason | None:
    """Whether the token that was just added ends its sequence."""
    if sequence.text is not None and sequence.text.stopped:
        return FinishReason.STOP
    if sequence.constraint is not None:
        sequence.constraint.advance(token)
        if sequence.constraint.finished():
            return FinishReason.STOP
    length = len(sequence.ids)
    if length - sequence.prompt_length >= sequence.request.max_new_tokens:
        return FinishReason.LENGTH
    return FinishReason.CACHE_FULL if length > max_length else None


def _logprobs(logits: Tensor, token: int, count: int) -> TokenLogprobs:
    """Log-probabilities of the model itself: before penalties, temperature and filters."""
    values = logits.float().log_softmax(-1)
    top = values.topk(min(count, values.shape[-1]))
    pairs = tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True))
    return TokenLogprobs(token, float(values[token]), pairs)
