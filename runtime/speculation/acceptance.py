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


def follow(
    drafts: Sequence[Sequence[int]], targets: Sequence[Tensor], proposals: Sequence[Tensor | None],
    accepts: Sequence[np.ndarray], draws: np.ndarray,
) -> tuple[list[int], int]:  # fmt: skip
    """The guessed tokens that stand and one more, for a tree of guesses given as its paths; and the path they follow.

    At a node its guesses are tried in turn, each against what the ones before it left of the model's distribution:

        accept x with probability min(1, p(x) / q(x)); else p ← norm(max(0, p - q)), q ← norm(q without x)

    so a guess must be drawn without those that were drawn before it at the node (`Proposal.branches`).

    Args:
        drafts: for each path k tokens, each drawn from its row of the path's proposal.
        targets: for each path [k + 1, V]: probabilities of the model at each position.
        proposals: for each path [k, V]; None: the draft was not drawn but is what the proposer always says there
            (q is one at it).
        accepts: for each turn at a node, uniform numbers by position.
        draws: uniform numbers by position; the one of the first position that is not a guess is used.

    Source: Jeon et al. 2024, "Recursive Speculative Decoding", https://arxiv.org/abs/2402.14160, algorithm 1.
    """
    alive, taken = list(range(len(drafts))), list[int]()
    while True:
        depth = len(taken)
        left = targets[alive[0]][depth]
        guesses: dict[int, int] = {}
        for path in alive:
            if depth < len(drafts[path]):
                guesses.setdefault(drafts[path][depth], path)
        for turn, (token, path) in enumerate(guesses.items()):
            q = _without(proposals[path], depth, token, list(guesses)[:turn], left.shape[-1])
            if accepts[turn][depth] * float(q[token]) < float(left[token]):
                taken.append(token)
                alive = [p for p in alive if depth < len(drafts[p]) and drafts[p][depth] == token]
                break
            left = _residual(left, q)
        else:
            return [*taken, int(draw(left.unsqueeze(0), draws[depth : depth + 1]))], alive[0]


def _without(proposal: Tensor | None, depth: int, token: int, before: Sequence[int], width: int) -> Tensor:
    """The distribution that a guess was drawn from: [V]."""
    if proposal is None:
        return probabilities_of([token], width)[0]
    if not before:
        return proposal[depth]
    q = proposal[depth].clone()
    q[list(before)] = 0.0
    return q / q.sum()


def _residual(p: Tensor, q: Tensor) -> Tensor:
    """What the target has and a refused guess did not offer: [V], summing to 1."""
    left = (p - q).clamp_min(0.0)
    total = left.sum()
    return left / total if float(total) > 0.0 else p  # p equals q but for rounding


def follow_greedy(drafts: Sequence[Sequence[int]], best: Sequence[Sequence[int]]) -> tuple[list[int], int]:
    """The path on which most guesses are what the model would have chosen: those tokens with one more, and the path."""
    found = [accept_greedy(draft, tokens) for draft, tokens in zip(drafts, best, strict=True)]
    winner = max(range(len(found)), key=lambda path: len(found[path]))
    return found[winner], winner


def accept_greedy(draft: Sequence[int], best: Sequence[int]) -> list[int]:
    """The draft tokens that the model would have chosen, and the token after them."""
    count = 0
    while count < len(draft) and draft[count] == best[count]:
        count += 1
    return [*draft[:count], best[count]]


def probabilities_of(best: Sequence[int], width: int) -> Tensor:
    """One-hot rows."""
    return torch.nn.functional.one_hot(torch.tensor(best), width).float()
