"""Task accuracy by EleutherAI's `lm-eval`: an adapter that gives its three kinds of requests to a program.

    from irc.evaluation.lm_eval_model import lm_eval_model
    lm_eval.simple_evaluate(model=lm_eval_model(compiled, tokenizer), tasks=["lambada_openai"])

`LanguageModelAdapter` itself needs nothing of that package: requests are objects with `args`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from irc.compiled import Compiled
from irc.core.contract import Progress
from irc.core.errors import OptionError
from irc.core.kv_cache import KVCache
from irc.core.program import Program
from irc.core.target import get_target
from irc.evaluation.subjects import subject
from irc.runtime.generation import generate
from irc.runtime.models import paged_model
from irc.runtime.sampling import Sampling

_MAX_NEW_TOKENS = 256


class LanguageModelAdapter:
    """Log-likelihoods and continuations of a compiled model or program.

    Args:
        model: gives logits for every token; attention is causal.
        tokenizer: of `tokenizers` or of transformers.
        max_length: most tokens that the model takes; None: what its key-value cache holds, else 2048.
        prefix: token that stands before a text without context; None: the tokenizer's end-of-text token.
        batch_size: requests at a time.
        progress: called with (what, done, total).

    Raises:
        OptionError: there is no tokenizer, or no token for the prefix.
    """

    def __init__(
        self,
        model: Compiled | Program,
        tokenizer: Any = None,
        *,
        max_length: int | None = None,
        prefix: int | None = None,
        batch_size: int = 8,
        progress: Progress | None = None,
    ) -> None:
        self._tokenizer: Any = tokenizer or getattr(model, "tokenizer", None)
        if self._tokenizer is None:
            raise OptionError("tasks are text: give a tokenizer")
        if not isinstance(model, (Compiled, Program)):
            raise OptionError(f"give a compiled model or a program, not a {type(model).__name__}")
        program = model.program if isinstance(model, Compiled) else model
        cache = KVCache.of(program)
        self.max_length = max_length or (cache.max_length if cache is not None else 2048)
        self._program, self._call = program, subject(model).call
        self._artifact = model.artifact if isinstance(model, Compiled) else get_target("reference").lower(program)
        self._batch_size, self._progress = batch_size, progress
        found = _end_of_text(model, self._tokenizer) if prefix is None else prefix
        if found is None:
            raise OptionError("the tokenizer names no end-of-text token: say which token stands first with prefix=…")
        self.prefix = found

    # ---------------------------------------------------------------- requests

    def loglikelihood(self, requests: Sequence[Any], **_: Any) -> list[tuple[float, bool]]:
        """For each (context, continuation): log-probability of the continuation, and whether it is the greedy one."""
        rows = []
        for request in requests:
            context, continuation = request.args[:2]
            rows.append(self._encode_pair(context, continuation))
        return self._score(rows, "loglikelihood")

    def loglikelihood_rolling(self, requests: Sequence[Any], **_: Any) -> list[float]:
        """For each (text,): its log-probability, every token predicted once, from as much context as fits."""
        rows: list[tuple[list[int], list[int]]] = []
        owners: list[int] = []
        for index, request in enumerate(requests):
            for row in self._windows(self._encode(request.args[0])):
                rows.append(row)
                owners.append(index)
        totals = [0.0] * len(requests)
        for owner, (value, _greedy) in zip(owners, self._score(rows, "loglikelihood_rolling"), strict=True):
            totals[owner] += value
        return totals

    def generate_until(self, requests: Sequence[Any], **_: Any) -> list[str]:
        """For each (context, options): the text that follows, up to the first of `until`."""
        found = []
        for done, request in enumerate(requests):
            self._report("generate_until", done, len(requests))
            context, options = request.args[:2]
            found.append(self._generate(context, options))
        self._report("generate_until", len(requests), len(requests))
        return found

    # ---------------------------------------------------------------- how

    def _encode(self, text: str) -> list[int]:
        encoded = self._tokenizer.encode(text, add_special_tokens=False)
        ids: list[int] = getattr(encoded, "ids", encoded)
        return list(ids)

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Tokens of both, split where the context alone ends; spaces between them belong to the continuation."""
        if not context:
            return [self.prefix], self._encode(continuation)
        kept = context.rstrip()
        continuation, context = context[len(kept) :] + continuation, kept
        head = self._encode(context)
        whole = self._encode(context + continuation)
        return head or [self.prefix], whole[len(head) :]

    def _windows(self, ids: list[int]) -> Iterator[tuple[list[int], list[int]]]:
        """(context, tokens to predict) so that each token is predicted once, the last from a full window."""
        length = self.max_length
        first = ids[:length]
        if first:
            yield [self.prefix], first
        done = len(first)
        while done < len(ids):
            stop = min(done + length, len(ids))
            # `length` inputs, of which the last stop - done predict something new.
            start = stop - length - 1
            yield ids[max(start, 0) : done], ids[done:stop]
            done = stop

    @torch.no_grad()
    def _score(self, rows: Sequence[tuple[list[int], list[int]]], what: str) -> list[tuple[float, bool]]:
        found: list[tuple[float, bool]] = [(0.0, True)] * len(rows)
        order = sorted((i for i in range(len(rows)) if rows[i][1]), key=lambda i: -len(rows[i][0]) - len(rows[i][1]))
        for start in range(0, len(order), self._batch_size):
            self._report(what, start, len(order))
            picked = order[start : start + self._batch_size]
            # Inputs are all but the last token; what does not fit is cut off at the left.
            inputs = [(rows[i][0] + rows[i][1])[:-1][-self.max_length :] for i in picked]
            width = max(map(len, inputs))
            # Causal attention: what pads on the right is seen by nothing that counts.
            batch = torch.tensor([row + [self.prefix] * (width - len(row)) for row in inputs])
            logits = self._call(batch)
            for index, row, scores in zip(picked, inputs, logits, strict=True):
                wanted = torch.tensor(rows[index][1][-len(row) :])
                found[index] = _likelihood(scores[len(row) - len(wanted) : len(row)], wanted)
        self._report(what, len(order), len(order))
        return found

    def _generate(self, context: str, options: Mapping[str, Any]) -> str:
        until = options.get("until") or []
        until = [until] if isinstance(until, str) else list(until)
        wanted = int(options.get("max_gen_toks", _MAX_NEW_TOKENS))
        sampled = bool(options.get("do_sample", False)) or float(options.get("temperature") or 0.0) > 0
        temperature = float(options.get("temperature") or (1.0 if sampled else 0.0))
        ids = (self._encode(context) or [self.prefix])[-max(1, self.max_length - wanted) :]
        result = generate(
            paged_model(self._artifact, self._program), [ids], tokenizer=self._tokenizer, max_new_tokens=wanted,
            sampling=Sampling(temperature=temperature, top_p=options.get("top_p"), top_k=options.get("top_k")),
            stop=[text for text in until if text], eos=(self.prefix,),
        )  # fmt: skip
        return result.text[0]

    def _report(self, what: str, done: int, total: int) -> None:
        if self._progress is not None:
            self._progress(what, done, total)


def lm_eval_model(model: Compiled | Program, tokenizer: Any = None, **options: Any) -> Any:
    """The adapter as an `lm_eval.api.model.LM`, for `lm_eval.simple_evaluate(model=…)`.

    Options are those of `LanguageModelAdapter`.

    Raises:
        OptionError: lm-eval is not installed.
    """
    try:
        from lm_eval.api.model import LM
    except ImportError:
        raise OptionError("task accuracy needs lm-eval: pip install 'irc-compiler[lm-eval]'") from None

    class IrcModel(LanguageModelAdapter, LM):
        """`LanguageModelAdapter` with what lm-eval expects of its models."""

        def __init__(self) -> None:
            LM.__init__(self)
            LanguageModelAdapter.__init__(self, model, tokenizer, **options)

    return IrcModel()


def _likelihood(logits: Tensor, wanted: Tensor) -> tuple[float, bool]:
    log_p = logits.float().log_softmax(-1)
    total = log_p.gather(-1, wanted.unsqueeze(-1)).sum()
    return float(total), bool((log_p.argmax(-1) == wanted).all())


def _end_of_text(model: Any, tokenizer: Any) -> int | None:
    known = getattr(tokenizer, "eos_token_id", None)
    if known is not None:
        return int(known)
    look_up = getattr(tokenizer, "token_to_id", None)
    for name in ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>", "<s>"):
        if callable(look_up) and look_up(name) is not None:
            return int(look_up(name))
    ends = getattr(model, "eos", None)
    return min(ends) if ends else None
