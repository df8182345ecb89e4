"""Generation: prompts in, tokens out, one by one, for several prompts of different lengths at once."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from irc.core.errors import IrcError, OptionError
from irc.core.paged import PagedModel
from irc.runtime.engine import Engine, EngineOptions
from irc.runtime.requests import Request, request_key
from irc.runtime.results import FinishReason, GenerationResult, Stats
from irc.runtime.sampling import Sampling
from irc.runtime.speculation.speculation import Speculation
from irc.runtime.text import TextCodec, TextStream

Prompts = str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]] | Tensor
StreamCallback = Callable[[int, int, str], None]

_MAX_SEQUENCES = 64


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
class _Answer:
    """What one prompt has got so far."""

    ids: list[int]
    text: TextStream | None
    finish_reason: FinishReason | None = None


def generate(
    model: PagedModel,
    prompts: Prompts,
    *,
    tokenizer: Any = None,
    max_new_tokens: int = 64,
    sampling: Sampling | None = None,
    stop: str | int | Iterable[str | int] = (),
    eos: int | Iterable[int] | None = None,
    stream: StreamCallback | None = None,
    options: EngineOptions | None = None,
    speculation: Speculation | None = None,
) -> GenerationResult:
    """Continue every prompt; `stream(index, token_id, text)` is called for each token as it is made.

    Raises:
        OptionError: an empty prompt, one longer than the cache, an id out of range, text without a tokenizer.
    """
    events = stream_tokens(
        model, prompts, tokenizer=tokenizer, max_new_tokens=max_new_tokens, sampling=sampling, stop=stop, eos=eos,
        options=options, speculation=speculation,
    )  # fmt: skip
    while True:
        try:
            event = next(events)
        except StopIteration as finished:
            result: GenerationResult = finished.value
            return result
        if stream is not None:
            stream(event.index, event.token_id, event.text)


def stream_tokens(
    model: PagedModel,
    prompts: Prompts,
    *,
    tokenizer: Any = None,
    max_new_tokens: int = 64,
    sampling: Sampling | None = None,
    stop: str | int | Iterable[str | int] = (),
    eos: int | Iterable[int] | None = None,
    options: EngineOptions | None = None,
    speculation: Speculation | None = None,
) -> Generator[TokenEvent, None, GenerationResult]:
    """As `generate`, as an iterator over tokens; its return value is the result.

    Arguments are checked here and now, not when the first token is asked for.
    """
    codec = TextCodec(tokenizer) if tokenizer is not None else None
    ids, single = read_prompts(prompts, codec)
    texts, stop_tokens = read_stops(stop, codec)
    if max_new_tokens < 1:
        raise OptionError(f"max_new_tokens must be at least 1, not {max_new_tokens}")
    _check_prompts(ids, model)
    ends = read_eos(eos, codec)
    chosen = sampling or Sampling()
    answers = [_Answer([], TextStream(codec, texts) if codec else None) for _ in ids]
    engine = Engine(model, options or EngineOptions(max_sequences=min(len(ids), _MAX_SEQUENCES)), speculation)
    times: dict[tuple[int, ...], int] = {}
    for prompt, answer in zip(ids, answers, strict=True):
        # When a prompt comes several times, each time has its own random numbers.
        nth = times[tuple(prompt)] = times.get(tuple(prompt), -1) + 1
        text = answer.text
        engine.add(
            Request(
                prompt=prompt,
                max_new_tokens=max_new_tokens,
                sampling=chosen,
                end_tokens=ends,
                stop_tokens=stop_tokens,
                key=request_key(chosen.seed, nth, tuple(prompt)),
                text=None if text is None else (lambda t=text: t),
            )
        )
    return _loop(engine, answers, sum(map(len, ids)), single=single)


def _loop(
    engine: Engine, answers: list[_Answer], prompt_tokens: int, *, single: bool
) -> Generator[TokenEvent, None, GenerationResult]:
    stats = Stats(prompt_tokens=prompt_tokens)
    begun: set[int] = set()
    while engine.has_work:
        spent = engine.stats.model_ms + engine.stats.overhead_ms
        outputs = engine.step()
        elapsed = engine.stats.model_ms + engine.stats.overhead_ms - spent
        tokens = sum(len(o.token_ids) + (o.end_token is not None) for o in outputs)
        stats.new_tokens += tokens
        # Steps until every prompt has its first token count as prefill.
        if len(begun) < len(answers):
            stats.prefill_ms += elapsed
        else:
            stats.decode_ms += elapsed
            stats.decode_steps += 1
            stats.decode_tokens += tokens
        for output in outputs:
            begun.add(output.request_id)
            answer = answers[output.request_id]
            if output.finish_reason is FinishReason.ERROR:
                raise IrcError(f"prompt {output.request_id} failed: {output.error}")
            answer.ids += output.token_ids
            answer.finish_reason = output.finish_reason
            given = [*output.token_ids, *([output.end_token] if output.end_token is not None else [])]
            for place, token in enumerate(given):
                last = place == len(given) - 1
                yield TokenEvent(
                    output.request_id, token, output.text if last else "", output.finish_reason if last else None
                )
    model, speculation = engine.model, engine.speculation
    return GenerationResult(
        token_ids=[answer.ids for answer in answers],
        finish_reasons=[answer.finish_reason for answer in answers if answer.finish_reason is not None],
        stats=stats,
        texts=[answer.text.text for answer in answers if answer.text is not None],
        single=single,
        notices=[model.notice] if model.notice else [],
        speculation=speculation.stats if speculation is not None else None,
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


def _check_prompts(prompts: Sequence[Sequence[int]], model: PagedModel) -> None:
    problems = []
    for number, ids in enumerate(prompts):
        wrong = [i for i in ids if not 0 <= i < model.vocabulary_size]
        if not ids:
            problems.append(f"prompt {number} is empty: it has no token to go on from")
        elif wrong:
            problems.append(f"prompt {number} has id {wrong[0]}; ids run from 0 to {model.vocabulary_size - 1}")
        elif len(ids) > model.max_length:
            problems.append(
                f"prompt {number} has {len(ids)} tokens, at most {model.max_length} fit"
                " (insert-kv-cache{max-length=…} sets the limit)"
            )
    if problems:
        raise OptionError("these prompts cannot be continued:\n" + "\n".join(f"  - {p}" for p in problems))


def read_stops(stop: str | int | Iterable[str | int], codec: TextCodec | None) -> tuple[list[str], frozenset[int]]:
    """Stop texts and stop tokens.

    Raises:
        OptionError: something else is among them, or a text without a tokenizer.
    """
    items = [stop] if isinstance(stop, (str, int)) else list(stop)
    texts = [item for item in items if isinstance(item, str)]
    tokens = frozenset(item for item in items if _is_id(item) and isinstance(item, int))
    if len(texts) + len([item for item in items if _is_id(item)]) < len(items) or "" in texts:
        raise OptionError(f"stop takes texts that are not empty and token ids, not {items!r}")
    if texts and codec is None:
        raise OptionError("a stop text needs a tokenizer; a stop token id does not")
    return texts, tokens


def read_eos(eos: int | Iterable[int] | None, codec: TextCodec | None) -> frozenset[int]:
    """End tokens: those given, else the tokenizer's."""
    if eos is None:
        return codec.end_tokens() if codec is not None else frozenset()
    return frozenset([eos] if isinstance(eos, int) else eos)
