"""Print a program as a typed listing that carries all of it but the weights' values.

    irc 1

    program @tinypy(%input_ids: i64[B, S]) -> f32[B, S, 2048] {
      dim B = 3 in 1..
      dim S = 16 in 1..512
      inputs ((*,), {})
      outputs *
      metadata {"capture": {"frontend": "torch"}}
      param @embed.weight: f32[2048, 256] = sha256:1b4f…
      tied @lm_head.weight = @embed.weight

      %embedding: f32[B, S, 256] = aten.embedding(@embed.weight, %input_ids)  # embed model.py:31
      …
      return %linear
    }

Sizes are expressions over dims; the nodes that compute them are left out and made anew by the parser. A
comment after an operation is its provenance: module path (or `-`) and `file:line`.
"""

from __future__ import annotations

import json
import operator
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor, nn

from irc.core import provenance as prov
from irc.core.content_hash import META_HASH, content_hash
from irc.core.errors import IrcError
from irc.core.listing.specs import FLATTENED, spec_text
from irc.core.listing.values import (
    FORMAT_VERSION,
    bare_or_quoted,
    literal,
    placement_text,
    quoted,
    size_text,
    type_text,
)  # fmt: skip
from irc.core.typed_graph import VAL, TypedGraph, is_size


def print_program(program: TypedGraph, *, provenance: bool = True, width: int = 100) -> str:
    """The text form. `provenance` adds the comments; they start at column `width` at the latest, if they can.

    A broken program prints too, as far as possible (`?` for a missing type), so that errors can show it.
    """
    printer = _Printer(program)
    lines = [
        f"irc {FORMAT_VERSION}",
        "",
        printer.signature(),
        *("  " + line for line in printer.declarations()),
        "",
    ]
    lines += _body(printer, provenance, width)
    lines += [f"  return {', '.join(printer.argument(v) for v in program.outputs)}".rstrip(), "}"]
    return "\n".join(lines) + "\n"


def operation_text(program: TypedGraph, node: fx.Node) -> str:
    """One operation as the listing shows it, without comment."""
    return _Printer(program).operation(node)


def target_name(target: Any) -> str:
    """`aten.embedding`, `aten.add.Tensor`: namespace, name and overload unless that is the default one."""
    if isinstance(target, torch._ops.OpOverload):
        overload = target._overloadname
        base = target._schema.name.replace("::", ".")
        return base if overload == "default" else f"{base}.{overload}"
    return f"python.{getattr(target, '__module__', '')}.{getattr(target, '__name__', target)}"


def comment_text(node: fx.Node) -> str:
    """Module path and location of a node on one line, or an empty string."""
    module, location = (" ".join(t.split()) for t in (prov.module_path(node), prov.location(node)))
    if not module and not location:
        return ""
    return f"# {module.replace(' ', '_') or '-'} {location}".rstrip()


def _body(printer: _Printer, provenance: bool, width: int) -> list[str]:
    nodes = [n for n in printer.program.graph.nodes if n.op not in ("placeholder", "get_attr", "output")]
    shown = [n for n in nodes if not is_size(n)]
    lines = [f"  {printer.operation(n)}" for n in shown]
    if not provenance:
        return lines
    column = max((len(line) for line in lines if len(line) <= width), default=0)
    comments = [comment_text(n) for n in shown]
    return [f"{line:<{column}}  {c}" if c else line for line, c in zip(lines, comments, strict=True)]


class _Printer:
    def __init__(self, program: TypedGraph) -> None:
        self.program = program

    def signature(self) -> str:
        inputs = ", ".join(self._input(node) for node in self.program.placeholders)
        outputs = [self._output_type(v) for v in self.program.outputs]
        result = outputs[0] if len(outputs) == 1 else f"({', '.join(outputs)})"
        return f"program @{bare_or_quoted(self.program.name)}({inputs}) -> {result} {{"

    def _input(self, node: fx.Node) -> str:
        alias = "" if node.name == node.target else f" as {quoted(str(node.target))}"
        value = node.meta.get(VAL)
        placement = placement_text(self.program, value) if isinstance(value, Tensor) else ""
        return f"%{node.name}{alias}: {self._type(node)}{placement}"

    def _output_type(self, value: Any) -> str:
        if isinstance(value, fx.Node):
            return self._type(value)
        return "None" if value is None else f"size({literal(value)})"

    def _type(self, node: fx.Node) -> str:
        return type_text(self.program, node.meta[VAL]) if VAL in node.meta else "?"

    def declarations(self) -> list[str]:
        program = self.program
        lines = []
        for dim in program.dims.values():
            maximum = "" if dim.maximum is None else dim.maximum
            lines.append(f"dim {dim.name} = {dim.hint} in {dim.minimum}..{maximum}")
        lines.append(f"inputs {spec_text(program, 'in_spec')}")
        lines.append(f"outputs {spec_text(program, 'out_spec')}")
        lines += [f"alias output {out} = input {into}" for out, into in sorted(program.aliases.items())]
        metadata = {k: v for k, v in program.metadata.items() if k != FLATTENED}
        if metadata:
            try:
                lines.append(f"metadata {json.dumps(metadata)}")
            except (TypeError, ValueError, RecursionError) as error:
                raise IrcError(f"metadata of program {program.name} is not JSON: {error}") from error
        lines += [self._weight(name, tensor) for name, tensor in program.weights.items()]
        lines += [f"tied @{bare_or_quoted(a)} = @{bare_or_quoted(b)}" for a, b in sorted(program.tied.items())]
        return lines

    def _weight(self, name: str, tensor: Tensor) -> str:
        kind = "buffer"
        if isinstance(tensor, nn.Parameter):
            kind = "param" if tensor.requires_grad else "frozen"
        digest = content_hash(tensor)
        where = digest if digest == META_HASH else f"sha256:{digest}"
        place = placement_text(self.program, tensor)
        return f"{kind} @{bare_or_quoted(name)}: {type_text(self.program, tensor)}{place} = {where}"

    def operation(self, node: fx.Node) -> str:
        left = f"%{node.name}: {self._type(node)} = "
        if node.target is operator.getitem:
            return f"{left}{self.argument(node.args[0])}[{self.argument(node.args[1])}]"
        parts = [self.argument(a) for a in node.args]
        parts += [f"{key}={self.argument(value)}" for key, value in node.kwargs.items()]
        return f"{left}{target_name(node.target)}({', '.join(parts)})"

    def argument(self, value: Any) -> str:
        if isinstance(value, fx.Node):
            if value.op == "get_attr":
                return f"@{bare_or_quoted(str(value.target))}"
            if value.op == "call_function" and is_size(value):
                return size_text(self.program, value.meta[VAL])
            return f"%{value.name}"
        if isinstance(value, (list, tuple)):
            return f"[{', '.join(self.argument(v) for v in value)}]"
        return literal(value)
