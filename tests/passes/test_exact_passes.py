"""Every exact pass keeps the numbers within 1e-5 and the same 64 greedy tokens, on a trained model where it applies."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import irc
import irc.passes
from irc.core.calibration import CALIBRATION_KEY
from irc.core.contract import registered_passes
from irc.core.numeric import compare_outputs
from irc.core.program import Program
from irc.demo.tinypy import load_model
from irc.passes.canonicalize import CANONICAL_ORDER, canonical_passes
from irc.runtime.generation import generate
from irc.runtime.models import paged_model
from irc.runtime.sampling import Sampling
from tests import zoo

NUM_TOKENS = 64
# The demo model has no work for these.
OF_ZOO = {"raise-linear": "gpt2", "fuse-activation": "opt"}
WORDY = {
    "raise-layer-norm", "simplify-algebra", "fold-constants", "eliminate-common-subexpressions", "eliminate-dead-code",
}  # fmt: skip
# These work on what another pass left.
AFTER = {"convert-fake-quantization": "insert-fake-quantization"}
WITHOUT_TOKENS = {"fold-conv-batch-norm", "normalize-windows"}
EXACT_PASSES = [
    name for name, cls in registered_passes().items() if cls().preserves.kind == "exact" and name not in WITHOUT_TOKENS
]


@pytest.fixture(scope="module")
def raw_demo() -> Program:
    example = torch.arange(5, 21).view(2, 8)
    return irc.capture(load_model(), (example,), dynamic=({0: "B", 1: "S"},), canonicalize=False)


class Wordy(nn.Module):
    """Next token from this one, said with more operations than it takes."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(512, 32), nn.Linear(32, 512)
        self.scale, self.bias = nn.Parameter(torch.rand(32) + 0.5), nn.Parameter(torch.randn(32))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        mean = x.mean(-1, keepdim=True)
        variance = (x - mean).pow(2).mean(-1, keepdim=True)
        x = (x - mean) / torch.sqrt(variance + 1e-5) * (self.scale * 2) + self.bias
        torch.exp(x)
        x = x * 1.0 + 0.0
        return self.head(torch.tanh(x) + torch.sin(torch.tanh(x)))


def raw_program(name: str, demo: Program) -> Program:
    """As captured: of a model that the pass has work on."""
    if name in OF_ZOO:
        return zoo.captured(OF_ZOO[name], canonicalize=False)
    if name not in WORDY:
        return demo
    torch.manual_seed(0)
    tokens = torch.arange(5, 21).view(2, 8)
    return irc.capture(Wordy().eval(), (tokens,), dynamic=({0: "B", 1: "S"},), canonicalize=False)


def before_and_after(name: str, raw: Program) -> tuple[Program, Program]:
    """The program that the pass gets in its place of the canonical order, and what it makes of it."""
    canonical = canonical_passes()
    place = CANONICAL_ORDER.index(name) if name in CANONICAL_ORDER else len(canonical)
    earlier = [*canonical[:place], *([registered_passes()[AFTER[name]]()] if name in AFTER else [])]
    pass_ = registered_passes()[name](expect_matches=1)
    tokens = torch.randint(4, 90, (4, 16), generator=torch.Generator().manual_seed(0))
    ctx = irc.PassContext(options={CALIBRATION_KEY: tokens})
    before = irc.PassManager(earlier, verify="off", ctx=ctx).run(raw).program
    return before, irc.PassManager([pass_], verify="off", ctx=ctx).run(before).program


def greedy(program: Program, prompt: list[int]) -> list[int]:
    """64 likeliest tokens: over the cache where there is one, else by computing the whole anew for each."""
    artifact = irc.core.target.get_target("reference").lower(program)
    result = generate(
        paged_model(artifact, program), [prompt], max_new_tokens=NUM_TOKENS, sampling=Sampling(temperature=0.0), eos=()
    )
    return result.token_ids[0]


@pytest.mark.parametrize("name", EXACT_PASSES)
def test_same_numbers_and_the_same_greedy_tokens(name: str, raw_demo: Program) -> None:
    before, after = before_and_after(name, raw_program(name, raw_demo))
    assert before.example_inputs is not None
    if name != "insert-kv-cache":
        comparison = compare_outputs(before.run(*before.example_inputs), after.run(*before.example_inputs))
        assert comparison.relative <= 1e-5
    prompt = [7]  # the random models have 64 positions
    assert greedy(after, prompt) == greedy(before, prompt)


def test_the_trained_model_says_something(raw_demo: Program) -> None:
    """The comparison above would mean little for a model that repeats one token."""
    tokens = greedy(raw_demo, [7])
    assert len(tokens) == NUM_TOKENS
    assert len(set(tokens)) > 8
