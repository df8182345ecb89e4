"""Read the text form back to a program equal to the one that was printed.

A hand-written recursive descent: nothing is evaluated, and names resolve only to operators of the namespaces
`aten`, `irc`, `prims` and `_c10d_functional` that are pure and give tensors. The text may be hostile: every limit is
checked, and what is wrong is a `ParseError` with line, column and the line itself.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Mapping
from typing import Any

import sympy
import torch
import torch.fx as fx
from torch import Tensor

from irc.core.errors import IrcError, ParseError, VerificationError, nearest
from irc.core.listing.values import type_text
from irc.core.program import VAL, Program
from irc.core.provenance import SOURCES_KEY, Source
from irc.core.schema import NAMESPACES, argument_problems, refusal
from irc.core.sizes import SizeBuilder
from irc.core.text.building import build_program
from irc.core.text.header import Header, read_header
from irc.core.text.lexer import Token
from irc.core.text.reader import Reader, SizeType, TensorType, Type
from irc.core.text.work import too_much_work


def parse(text: str, weights: Mapping[str, Tensor] | None = None) -> Program:
    """The program that `str(program)` describes.

    Without `weights` all weights are on the meta device: the program has types but cannot run. With `weights`
    (by name, `other.weights` say) it runs; they must be there, with the declared types and content.

    Raises:
        ParseError: the text is no program, or the weights are not those it declares.
    """
    if not isinstance(text, str):
        raise ParseError(f"a program is read from a string, not from {type(text).__name__}")
    try:
        return _Parser(text, weights).program()
    except RecursionError as error:
        raise ParseError("the text is nested too deeply") from error


class _Parser:
    def __init__(self, text: str, weights: Mapping[str, Tensor] | None) -> None:
        self.reader = Reader(text)
        self.given = weights
        self.nodes: dict[str, fx.Node] = {}

    def program(self) -> Program:
        reader = self.reader
        header = read_header(reader)
        reserved = _node_names(reader.lexer.text)
        program, self.nodes, self.weights = build_program(reader, header, self.given, reserved)
        self.sizes = SizeBuilder(program, reserved=reserved)
        self.target = program
        while reader.token.kind == "node":
            self._operation()
        self._return(header)
        reader.expect("}")
        if reader.token.kind != "end":
            raise reader.error("text after the program's end")
        program.graph_module.recompile()
        return program

    # ---------------------------------------------------------------- operations

    def _operation(self) -> None:
        reader = self.reader
        name = reader.advance()
        if name.text[1:] in self.nodes:
            raise reader.error(f"{name.text} is defined twice", name)
        reader.expect(":")
        declared = reader.type()
        reader.expect("=")
        start = reader.token
        target: Any = operator.getitem if start.kind == "node" else self._target()
        args, kwargs = (self._item(), {}) if start.kind == "node" else self._arguments(target)
        node = self._create(name, start, target, args, kwargs, declared)
        self._check_type(name, declared, node.meta[VAL])
        self._provenance(node)
        self.nodes[name.text[1:]] = node

    def _create(
        self, name: Token, start: Token, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], declared: Type
    ) -> fx.Node:
        if target is not operator.getitem:
            problems = argument_problems(target, args, kwargs)
            work = too_much_work(target, args, kwargs)
            if problems or work:
                raise self.reader.error(f"{target} {'; '.join(problems) or work}", start)
        node = self.target.graph.create_node("call_function", target, args, kwargs, name=name.text[1:])
        try:
            self.target.infer_type(node)
        except VerificationError as error:
            raise self.reader.error(str(error), start) from error
        return node

    def _item(self) -> tuple[Any, ...]:
        reader = self.reader
        at, source = reader.token, self._node()
        reader.expect("[")
        index = reader.natural()
        reader.expect("]")
        results = source.meta[VAL]
        if not isinstance(results, (tuple, list)):
            raise reader.error(f"{at.text} has one result, there is nothing to choose from", at)
        if index >= len(results):
            raise reader.error(f"{at.text} has {len(results)} results, there is no [{index}]", at)
        return source, index

    def _target(self) -> torch._ops.OpOverload:
        token = self.reader.expect_kind("word", "an operator like aten.linear")
        parts = token.text.split(".")
        if len(parts) not in (2, 3) or parts[0] not in NAMESPACES:
            raise self.reader.error(
                f"{token.text!r} is no operator: expected namespace.name or namespace.name.overload,"
                f" with a namespace of {', '.join(NAMESPACES)}",
                token,
            )
        target = _find_operator(parts[0], parts[1], parts[2] if len(parts) == 3 else "default")
        if isinstance(target, str):
            raise self.reader.error(target, token)
        reason = refusal(target)
        if reason is not None:
            raise self.reader.error(reason, token)
        return target

    def _arguments(self, target: torch._ops.OpOverload) -> tuple[tuple[Any, ...], dict[str, Any]]:
        reader = self.reader
        args: list[Any] = []
        kwargs: dict[str, Any] = {}
        arguments = target._schema.arguments
        kinds = {a.name: str(a.real_type) for a in arguments}
        order = [a.name for a in arguments if not a.kwarg_only]

        def read() -> None:
            key, value = self._argument()
            if key is None:
                if kwargs:
                    raise reader.error("a positional argument after a named one", reader.previous)
                kind = kinds[order[len(args)]] if len(args) < len(order) else ""
                args.append(self._converted(value, kind))
            elif key in kwargs:
                raise reader.error(f"argument {key!r} is given twice", reader.previous)
            else:
                kwargs[key] = self._converted(value, kinds.get(key, ""))

        reader.expect("(")
        reader.items(")", read)
        return tuple(args), kwargs

    def _argument(self) -> tuple[str | None, Any]:
        """Name (None: positional) and value."""
        reader = self.reader
        follows = reader.lexer.text[reader.token.stop : reader.token.stop + 2]
        if reader.token.kind == "word" and follows.startswith("=") and follows != "==":
            key = reader.advance().text
            reader.expect("=")
            return key, self._value()
        return None, self._value()

    def _value(self) -> Any:
        reader = self.reader
        if reader.take("["):
            return reader.nested(lambda: reader.items("]", self._value))
        if reader.token.kind == "string":
            return reader.string()
        if reader.token.kind == "node":
            return self._node()
        if reader.token.kind == "weight":
            token = reader.token
            return self._weight(token, reader.weight_name())
        start = reader.token
        return self._size(reader.expression(), start)

    def _size(self, value: Any, start: Token) -> Any:
        """A sympy expression becomes a node that computes it; other constants stay."""
        if not isinstance(value, sympy.Basic):
            return value
        self._check_dims()
        try:
            return self.sizes.value(value)
        except IrcError as error:
            raise self.reader.error(str(error), start) from error

    def _check_dims(self) -> None:
        for name, token in self.reader.dim_uses.items():
            if name not in self.target.dims:
                raise self.reader.error(f"unknown dimension {name!r}{nearest(name, self.target.dims)}", token)

    def _converted(self, value: Any, kind: str) -> Any:
        if isinstance(value, str) and kind in ("Device", "Optional[Device]"):
            try:
                return torch.device(value)
            except RuntimeError as error:
                raise self.reader.error(f"{value!r} is not a device", self.reader.previous) from error
        return value

    def _node(self) -> fx.Node:
        token = self.reader.advance()
        found = self.nodes.get(token.text[1:])
        if found is None:
            hint = nearest(token.text[1:], self.nodes)
            raise self.reader.error(f"{token.text} is not defined before its use{_short(hint)}", token)
        return found

    def _weight(self, token: Token, name: str) -> fx.Node:
        found = self.weights.get(name)
        if found is None:
            raise self.reader.error(f"weight {name!r} is not declared{_short(nearest(name, self.weights))}", token)
        return found

    # ---------------------------------------------------------------- checks

    def _check_type(self, name: Token, declared: Type, actual: Any) -> None:
        self._check_dims()
        if not same_type(self.target, declared, actual):
            shown = type_text(self.target, actual)
            raise self.reader.error(
                f"{name.text} is declared with another type than the operation gives: {shown}", name
            )

    def _provenance(self, node: fx.Node) -> None:
        reader = self.reader
        comment, last = reader.comment, reader.previous
        reader.comment = None
        if comment is None or last is None or comment.line != last.line:
            return
        module, _, location = comment.text[1:].strip().partition(" ")
        source = Source(node.name, "" if module == "-" else module, location.strip())
        node.meta[SOURCES_KEY] = frozenset((source,))

    def _return(self, header: Header) -> None:
        reader = self.reader
        start = reader.expect("return")
        values = []
        while not reader.at("}"):
            values.append(self._value())
            if not reader.take(","):
                break
        if len(values) != len(header.outputs):
            raise reader.error(f"{len(values)} values for {len(header.outputs)} declared outputs", start)
        if header.out_spec.num_leaves != len(values):
            raise reader.error(f"{len(values)} values for {header.out_spec.num_leaves} places of `outputs`", start)
        for index, (value, declared) in enumerate(zip(values, header.outputs, strict=True)):
            actual = value.meta[VAL] if isinstance(value, fx.Node) else value
            if not same_type(self.target, declared, actual):
                shown = type_text(self.target, actual)
                raise reader.error(f"output {index} is declared with another type than it has: {shown}", start)
        self.target.graph.output(tuple(values))
        self._aliases(header, values, start)

    def _aliases(self, header: Header, values: list[Any], start: Token) -> None:
        inputs = self.target.placeholders
        for out, into in header.aliases.items():
            if out >= len(values) or into >= len(inputs):
                raise self.reader.error(f"alias output {out} = input {into}: there is no such output or input", start)
        self.target.aliases = dict(header.aliases)


def same_type(program: Program, declared: Type, actual: Any) -> bool:
    """Whether a value has the declared type; sizes are compared as functions of the dims."""
    if isinstance(declared, TensorType):
        if not isinstance(actual, Tensor) or actual.dtype != declared.dtype or actual.dim() != len(declared.shape):
            return False
        return all(same_size(program, d, a) for d, a in zip(declared.shape, actual.shape, strict=True))
    if isinstance(declared, tuple):
        if not isinstance(actual, (tuple, list)) or len(actual) != len(declared):
            return False
        return all(same_type(program, d, a) for d, a in zip(declared, actual, strict=True))
    if isinstance(declared, SizeType):
        return (
            not isinstance(actual, (Tensor, tuple, list))
            and actual is not None
            and same_size(program, declared.value, actual)
        )
    return actual is None


def same_size(program: Program, declared: Any, actual: Any) -> bool:
    """Whether two sizes are the same expression, or at least agree at several sizes of every dimension."""
    if isinstance(actual, str) or isinstance(declared, str):
        return declared == actual
    a, b = sympy.sympify(declared), program.expr(actual)
    if a == b:
        return True
    symbols = sorted(a.free_symbols | b.free_symbols, key=str)
    if not symbols:
        return bool(a == b)
    for sample in range(1, 6):
        point = {s: sympy.Integer(2 + sample * (7 + 4 * i) % 31) for i, s in enumerate(symbols)}
        try:
            if a.xreplace(point) != b.xreplace(point):
                return False
        except (ArithmeticError, TypeError, ValueError):
            return False
    return True


def _find_operator(namespace: str, name: str, overload: str) -> torch._ops.OpOverload | str:
    """The overload, or what is wrong with the name."""
    _, overloads = torch._C._jit_get_operation(f"{namespace}::{name}")
    if overloads is None:
        known = [
            s.name.partition("::")[2] for s in torch._C._jit_get_all_schemas() if s.name.startswith(f"{namespace}::")
        ]
        return f"there is no operator {namespace}.{name}{_short(nearest(name, set(known)))}"
    names = [o or "default" for o in overloads]
    if overload not in names:
        return f"{namespace}.{name} has no overload {overload!r}{nearest(overload, names)}"
    packet = getattr(getattr(torch.ops, namespace), name)
    target = getattr(packet, overload) if isinstance(packet, torch._ops.OpOverloadPacket) else None
    return target if isinstance(target, torch._ops.OpOverload) else f"{namespace}.{name} is no operator"


def _short(hint: str) -> str:
    """A hint, unless it is a list of everything that exists."""
    return hint if len(hint) < 400 else ""


def _node_names(text: str) -> set[str]:
    """Every word after a `%`: names that nodes of our own making must leave free."""
    return set(re.findall(r"%([A-Za-z_]\w*)", text, re.ASCII))
