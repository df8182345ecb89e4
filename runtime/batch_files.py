"""Batch files: requests as JSON lines in, answers as JSON lines out. What was answered before is not done again.

    {"id": "a", "prompt": "def main(", "max_tokens": 32, "temperature": 0.7, "seed": 1, "stop": ["\\n\\n"]}
    {"id": "a", "text": "…", "token_ids": […], "finish_reason": "length", "prompt_tokens": 4}

A line that cannot be served gets an answer with `error`. Answers are written as they are finished, each as a whole
line; a run that was cut off goes on with what is missing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from irc.core.errors import IrcError, OptionError, StorageError, nearest
from irc.runtime.engine import Engine
from irc.runtime.generation import read_prompts, read_stops
from irc.runtime.requests import Output, Request, request_key
from irc.runtime.results import FinishReason
from irc.runtime.sampling import Sampling
from irc.runtime.text import TextCodec, TextStream

Progress = Callable[[int, int], None]

_SAMPLING = (
    "temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty", "presence_penalty",
    "frequency_penalty", "seed",
)  # fmt: skip
_KNOWN = ("id", "prompt", "max_tokens", "stop", "priority", "logit_bias", *_SAMPLING)


@dataclass
class BatchResult:
    """What a run did: lines answered now, answered with an error, and found answered before."""

    answered: int = 0
    failed: int = 0
    skipped: int = 0


@dataclass
class _Open:
    """A line that is being answered."""

    name: str
    prompt_tokens: int
    ids: list[int]
    text: str = ""


def run_batch(
    engine: Engine,
    source: Path,
    target: Path,
    *,
    tokenizer: Any,
    end_tokens: frozenset[int] | None = None,
    progress: Progress | None = None,
) -> BatchResult:
    """Answer every line of `source` that `target` has no answer for; answers are added to `target`.

    `progress(done, total)` is called after each answer.

    Raises:
        StorageError: a line is no JSON object, two have one id, or `target` holds something else than answers.
    """
    codec = TextCodec(tokenizer)
    ends = codec.end_tokens() if end_tokens is None else end_tokens
    lines = _read(source)
    done = _answered(target)
    result = BatchResult(skipped=sum(name in done for name in lines))
    todo = [(name, line) for name, line in lines.items() if name not in done]
    with target.open("a", encoding="utf-8") as out:
        _Run(engine, codec, ends, out, progress, result, len(lines)).run(todo)
    return result


class _Run:
    def __init__(
        self, engine: Engine, codec: TextCodec, ends: frozenset[int], out: TextIO, progress: Progress | None,
        result: BatchResult, total: int,
    ) -> None:  # fmt: skip
        self._engine, self._codec, self._ends, self._out = engine, codec, ends, out
        self._progress, self._result, self._total = progress, result, total
        self._open: dict[int, _Open] = {}

    def run(self, todo: list[tuple[str, dict[str, Any]]]) -> None:
        waiting: Iterator[tuple[str, dict[str, Any]]] = iter(todo)
        more = True
        while more or self._engine.has_work:
            # The engine's queue is kept short: a file may be longer than memory likes.
            while more and self._engine.num_waiting < 2 * self._engine.options.max_sequences:
                following = next(waiting, None)
                more = following is not None
                if following is not None:
                    self._add(*following)
            for output in self._engine.step() if self._engine.has_work else ():
                self._take(output)

    def _add(self, name: str, line: dict[str, Any]) -> None:
        try:
            request = self._request(name, line)
            number = self._engine.add(request)
        except (IrcError, TypeError, ValueError) as error:
            self._write({"id": name, "error": str(error)}, failed=True)
            return
        self._open[number] = _Open(name, len(request.prompt), [])

    def _request(self, name: str, line: dict[str, Any]) -> Request:
        unknown = [key for key in line if key not in _KNOWN]
        if unknown:
            raise OptionError(f"unknown field {unknown[0]!r}{nearest(unknown[0], _KNOWN)}")
        if "prompt" not in line:
            raise OptionError("there is no prompt")
        (ids,), single = read_prompts(line["prompt"], self._codec)
        if not single:
            raise OptionError("prompt is one text, or one list of ids")
        texts, tokens = read_stops(line.get("stop", ()), self._codec)
        bias = {int(token): float(value) for token, value in line.get("logit_bias", {}).items()}
        sampling = Sampling(
            logit_bias=tuple(sorted(bias.items())), **{k: line[k] for k in _SAMPLING if line.get(k) is not None}
        )
        return Request(
            prompt=ids, max_new_tokens=line.get("max_tokens", 64), sampling=sampling,
            key=request_key(sampling.seed, name, tuple(ids)), end_tokens=self._ends, stop_tokens=tokens,
            text=lambda: TextStream(self._codec, texts), priority=line.get("priority", 0),
        )  # fmt: skip

    def _take(self, output: Output) -> None:
        entry = self._open[output.request_id]
        entry.ids += output.token_ids
        entry.text += output.text
        if output.finish_reason is None:
            return
        del self._open[output.request_id]
        if output.finish_reason is FinishReason.ERROR:
            self._write({"id": entry.name, "error": output.error}, failed=True)
            return
        self._write(
            {
                "id": entry.name, "text": entry.text, "token_ids": entry.ids,
                "finish_reason": output.finish_reason.value, "prompt_tokens": entry.prompt_tokens,
            },
            failed=False,
        )  # fmt: skip

    def _write(self, answer: dict[str, Any], *, failed: bool) -> None:
        self._out.write(json.dumps(answer, ensure_ascii=False) + "\n")
        self._out.flush()
        self._result.failed += failed
        self._result.answered += not failed
        if self._progress is not None:
            done = self._result.answered + self._result.failed + self._result.skipped
            self._progress(done, self._total)


def _read(source: Path) -> dict[str, dict[str, Any]]:
    """The lines by id; a line without one is called after its number."""
    found: dict[str, dict[str, Any]] = {}
    try:
        text = source.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise StorageError(f"{source} is no UTF-8 text: {error}") from None
    for number, raw in enumerate(text.splitlines(), start=1):
        if not raw.strip():
            continue
        try:
            line = json.loads(raw)
        except ValueError as error:
            raise StorageError(f"{source}, line {number} is no JSON: {error}") from None
        if not isinstance(line, dict):
            raise StorageError(f"{source}, line {number} is no JSON object")
        name = str(line.get("id", number))
        if name in found:
            raise StorageError(f"{source}, line {number}: the id {name!r} was there before")
        found[name] = line
    return found


def _answered(target: Path) -> set[str]:
    """Ids that have an answer; what a cut-off run left of its last line is taken away."""
    if not target.exists():
        return set()
    data = target.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    found = set()
    for number, raw in enumerate(whole.splitlines(), start=1):
        try:
            answer = json.loads(raw)
            found.add(str(answer["id"]))
        except (ValueError, KeyError, TypeError):
            raise StorageError(f"{target}, line {number} is no answer of a batch: not adding to it") from None
    if len(whole) < len(data):
        if not data[len(whole) :].startswith(b"{"):
            raise StorageError(f"{target} does not end like an answer of a batch: not adding to it")
        with target.open("r+b") as out:
            out.truncate(len(whole))
    return found
