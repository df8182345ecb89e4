"""Every `irc::` operator: reference, fake, cost and gradients against each other and against plain formulas."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import sympy
import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
from torch import Tensor

import irc.core.ops.attention as attention_module
from irc.core import formats
from irc.core.dims import dim_symbol, new_dim, new_fake_mode, size_expr
from irc.core.errors import OptionError
from irc.core.ops import OpDefinition, all_ops, define_op, find_op, is_irc_op
from irc.core.ops.fused import ACTIVATIONS

# Sizes that become dynamic dimensions wherever a tensor of an example has them; examples use no others like them.
DYNAMIC = {3: "B", 5: "S"}


def rand(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(math.prod(shape) + len(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def integers(high: int, *shape: int) -> Tensor:
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(high))


def stored(text: str, *shape: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Packed integers, scale and zero point of a random tensor."""
    chosen = formats.parse(text)
    assert isinstance(chosen, formats.QuantFormat)
    scale = rand(*chosen.scale_shape(shape)).abs() + 0.1
    zero = None if chosen.symmetric else torch.full_like(scale, (chosen.low + chosen.high + 1) // 2, dtype=torch.int16)
    return chosen.quantize(rand(*shape), scale, zero), scale, zero


def parts(text: str, *shape: int) -> tuple[Tensor | None, ...]:
    """A random tensor in a format: the arguments of dequantize."""
    return tuple(formats.quantize_tensor(rand(*shape), formats.parse(text)))


@dataclass
class Example:
    """Arguments of one call; `flops`: counted by hand."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    flops: int | None = None
    differentiable: bool = True


def heads(*, queries: int = 5, keys: int = 7, kv: int = 2, width: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    return rand(3, 4, queries, width), rand(3, kv, keys, width), rand(3, kv, keys, 6)


def attention_examples() -> list[Example]:
    # 3·4 heads, 5 × 7 scores: 2·4 for q·k, 2·6 for p·v, 5 for the softmax.
    count = 3 * 4 * 5 * 7 * (2 * 4 + 2 * 6 + 5)
    half = tuple(x.to(torch.bfloat16) for x in heads())
    return [
        Example(heads(), flops=count),
        Example(heads(kv=4), {"mask": "causal", "scale": 0.5}, flops=count),
        Example(heads(), {"bias": rand(1, 4, 5, 7), "sinks": rand(4), "softcap": 2.0}),
        Example(heads(), {"mask": "sliding", "window": 2, "positions": integers(7, 3, 5)}),
        Example(half, {"mask": "chunked", "window": 4}, differentiable=False),
        Example((*heads()[:2], half[2]), differentiable=False),  # the result has the values' type
    ]


def paged_arguments() -> tuple[Tensor, ...]:
    pages = rand(8, 4, 2, 4), rand(8, 4, 2, 6)
    tables = torch.tensor([[6, 1, 2], [0, 7, 4]])
    return rand(5, 4, 4), *pages, tables, torch.tensor([0, 1, 1, 0, 1]), torch.tensor([9, 0, 5, 10, 11])


EXAMPLES: dict[str, list[Example]] = {
    "attention": attention_examples(),
    "flash_attention": attention_examples(),
    "cache_write": [
        Example((rand(3, 2, 8, 4), rand(3, 2, 5, 4), torch.arange(5) + torch.tensor([[0], [2], [3]])), flops=0),
        Example((rand(3, 2, 8, 4, dtype=torch.bfloat16), rand(3, 2, 1, 4), integers(8, 3, 1)), differentiable=False),
    ],
    "paged_cache_write": [
        Example((rand(4, 4, 2, 6), rand(5, 2, 6), torch.tensor([0, -1, 13, 7, -1])), flops=0),
        Example((rand(4, 4, 2, 6), rand(5, 2, 6), torch.full((5,), -1))),
    ],
    "paged_attention": [
        # 5 tokens × 4 heads see 2 tables' worth of 3 pages of 4 keys; widths 4 and 6.
        Example(paged_arguments(), flops=5 * 4 * (3 * 4) * (2 * 4 + 2 * 6 + 5)),
        Example(paged_arguments(), {"mask": "sliding", "window": 3, "sinks": rand(4), "softcap": 3.0, "scale": 0.3}),
        Example(paged_arguments(), {"bias": rand(5, 4, 10)}),
        Example(paged_arguments(), {"bias": rand(1, 1, 20)}),
    ],
    "linear_activation": [
        # [15, 8] · [8, 6]: 2·8 a number, one for the bias, one for relu.
        Example((rand(3, 5, 8), rand(6, 8), rand(6)), {"activation": "relu"}, flops=15 * 6 * (16 + 1 + 1)),
        Example((rand(5, 8), rand(6, 8)), {"activation": "gelu"}, flops=5 * 6 * (16 + 6)),
    ],
    "conv_activation": [
        # [3, 4, 9, 9] with 3 × 3 taps, stride 2, padding 1: 25 places, 6 channels, 36 products each.
        Example(
            (rand(3, 4, 9, 9), rand(6, 4, 2, 2), rand(6), [2, 2], [0, 0], [1, 1], False, [0, 0], 1),
            {"activation": "relu"},
            flops=3 * 6 * 4 * 4 * (2 * 16 + 1 + 1),
        ),
        Example(
            (rand(3, 4, 5), rand(6, 2, 2), None, [1], [1], [1], False, [0], 2),
            {"activation": "silu"},
            flops=3 * 6 * 6 * (2 * 4 + 6),
        ),
        Example(
            (rand(3, 4, 8), rand(4, 6, 4), rand(6), [2], [1], [1], True, [0], 1),
            {"activation": "tanh"},
            flops=2 * 3 * 4 * 8 * 6 * 4 + 3 * 6 * 16 * (1 + 6),
        ),
    ],
    "glu": [
        Example((rand(3, 5, 8), rand(3, 5, 8)), flops=6 * 120),
        Example((rand(5, 8), rand(5, 8)), {"activation": "quick_gelu"}),
        Example((rand(5, 8, dtype=torch.bfloat16), rand(5, 8)), differentiable=False),
    ],
    "rms_norm": [
        Example((rand(3, 5, 8), rand(8), 1e-5), flops=4 * 120),
        Example((rand(3, 8), None, 1e-5), flops=3 * 24),
        Example((rand(3, 8, dtype=torch.bfloat16), rand(8), 1e-5), differentiable=False),
        Example((rand(3, 8, dtype=torch.float16), rand(8), 1e-5), {"weight_in_f32": True}, differentiable=False),
    ],
    "rope": [
        Example((rand(3, 2, 5, 8), rand(5, 4), rand(5, 4)), flops=6 * 3 * 2 * 5 * 4),
        Example((rand(3, 2, 5, 8), rand(3, 1, 5, 2), rand(3, 1, 5, 2)), {"interleaved": True}, flops=6 * 30 * 2),
        Example((rand(3, 2, 5, 8, dtype=torch.float16), rand(5, 2), rand(5, 2)), differentiable=False),
    ],
    "quantize": [
        Example((rand(3, 8), torch.full((3, 2), 0.2), None), {"format": "int4.g4"}, flops=72, differentiable=False),
        Example((rand(3, 8), rand(3, 1).abs(), torch.ones(3, 1)), {"format": "uint8.row.asym"}, differentiable=False),
        # Scales of tokens, computed at run time.
        Example((rand(3, 5, 8), rand(3, 5, 1).abs(), None), {"format": "f8e4m3.row"}, flops=360, differentiable=False),
        Example((rand(3, 8), torch.full((1, 1), 0.2), None), {"format": "f8e5m2.tensor"}, differentiable=False),
        Example((rand(5, 8), torch.full((5, 2), 0.2), None), {"format": "f4e2m1.g4"}, differentiable=False),
        Example((rand(3, 64), integers(200, 3, 2).to(torch.uint8), None), {"format": "mxfp4"}, differentiable=False),
        Example((rand(3, 32), *parts("nvfp4", 3, 32)[1:]), {"format": "nvfp4"}, differentiable=False),
        *(
            Example((rand(3, 5, 256), None, None), {"format": text}, flops=3 * 3840, differentiable=False)
            for text in ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k")
        ),
    ],
    "dynamic_scale": [
        Example((rand(3, 5, 8),), {"format": "int8.row"}, flops=240),
        Example((rand(3, 8),), {"format": "int4.g4"}),
        Example((rand(3, 5, 8),), {"format": "int8.tensor"}),
        Example((rand(3, 8),), {"format": "f8e4m3.row"}),
        Example((rand(3, 5, 8, dtype=torch.bfloat16),), {"format": "int8.row"}, differentiable=False),
    ],
    "fake_quantize": [  # its gradients are not those of its value: tested by formula
        Example((rand(3, 8), torch.full((3, 2), 0.2), None), {"format": "int4.g4"}, flops=120, differentiable=False),
        Example(
            (rand(3, 5, 8, dtype=torch.float16), torch.full((1, 1, 1), 0.01), torch.ones(1, 1, 1, dtype=torch.uint8)),
            {"format": "uint8.tensor.asym", "learned": True},
            differentiable=False,
        ),
    ],
    "dequantize": [
        Example(stored("int4.g4", 3, 8), {"format": "int4.g4"}, flops=48),
        Example(stored("uint3.tensor.asym", 3, 8), {"format": "uint3.tensor.asym"}, flops=48),
        Example(stored("int8.row", 3, 8), {"format": "int8.row", "dtype": torch.float16}, differentiable=False),
        Example(parts("f8e4m3.row", 3, 8), {"format": "f8e4m3.row"}, flops=48, differentiable=False),
        Example(
            parts("f8e5m2.tensor", 3, 8), {"format": "f8e5m2.tensor", "dtype": torch.bfloat16}, differentiable=False
        ),
        Example(parts("f4e2m1.g4", 3, 8)[:3], {"format": "f4e2m1.g4"}, flops=48),
        Example(parts("mxfp4", 3, 64), {"format": "mxfp4"}, flops=384, differentiable=False),
        Example(parts("nvfp4", 3, 32), {"format": "nvfp4"}, flops=192, differentiable=False),
        *(
            Example(parts(text, 3, 256), {"format": text}, flops=1536, differentiable=False)
            for text in ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k")
        ),
    ],
}  # fmt: skip

CASES = [
    pytest.param(all_ops()[name], example, id=f"{name}-{index}")
    for name, examples in EXAMPLES.items()
    for index, example in enumerate(examples)
    if name in all_ops()
]
each_case = pytest.mark.parametrize(("op", "example"), CASES)


def test_every_operator_has_examples() -> None:
    assert set(EXAMPLES) == set(all_ops())
    assert all(any(e.flops is not None for e in examples) for examples in EXAMPLES.values())


# -------------------------------------------------------------------- registry


def test_registry_finds_operators_by_target() -> None:
    target = torch.ops.irc.rms_norm.default
    assert find_op(target) is all_ops()["rms_norm"]
    assert find_op(target).overload is target
    assert is_irc_op(target, "rms_norm")
    assert not is_irc_op(target, "rope")
    assert find_op(torch.ops.aten.relu.default) is None
    assert find_op(torch.relu) is None


def test_an_operator_is_registered_once() -> None:
    with pytest.raises(ValueError, match=r"irc::rope is registered twice"):
        define_op("rope(Tensor x) -> Tensor", fake=torch.empty_like, flops=lambda x: sympy.Integer(0))(torch.neg)


@each_case
def test_schema_takes_the_reference_arguments(op: OpDefinition, example: Example) -> None:
    """The operator called through PyTorch is the reference, argument for argument; it writes into none of them."""
    before = pytree.tree_map_only(Tensor, Tensor.clone, example.args)
    through = op.overload(*example.args, **example.kwargs)
    torch.testing.assert_close(through, op.reference(*example.args, **example.kwargs), rtol=0, atol=0)
    torch.testing.assert_close(example.args, before, rtol=0, atol=0)


# -------------------------------------------------------------------- types


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@each_case
def test_fake_has_the_type_of_the_reference(op: OpDefinition, example: Example, dynamic: bool) -> None:
    mode = new_fake_mode()
    dims = {name: new_dim(mode, name, size) for size, name in DYNAMIC.items()} if dynamic else {}

    def fake(x: Tensor) -> Tensor:
        shape = [dims[DYNAMIC[s]].size if dynamic and s in DYNAMIC else s for s in x.shape]
        with mode:
            return torch.empty(shape, dtype=x.dtype)

    args, kwargs = pytree.tree_map_only(Tensor, fake, (example.args, example.kwargs))
    with mode:
        made = op.fake(*args, **kwargs)
    for dim in dims.values():
        assert dim.size.node.expr.is_Symbol, f"the fake function fixes {dim.name}"
    real = op.reference(*example.args, **example.kwargs)
    assert made.dtype == real.dtype
    assert made.device == real.device
    point = {dim_symbol(name): sympy.Integer(size) for size, name in DYNAMIC.items()} if dynamic else {}
    assert [int(size_expr(s, dims).xreplace(point)) for s in made.shape] == list(real.shape)


@each_case
def test_reference_runs_on_fake_tensors(op: OpDefinition, example: Example) -> None:
    """Export and tracing see the reference's own type, without data (a loop over blocks may fix its sizes)."""
    with new_fake_mode() as mode:
        args, kwargs = pytree.tree_map_only(Tensor, mode.from_tensor, (example.args, example.kwargs))
        traced = op.reference(*args, **kwargs)
    real = op.reference(*example.args, **example.kwargs)
    assert (traced.dtype, traced.device, traced.shape) == (real.dtype, real.device, real.shape)


# -------------------------------------------------------------------- cost


@each_case
def test_flops_count(op: OpDefinition, example: Example) -> None:
    def static(x: Tensor) -> tuple[sympy.Integer, ...]:
        return tuple(sympy.Integer(size) for size in x.shape)

    def symbolic(x: Tensor) -> tuple[sympy.Expr, ...]:
        return tuple(dim_symbol(DYNAMIC[s]) if s in DYNAMIC else sympy.Integer(s) for s in x.shape)

    counts = []
    for shape in (static, symbolic):
        args, kwargs = pytree.tree_map_only(Tensor, shape, (example.args, example.kwargs))
        expr = sympy.sympify(op.flops(*args, **kwargs))
        assert isinstance(expr, sympy.Expr)
        counts.append(expr.xreplace({dim_symbol(name): sympy.Integer(size) for size, name in DYNAMIC.items()}))
    assert counts[0] == counts[1]
    assert counts[0].is_Integer
    assert counts[0] >= 0
    if example.flops is not None:
        assert counts[0] == example.flops


# -------------------------------------------------------------------- gradients


@pytest.mark.parametrize(("op", "example"), [case for case in CASES if case.values[1].differentiable])
def test_gradients_flow(op: OpDefinition, example: Example) -> None:
    leaves, spec = pytree.tree_flatten((example.args, example.kwargs))
    wide = [x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in leaves]
    places = [i for i, x in enumerate(wide) if isinstance(x, Tensor) and x.is_floating_point()]

    def run(*inputs: Tensor) -> Tensor:
        given = dict(zip(places, inputs, strict=True))
        args, kwargs = pytree.tree_unflatten([given.get(i, x) for i, x in enumerate(wide)], spec)
        return op.overload(*args, **kwargs)

    inputs = [wide[i].clone().requires_grad_() for i in places]
    # One projection of the Jacobian: finite differences of every entry would take minutes.
    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)


# -------------------------------------------------------------------- formulas


def close(made: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(made, expected, rtol=1e-5, atol=1e-5)


def test_rms_norm_formula() -> None:
    x, weight = rand(3, 5, 8), rand(8)
    close(torch.ops.irc.rms_norm(x, weight, 0.1), F.rms_norm(x, (8,), weight, eps=0.1))
    close(torch.ops.irc.rms_norm(x, None, 0.1), x / (x.pow(2).mean(-1, keepdim=True) + 0.1).sqrt())


def test_rms_norm_rounds_where_it_says() -> None:
    x, weight = rand(3, 64, dtype=torch.float16), rand(64)
    after = torch.ops.irc.rms_norm(x, weight.half(), 1e-5, weight_in_f32=True)
    normed = F.rms_norm(x.float(), (64,), eps=1e-5)
    assert torch.equal(after, (normed * weight.half().float()).half())
    assert torch.equal(torch.ops.irc.rms_norm(x, weight.half(), 1e-5), normed.half() * weight.half())


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("width", [8, 10])
def test_rope_is_a_rotation_of_pairs(interleaved: bool, width: int) -> None:
    x, angles = rand(3, 2, 5, width), rand(5, 4)
    made = torch.ops.irc.rope(x, angles.cos(), angles.sin(), interleaved=interleaved)
    pairs = [(2 * i, 2 * i + 1) if interleaved else (i, i + 4) for i in range(4)]
    expected = x.clone()
    for i, (a, b) in enumerate(pairs):
        turned = torch.complex(x[..., a], x[..., b]) * torch.polar(torch.ones(5), angles[:, i])
        expected[..., a], expected[..., b] = turned.real, turned.imag
    close(made, expected)


GATES: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": lambda x: x * torch.sigmoid(x),
    "gelu": lambda x: x * 0.5 * (1 + torch.erf(x / math.sqrt(2))),
    "gelu_tanh": lambda x: x * 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "relu": lambda x: x.clamp(min=0),
    "quick_gelu": lambda x: x / (1 + torch.exp(-1.702 * x)),
    "sigmoid": lambda x: 1 / (1 + torch.exp(-x)),
}
OTHERS: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": lambda x: 2 / (1 + torch.exp(-2 * x)) - 1,
    "relu6": lambda x: x.clamp(0, 6),
    "leaky_relu": lambda x: torch.where(x > 0, x, 0.01 * x),
    "hardswish": lambda x: x * (x + 3).clamp(0, 6) / 6,
    "hardsigmoid": lambda x: ((x + 3) / 6).clamp(0, 1),
    "mish": lambda x: x * torch.tanh(torch.log1p(torch.exp(x))),
}


@pytest.mark.parametrize("name", GATES)
def test_glu_formula(name: str) -> None:
    gate, up = 3 * rand(3, 5, 8), rand(3, 5, 8)
    close(torch.ops.irc.glu(gate, up, activation=name), GATES[name](gate) * up)


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_activation_formulas(name: str) -> None:
    formula = {**GATES, **OTHERS}[name]
    x, weight, bias = 4 * rand(5, 8), rand(6, 8), rand(6)
    close(torch.ops.irc.linear_activation(x, weight, bias, activation=name), formula(x @ weight.T + bias))
    image, kernel = rand(3, 4, 7, 7), rand(6, 2, 2, 2)
    made = torch.ops.irc.conv_activation(image, kernel, bias, [2, 1], [1, 0], [1, 2], False, [0, 0], 2, activation=name)
    close(made, formula(F.conv2d(image, kernel, bias, (2, 1), (1, 0), (1, 2), 2)))


def test_transposed_convolution() -> None:
    x, kernel = rand(3, 4, 7), rand(4, 6, 4)
    made = torch.ops.irc.conv_activation(x, kernel, None, [2], [1], [1], True, [1], 1, activation="relu")
    close(made, F.conv_transpose1d(x, kernel, None, 2, 1, 1).relu())


@pytest.mark.parametrize("op", ["linear_activation", "conv_activation"])
def test_unknown_activation_is_refused(op: str) -> None:
    example = EXAMPLES[op][0]
    for function in (all_ops()[op].overload, all_ops()[op].fake):
        with pytest.raises(ValueError, match="unknown activation 'swish'; known: gelu, "):
            function(*example.args, activation="swish")


def test_cache_write_formula() -> None:
    cache, value, positions = EXAMPLES["cache_write"][0].args
    expected = cache.clone()
    for b, s in itertools.product(range(3), range(5)):
        expected[b, :, positions[b, s]] = value[b, :, s]
    assert torch.equal(torch.ops.irc.cache_write(cache, value, positions), expected)


def test_quantize_formula() -> None:
    x, scale = rand(3, 8), rand(3, 2).abs() + 0.05
    made = torch.ops.irc.quantize(x, scale, None, format="int3.g4")
    assert torch.equal(made, (x.view(3, 2, 4) / scale[..., None]).round().clamp(-3, 3).view(3, 8).to(torch.int8))
    back = torch.ops.irc.dequantize(made, scale, None, format="int3.g4", dtype=torch.float64)
    close(back, (made.view(3, 2, 4) * scale[..., None]).view(3, 8).double())


@pytest.mark.parametrize(
    ("text", "given", "reason"),
    [
        ("int4.g4", {}, "format int4.g4 needs a scale"),
        ("q4_0", {"scale": torch.ones(1)}, "format q4_0 has no scale"),
        ("nvfp4", {"scale": torch.ones(1)}, "format nvfp4 needs a tensor_scale"),
        ("nvfp4", {}, "format nvfp4 needs a scale and needs a tensor_scale"),
        ("int8.row", {"scale": torch.ones(1), "tensor_scale": torch.ones(1)}, "format int8.row has no tensor_scale"),
        ("mxfp4", {"scale": torch.ones(1), "zero_point": torch.ones(1)}, "format mxfp4 has no zero_point"),
    ],
)
@pytest.mark.parametrize("op", ["quantize", "dequantize"])
def test_missing_parts_of_a_format_are_named(op: str, text: str, given: dict[str, Tensor], reason: str) -> None:
    parts = {"scale": None, "zero_point": None, "tensor_scale": None} | given
    for function in (all_ops()[op].reference, all_ops()[op].fake):
        with pytest.raises(OptionError) as caught:
            function(torch.zeros(1, 64), **parts, format=text)
        assert str(caught.value) == reason


def test_dynamic_scale_formula() -> None:
    x = rand(3, 5, 8)
    x[1, 2] = 0
    scale = torch.ops.irc.dynamic_scale(x, format="int8.row")
    expected = x.abs().amax(-1, keepdim=True) / 127
    expected[1, 2] = 1
    assert torch.equal(scale, expected)
    grouped = torch.ops.irc.dynamic_scale(x.bfloat16(), format="int4.g4")
    assert grouped.dtype == torch.float32
    assert torch.equal(grouped[0], x[0].bfloat16().float().view(5, 2, 4).abs().amax(-1) / 7 + 0.0)
    assert float(torch.ops.irc.dynamic_scale(x, format="int8.tensor")) == float(x.abs().max() / 127)


def test_dynamic_scale_lets_nan_through() -> None:
    x = rand(2, 8)
    x[0, 3] = torch.nan
    scale = torch.ops.irc.dynamic_scale(x, format="int8.row")
    stored = torch.ops.irc.quantize(x, scale, None, format="int8.row")
    back = torch.ops.irc.dequantize(stored, scale, None, format="int8.row")
    assert bool(back[0].isnan().all())
    assert bool(back[1].isfinite().all())


@pytest.mark.parametrize("text", ["uint8.row.asym", "mxfp4", "q8_0"])
def test_dynamic_scale_needs_a_format_with_one_float_scale(text: str) -> None:
    with pytest.raises(OptionError, match=rf"needs a symmetric format with a float scale, not {text}"):
        torch.ops.irc.dynamic_scale(rand(2, 32), format=text)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("kind", ["row", "tensor", "g4", "row.asym", "tensor.asym"])
def test_fake_quantize_is_quantize_then_dequantize(kind: str, bits: int, dtype: torch.dtype) -> None:
    """Bit for bit, far outside the range and at half steps too."""
    form = formats.parse(f"{'u' if 'asym' in kind else ''}int{bits}.{kind}")
    x = (rand(6, 8, dtype=torch.float64) * torch.logspace(-3, 6, 6).unsqueeze(1)).to(dtype)
    scale = rand(*form.scale_shape((6, 8))).abs() + 0.1
    scale = scale.double() if dtype == torch.float64 else scale
    x[0] = ((torch.arange(8) - 3.5) * scale[0, 0]).to(dtype)
    zero = None if form.symmetric else torch.full_like(scale, form.high // 3, dtype=torch.uint8)
    stored = form.quantize(x, scale, zero)
    expected = torch.ops.irc.dequantize(stored, scale, zero, format=str(form), dtype=dtype)
    for learned in (False, True):
        made = torch.ops.irc.fake_quantize(x, scale, zero, format=str(form), learned=learned)
        assert made.dtype == dtype
        assert torch.equal(made, expected)


@pytest.mark.parametrize("learned", [False, True])
def test_fake_quantize_gradients(learned: bool) -> None:
    """Straight through within the range, nothing outside; the step's gradient as in LSQ, equation 3."""
    values = [-3.0, -0.26, 0.0, 0.24, 0.6, 9.0, 0.1, -0.4]
    x = torch.tensor([values], requires_grad=True)
    scale, upstream = torch.tensor([[0.2]], requires_grad=True), torch.arange(1.0, 9.0).view(1, 8)
    made = torch.ops.irc.fake_quantize(x, scale, None, format="int3.row", learned=learned)
    made.backward(upstream)
    inside = [abs(v / 0.2) <= 3 for v in values]
    assert x.grad is not None
    assert torch.equal(x.grad, upstream * torch.tensor([inside]).float())
    if not learned:
        assert scale.grad is None
        return
    slopes = [round(v / 0.2) - v / 0.2 if i else math.copysign(3, v) for v, i in zip(values, inside, strict=True)]
    expected = (torch.tensor([slopes]) * upstream).sum() / math.sqrt(8 * 3)
    torch.testing.assert_close(scale.grad, expected.view(1, 1))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_cache_write_moves_float8(dtype: torch.dtype) -> None:
    cache, value, positions = EXAMPLES["cache_write"][0].args
    made = torch.ops.irc.cache_write(cache.to(dtype), value, positions)
    assert torch.equal(
        made.float(), torch.ops.irc.cache_write(cache.to(dtype).float(), value.to(dtype).float(), positions)
    )


# -------------------------------------------------------------------- attention


def naive_attention(
    query: Tensor, key: Tensor, value: Tensor, *, bias: Tensor | None = None, positions: Tensor | None = None,
    sinks: Tensor | None = None, mask: str = "full", window: int = 0, scale: float = 1.0, softcap: float | None = None,
) -> Tensor:  # fmt: skip
    """One query at a time, straight from the definition."""
    (batch, num_heads, num_queries, _), num_keys = query.shape, key.shape[2]
    out = query.new_zeros(batch, num_heads, num_queries, value.shape[-1])
    for b, h, s in itertools.product(range(batch), range(num_heads), range(num_queries)):
        p = num_keys - num_queries + s if positions is None else int(positions[b, s])
        kv = h * key.shape[1] // num_heads
        logits, values = [], []
        for t in range(num_keys):
            seen = {"full": True, "causal": t <= p, "sliding": p - window < t <= p}
            if not seen.get(mask, t <= p and window and t // window == p // window):
                continue
            score = scale * query[b, h, s] @ key[b, kv, t]
            score = score if softcap is None else softcap * torch.tanh(score / softcap)
            if bias is not None:
                entry = bias.expand(batch, num_heads, num_queries, num_keys)[b, h, s, t]
                if entry.dtype == torch.bool and not entry:
                    continue
                score = score if entry.dtype == torch.bool else score + entry
            logits.append(score)
            values.append(value[b, kv, t])
        if sinks is not None:
            logits.append(sinks[h])
            values.append(torch.zeros_like(value[b, kv, 0]))
        if logits and max(logits) > -torch.inf:
            out[b, h, s] = torch.stack(logits).softmax(0) @ torch.stack(values)
    return out


MASKS: dict[str, dict[str, Any]] = {
    "full": {"mask": "full"},
    "causal": {"mask": "causal"},
    "sliding": {"mask": "sliding", "window": 3},
    "chunked": {"mask": "chunked", "window": 4},
}


def _bias(kind: str, queries: int, keys: int) -> Tensor | None:
    if kind == "none":
        return None
    if kind == "row of -inf":  # the first query sees nothing
        return torch.zeros(1, 1, queries, keys, dtype=torch.float64).index_fill(2, torch.tensor([0]), -torch.inf)
    shape = {"all": (2, 4, queries, keys), "heads": (1, 4, queries, keys), "keys": (2, 1, 1, keys),
             "queries": (1, 4, queries, 1)}[kind.split(", ")[-1]]  # fmt: skip
    values = rand(*shape, dtype=torch.float64)
    return values > -0.5 if kind.startswith("bool") else values


BIASES = ["none", "row of -inf", "float, all", "float, heads", "float, keys", "float, queries",
          "bool, all", "bool, heads", "bool, keys", "bool, queries"]  # fmt: skip


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks of queries and keys at sizes that a test can afford."""
    monkeypatch.setattr(attention_module, "_QUERY_BLOCK", 4)
    monkeypatch.setattr(attention_module, "_KEY_BLOCK", 3)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("mask", MASKS)
def test_flash_attention_equals_attention(mask: str, bias: str) -> None:
    keys, width = 11, 4
    for queries, kv, sinks, softcap, placed in itertools.product(
        (6, 11), (4, 2), (False, True), (None, 1.5), (False, True)
    ):
        query = rand(2, 4, queries, width, dtype=torch.float64)
        key, value = (rand(2, kv, keys, w, dtype=torch.float64) for w in (width, 6))
        options = {
            **MASKS[mask], "bias": _bias(bias, queries, keys), "softcap": softcap, "scale": 0.7,
            "sinks": rand(4, dtype=torch.float64) if sinks else None,
            "positions": integers(keys, 2, queries) if placed else None,
        }  # fmt: skip
        expected = torch.ops.irc.attention(query, key, value, **options)
        made = torch.ops.irc.flash_attention(query, key, value, **options)
        torch.testing.assert_close(made, expected, rtol=1e-10, atol=1e-10)
        assert expected.isfinite().all()


@pytest.mark.parametrize("bias", ["none", "row of -inf", "float, keys", "bool, all"])
@pytest.mark.parametrize("mask", MASKS)
def test_attention_formula(mask: str, bias: str) -> None:
    query, key = rand(2, 4, 3, 4, dtype=torch.float64), rand(2, 2, 5, 4, dtype=torch.float64)
    value = rand(2, 2, 5, 6, dtype=torch.float64)
    for sinks, softcap, placed in [(False, None, False), (True, 1.5, True)]:
        options = {
            **MASKS[mask], "bias": _bias(bias, 3, 5), "softcap": softcap, "scale": 0.7,
            "sinks": rand(4, dtype=torch.float64) if sinks else None,
            "positions": integers(5, 2, 3) if placed else None,
        }  # fmt: skip
        made = torch.ops.irc.attention(query, key, value, **options)
        torch.testing.assert_close(made, naive_attention(query, key, value, **options), rtol=1e-10, atol=1e-10)


def test_attention_is_sdpa() -> None:
    query, key, value = rand(2, 4, 5, 8), rand(2, 4, 5, 8), rand(2, 4, 5, 8)
    for causal in (False, True):
        mask, scale = "causal" if causal else "full", 8**-0.5
        expected = F.scaled_dot_product_attention(query, key, value, is_causal=causal)
        for op in (torch.ops.irc.attention, torch.ops.irc.flash_attention):
            close(op(query, key, value, mask=mask, scale=scale), expected)


@pytest.mark.parametrize("op", ["attention", "flash_attention"])
def test_bad_masks_are_refused(op: str) -> None:
    function = all_ops()[op].overload
    with pytest.raises(ValueError, match="mask='sliding' needs a window"):
        function(*heads(), mask="sliding")
    with pytest.raises(ValueError, match="unknown mask 'prefix'; known: full, causal"):
        function(*heads(), mask="prefix", window=3)


# -------------------------------------------------------------------- pages


def _slots(tables: Tensor, sequences: Tensor, positions: Tensor, page: int) -> Tensor:
    return tables[sequences, positions // page] * page + positions % page


@pytest.mark.parametrize("kv", [1, 2, 4])
@pytest.mark.parametrize("options", [
    {"mask": "full"}, {"mask": "causal"}, {"mask": "sliding", "window": 5}, {"mask": "chunked", "window": 4},
    {"mask": "causal", "softcap": 1.5, "scale": 0.4},
])  # fmt: skip
def test_paged_attention_equals_contiguous(options: dict[str, Any], kv: int) -> None:
    """Two sequences written in interleaved pieces with padding between: as if each had a cache of its own."""
    page, length, tables = 4, 12, torch.tensor([[6, 1, 2], [0, 7, 4]])
    sinks = rand(4) if "softcap" in options else None
    pages = [torch.zeros(8, page, kv, width) for width in (4, 6)]
    caches = [torch.zeros(2, kv, length, width) for width in (4, 6)]
    pieces = [([0, 1, 0, 1], [0, 0, 1, 1]), ([1, 1, 0], [2, 3, 2]), ([1, 0, 1], [4, 3, 5])]
    if options["mask"] == "full":  # sees keys behind the sequence, too: fill them
        pieces = [([0] * length + [1] * length, [*range(length)] * 2)]
    for sequence_list, position_list in pieces:
        sequences, positions = torch.tensor(sequence_list), torch.tensor(position_list)
        count = len(sequences)
        slots = _slots(tables, sequences, positions, page)
        for i, width in enumerate((4, 6)):
            new = rand(count, kv, width) + position_list[0]
            padded = torch.cat((new, new[:2])), torch.cat((slots, torch.tensor([-1, -1])))
            pages[i] = torch.ops.irc.paged_cache_write(pages[i], *padded)
            for n in range(count):
                at = positions[n].view(1, 1).expand(2, 1)
                written = torch.ops.irc.cache_write(caches[i], new[n].expand(2, kv, width).unsqueeze(2), at)
                caches[i][sequences[n]] = written[sequences[n]]
        query = rand(count, 4, 4)
        made = torch.ops.irc.paged_attention(query, *pages, tables, sequences, positions, sinks=sinks, **options)
        for n in range(count):
            own = [cache[sequences[n] : sequences[n] + 1] for cache in caches]
            expected = torch.ops.irc.attention(
                query[n].view(1, 4, 1, 4), *own, positions=positions[n].view(1, 1), sinks=sinks, **options
            )
            close(made[n], expected[0, :, 0])


def test_padding_never_undoes_a_write() -> None:
    """Padding in front of, between and behind a token of slot 0."""
    cache, value = rand(2, 4, 2, 6), rand(5, 2, 6)
    made = torch.ops.irc.paged_cache_write(cache, value, torch.tensor([-1, 0, -1, 6, -1]))
    expected = cache.clone()
    expected[0, 0], expected[1, 2] = value[1], value[3]
    assert torch.equal(made, expected)
    assert torch.equal(torch.ops.irc.paged_cache_write(cache, value, torch.full((5,), -1)), cache)
