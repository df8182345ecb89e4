"""Structured output: only tokens that a JSON schema, a regular expression or a grammar allows are chosen.

The work is done by `llguidance` (extra `structured`); a request's matcher gives a mask of tokens before each choice.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from irc.core.errors import IrcError, OptionError

Kind = Literal["json_schema", "regex", "grammar"]
_FORMATS = {"json_schema": "json_schema", "regex": "regex", "grammar": "lark"}


class Grammars:
    """Makes constraints for one tokenizer.

    Args:
        tokenizer: of the `tokenizers` library, or one of transformers that holds such a one.
        vocabulary_size: of the model.
        end_tokens: one of them must be allowed where the output may end.

    Raises:
        OptionError: llguidance is missing, or the tokenizer is of another kind.
    """

    def __init__(self, tokenizer: Any, vocabulary_size: int, end_tokens: Iterable[int]) -> None:
        try:
            import llguidance
        except ImportError:
            raise OptionError("structured output needs llguidance: pip install 'irc-compiler[structured]'") from None
        inner = getattr(tokenizer, "backend_tokenizer", tokenizer)
        to_str = getattr(inner, "to_str", None)
        ends = sorted(end_tokens)
        if not callable(to_str):
            raise OptionError(f"structured output needs a tokenizer of the tokenizers library, not {type(tokenizer)}")
        if not ends:
            raise OptionError("structured output needs an end token: the tokenizer names none")
        self._library = llguidance
        self._tokenizer = llguidance.LLTokenizer(to_str(), n_vocab=vocabulary_size, eos_token=ends)
        self._size = vocabulary_size

    def of(self, kind: Kind, text: str | dict[str, Any] | bool) -> Callable[[], GrammarConstraint]:
        """What makes a constraint for a sample.

        Raises:
            OptionError: the schema, expression or grammar cannot be used; says why.
        """
        if kind not in _FORMATS:
            raise OptionError(f"structured output is one of {', '.join(_FORMATS)}, not {kind!r}")
        given = text if isinstance(text, str) else json.dumps(text)
        try:
            if kind == "json_schema":  # compact: with free white space a model may go on for ever saying nothing
                grammar = self._library.LLMatcher.grammar_from_json_schema(
                    given, overrides={"whitespace_flexible": False}
                )
            else:
                form: Any = _FORMATS[kind]
                grammar = self._library.grammar_from(form, given)
        except ValueError as error:
            raise OptionError(f"this {kind} cannot be used: {error}") from None
        problem = self._library.LLMatcher.validate_grammar(grammar, self._tokenizer)
        if problem:
            raise OptionError(f"this {kind} cannot be used: {problem}")
        return lambda: GrammarConstraint(self._library.LLMatcher(self._tokenizer, grammar, log_level=0), self._size)


class GrammarConstraint:
    """The state of one sample."""

    def __init__(self, matcher: Any, size: int) -> None:
        self._matcher, self._size = matcher, size

    def masks(self, draft: Sequence[int]) -> list[Tensor | None]:
        found, last, consumed = list[Tensor | None](), self._mask(), 0
        for token in draft:
            found.append(last)
            if consumed == len(found) - 1 and bool(last[token]):
                self.advance(token)
                consumed += 1
                last = last if self.finished() else self._mask()
        if consumed:
            self._matcher.rollback(consumed)
            self._check()
        return [*found, last]

    def _mask(self) -> Tensor:
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        self._check()
        return torch.from_numpy(np.unpackbits(bits, bitorder="little")[: self._size].astype(bool))

    def advance(self, token: int) -> None:
        self._matcher.consume_token(token)
        self._check()

    def finished(self) -> bool:
        return bool(self._matcher.is_stopped())

    def _check(self) -> None:
        if self._matcher.is_error():
            raise IrcError(f"structured output failed: {self._matcher.get_error()}")
