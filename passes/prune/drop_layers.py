"""Dropping whole layers of a decoder: the residual stream goes on as if they were not there.

A layer is what lies on the residual stream from one attention to the next: the stream's additions x + f(x) whose f
holds the attention, and those up to the next attention. It is found by dataflow, so parallel and sequential blocks, and
any number of additions a layer, are the same. Runs after canonicalization and before `insert-kv-cache`: the caches of
dropped layers are never made. Does not handle: models without a residual stream.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.fx as fx

from irc.core.contract import Finding, Pass, PassContext, PassResult, Preserves, Skip, register_pass
from irc.core.errors import OptionError
from irc.core.ops.registry import is_irc_op
from irc.core.program import Program


@register_pass
@dataclass(frozen=True, kw_only=True)
class DropLayers(Pass):
    """x + f(x) → x, for every addition of the dropped layers.

    Attributes:
        layers: numbers of the layers to drop, from 0, separated by `;` (`1;3`).

    Preserves: nothing: what the rest still does must be measured.
    """

    name: ClassVar[str] = "drop-layers"
    layers: str = ""

    def __post_init__(self) -> None:
        try:
            self.numbers()
        except ValueError:
            raise OptionError(f"{self.name}: layers are numbers separated by ';', not {self.layers!r}") from None

    def numbers(self) -> list[int]:
        """The layers to drop."""
        return sorted({int(part) for part in self.layers.split(";") if part.strip()})

    @property
    def preserves(self) -> Preserves:
        return Preserves("lossy", rtol=float("inf"), max_kl=float("inf"))

    def requires(self, program: Program) -> list[str]:
        count = len(find_layers(program))
        wrong = [number for number in self.numbers() if not 0 <= number < count]
        if wrong:
            return [f"there is no layer {wrong[0]}: the program has {count} (numbered from 0)"]
        if count and len(self.numbers()) == count:
            return [f"all {count} layers would be dropped"]
        return []

    def ensures(self, before: Program, result: PassResult) -> list[Finding]:
        """What is left reads what it read before, or the stream where an addition is gone; nothing else changed."""
        left = {node.name: node for node in result.program.graph.nodes}
        layers = find_layers(before)
        gone = {
            addition.name: stream.name
            for number in self.numbers()
            for addition, stream in layers[number]
            if addition.name not in left
        }

        def resolved(node: fx.Node) -> str:
            name = node.name
            while name in gone:
                name = gone[name]
            return name

        findings = []
        old = {node.name: node for node in before.graph.nodes}
        for name, node in left.items():
            was = old.get(name)
            if was is None or was.target != node.target:
                findings.append(Finding(name, "is no operation of the program before"))
                continue
            expected = fx.map_arg((was.args, was.kwargs), resolved)
            if fx.map_arg((node.args, node.kwargs), lambda used: used.name) != expected:
                findings.append(Finding(name, "reads something else than before, beyond the dropped additions"))
        return findings

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        matches, skips = 0, list[Skip]()
        layers = find_layers(program)
        # Backwards: the stream before an addition may be an addition that is dropped as well.
        for number in reversed(self.numbers()):
            for addition, stream in reversed(layers[number]):
                if ctx.allow(addition):
                    addition.replace_all_uses_with(stream)
                    matches += 1
        program.erase_dead()
        return PassResult(program, matches=matches, skips=skips, modified=matches > 0)


def find_layers(program: Program) -> list[list[tuple[fx.Node, fx.Node]]]:
    """For each layer its additions to the residual stream, each with the stream before it, in order."""
    layers: list[list[tuple[fx.Node, fx.Node]]] = []
    seen: set[fx.Node] = set()
    for addition, stream in _stream(program):
        inner = _above(addition, stream)
        if any(_attends(node) for node in inner - seen):
            layers.append([])
        seen |= inner
        if layers:
            layers[-1].append((addition, stream))
    return layers


def _stream(program: Program) -> list[tuple[fx.Node, fx.Node]]:
    """The additions of the residual stream, first to last, each with its operand that is the stream so far.

    The stream is the longest chain of additions of equal types in which each addition's other operand is computed
    from the stream before it: from the addition before, or from one before that (parallel blocks).
    """
    chain: dict[fx.Node, tuple[int, fx.Node]] = {}
    for node in program.graph.nodes:
        if not _is_addition(node):
            continue
        for stream, branch in (tuple(node.args[:2]), tuple(node.args[1::-1])):
            if not isinstance(stream, fx.Node) or not isinstance(branch, fx.Node):
                continue
            length = chain[stream][0] + 1 if stream in chain else 1
            longer = node not in chain or length > chain[node][0]
            same = program.type_text(stream) == program.type_text(node)
            if longer and same and _comes_from(branch, stream, chain):
                chain[node] = (length, stream)
    found: list[tuple[fx.Node, fx.Node]] = []
    last: fx.Node | None = max(chain, key=lambda n: chain[n][0], default=None)
    while last is not None and last in chain:
        found.append((last, chain[last][1]))
        last = chain[last][1]
    return found[::-1]


def _comes_from(branch: fx.Node, stream: fx.Node, chain: dict[fx.Node, tuple[int, fx.Node]]) -> bool:
    """Whether the branch is computed from the stream, or from where the stream was up to two additions before."""
    for _ in range(3):
        if stream is branch:
            return False
        if stream in _above(branch, stream):
            return True
        if stream not in chain:
            return False
        stream = chain[stream][1]
    return False


def _is_addition(node: fx.Node) -> bool:
    return node.target is torch.ops.aten.add.Tensor and not node.kwargs


def _attends(node: fx.Node) -> bool:
    return any(is_irc_op(node.target, name) for name in ("attention", "flash_attention"))


def _above(node: fx.Node, stop: fx.Node) -> set[fx.Node]:
    found: set[fx.Node] = set()
    pending = [node]
    while pending:
        for used in pending.pop().all_input_nodes:
            if used not in found:
                found.add(used)
                if used is not stop:
                    pending.append(used)
    return found
