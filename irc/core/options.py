"""Option values of passes as text: reading by the type of the dataclass field, and printing.

Types: `int`, `float`, `bool`, `str`, enums, `Literal`, lists and tuples of these, and unions (`int | None`).
"""

from __future__ import annotations

import dataclasses
import enum
import json
import re
import types
import typing
from collections.abc import Callable, Sequence
from typing import Any, Literal, Union

BARE = re.compile(r"[A-Za-z0-9_./+*:@%^~-]+")
# Inside a list no option can begin, so that `=` is a character like any other there: [layers.0.*=int8.row].
BARE_ITEM = re.compile(r"[A-Za-z0-9_./+*:@%^~=-]+")
_NUMBER = re.compile(r"[+-]?(\d|\.\d|inf|nan)", re.IGNORECASE)
_BOOLEANS = {"true": True, "false": False, "yes": True, "no": False, "on": True, "off": False}
_WORDS = {"none", *_BOOLEANS}
_YAML_PLAIN = re.compile(r"[A-Za-z][A-Za-z0-9_./-]*")
_YAML_WORDS = _WORDS | {"null", "y", "n"}


class Quoted(str):
    """Text that was quoted: it is text, whatever it looks like."""


Raw = str | list[Any]  # a word, a Quoted, or a list of raw values


class WrongValue(ValueError):
    """A value does not have the type of its option; the message says what was expected."""


def option_types(cls: type) -> dict[str, Any]:
    """Option name (as the field spells it) → type, in order."""
    hints = typing.get_type_hints(cls)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls) if f.init}


def read(raw: Raw, wanted: Any) -> Any:
    """A raw value as a value of type `wanted`.

    Raises:
        WrongValue: it is none; the message names the type.
    """
    origin, arguments = typing.get_origin(wanted), typing.get_args(wanted)
    if origin in (Union, types.UnionType):
        return _read_union(raw, arguments)
    if origin is Literal:
        return _read_literal(raw, arguments)
    if origin in (list, tuple, Sequence) or wanted in (list, tuple):
        return _read_sequence(raw, origin or wanted, arguments)
    if isinstance(raw, list):
        raise WrongValue(f"expected {type_text(wanted)}, got a list")
    if isinstance(wanted, type) and issubclass(wanted, enum.Enum):
        return _read_enum(raw, wanted)
    if wanted is str:
        return str(raw)
    if not isinstance(raw, Quoted):
        if wanted is type(None) and raw == "none":
            return None
        if wanted is bool and raw.lower() in _BOOLEANS:
            return _BOOLEANS[raw.lower()]
        if wanted in (int, float):
            try:
                return wanted(raw)
            except ValueError:
                pass
    raise WrongValue(f"expected {type_text(wanted)}, got {_shown(raw)}")


def mismatch(value: Any, wanted: Any) -> str | None:
    """Why a Python value is none of type `wanted`, in the words of `read`; None where it is one."""
    if _fits(value, wanted):
        return None
    return f"expected {type_text(wanted)}, got {value!r}"


def _fits(value: Any, wanted: Any) -> bool:
    origin, arguments = typing.get_origin(wanted), typing.get_args(wanted)
    if wanted is Any:
        return True
    if origin in (Union, types.UnionType):
        return any(_fits(value, one) for one in arguments)
    if origin is Literal:
        return value in arguments
    if origin is not None:
        text = isinstance(value, str)  # a sequence of its characters is never meant
        items = arguments[:1] if issubclass(origin, Sequence) else ()
        return isinstance(value, origin) and not text and all(_fits(item, one) for item in value for one in items)
    if wanted in (int, float) and isinstance(value, bool):
        return False
    return isinstance(value, (int, float) if wanted is float else wanted)


def write(value: Any, text: Callable[[str], str] | None = None) -> str:
    """The text that `read` turns back into the value; `text` writes strings (default: `word`).

    Raises:
        WrongValue: the value has no text form.
    """
    text = text or word
    if value is None or isinstance(value, bool):
        return {None: "none", True: "true", False: "false"}[value]
    if isinstance(value, enum.Enum):
        return text(value.value if isinstance(value.value, str) else value.name)
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, str):
        return text(value)
    if isinstance(value, (list, tuple)):
        inner = _item_word if text is word else text
        return "[" + ", ".join(write(item, inner) for item in value) + "]"
    raise WrongValue(f"a {type(value).__name__} has no text form")


def word(text: str) -> str:
    """Text bare where it can only be text, else in double quotes."""
    plain = BARE.fullmatch(text) and text.lower() not in _WORDS and not _NUMBER.match(text)
    return text if plain else json.dumps(text)


def _item_word(text: str) -> str:
    """The same inside a list."""
    plain = BARE_ITEM.fullmatch(text) and text.lower() not in _WORDS and not _NUMBER.match(text)
    return text if plain else json.dumps(text)


def yaml_word(text: str) -> str:
    """The same for YAML, which gives more words a meaning and escapes wide characters differently."""
    if _YAML_PLAIN.fullmatch(text) and text.lower() not in _YAML_WORDS and not _NUMBER.match(text):
        return text
    return '"' + "".join(map(_yaml_char, text)) + '"'


def _yaml_char(char: str) -> str:
    if char in '"\\':
        return "\\" + char
    if " " <= char <= "~":
        return char
    return f"\\U{ord(char):08x}"


def type_text(wanted: Any) -> str:
    """A type as messages and help show it: `int or none`, `'a' or 'b'`, `list of float`."""
    origin, arguments = typing.get_origin(wanted), typing.get_args(wanted)
    if origin in (Union, types.UnionType):
        return _choices(arguments)
    if origin is Literal:
        return " or ".join("none" if a is None else write(a) for a in arguments)
    if origin in (list, Sequence):
        return f"list of {type_text(arguments[0])}"
    if origin is tuple:
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            return f"list of {type_text(arguments[0])}"
        return f"[{', '.join(type_text(a) for a in arguments)}]"
    if wanted is type(None):
        return "none"
    if isinstance(wanted, type) and issubclass(wanted, enum.Enum):
        return " or ".join(write(member) for member in wanted)
    if wanted is str:
        return "text"
    if wanted is bool:
        return "true or false"
    return getattr(wanted, "__name__", str(wanted))


def _choices(types_: tuple[Any, ...]) -> str:
    return " or ".join(type_text(one) for one in types_)


def _read_union(raw: Raw, arguments: tuple[Any, ...]) -> Any:
    # Text takes anything, so it is tried last; numbers before it in the order of precision.
    order = [type(None), bool, int, float]
    for wanted in sorted(arguments, key=lambda a: order.index(a) if a in order else 9 if a is str else 5):
        try:
            return read(raw, wanted)
        except WrongValue:
            continue
    raise WrongValue(f"expected {_choices(arguments)}, got {_shown(raw)}")


def _read_literal(raw: Raw, arguments: tuple[Any, ...]) -> Any:
    for choice in arguments:
        try:
            value = read(raw, type(choice))
        except WrongValue:
            continue
        if value == choice and type(value) is type(choice):
            return choice
    raise WrongValue(f"expected {type_text(Literal[arguments])}, got {_shown(raw)}")


def _read_sequence(raw: Raw, kind: Any, arguments: tuple[Any, ...]) -> Any:
    if not isinstance(raw, list):
        raise WrongValue(f"expected a list such as [a, b], got {_shown(raw)}")
    if kind is tuple and not (len(arguments) == 2 and arguments[1] is Ellipsis) and arguments:
        if len(raw) != len(arguments):
            raise WrongValue(f"expected {len(arguments)} values, got {len(raw)}")
        return tuple(read(item, wanted) for item, wanted in zip(raw, arguments, strict=True))
    wanted = arguments[0] if arguments else str
    items = [read(item, wanted) for item in raw]
    return items if kind is list else tuple(items)


def _read_enum(raw: str, wanted: type[enum.Enum]) -> enum.Enum:
    for member in wanted:
        if raw == (member.value if isinstance(member.value, str) else member.name):
            return member
    raise WrongValue(f"expected {type_text(wanted)}, got {_shown(raw)}")


def _shown(raw: Raw) -> str:
    if isinstance(raw, list):
        return "a list"
    return json.dumps(raw, ensure_ascii=False)
