"""Generation: prompts in, tokens out, one by one, for several prompts of different lengths at once."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from irc.core.errors import OptionError
from irc.runtime.decoding import Decoder
from irc.runtime.results import FinishReason, GenerationResult, Stats
from irc.runtime.sampling import Sampler, Sampling
from irc.runtime.text import TextCodec, TextStream

Prompts = str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]] | Tensor
StreamCallback = Callable[[int, int, str], None]


@dataclass(frozen=True)
class TokenEvent:
    """A new token.

    Attributes:
        index: of the prompt.
        token_id: the token.
        text: text that became final with it (may be empty; empty without a tokenizer).
        finish_reason: set on the last event of a prompt.
    """

    index: int
    token_id: int
    text: str = ""
    finish_reason: FinishReason | None = None


@dataclass
class _Sequence:
    """State of one prompt."""

    prompt_length: int
    ids: list[int]
    text: TextStream | None
    finish_reason: FinishReason | None = None

    @property
    def new_ids(self) -> list[int]:
        return self.ids[self.prompt_length :]


@dataclass(frozen=True)
class _Limits:
    """When a sequence ends."""

    max_new_tokens: int
    max_length: int | None
    ends: frozenset[int]
    stop_tokens: frozenset[int]


def generate(
    decoder: Decoder,
    prompts: Prompts,
    *,
    tokenizer: Any = None,
    max_new_tokens: int = 64,
    sampling: Sampling | None = None,
    stop: str | int | Iterable[str | int] = (),
    eos: int | Iterable[int] | None = None,
    stream: StreamCallback | None = None,
) -> GenerationResult:
    """Continue every prompt; `stream(index, token_id, text)` is called for each token as it is made.

    Raises:
        OptionError: an empty prompt, one longer than the cache, an id out of range, text without a tokenizer.
    """
    events = stream_tokens(
        decoder, prompts, tokenizer=tokenizer, max_new_tokens=max_new_tokens, sampling=sampling, stop=stop, eos=eos
    )
    while True:
        try:
            event = next(events)
        except StopIteration as finished:
            result: GenerationResult = finished.value
            return result
        if stream is not None:
            stream(event.index, event.token_id, event.text)


def stream_tokens(
    decoder: Decoder,
    prompts: Prompts,
    *,
    tokenizer: Any = None,
    max_new_tokens: int = 64,
    sampling: Sampling | None = None,
    stop: str | int | Iterable[str | int] = (),
    eos: int | Iterable[int] | None = None,
) -> Generator[TokenEvent, None, GenerationResult]:
    """As `generate`, as an iterator over tokens; its return value is the result.

    Arguments are checked here and now, not when the first token is asked for.
    """
    codec = TextCodec(tokenizer) if tokenizer is not None else None
    ids, single = read_prompts(prompts, codec)
    texts, stop_tokens = _read_stops(stop, codec)
    if max_new_tokens < 1:
        raise OptionError(f"max_new_tokens must be at least 1, not {max_new_tokens}")
    _check_prompts(ids, decoder)
    ends = _read_eos(eos, codec)
    sequences = [_Sequence(len(one), list(one), TextStream(codec, texts) if codec else None) for one in ids]
    limits = _Limits(max_new_tokens, decoder.max_length, ends, stop_tokens)
    return _loop(decoder, sequences, Sampler(sampling or Sampling(), ids), limits, single=single)


def _loop(
    decoder: Decoder, sequences: list[_Sequence], sampler: Sampler, limits: _Limits, *, single: bool
) -> Generator[TokenEvent, None, GenerationResult]:
    stats = Stats(prompt_tokens=sum(s.prompt_length for s in sequences))
    active = list(range(len(sequences)))
    started = time.perf_counter()
    logits = decoder.prefill([s.ids for s in sequences])
    while True:
        chosen = sampler(logits, active)
        elapsed = (time.perf_counter() - started) * 1e3
        if stats.new_tokens == 0:
            stats.prefill_ms = elapsed
        else:
            stats.decode_ms += elapsed
            stats.decode_steps += 1
            stats.decode_tokens += len(active)
        stats.new_tokens += len(active)
        for index, token in zip(active, chosen, strict=True):
            yield from _advance(index, sequences[index], token, limits)
        active = [i for i in active if sequences[i].finish_reason is None]
        if not active:
            return _result(sequences, stats, decoder, single=single)
        started = time.perf_counter()  # the consumer's time between tokens is not counted
        logits = decoder.decode([s.ids for s in sequences], active)


def _advance(index: int, sequence: _Sequence, token: int, limits: _Limits) -> Iterator[TokenEvent]:
    """Add a token to its sequence and say whether that ends it."""
    if token in limits.ends or token in limits.stop_tokens:
        sequence.finish_reason = FinishReason.EOS if token in limits.ends else FinishReason.STOP
        rest = sequence.text.finish() if sequence.text else ""
        yield TokenEvent(index, token, rest, sequence.finish_reason)
        return
    sequence.ids.append(token)
    text = sequence.text.push(token) if sequence.text else ""
    length = len(sequence.ids)
    if sequence.text is not None and sequence.text.stopped:
        sequence.finish_reason = FinishReason.STOP
    elif length - sequence.prompt_length >= limits.max_new_tokens:
        sequence.finish_reason = FinishReason.LENGTH
    elif limits.max_length is not None and length > limits.max_length:
        sequence.finish_reason = FinishReason.CACHE_FULL
    if sequence.finish_reason is not None and sequence.text is not None:
        text += sequence.text.finish()
        # What was held back may complete a stop text.
        if sequence.text.stopped:
            sequence.finish_reason = FinishReason.STOP
    yield TokenEvent(index, token, text, sequence.finish_reason)


def _result(sequences: Sequence[_Sequence], stats: Stats, decoder: Decoder, *, single: bool) -> GenerationResult:
    reasons = [s.finish_reason for s in sequences if s.finish_reason is not None]
    return GenerationResult(
        token_ids=[s.new_ids for s in sequences],
        finish_reasons=reasons,
        stats=stats,
        texts=[s.text.text for s in sequences if s.text is not None],
        single=single,
        notices=[decoder.notice] if decoder.notice else [],
    )


def read_prompts(prompts: Prompts, codec: TextCodec | None) -> tuple[list[list[int]], bool]:
    """Prompts as lists of ids, and whether it was a single one.

    Raises:
        OptionError: they are neither text nor ids.
    """
    if isinstance(prompts, Tensor):
        if prompts.is_floating_point() or prompts.dtype == torch.bool or prompts.dim() not in (1, 2):
            raise OptionError(f"token ids are integers [S] or [B, S], not {prompts.dtype} {list(prompts.shape)}")
        rows = prompts.tolist()
        return ([rows], True) if prompts.dim() == 1 else (rows, False)
    single = isinstance(prompts, str) or (len(prompts) > 0 and all(_is_id(p) for p in prompts))
    items: Sequence[Any] = [prompts] if single else list(prompts)
    if not items:
        raise OptionError("no prompts were given")
    return [_ids_of(number, item, codec) for number, item in enumerate(items)], single


def _ids_of(number: int, item: Any, codec: TextCodec | None) -> list[int]:
    if isinstance(item, str):
        if codec is None:
            raise OptionError("text needs a tokenizer: compile(..., tokenizer=...), or give token ids")
        return codec.encode(item)
    if isinstance(item, Tensor):
        item = item.tolist()
    if isinstance(item, (list, tuple, range)) and all(_is_id(i) for i in item):
        return [int(i) for i in item]
    raise OptionError(f"prompt {number} is neither text nor a list of token ids: {str(item)[:60]!r}")


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_prompts(prompts: Sequence[Sequence[int]], decoder: Decoder) -> None:
    problems = []
    for number, ids in enumerate(prompts):
        wrong = [i for i in ids if not 0 <= i < decoder.vocabulary_size]
        if not ids:
            problems.append(f"prompt {number} is empty: it has no token to go on from")
        elif wrong:
            problems.append(f"prompt {number} has id {wrong[0]}; ids run from 0 to {decoder.vocabulary_size - 1}")
        elif decoder.max_length is not None and len(ids) > decoder.max_length:
            problems.append(
                f"prompt {number} has {len(ids)} tokens, at most {decoder.max_length} fit"
                " (insert-kv-cache{max-length=…} sets the limit)"
            )
    if problems:
        raise OptionError("these prompts cannot be continued:\n" + "\n".join(f"  - {p}" for p in problems))


def _read_stops(stop: str | int | Iterable[str | int], codec: TextCodec | None) -> tuple[list[str], frozenset[int]]:
    items = [stop] if isinstance(stop, (str, int)) else list(stop)
    texts = [item for item in items if isinstance(item, str)]
    tokens = frozenset(item for item in items if _is_id(item) and isinstance(item, int))
    if len(texts) + len([item for item in items if _is_id(item)]) < len(items) or "" in texts:
        raise OptionError(f"stop takes texts that are not empty and token ids, not {items!r}")
    if texts and codec is None:
        raise OptionError("a stop text needs a tokenizer; a stop token id does not")
    return texts, tokens


def _read_eos(eos: int | Iterable[int] | None, codec: TextCodec | None) -> frozenset[int]:
    if eos is None:
        return codec.end_tokens() if codec is not None else frozenset()
    return frozenset([eos] if isinstance(eos, int) else eos)
