"""Generation: a batch equals each prompt alone, with and without a cache; ends, streams, errors."""

from __future__ import annotations

import functools

import pytest
import torch

from irc.core.errors import OptionError, TargetError
from irc.core.paged import PagedModel
from irc.core.target import get_target
from irc.runtime.generation import TokenEvent, generate, stream_tokens
from irc.runtime.models import paged_model
from irc.runtime.results import FinishReason
from irc.runtime.sampling import Sampling
from irc.runtime.text import TextCodec, TextStream
from tests.lowering import steps
from tests.lowering.steps import PROMPTS, VOCABULARY


class Letters:
    """A tokenizer: id 2·i and 2·i+1 are the two bytes of the character U+0080 + i."""

    eos_token_id = None

    def encode(self, text: str) -> list[int]:
        return [part for c in text for part in (2 * (ord(c) - 0x80), 2 * (ord(c) - 0x80) + 1)]

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(0x80 + i // 2) if i % 2 else "" for i in ids) + ("�" if ids and ids[-1] % 2 == 0 else "")


class Words:
    def encode(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]

    def decode(self, ids: list[int]) -> str:
        return "".join(f" {i}" for i in ids)


@functools.cache
def cached() -> PagedModel:
    return paged_model(get_target("reference").lower(steps.step()), steps.step())


@functools.cache
def paged() -> PagedModel:
    program = steps.step("insert-kv-cache{layout=paged,block-size=4,max-length=32}")
    return paged_model(get_target("reference").lower(program), program)


@functools.cache
def recomputing() -> PagedModel:
    return paged_model(get_target("reference").lower(steps.decoder()), steps.decoder())


@functools.cache
def expected(count: int = 12) -> list[list[int]]:
    """Greedy tokens by the plain model, one prompt at a time."""
    made = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        with torch.no_grad():
            for _ in range(count):
                ids = torch.cat((ids, steps.language_model()(ids)[:, -1:].argmax(-1)), dim=1)
        made.append(ids[0, len(prompt) :].tolist())
    return made


@pytest.mark.parametrize("decoder", [cached, paged, recomputing])
def test_greedy_batch_equals_the_model_on_each_prompt(decoder) -> None:
    result = generate(decoder(), PROMPTS, max_new_tokens=12)
    assert result.token_ids == expected()
    assert len({i for row in expected() for i in row}) > 6, "the model must not just repeat itself"
    assert result.finish_reasons == [FinishReason.LENGTH] * 3
    assert bool(result.notices) == (decoder is recomputing)


@pytest.mark.parametrize("decoder", [cached, paged, recomputing])
def test_sampled_batch_equals_each_prompt_alone(decoder) -> None:
    sampling = Sampling(temperature=1.5, top_p=0.95, seed=3)
    batch = generate(decoder(), PROMPTS, max_new_tokens=10, sampling=sampling).token_ids
    alone = [generate(decoder(), p, max_new_tokens=10, sampling=sampling).token_ids[0] for p in PROMPTS]
    assert batch == alone
    assert batch != [row[:10] for row in expected()]
    assert generate(decoder(), PROMPTS, max_new_tokens=10, sampling=sampling).token_ids == batch


def test_sequences_end_one_by_one() -> None:
    """Rows leave the batch at different steps; the others go on unchanged."""
    row = expected()[0]
    end = row[4]
    result = generate(cached(), PROMPTS, max_new_tokens=12, eos=end)
    for found, full, reason in zip(result.token_ids, expected(), result.finish_reasons, strict=True):
        cut = full.index(end) if end in full else None
        assert found == (full if cut is None else full[:cut])
        assert reason == (FinishReason.LENGTH if cut is None else FinishReason.EOS)
    assert FinishReason.EOS in result.finish_reasons


def test_cache_full() -> None:
    prompt = [i % VOCABULARY for i in range(30)]
    result = generate(cached(), prompt, max_new_tokens=99)
    assert result.finish_reasons == [FinishReason.CACHE_FULL]
    assert len(result.token_ids[0]) == 3  # two more positions, and the token after the last of them
    assert result.token_ids == generate(recomputing(), prompt, max_new_tokens=3).token_ids
    exact = generate(cached(), [i % VOCABULARY for i in range(32)], max_new_tokens=9)
    assert len(exact.token_ids[0]) == 1


def test_tensor_prompts_and_stop_tokens() -> None:
    end = expected()[1][3]
    result = generate(cached(), torch.tensor([PROMPTS[1]]), max_new_tokens=12, stop=end)
    assert result.token_ids == [expected()[1][: expected()[1].index(end)]]
    assert result.finish_reasons == [FinishReason.STOP]


def test_text_and_stop_text() -> None:
    full = expected()[0]
    result = generate(cached(), "1 5 9", tokenizer=Words(), max_new_tokens=12)
    assert result.text == "".join(f" {i}" for i in full)
    stop = f" {full[2]} {full[3]}"
    stopped = generate(cached(), ["1 5 9"], tokenizer=Words(), max_new_tokens=12, stop=stop)
    assert stopped.text == [result.text[: result.text.index(stop)]]
    assert stopped.finish_reasons == [FinishReason.STOP]


def test_streamed_text_adds_up() -> None:
    pieces: dict[int, str] = {}
    ids: dict[int, list[int]] = {}

    def show(index: int, token: int, text: str) -> None:
        pieces[index] = pieces.get(index, "") + text
        ids.setdefault(index, []).append(token)

    prompts = [" ".join(map(str, p)) for p in PROMPTS]
    result = generate(cached(), prompts, tokenizer=Words(), max_new_tokens=8, stream=show, stop=" 1 2 3 4")
    assert [pieces[i] for i in range(3)] == result.text
    assert [ids[i] for i in range(3)] == result.token_ids


def test_iterator_gives_tokens_as_they_are_made() -> None:
    events = stream_tokens(cached(), PROMPTS[0], max_new_tokens=3)
    first = next(events)
    assert first == TokenEvent(0, expected()[0][0])
    assert [e.finish_reason for e in events] == [None, FinishReason.LENGTH]


def test_stats_count_tokens() -> None:
    stats = generate(cached(), PROMPTS, max_new_tokens=5).stats
    assert (stats.prompt_tokens, stats.new_tokens, stats.decode_steps, stats.decode_tokens) == (12, 15, 4, 12)
    assert stats.decode_tokens_per_second is not None
    assert "tok/s" in str(stats)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([[]], "prompt 0 is empty"),
        ([], "no prompts"),
        ([[1], [1, VOCABULARY]], "prompt 1 has id 64; ids run from 0 to 63"),
        ([[-1]], "prompt 0 has id -1"),
        ([[1] * 33], "prompt 0 has 33 tokens, at most 32 fit"),
        ([1.5], "neither text nor"),
        (torch.ones(2, 2), "token ids are integers"),
        ("text", "text needs a tokenizer"),
    ],
)
def test_wrong_prompts(prompts, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        generate(cached(), prompts)


def test_wrong_options() -> None:
    with pytest.raises(OptionError, match="max_new_tokens must be at least 1"):
        generate(cached(), [1], max_new_tokens=0)
    with pytest.raises(OptionError, match="a stop text needs a tokenizer"):
        generate(cached(), [1], stop="x")
    with pytest.raises(TargetError, match=r"cannot generate: its input .* is no integer tensor"):
        paged_model(get_target("reference").lower(steps.cnn()), steps.cnn())


def test_incomplete_characters_and_possible_stops_are_held_back() -> None:
    stream = TextStream(TextCodec(Letters()), ["\x81\x82"])
    ids = Letters().encode("\x83\x81\x83\x81\x82\x84")
    pieces = [stream.push(i) for i in ids[:10]]
    assert pieces == ["", "\x83", "", "", "", "\x81\x83", "", "", "", ""]
    assert stream.stopped
    assert stream.text == "\x83\x81\x83"
    unfinished = TextStream(TextCodec(Letters()), ["\x81\x82"])
    assert [unfinished.push(i) for i in ids[2:4]] == ["", ""]
    assert unfinished.finish() == "\x81"
