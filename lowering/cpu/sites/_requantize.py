"""Epilogues of integer layers that end in integers, recognised in the kernel IR: `irc/requantize.h` computes them.

    clamp(round(bounded(acc + bias + added) / scale) + zero point)

Bias, bounds (ReLU, ReLU6, a clamp) and the added tensor may be missing; what is added is f32, or
8-bit integers that are dequantized there (a residual sum). Any other epilogue is printed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import sympy
import torch
from torch import Tensor

from irc.core.program import Program
from irc.lowering.cpp.function import PrintedEpilogue
from irc.lowering.cpp.templates.base import PANEL, pad_to
from irc.lowering.cpu.weights import WeightBlock
from irc.lowering.kernels.buffers import Buffer
from irc.lowering.kernels.kernel import Loop, Store
from irc.lowering.kernels.sites import TemplateCall
from irc.lowering.kernels.values import Apply, Literal, Load, Local, Value

_LARGEST = torch.finfo(torch.float32).max
_C_TYPES = {"f32": "float", "u8": "uint8_t", "i8": "int8_t"}


@dataclass
class _Terms:
    """What is added to the sums.

    Attributes:
        bias: of each channel, in real numbers.
        added: the tensor, with the numbers that its elements minus `added_zero` are multiplied with.
    """

    bias: Tensor
    added: Buffer | None = None
    added_scale: float = 1.0
    added_zero: int = 0
    sums: int = 0


@dataclass(frozen=True)
class Requantization:
    """An epilogue of that form.

    Attributes:
        low, high: bounds of the result, in which those of the real number are, too: rounding keeps order.
    """

    scale: float
    zero: int
    low: int
    high: int
    terms: _Terms = field(repr=False)

    @staticmethod
    def of(call: TemplateCall, program: Program, channels: int) -> Requantization | None:
        """What a call's epilogue is, or None."""
        reader = _Reader.of(call, program, channels)
        if reader is None:
            return None
        value = reader.store.value
        if isinstance(value, Apply) and value.op.startswith("round.") and value.dtype == "i32":
            value = value.args[0]  # of what fits anyway
        match value:
            case Apply("bounded", (whole, Literal(low), Literal(high))):
                pass
            case _:
                return None
        zero: float | None = 0
        match whole:
            case Apply("add", (rounded, Apply("convert", (Load() as load,)))):
                whole, zero = rounded, reader.number(load)
        match whole:
            case Apply("round", (Apply("div", (real, Load() as load)),)) if zero is not None:
                scale = reader.number(load)
            case _:
                return None
        inner, least, most = _bounds(real)
        terms = reader.terms(inner)
        if scale is None or not scale > 0 or terms is None or not terms.added_scale / scale <= _LARGEST:
            return None  # of values that are next to nothing: what divides by their scale leaves f32
        # As the program rounds them: in f32.
        ends = (torch.tensor([least, most]) / torch.tensor(scale)).round() + zero
        first, last = ends.clamp(int(low), int(high)).tolist()
        return Requantization(scale, int(zero), int(first), int(last), terms)

    def epilogue(self, call: TemplateCall, weights: WeightBlock, scales: Tensor) -> PrintedEpilogue:
        """The epilogue as C++.

        Args:
            weights: gets the factors and offsets.
            scales: [channels], what a sum is multiplied with to be a real number.
        """
        terms, name = self.terms, f"factors and offsets of {call.name}"
        factors = scales.double() / self.scale
        added_factor = terms.added_scale / self.scale
        offsets = terms.bias.double() / self.scale - terms.added_zero * added_factor
        both = torch.stack(
            [pad_to(torch.cat([x.float(), x.new_zeros(PANEL).float()]), 0, PANEL) for x in (factors, offsets)]
        )
        at = weights.add(name, both)
        added = "irc::Nothing" if terms.added is None else _C_TYPES[terms.added.dtype]
        out = _C_TYPES[call.write.dtype]
        text = (
            f"irc::Requantize<{out}, {added}> epilogue{{out0, {'nullptr' if terms.added is None else 'in0'}, factors,"
            f" factors + {both.shape[1]}, added_factor, least, most,"
            f" {len(factors)}, result_zero}}"
        )
        given: list[tuple[str, Buffer | str]] = [(f"{out}* out0", call.write)]
        if terms.added is not None:
            given.append((f"const {added}* in0", terms.added))
        given += [
            ("const float* factors", f"reinterpret_cast<const float*>(arguments.weights + {at})"),
            ("float added_factor", f"{float(torch.tensor(added_factor, dtype=torch.float32))!r}f"),
            ("float least", str(self.low - self.zero)), ("float most", str(self.high - self.zero)),
            ("int result_zero", str(self.zero)),
        ]  # fmt: skip
        parameters, arguments = zip(*given, strict=True)
        return PrintedEpilogue(text, parameters, arguments, (), takes_sums=True)


@dataclass(frozen=True)
class _Reader:
    """An epilogue of one store to rows of channels, and the weights that it reads."""

    program: Program
    channels: int
    column: sympy.Symbol
    store: Store

    @staticmethod
    def of(call: TemplateCall, program: Program, channels: int) -> _Reader | None:
        kernel = call.epilogue
        if kernel is None or len(kernel.outer) != 1 or len(kernel.body) != 1 or call.write.dtype not in ("u8", "i8"):
            return None
        loop = kernel.body[0]
        if not isinstance(loop, Loop) or len(loop.body) != 1 or not isinstance(loop.body[0], Store):
            return None
        store, column = loop.body[0], loop.axis.symbol
        at = channels * kernel.outer[0].symbol + column
        if store.when is not None or store.offset.bindings or sympy.expand(store.offset.expr - at) != 0:
            return None
        return _Reader(program, channels, column, store)

    def number(self, load: Load) -> float | None:
        """A weight of one element."""
        if load.buffer.kind != "weight" or load.offset != 0 or load.bindings:
            return None
        tensor = self.program.weight(load.buffer.name)
        return float(tensor.detach().item()) if tensor.numel() == 1 else None

    def terms(self, value: Value) -> _Terms | None:
        """A sum of the template's result, biases and at most one tensor."""
        terms = _Terms(torch.zeros(self.channels))
        for part in _summands(value):
            if isinstance(part, Local):
                terms.sums += 1
            elif not self._bias(part, terms) and not self._added(part, terms):
                return None
        return terms if terms.sums == 1 else None

    def _bias(self, part: Value, terms: _Terms) -> bool:
        if not isinstance(part, Load) or part.buffer.kind != "weight" or part.buffer.dtype != "f32":
            return False
        tensor = self.program.weight(part.buffer.name).detach()
        if part.bindings or part.offset != self.column or tensor.numel() != self.channels:
            return False
        terms.bias = terms.bias + tensor.reshape(-1)
        return True

    def _added(self, part: Value, terms: _Terms) -> bool:
        zero: float | None = 0
        scale: float | None = 1.0
        match part:
            case Apply("mul", (Apply("convert", (stored,)), Load() as load)) if part.dtype == "f32":
                scale = self.number(load)
                match stored:
                    case Apply("sub", (inner, Load() as offset)):
                        stored, zero = inner, self.number(offset)
            case _:
                stored = part
        known = ("u8", "i8") if stored is not part else ("f32",)
        if not isinstance(stored, Load) or stored.buffer.dtype not in known or stored.buffer.kind == "weight":
            return False
        same_place = not stored.bindings and sympy.expand(stored.offset - self.store.offset.expr) == 0
        if not same_place or terms.added is not None or scale is None or zero is None:
            return False
        terms.added, terms.added_scale, terms.added_zero = stored.buffer, scale, int(zero)
        return True


def _bounds(value: Value) -> tuple[Value, float, float]:
    """(x, least, most) of a value that is x between two numbers: of a ReLU, of a clamp."""
    least, most = -math.inf, math.inf
    while True:
        match value:
            case Apply("relu", (inner,)):
                least = min(max(least, 0.0), most)
            case Apply("maximum", (inner, Literal(bound))):
                least = min(max(least, float(bound)), most)
            case Apply("minimum", (inner, Literal(bound))):
                most = max(min(most, float(bound)), least)
            case _:
                return value, least, most
        value = inner


def _summands(value: Value) -> Iterator[Value]:
    if isinstance(value, Apply) and value.op == "add" and value.dtype == "f32":
        for part in value.args:
            yield from _summands(part)
    else:
        yield value
