"""Constraints: their masks along a draft, and speculation for requests that have one."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from irc.demo.tinypy import load_tokenizer
from irc.runtime.engine import Engine, EngineOptions
from irc.runtime.requests import Request
from irc.runtime.sampling import Sampling
from irc.runtime.speculation.controller import Controller
from irc.runtime.speculation.draft_model import DraftModelProposer
from irc.runtime.speculation.speculation import Speculation
from irc.runtime.structured import Grammars
from tests.runtime.driving import model

SIZE = 64


class ByTurns:
    """Token number n must be n modulo 3, and the sixth is the last."""

    def __init__(self) -> None:
        self.count = 0

    def _mask(self, count: int) -> Tensor:
        return torch.arange(SIZE) % 3 == count % 3

    def masks(self, draft: Sequence[int]) -> list[Tensor | None]:
        return [self._mask(self.count + i) for i in range(len(draft) + 1)]

    def advance(self, token: int) -> None:
        assert token % 3 == self.count % 3
        self.count += 1

    def finished(self) -> bool:
        return self.count == 6


class Broken(ByTurns):
    def masks(self, draft: Sequence[int]) -> list[Tensor | None]:
        if self.count == 2:
            raise RuntimeError("no mask")
        return super().masks(draft)


def answers(requests: Sequence[Request], speculation: Speculation | None = None) -> list[list[int]]:
    engine = Engine(model(), EngineOptions(), speculation)
    numbers = [engine.add(request) for request in requests]
    found: dict[int, list[int]] = {number: [] for number in numbers}
    while engine.has_work:
        for output in engine.step():
            found[output.request_id] += output.token_ids
        engine.check()
    return [found[number] for number in numbers]


def own_draft() -> Speculation:
    return Speculation(DraftModelProposer(model(), model()), Controller(fixed=3))


def test_greedy_answers_are_those_without_a_draft() -> None:
    requests = [
        Request(prompt=[3, 4], max_new_tokens=20, constraint=ByTurns),
        Request(prompt=[9], max_new_tokens=7),
        Request(prompt=[5, 6, 7], max_new_tokens=4, constraint=ByTurns),
    ]
    speculation = own_draft()
    found = answers(requests, speculation)
    assert found == answers(requests)
    assert [token % 3 for token in found[0]] == [0, 1, 2, 0, 1, 2]
    assert len(found[2]) == 4
    assert speculation.stats.drafted > 0


def test_sampled_answers_keep_to_the_constraint() -> None:
    requests = [
        Request(prompt=[i], max_new_tokens=9, constraint=ByTurns, sampling=Sampling(temperature=1.5), key=i)
        for i in range(1, 9)
    ]
    for answer in answers(requests, own_draft()):
        assert [token % 3 for token in answer] == [0, 1, 2, 0, 1, 2]


def test_a_constraint_that_fails_ends_its_own_request_only() -> None:
    good = [Request(prompt=[9, 8], max_new_tokens=12), Request(prompt=[3], max_new_tokens=20, constraint=ByTurns)]
    bad = Request(prompt=[3, 4], max_new_tokens=20, constraint=Broken)
    found = answers([bad, *good], own_draft())
    assert found[1:] == answers(good)
    assert len(found[0]) < 6


@pytest.fixture(scope="module")
def grammars() -> Grammars:
    pytest.importorskip("llguidance")
    return Grammars(load_tokenizer(), 2048, [0])


@pytest.mark.parametrize("text", ["value = 12", "value = xy", "value"])
def test_masks_along_a_draft_are_those_met_one_by_one(grammars: Grammars, text: str) -> None:
    make = grammars.of("regex", r"value = [0-9]{1,3}")
    draft = load_tokenizer().encode(text).ids
    ahead, stepwise = make(), make()
    masks = ahead.masks(draft)
    assert len(masks) == len(draft) + 1
    for token, mask in zip(draft, masks, strict=False):
        assert mask is not None
        assert torch.equal(mask, stepwise.masks([])[0])
        if not mask[token]:
            break
        stepwise.advance(token)
    again = ahead.masks([])[0]
    assert torch.equal(again, masks[0])


def test_the_end_within_a_draft(grammars: Grammars) -> None:
    constraint = grammars.of("regex", "ab")()
    draft = [*load_tokenizer().encode("ab").ids, 0, 5, 5]
    assert len(constraint.masks(draft)) == len(draft) + 1
    for token in draft[:-3]:
        constraint.advance(token)
    assert constraint.masks([0])[0][0]
