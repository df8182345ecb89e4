"""Functions of each element, and reductions."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from irc.core.errors import CaptureError
from irc.frontend.onnx.calls import Call, operator

_UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "Abs": torch.abs, "Acos": torch.acos, "Asin": torch.asin, "Atan": torch.atan, "Ceil": torch.ceil, "Cos": torch.cos,
    "Erf": torch.erf, "Exp": torch.exp, "Floor": torch.floor, "HardSwish": F.hardswish, "IsNaN": torch.isnan,
    "Log": torch.log, "Mish": F.mish, "Neg": torch.neg, "Not": torch.logical_not, "Reciprocal": torch.reciprocal,
    "Relu": torch.relu, "Round": torch.round, "Sigmoid": torch.sigmoid, "Sign": torch.sign, "Sin": torch.sin,
    "Softplus": F.softplus, "Sqrt": torch.sqrt, "Tan": torch.tan, "Tanh": torch.tanh,
}  # fmt: skip
_BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "And": torch.logical_and, "Or": torch.logical_or, "Xor": torch.logical_xor,
}  # fmt: skip
_MANY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"Max": torch.maximum, "Min": torch.minimum, "Sum": torch.add}
_REDUCTIONS: dict[str, Callable[..., Tensor]] = {
    "ReduceMean": torch.mean, "ReduceSum": torch.sum, "ReduceMax": torch.amax, "ReduceMin": torch.amin,
}  # fmt: skip


def _register() -> None:
    for name, function in _UNARY.items():
        operator(name)(functools.partial(_of_one, function))
    for name, two in _BINARY.items():
        operator(name)(functools.partial(_of_two, two))
    for name, two in _MANY.items():
        operator(name)(functools.partial(_of_many, two))
    for name, reduction in _REDUCTIONS.items():
        operator(name)(functools.partial(_reduced, reduction))


def _of_one(function: Callable[[Tensor], Tensor], call: Call) -> Tensor:
    return function(call.tensor(0))


def _of_two(function: Callable[[Tensor, Tensor], Tensor], call: Call) -> Tensor:
    return function(call.tensor(0), call.tensor(1))


def _of_many(function: Callable[[Tensor, Tensor], Tensor], call: Call) -> Tensor:
    return functools.reduce(function, call.tensors())


def _reduced(reduction: Callable[..., Tensor], call: Call) -> Tensor:
    x, axes = call.tensor(0), call.axes("axes", 1)
    if not axes and call.attribute("noop_with_empty_axes", 0):
        return x
    return reduction(x, axes or list(range(x.dim())), keepdim=bool(call.attribute("keepdims", 1)))


_register()


@operator("Pow")
def power(call: Call) -> Tensor:
    """In the type of the base."""
    x, exponent = call.tensor(0), call.operand(1)
    if isinstance(exponent, float):
        return torch.pow(x, int(exponent) if exponent.is_integer() else exponent)
    return torch.pow(x, exponent.to(x.dtype) if x.is_floating_point() else exponent).to(x.dtype)


@operator("Mod")
def modulo(call: Call) -> Tensor:
    """Sign of the divisor, or with `fmod` of the dividend."""
    return (torch.fmod if call.attribute("fmod", 0) else torch.remainder)(call.tensor(0), call.tensor(1))


@operator("Clip")
def clip(call: Call) -> Tensor:
    """Between bounds that may be missing."""
    x = call.tensor(0)
    if call.opset < 11:
        return x.clamp(call.attribute("min"), call.attribute("max"))
    for index, bound in ((1, torch.maximum), (2, torch.minimum)):
        if call.has(index):
            x = bound(x, call.tensor(index).to(x.dtype))
    return x


@operator("LeakyRelu")
def leaky_relu(call: Call) -> Tensor:
    """Slope below 0."""
    return F.leaky_relu(call.tensor(0), call.attribute("alpha", 0.01))


@operator("Elu")
def elu(call: Call) -> Tensor:
    """α (eˣ - 1) below 0."""
    return F.elu(call.tensor(0), call.attribute("alpha", 1.0))


@operator("PRelu")
def prelu(call: Call) -> Tensor:
    """A slope that is an input."""
    x = call.tensor(0)
    return torch.where(x > 0, x, x * call.tensor(1))


@operator("HardSigmoid")
def hard_sigmoid(call: Call) -> Tensor:
    """clamp(αx + β, 0, 1)."""
    alpha, beta = call.attribute("alpha", 0.2), call.attribute("beta", 0.5)
    x = call.tensor(0)
    return F.hardsigmoid(x) if abs(alpha - 1 / 6) < 1e-6 and beta == 0.5 else (x * alpha + beta).clamp(0, 1)


@operator("Gelu")
def gelu(call: Call) -> Tensor:
    """Exact, or by tanh."""
    return F.gelu(call.tensor(0), approximate=call.attribute("approximate", "none"))


@operator("Swish")
def swish(call: Call) -> Tensor:
    """x · sigmoid(αx)."""
    x, alpha = call.tensor(0), call.attribute("alpha", 1.0)
    return F.silu(x) if alpha == 1.0 else x * torch.sigmoid(alpha * x)


@operator("Softmax", "LogSoftmax")
def softmax(call: Call) -> Tensor:
    """Along an axis."""
    if call.opset < 13:
        raise CaptureError(f"{call.op} of operator sets before 13 is not read: convert the model to a newer one")
    function = torch.softmax if call.op == "Softmax" else torch.log_softmax
    return function(call.tensor(0), call.attribute("axis", -1))


@operator("ArgMax")
def argmax(call: Call) -> Tensor:
    """Place of the largest."""
    return call.tensor(0).argmax(call.attribute("axis", 0), keepdim=bool(call.attribute("keepdims", 1)))


@operator("CumSum")
def cumsum(call: Call) -> Tensor:
    """Running sum."""
    if call.attribute("exclusive", 0) or call.attribute("reverse", 0):
        raise CaptureError("CumSum: exclusive and reverse sums are not read")
    return call.tensor(0).cumsum(int(call.ints(1)[0]))


@operator("QuickGelu", domain="com.microsoft")
def quick_gelu(call: Call) -> Tensor:
    """x · sigmoid(αx)."""
    x, alpha = call.tensor(0), call.attribute("alpha", 1.702)
    return F.silu(x) if alpha == 1.0 else x * torch.sigmoid(alpha * x)


@operator("FastGelu", "BiasGelu", domain="com.microsoft")
def biased_gelu(call: Call) -> Tensor:
    """Of a sum with a bias; FastGelu by tanh."""
    x = call.tensor(0) if not call.has(1) else call.tensor(0) + call.tensor(1)
    return F.gelu(x, approximate="tanh" if call.op == "FastGelu" else "none")
