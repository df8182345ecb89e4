"""Which of the guessed tokens stand: exact rejection sampling, so that the output's distribution is the target's.

    accept x ~ q with probability min(1, p(x) / q(x)); on rejection draw from norm(max(0, p - q))

Source: Leviathan, Kalman and Matias 2023, "Fast Inference from Transformers via Speculative Decoding", algorithm 1.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from irc.runtime.sampling import draw


def accept(
    draft: Sequence[int], target: Tensor, proposal: Tensor | None, accepts: np.ndarray, draws: np.ndarray
) -> list[int]:
    """The draft tokens that stand and one more: between 1 and k + 1 tokens.

    Args:
        draft: k tokens, each drawn from its row of `proposal`.
        target: [k + 1, V] probabilities of the model at each position.
        proposal: [k, V]; None: the draft was not drawn but is what the proposer always says there (q is one at it).
        accepts: [k] uniform numbers that decide on acceptance.
        draws: [k + 1] uniform numbers; the one of the first position that is not a draft token is used.
    """
    for index, token in enumerate(draft):
        p = float(target[index, token])
        q = 1.0 if proposal is None else float(proposal[index, token])
        if accepts[index] * q >= p:
            return [*draft[:index], _residual(target[index], proposal, index, token, draws)]
    return [*draft, int(draw(target[-1:], draws[-1:]))]


def _residual(p: Tensor, proposal: Tensor | None, index: int, token: int, draws: np.ndarray) -> int:
    """A draw from what the target has and the proposal did not offer."""
    if proposal is None:
        left = p.clone()
        left[token] = 0.0
    else:
        left = (p - proposal[index]).clamp_min(0.0)
    if float(left.sum()) <= 0.0:  # p equals q but for rounding
        left = p
    return int(draw(left.unsqueeze(0), draws[index : index + 1]))


def accept_greedy(draft: Sequence[int], best: Sequence[int]) -> list[int]:
    """The draft tokens that the model would have chosen, and the token after them."""
    count = 0
    while count < len(draft) and draft[count] == best[count]:
        count += 1
    return [*draft[:count], best[count]]


def probabilities_of(best: Sequence[int], width: int) -> Tensor:
    """One-hot rows."""
    return torch.nn.functional.one_hot(torch.tensor(best), width).float()
