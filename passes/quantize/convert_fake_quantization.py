"""Quantization-aware training, after: trained fake quantization becomes stored integers and Q/DQ, bit for bit.

Runs behind `insert-fake-quantization` and training, before lowering. What multiplies afterwards are the very numbers
that were trained, so every output is equal. Does not handle: a scale that training drove to zero or below (an error
that names it: train with a smaller step for the scales).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.fx as fx

from irc.core import formats
from irc.core.contract import Finding, Pass, PassContext, PassResult, Preserves, register_pass
from irc.core.operands import apply_op, input_node
from irc.core.ops.registry import is_irc_op
from irc.core.program import VAL, Program

aten, ops = torch.ops.aten, torch.ops.irc


@register_pass
@dataclass(frozen=True, kw_only=True)
class ConvertFakeQuantization(Pass):
    """irc.fake_quantize(x, s) → irc.dequantize(irc.quantize(x, s), s); for weights with the integers stored.

    Preserves: exact, bit for bit.
    """

    name: ClassVar[str] = "convert-fake-quantization"
    preserves: ClassVar[Preserves] = Preserves("exact", rtol=0.0)

    def requires(self, program: Program) -> list[str]:
        problems = []
        for node in _fakes(program):
            scale = program.weight(input_node(node, 1))
            if scale.device.type != "meta" and not bool((scale.isfinite() & (scale > 0)).all()):
                problems.append(
                    f"{node.name}: scale {input_node(node, 1).target} = {float(scale.detach().min()):.3g} is no step;"
                    " train scales with a smaller learning rate"
                )
        return problems

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        counts = {"weights": 0, "values": 0}
        for node in _fakes(program):
            if not ctx.allow(node):
                continue
            stored = _weight_rows(node)
            counts["values" if stored is None else "weights"] += 1
            _convert(program, node, stored)
        matches = sum(counts.values())
        if matches:
            program.erase_dead()
        return PassResult(program, matches=matches, modified=matches > 0, statistics=counts)

    def ensures(self, before: Program, result: PassResult) -> list[Finding]:
        """Stored integers give what the fake quantization of the trained weight gave, number for number."""
        old = {node.name: node for node in before.graph.nodes}
        findings = []
        for node in result.program.graph.nodes:
            if node.name in old or not is_irc_op(node.target, "dequantize") or node.args[0].op != "get_attr":
                continue
            name = node.meta.get("irc_origin")
            fake = old.get(name) if name else None
            if fake is None or not is_irc_op(fake.target, "fake_quantize"):
                findings.append(Finding(node.name, "stands for no fake quantization of the program before"))
                continue
            expected = _value(before, fake)
            found = _value(result.program, node)
            if expected.device.type != "meta" and not torch.equal(expected, found):
                findings.append(
                    Finding(node.name, f"differs from {fake.name} in {int((expected != found).sum())} numbers")
                )
        return findings


def _fakes(program: Program) -> list[fx.Node]:
    return [node for node in program.operations() if is_irc_op(node.target, "fake_quantize")]


def _weight_rows(node: fx.Node) -> fx.Node | None:
    """The stored weight that a fake quantization is over (as it is, or seen as rows), or None for an activation."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    if source.target is aten.view.default and isinstance(source.args[0], fx.Node):
        source = source.args[0]
    return source if source.op == "get_attr" else None


def _convert(program: Program, node: fx.Node, weight: fx.Node | None) -> None:
    source, scale, zero_point = node.args[:3]
    assert isinstance(source, fx.Node)
    assert isinstance(scale, fx.Node)
    text = str(node.kwargs["format"])
    parts: list[Any] = [
        program.weight_node(f"{part.target}_final", program.weight(part).detach(), before=node)
        if isinstance(part, fx.Node)
        else None
        for part in (scale, zero_point)
    ]
    if weight is None:
        stored = program.insert(ops.quantize.default, source, *parts, before=node, format=text)
    else:
        rows = program.weight(weight).detach().reshape(tuple(source.meta[VAL].shape))
        zeros = None if parts[1] is None else program.weight(parts[1])
        integers = formats.parse(text).quantize(rows, program.weight(parts[0]), zeros)
        stored = program.weight_node(f"{weight.target}_stored", integers, before=node)
    dtype = node.meta[VAL].dtype
    options: dict[str, Any] = {} if dtype == scale.meta[VAL].dtype else {"dtype": dtype}
    restored = program.insert(ops.dequantize.default, stored, *parts, before=node, format=text, **options)
    program.replace(node, restored)


def _value(program: Program, node: fx.Node) -> torch.Tensor:
    """What an operation over stored weights gives."""

    def of(used: fx.Node) -> torch.Tensor:
        if used.op == "get_attr":
            return program.weight(used).detach()
        return program.weight(input_node(used)).detach().reshape(tuple(used.meta[VAL].shape))

    args, kwargs = fx.map_arg((node.args, node.kwargs), of)
    return apply_op(node, *args, **kwargs)
