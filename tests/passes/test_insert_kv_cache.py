"""KV-cache insertion: structure, numbers, controls that must fail, and a refusal for each reason."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from irc.core.contract import PassContext, PassResult
from irc.core.errors import OptionError, PassError
from irc.core.ops.registry import is_irc_op
from irc.core.program import Program
from irc.core.text import parse
from irc.frontend import capture
from irc.passes.attention.insert_kv_cache import InsertKVCache
from tests import coverage, zoo

WIDTH, HEADS, VOCABULARY = 16, 2, 31


class Decoder(nn.Module):
    """One causal attention and a head; `extra` is applied to x before, so that a test can spoil it."""

    def __init__(
        self, extra: Callable[[Decoder, Tensor], Tensor] | None = None, *, causal: bool = True, width: int = WIDTH
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.extra, self.causal = extra, causal
        self.embed = nn.Embedding(VOCABULARY, width)
        self.qkv = nn.Linear(width, 3 * width)
        self.head = nn.Linear(width, VOCABULARY)
        self.conv = nn.Conv1d(width, width, 3, padding=1)
        self.positions = nn.Embedding(24, width)

    def attend(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        batch, length, width = x.shape
        q, k, v = (y.view(batch, length, HEADS, -1).transpose(1, 2) for y in self.qkv(x).chunk(3, dim=-1))
        causal = self.causal and mask is None
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
        return x + y.transpose(1, 2).reshape(batch, length, width)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        x = self.extra(self, x) if self.extra is not None else x
        return self.head(self.attend(x))


class DataMask(Decoder):
    """Attends only to keys whose token is not 0: the mask comes from data."""

    def forward(self, tokens: Tensor) -> Tensor:
        length = tokens.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool, device=tokens.device).tril()
        keep = causal[None, None] & (tokens != 0)[:, None, None, :]
        return self.head(self.attend(self.embed(tokens), keep | torch.eye(length, dtype=torch.bool)))


class TwoInputs(Decoder):
    def forward(self, tokens: Tensor, types: Tensor) -> Tensor:
        return self.head(self.attend(self.embed(tokens) + self.embed(types)))


def rotary(length: int, base: float | Tensor) -> Tensor:
    steps = torch.arange(WIDTH // 2) * (2.0 / WIDTH)
    angles = torch.arange(length)[:, None] * torch.as_tensor(base) ** -steps
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


def dynamic_table(model: Decoder, x: Tensor) -> Tensor:
    """NTK-style: the base grows with the sequence once it is longer than 8."""
    length = torch.ones(x.shape[1]).sum()
    return x + rotary(x.shape[1], 100.0 * torch.clamp(length / 8, min=1.0) ** 2)


def program_of(model: nn.Module, *inputs: Tensor) -> Program:
    given = inputs or (ids(3, 9),)
    return capture(model.eval(), given, dynamic=tuple({0: "B", 1: "S"} for _ in given))


def ids(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(1, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def insert(program: Program, **options: object) -> PassResult:
    return InsertKVCache(**options).run(program.copy(), PassContext())


@functools.cache
def plain() -> Program:
    return program_of(Decoder())


def targets(program: Program, name: str) -> int:
    return sum(is_irc_op(node.target, name) for node in program.graph.nodes)


# ---------------------------------------------------------------- structure


def test_step_program_has_the_promised_inputs_outputs_and_metadata() -> None:
    result = insert(plain(), max_length=20)
    step = result.program
    assert step.input_names == ["tokens", "positions", "logit_indices", "cache_k_0", "cache_v_0"]
    assert len(step.outputs) == 3
    assert step.aliases == {1: 3, 2: 4}
    assert step.metadata["kv_cache"] == {
        "layout": "contiguous",
        "max_length": 20,
        "tokens": "tokens",
        "positions": "positions",
        "logit_indices": "logit_indices",
        "caches": [
            {"name": "cache_k_0", "heads": 2, "head_dim": 8, "dtype": "f32"},
            {"name": "cache_v_0", "heads": 2, "head_dim": 8, "dtype": "f32"},
        ],
    }
    assert [str(s) for s in step.shape_expr(step.outputs[0])] == ["B", "R", str(VOCABULARY)]
    assert [str(s) for s in step.shape_expr(step.placeholders[3])] == ["B", "2", "20", "8"]
    assert result.matches == targets(step, "attention") == 1
    assert targets(step, "cache_write") == 2
    assert str(parse(str(step), weights=step.weights)) == str(step)
    assert "kv_cache" not in plain().metadata


def test_head_runs_on_the_wanted_tokens_only() -> None:
    step = insert(plain()).program
    head = step.outputs[0]
    assert head.target is torch.ops.aten.linear.default
    assert [str(s) for s in step.shape_expr(head.args[0])] == ["B", "R", str(WIDTH)]


def test_grouped_heads_are_cached_unrepeated() -> None:
    step = insert(zoo.captured("llama")).program
    assert {cache["heads"] for cache in step.metadata["kv_cache"]["caches"]} == {2}


def test_example_step_runs_and_result_is_sound() -> None:
    before = plain()
    result = insert(before)
    assert InsertKVCache().ensures(before, result) == []
    assert result.program.example_inputs is not None
    outputs = result.program.run(*result.program.example_inputs)
    assert outputs[0].shape == (3, 2, VOCABULARY)
    before_types = [n.meta["val"] for n in result.program.graph.nodes if n.op != "output"]
    result.program.infer_types()
    after_types = [n.meta["val"] for n in result.program.graph.nodes if n.op != "output"]
    for old, new in zip(before_types, after_types, strict=True):
        if isinstance(old, Tensor):
            assert str(old.shape) == str(new.shape)
            assert old.dtype == new.dtype


def test_ensures_sees_a_dropped_cache() -> None:
    result = insert(plain())
    node = next(n for n in result.program.graph.nodes if is_irc_op(n.target, "attention"))
    node.args = (node.args[0], node.args[1].args[1], node.args[2])
    assert any("is no cache" in finding.problem for finding in InsertKVCache().ensures(plain(), result))


def test_a_second_insertion_is_refused() -> None:
    problems = InsertKVCache().requires(insert(plain()).program)
    assert len(problems) == 1
    assert "already has a cache" in problems[0]


# ---------------------------------------------------------------- numbers


@pytest.mark.parametrize(("batch", "length"), [(3, 9), (1, 1), (2, 16)])
def test_replay_equals_the_program(batch: int, length: int) -> None:
    result, tokens = insert(plain()), ids(batch, length)
    assert result.replay is not None
    torch.testing.assert_close(result.replay(result.program, [tokens])[0], plain().run(tokens)[0], rtol=1e-5, atol=1e-6)


MODELS = ("llama", "mistral", "nanogpt", "qwen3-moe", "tinypy")


@pytest.mark.parametrize("name", MODELS)
def test_ragged_decoding_equals_full_recomputation(name: str) -> None:
    step, model = insert(zoo.captured(name)).program, zoo.built(name)
    example = zoo.ZOO[name].inputs(model)
    assert coverage.decoding_error(step, model, example) < 1e-5


def test_controls_differ() -> None:
    """Wrong positions, a cache that is not kept, and a window that is dropped are all seen."""
    model, example = zoo.built("mistral"), zoo.ZOO["mistral"].inputs(zoo.built("mistral"))
    step = insert(zoo.captured("mistral")).program
    assert coverage.decoding_error(step, model, example, shift=1) > 1e-2
    forgetful = step.copy()
    output = forgetful.output_node
    output.args = ((output.args[0][0], *forgetful.placeholders[3:]),)
    assert coverage.decoding_error(forgetful, model, example) > 1e-2
    unlimited = step.copy()
    for node in unlimited.graph.nodes:
        if is_irc_op(node.target, "attention"):
            node.kwargs = dict(node.kwargs) | {"mask": "causal", "window": None}
    assert coverage.decoding_error(unlimited, model, example) > 1e-2


def test_narrower_cache() -> None:
    result, tokens = insert(plain(), cache_dtype="bf16"), ids(2, 8)
    assert result.replay is not None
    assert result.program.placeholders[3].meta["val"].dtype == torch.bfloat16
    difference = result.replay(result.program, [tokens])[0] - plain().run(tokens)[0]
    assert 1e-5 < difference.abs().max() < 0.05
    assert InsertKVCache(cache_dtype="bf16").preserves.kind == "lossy"
    assert InsertKVCache().preserves.kind == "exact"


def test_sequence_first_layout() -> None:
    """[S, B, E] inside: the batch is found where it is, not assumed in front."""

    def turn(model: Decoder, x: Tensor) -> Tensor:
        y = x.transpose(0, 1) + model.positions(torch.arange(x.shape[1]))[:, None]
        return y.transpose(0, 1)

    check_decodes(Decoder(turn))


def test_flat_tokens_and_positions() -> None:
    """[B·S, E] inside, with the position ids flattened along."""

    def flatten(model: Decoder, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        positions = torch.arange(length).expand(batch, length).reshape(-1)
        return (x.reshape(-1, width) + model.positions(positions)).view(batch, length, width)

    check_decodes(Decoder(flatten))


def check_decodes(model: nn.Module) -> None:
    program = program_of(model)
    result, tokens = insert(program, max_length=20), ids(3, 13, seed=1)
    assert result.replay is not None
    torch.testing.assert_close(result.replay(result.program, [tokens])[0], program.run(tokens)[0], rtol=1e-5, atol=1e-5)


def test_batch_of_one_fixed() -> None:
    model = Decoder(lambda model, x: x + model.positions(torch.arange(x.shape[1]))).eval()
    program = capture(model, (ids(1, 9),), dynamic=({1: "S"},))
    result, tokens = insert(program), ids(1, 12)
    assert result.replay is not None
    torch.testing.assert_close(result.replay(result.program, [tokens])[0], program.run(tokens)[0], rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------- length


def test_learned_positions_limit_the_length() -> None:
    program = program_of(Decoder(lambda model, x: x + model.positions(torch.arange(x.shape[1]))))
    assert insert(program).program.metadata["kv_cache"]["max_length"] == 24
    assert "at most 24" in InsertKVCache(max_length=25).requires(program)[0]


# ---------------------------------------------------------------- refusals


def running_mean(model: Decoder, x: Tensor) -> Tensor:
    return x + x.mean(dim=1, keepdim=True)


REFUSALS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "mean": (lambda: Decoder(running_mean), "reduces over the sequence dimension S"),
    "cumsum": (lambda: Decoder(lambda m, x: x.cumsum(1)), "accumulates over the sequence dimension S"),
    "convolution": (
        lambda: Decoder(lambda m, x: m.conv(x.transpose(1, 2)).transpose(1, 2)), r"\(a convolution\)"),
    "softmax over S": (lambda: Decoder(lambda m, x: x.softmax(dim=1)), "normalises over the sequence dimension S"),
    "batch mean": (lambda: Decoder(lambda m, x: x + x.mean(dim=0)), "reduces over the batch dimension"),
    "contraction": (lambda: Decoder(lambda m, x: x @ (x.transpose(1, 2) @ x)), "contracts over the sequence dimension"),
    "shift": (lambda: Decoder(lambda m, x: x + x.roll(1, dims=1)), "reorders the sequence dimension S"),
    "flip": (lambda: Decoder(lambda m, x: x + x.flip(1)), "reorders the sequence dimension S"),
    "length": (lambda: Decoder(lambda m, x: x * x.shape[1]), "sequence length"),
    "bidirectional": (lambda: Decoder(causal=False), "is bidirectional"),
    "dynamic table": (lambda: Decoder(dynamic_table), "a table that changes as the sequence grows"),
    "reversed positions": (
        lambda: Decoder(lambda m, x: x + m.positions(torch.arange(x.shape[1]).flip(0))),
        "changes as the sequence grows"),
    "data mask": (lambda: DataMask(), "bias that depend on the data"),
    "regrouping": (
        lambda: Decoder(lambda m, x: x + x.reshape(x.shape[0], WIDTH, -1).transpose(1, 2)), "takes positions apart"),
}  # fmt: skip


@pytest.mark.parametrize("case", list(REFUSALS))
def test_refuses(case: str) -> None:
    build, reason = REFUSALS[case]
    program = program_of(build())
    problems = InsertKVCache().requires(program)
    assert len(problems) == 1, problems
    assert re.search(reason, problems[0]), problems[0]
    with pytest.raises(PassError, match=reason):
        insert(program)


def test_refusal_names_node_and_line() -> None:
    problem = InsertKVCache().requires(program_of(Decoder(running_mean)))[0]
    assert "mean" in problem
    assert "test_insert_kv_cache.py:" in problem


def test_all_problems_at_once() -> None:
    def spoil(model: Decoder, x: Tensor) -> Tensor:
        return x.cumsum(1) + x.mean(dim=1, keepdim=True)

    problems = InsertKVCache(max_length=10**6).requires(
        program_of(Decoder(lambda m, x: spoil(m, x) + m.positions(torch.arange(x.shape[1]))))
    )
    assert len(problems) == 3
    assert ["max_length" in problems[0], "cumsum" in problems[1], "mean" in problems[2]] == [True] * 3


def test_refuses_a_second_input() -> None:
    program = program_of(TwoInputs(), ids(3, 9), ids(3, 9, seed=1))
    assert "expected one used input" in InsertKVCache().requires(program)[0]
    named = InsertKVCache(tokens="tokens").requires(program)
    assert len(named) == 1
    assert "inputs besides the tokens (tokens): types" in named[0]


@pytest.mark.parametrize("name", ["bert", "cnn"])
def test_refuses_models_without_causal_attention(name: str) -> None:
    assert InsertKVCache().requires(zoo.captured(name))


# ---------------------------------------------------------------- options


def test_options_are_checked_all_at_once() -> None:
    with pytest.raises(OptionError) as caught:
        InsertKVCache(max_length=0, layout="contigous", cache_dtype="f23")
    for part in ("max-length", "'contigous' (did you mean 'contiguous'?)", "'f23' (did you mean"):
        assert part in str(caught.value)


def test_scale_of_the_test_model_is_not_trivial() -> None:
    """The head's logits differ between positions, so that a wrong row would be seen."""
    logits = plain().run(ids(1, 9))[0]
    assert math.isfinite(float(logits.std()))
    assert float((logits[0, 1:] - logits[0, :-1]).abs().max()) > 0.1
