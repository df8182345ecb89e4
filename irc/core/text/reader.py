"""Recursive descent over tokens: the parts that need no program (names, types, expressions, structures)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import sympy
import torch

from irc.core.dims import dim_symbol
from irc.core.errors import ParseError, nearest
from irc.core.listing.values import CONSTANTS, DTYPES
from irc.core.text.arithmetic import CALLS, COMPARISONS, is_symbolic, times
from irc.core.text.lexer import MAX_DIGITS, Lexer, Token, unquoted

MAX_DEPTH = 24
MAX_OPERATORS = 64
MAX_ITEMS = 65536
MAX_POWER = 4
_LIMIT = 1 << 63


@dataclass(frozen=True)
class TensorType:
    """`f32[B, 8]`, with strides and device where they are written."""

    dtype: torch.dtype
    shape: tuple[Any, ...]
    strides: tuple[Any, ...] | None = None
    device: str | None = None


@dataclass(frozen=True)
class SizeType:
    """`size(2*S)`: a number known from the sizes of the inputs."""

    value: Any


Type = TensorType | SizeType | tuple[Any, ...] | None


class Reader:
    """Holds the current token and reads what the grammar allows there.

    `dim_uses` collects where each dimension name is first used, for the check that it is declared.
    """

    def __init__(self, text: str) -> None:
        self.lexer = Lexer(text)
        self.dim_uses: dict[str, Token] = {}
        self.comment: Token | None = None
        self.previous: Token | None = None
        self._operators = 0
        self._depth = 0
        self.token = self._fetch()

    # ---------------------------------------------------------------- tokens

    def _fetch(self) -> Token:
        while (token := self.lexer.next()).kind == "comment":
            self.comment = token
        return token

    def advance(self) -> Token:
        """Take the current token."""
        taken = self.previous = self.token
        self.token = self._fetch()
        return taken

    def at(self, text: str) -> bool:
        """Whether the current token is this word or mark."""
        return self.token.text == text and self.token.kind in ("mark", "word")

    def take(self, text: str) -> bool:
        """Take the current token if it is this word or mark."""
        if self.at(text):
            self.advance()
            return True
        return False

    def expect(self, text: str) -> Token:
        """Take this word or mark, or fail."""
        if not self.at(text):
            raise self.error(f"expected {text!r}, got {self._shown()}")
        return self.advance()

    def expect_kind(self, kind: str, what: str) -> Token:
        """Take a token of this kind, or fail saying what was expected."""
        if self.token.kind != kind:
            raise self.error(f"expected {what}, got {self._shown()}")
        return self.advance()

    def _shown(self) -> str:
        return "the end of the text" if self.token.kind == "end" else repr(self.token.text[:40])

    def error(self, message: str, at: Token | None = None) -> ParseError:
        """A `ParseError` at a token (default: the current one)."""
        token = at or self.token
        return self.lexer.error(message, token.start, token.stop)

    def items(self, close: str, read: Callable[[], Any]) -> list[Any]:
        """Items with commas in between (one may trail) up to and with the closing mark."""
        found: list[Any] = []
        while not self.at(close):
            if len(found) >= MAX_ITEMS:
                raise self.error(f"more than {MAX_ITEMS} items")
            found.append(read())
            if not self.take(","):
                break
        self.expect(close)
        return found

    def nested(self, read: Callable[[], Any]) -> Any:
        """Read one level deeper."""
        if self._depth >= MAX_DEPTH:
            raise self.error(f"nested more than {MAX_DEPTH} deep")
        self._depth += 1
        try:
            return read()
        finally:
            self._depth -= 1

    # ---------------------------------------------------------------- names and literals

    def weight_name(self) -> str:
        """`@a.b` or `@"any text"`."""
        token = self.expect_kind("weight", "a name like @layers.0.weight")
        return self.string_value(token, token.text[1:]) if token.text[1] == '"' else token.text[1:]

    def string(self) -> str:
        """A JSON string."""
        token = self.expect_kind("string", "a string")
        return self.string_value(token, token.text)

    def string_value(self, token: Token, text: str) -> str:
        value = unquoted(text)
        if value is None:
            raise self.error("not a JSON string", token)
        return value

    def natural(self) -> int:
        """A whole number without sign."""
        token = self.expect_kind("number", "a whole number")
        value = self._number(token)
        if not isinstance(value, int):
            raise self.error("expected a whole number", token)
        return value

    def _number(self, token: Token) -> int | float:
        if token.text.isdigit():
            if len(token.text) > MAX_DIGITS or int(token.text) > _LIMIT:
                raise self.error("the number does not fit 64 bits", token)
            return int(token.text)
        if len(token.text) > 400:
            raise self.error("the number has too many digits", token)
        return float(token.text)

    # ---------------------------------------------------------------- types

    def type(self) -> Type:
        """A type: `f32[B, 8]`, `(f32[2], i64[2])`, `size(S)`, `None`."""
        if self.take("("):
            return self.nested(lambda: tuple(self.items(")", self.type)))
        token = self.expect_kind("word", "a type like f32[B, 8]")
        if token.text == "None":
            return None
        if token.text == "size":
            self.expect("(")
            value = self.expression()
            self.expect(")")
            return SizeType(value)
        if token.text not in DTYPES:
            raise self.error(f"unknown type {token.text!r}{nearest(token.text, DTYPES)}", token)
        self.expect("[")
        return TensorType(DTYPES[token.text], tuple(self.items("]", self.size)))

    def placed_type(self) -> Type:
        """A type, for a tensor with `strides [..]` and `on "device"` where they are not the usual."""
        found = self.type()
        if not isinstance(found, TensorType):
            return found
        strides = device = None
        if self.take("strides"):
            self.expect("[")
            strides = tuple(self.items("]", self.size))
            if len(strides) != len(found.shape):
                raise self.error(f"{len(strides)} strides for {len(found.shape)} sizes", self.previous)
        if self.take("on"):
            device = self.string()
        return TensorType(found.dtype, found.shape, strides, device)

    def size(self) -> Any:
        """An expression that is a size: not negative, no float."""
        start = self.token
        value = self.expression()
        whole = isinstance(value, int) and not isinstance(value, bool) and value >= 0
        if not whole and not (isinstance(value, sympy.Expr) and value.is_integer):
            raise self.error("expected a size", start)
        return value

    # ---------------------------------------------------------------- expressions

    def expression(self) -> Any:
        """A constant, or a sympy expression over dimensions."""
        self._operators = 0
        start = self.token
        try:
            return self._or()
        except (ArithmeticError, TypeError, ValueError, AttributeError, AssertionError) as error:
            # Sympy's and Python's own refusals: division by zero, None + 1, a comparison of booleans.
            raise self.error(f"this expression has no value: {error}", start) from error

    def _or(self) -> Any:
        value = self.nested(self._and)
        while self.at("or"):
            self._count()
            value = sympy.Or(value, self._and())
        return value

    def _and(self) -> Any:
        value = self._not()
        while self.at("and"):
            self._count()
            value = sympy.And(value, self._not())
        return value

    def _not(self) -> Any:
        if self.at("not"):
            self._count()
            return sympy.Not(self.nested(self._not))
        return self._compare()

    def _compare(self) -> Any:
        value = self._add()
        if self.token.kind == "mark" and self.token.text in COMPARISONS:
            plain, symbolic = COMPARISONS[self._count().text]
            other = self._add()
            return (symbolic if is_symbolic(value, other) else plain)(value, other)
        return value

    def _add(self) -> Any:
        value = self._multiply()
        while self.at("+") or self.at("-"):
            sign = self._count()
            other = self._multiply()
            value = self._bounded(value + other if sign.text == "+" else value - other, sign)
        return value

    def _multiply(self) -> Any:
        value = self._unary()
        while self.token.kind == "mark" and self.token.text in ("*", "//", "/", "%"):
            sign = self._count()
            value = self._bounded(times(sign.text, value, self._unary()), sign)
        return value

    def _unary(self) -> Any:
        if self.at("-"):
            sign = self._count()
            return self._bounded(-self.nested(self._unary), sign)
        return self._power()

    def _power(self) -> Any:
        base = self._atom()
        if not self.at("**"):
            return base
        sign = self._count()
        exponent = self._atom()
        small = isinstance(exponent, int) and 0 <= exponent <= MAX_POWER
        if not small or (isinstance(base, sympy.Basic) and base.has(sympy.Pow)):
            raise self.error(f"only whole powers up to {MAX_POWER} of something without powers", sign)
        return self._bounded(base**exponent, sign)

    def _atom(self) -> Any:
        token = self.advance()
        if token.kind == "number":
            return self._number(token)
        if token.text == "(" and token.kind == "mark":
            value = self.nested(self._or)
            self.expect(")")
            return value
        if token.kind != "word":
            raise self.error(f"expected a value, got {token.text[:40]!r}", token)
        if token.text in CONSTANTS:
            return CONSTANTS[token.text]
        if token.text in DTYPES:
            return DTYPES[token.text]
        if token.text in CALLS and self.at("("):
            return self._call(token)
        if "." in token.text:
            raise self.error(f"unknown name {token.text!r}", token)
        self.dim_uses.setdefault(token.text, token)
        return dim_symbol(token.text)

    def _call(self, token: Token) -> Any:
        self._operators += 1
        self.expect("(")
        arguments = self.nested(lambda: self.items(")", self._or))
        count, function = CALLS[token.text]
        if len(arguments) != count and not (token.text in ("max", "min") and 2 <= len(arguments) <= 16):
            raise self.error(f"{token.text} takes {count} arguments, got {len(arguments)}", token)
        return self._bounded(function(*map(sympy.sympify, arguments)), token)

    def _count(self) -> Token:
        self._operators += 1
        if self._operators > MAX_OPERATORS:
            raise self.error(f"an expression of more than {MAX_OPERATORS} operators")
        return self.advance()

    def _bounded(self, value: Any, at: Token) -> Any:
        if isinstance(value, (sympy.Integer, sympy.Float)):
            value = int(value) if isinstance(value, sympy.Integer) else float(value)
        if isinstance(value, int) and abs(value) > _LIMIT:
            raise self.error("the number does not fit 64 bits", at)
        return value

    # ---------------------------------------------------------------- structures

    def structure(self) -> Any:
        """`((*, *), {"mask": *})` as Python containers with None leaves."""
        return self.nested(self._structure)

    def _structure(self) -> Any:
        if self.take("*"):
            return None
        if self.take("("):
            return tuple(self.items(")", self.structure))
        if self.take("["):
            return self.items("]", self.structure)
        self.expect("{")
        return dict(self.items("}", self._entry))

    def _entry(self) -> tuple[str | int, Any]:
        key: str | int = self.string() if self.token.kind == "string" else self.natural()
        self.expect(":")
        return key, self.structure()
