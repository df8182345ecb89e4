"""Dropping layers: what is left computes what a model without them would."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import irc
from irc.core.contract import PassContext
from irc.core.errors import OptionError
from irc.core.manager import PassManager
from irc.core.pipeline import parse_pipeline, print_pipeline
from irc.demo.tinypy import TinyPy, TinyPyConfig
from irc.drafting import choose_layers
from irc.frontend import capture
from irc.passes.prune.drop_layers import DropLayers, find_layers
from tests import zoo

CONFIG = TinyPyConfig(vocab_size=64, hidden_size=32, num_layers=4, num_heads=4, intermediate_size=64, max_positions=64)
TOKENS = torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def model() -> TinyPy:
    torch.manual_seed(0)
    model = TinyPy(CONFIG).eval()
    model.lm_head.weight = nn.Parameter(torch.randn(64, 32))
    with torch.no_grad():  # layer 2 does next to nothing
        for weight in (model.layers[2].attn.o_proj.weight, model.layers[2].mlp.down_proj.weight):
            weight *= 1e-4
    return model


@pytest.fixture(scope="module")
def program(model: TinyPy) -> irc.Program:
    return capture(model, (TOKENS,), dynamic=({0: "B", 1: "S"},), name="four")


def test_equals_the_model_without_them(model: TinyPy, program: irc.Program) -> None:
    row = PassManager([DropLayers(layers="0;2")]).run(program)
    smaller = copy.deepcopy(model)
    smaller.layers = nn.ModuleList([smaller.layers[1], smaller.layers[3]])
    torch.testing.assert_close(row.program(TOKENS), smaller(TOKENS).detach())
    assert row.report.rows[-1].matches == 4
    assert not any(name.startswith(("layers.0.", "layers.2.")) for name in row.program.weights)


@pytest.mark.parametrize(("name", "additions"), [("llama", 2), ("gpt-j", 1), ("phi", 1), ("gemma2", 2), ("gpt2", 2)])
def test_layers_are_found_in_any_block(name: str, additions: int) -> None:
    """Sequential and parallel blocks, norms before and after."""
    layers = find_layers(zoo.captured(name))
    assert [len(layer) for layer in layers] == [additions] * 2


def test_refusals_and_options(program: irc.Program) -> None:
    assert DropLayers(layers="4").requires(program) == ["there is no layer 4: the program has 4 (numbered from 0)"]
    assert DropLayers(layers="0;1;2;3").requires(program) == ["all 4 layers would be dropped"]
    assert DropLayers(layers="1").requires(zoo.captured("cnn")) == [
        "there is no layer 1: the program has 0 (numbered from 0)"
    ]
    with pytest.raises(OptionError, match="layers are numbers separated by ';', not '1-2'"):
        DropLayers(layers="1-2")
    assert parse_pipeline(print_pipeline([DropLayers(layers="1;3")])) == [DropLayers(layers="1;3")]


def test_nothing_to_drop_changes_nothing(program: irc.Program) -> None:
    result = DropLayers().run(program.copy(), PassContext())
    assert (result.matches, result.modified) == (0, False)


def test_make_draft_keeps_what_matters(program: irc.Program) -> None:
    assert choose_layers(program, 3, TOKENS) == [0, 1, 3]
    assert choose_layers(program, 2) == [0, 3]
    assert choose_layers(program, 3) == [0, 2, 3]
    draft = irc.make_draft(program, keep=3, tokens=TOKENS, bits=8)
    target = irc.compile(program, "insert-kv-cache{layout=paged}", verify="off")
    plain = target.generate([[1, 2, 3], [9, 8]], max_new_tokens=20)
    guessed = target.generate([[1, 2, 3], [9, 8]], max_new_tokens=20, draft=draft)
    assert guessed.token_ids == plain.token_ids
    assert guessed.speculation is not None
    assert guessed.speculation.accepted > 5
    with pytest.raises(OptionError, match="a draft with 5 layers cannot be made from the 4"):
        irc.make_draft(program, keep=5)
    with pytest.raises(OptionError, match="draft is 'ngram', a compiled model or a Speculation, not 'lookup'"):
        target.generate([1], draft="lookup")
