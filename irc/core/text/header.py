"""What stands above the operations: signature, dims, structures, aliases, metadata, weights."""

from __future__ import annotations

import json
import keyword
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch.utils._pytree as pytree

from irc.core.content_hash import META_HASH
from irc.core.errors import nearest
from irc.core.listing.specs import FLATTENED, spec_of
from irc.core.listing.values import FORMAT_VERSION, is_dim_name
from irc.core.text.lexer import Token
from irc.core.text.reader import Reader, TensorType, Type

MAX_DIMS = 64
MAX_RANK = 32
MAX_ELEMENTS = 1 << 48
_DIGEST = re.compile(r":([0-9a-f]{64})[ \t\r]*(?:#.*)?")
_WEIGHT_KINDS = ("param", "frozen", "buffer")


@dataclass(frozen=True)
class InputDeclaration:
    """`%name as "target": type`."""

    token: Token
    name: str
    target: str
    type: Type


@dataclass(frozen=True)
class WeightDeclaration:
    """`param @name: type = sha256:…`."""

    token: Token
    kind: str
    type: TensorType
    digest: str


@dataclass
class Header:
    """Everything declared above the operations."""

    name: str
    inputs: list[InputDeclaration]
    outputs: list[Type]
    dims: dict[str, tuple[int, int, int | None]] = field(default_factory=dict)
    specs: dict[str, pytree.TreeSpec] = field(default_factory=dict)
    aliases: dict[int, int] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)
    weights: dict[str, WeightDeclaration] = field(default_factory=dict)
    tied: dict[str, str] = field(default_factory=dict)

    @property
    def out_spec(self) -> pytree.TreeSpec:
        return self.specs["out_spec"]


def read_header(reader: Reader) -> Header:
    """Signature and declarations."""
    reader.expect("irc")
    version_token = reader.token
    if reader.natural() != FORMAT_VERSION:
        raise reader.error(f"this is format version {FORMAT_VERSION}; the text is of another", version_token)
    header = _signature(reader)
    while reader.token.kind == "word" and not reader.at("return"):
        token = reader.token
        known = {**_DECLARATIONS, **dict.fromkeys(_WEIGHT_KINDS, _weight)}
        if token.text not in known:
            raise reader.error(f"unknown declaration {token.text!r}{nearest(token.text, known)}")
        known[token.text](reader, header)
    for which, word in (("in_spec", "inputs"), ("out_spec", "outputs")):
        if which not in header.specs:
            raise reader.error(f"the declaration `{word}` is missing")
    for name, token in reader.dim_uses.items():
        if name not in header.dims:
            raise reader.error(f"unknown dimension {name!r}{nearest(name, header.dims)}", token)
    _check_tied(reader, header)
    return header


def _signature(reader: Reader) -> Header:
    reader.expect("program")
    name = reader.weight_name()
    reader.expect("(")
    inputs = reader.items(")", lambda: _input(reader))
    reader.expect("->")
    outputs = list(reader.items(")", reader.type)) if reader.take("(") else [reader.type()]
    reader.expect("{")
    return Header(name, inputs, outputs)


def _input(reader: Reader) -> InputDeclaration:
    token = reader.expect_kind("node", "an input like %x")
    name = target = token.text[1:]
    if reader.take("as"):
        target = reader.string()
    if not target.isascii() or not target.isidentifier() or keyword.iskeyword(target):
        raise reader.error(f"an input cannot be called {target!r}", token)
    reader.expect(":")
    return InputDeclaration(token, name, target, reader.placed_type())


def _dim(reader: Reader, header: Header) -> None:
    reader.advance()
    token = reader.expect_kind("word", "a dimension's name")
    if not is_dim_name(token.text):
        raise reader.error(f"a dimension cannot be called {token.text!r}", token)
    if token.text in header.dims or len(header.dims) >= MAX_DIMS:
        raise reader.error(f"dimension {token.text!r} is declared twice, or more than {MAX_DIMS} are", token)
    reader.expect("=")
    hint = reader.natural()
    reader.expect("in")
    minimum = reader.natural()
    reader.expect("..")
    on_line = reader.token.kind == "number" and reader.token.line == token.line
    maximum = reader.natural() if on_line else None
    top = maximum if maximum is not None else hint
    if not (0 <= minimum <= top and 1 <= hint < 1 << 31 and top < 1 << 62):
        raise reader.error(f"dimension {token.text!r} has an impossible range or hint", token)
    header.dims[token.text] = (hint, minimum, maximum)


def _spec(which: str) -> Callable[[Reader, Header], None]:
    def read(reader: Reader, header: Header) -> None:
        token = reader.advance()
        if which in header.specs:
            raise reader.error(f"`{token.text}` is declared twice", token)
        if reader.take("flat"):
            header.metadata.setdefault(FLATTENED, {})[which] = reader.string()
        structure = reader.structure()
        if which == "in_spec" and not _is_call(structure):
            raise reader.error("`inputs` must look like ((…), {…}): arguments and keyword arguments", token)
        header.specs[which] = spec_of(structure)

    return read


def _is_call(structure: Any) -> bool:
    return (
        isinstance(structure, tuple)
        and len(structure) == 2
        and isinstance(structure[0], (tuple, list))
        and isinstance(structure[1], dict)
    )


def _alias(reader: Reader, header: Header) -> None:
    reader.advance()
    reader.expect("output")
    token = reader.token
    output = reader.natural()
    reader.expect("=")
    reader.expect("input")
    if output in header.aliases:
        raise reader.error(f"output {output} is aliased twice", token)
    header.aliases[output] = reader.natural()


def _metadata(reader: Reader, header: Header) -> None:
    token = reader.token
    raw = reader.lexer.rest_of_line(token)
    try:
        value = json.loads(raw)
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        raise reader.error(f"metadata is not JSON: {error}", token) from error
    if not isinstance(value, dict) or FLATTENED in value:
        raise reader.error(f"metadata must be a JSON object without {FLATTENED!r}", token)
    if header.metadata.keys() - {FLATTENED}:
        raise reader.error("metadata is declared twice", token)
    reader.advance()
    header.metadata = value | {k: v for k, v in header.metadata.items() if k == FLATTENED}


def _weight(reader: Reader, header: Header) -> None:
    kind = reader.advance().text
    token = reader.token
    name = reader.weight_name()
    if name in header.weights:
        raise reader.error(f"weight {name!r} is declared twice", token)
    reader.expect(":")
    declared = reader.placed_type()
    if not isinstance(declared, TensorType) or not all(type(s) is int for s in declared.shape):
        raise reader.error(f"weight {name!r} must be a tensor of fixed sizes", token)
    if kind == "param" and not (declared.dtype.is_floating_point or declared.dtype.is_complex):
        raise reader.error(f"weight {name!r}: only floating point weights have gradients", token)
    _check_size(reader, token, declared)
    reader.expect("=")
    digest = _digest(reader)
    header.weights[name] = WeightDeclaration(token, kind, declared, digest)


def _digest(reader: Reader) -> str:
    if reader.take(META_HASH):
        return META_HASH
    # Digits and letters in any order: read from the text, for tokens would split them.
    token = reader.expect("sha256")
    found = _DIGEST.fullmatch(reader.lexer.rest_of_line(token))
    if found is None:
        raise reader.error("expected sha256: and 64 hexadecimal digits", token)
    reader.advance()
    return found.group(1)


def _check_size(reader: Reader, token: Token, declared: TensorType) -> None:
    elements = 1
    for size in declared.shape:
        elements *= max(1, size)
    reach = sum(abs(s) * n for s, n in zip(declared.strides or (), declared.shape, strict=False) if type(s) is int)
    if len(declared.shape) > MAX_RANK or elements > MAX_ELEMENTS or reach > MAX_ELEMENTS:
        raise reader.error(f"a tensor of {elements} elements in {len(declared.shape)} dimensions is too large", token)


def _tied(reader: Reader, header: Header) -> None:
    reader.advance()
    token = reader.token
    alias = reader.weight_name()
    reader.expect("=")
    if alias in header.tied:
        raise reader.error(f"{alias!r} is tied twice", token)
    header.tied[alias] = reader.weight_name()


def _check_tied(reader: Reader, header: Header) -> None:
    for alias, name in header.tied.items():
        if name not in header.weights or alias in header.weights:
            raise reader.error(f"tied @{alias} = @{name}: the second must be a declared weight, the first none")


_DECLARATIONS: dict[str, Callable[[Reader, Header], None]] = {
    "dim": _dim,
    "inputs": _spec("in_spec"),
    "outputs": _spec("out_spec"),
    "alias": _alias,
    "metadata": _metadata,
    "tied": _tied,
}
