"""Number formats: text, shapes, packing, rounding, GGUF bytes and lossless repacking."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from irc.core import formats
from irc.core.errors import OptionError, ParseError
from irc.core.formats import Format, GgufFormat, Parts, QuantFormat, ScaledFormat, quantize_tensor, repack
from irc.core.formats.float4 import decode_e2m1, encode_e2m1
from irc.core.formats.gguf import LAYOUTS
from irc.core.formats.nibbles import pack_nibbles, unpack_nibbles

E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
GROUPS = ["g16", "g32", "row", "tensor"]
TEXTS = [
    *(f"{sign}int{bits}.{group}{asym}" for sign in ("", "u") for bits in range(2, 9) for group in GROUPS
      for asym in ("", ".asym")),
    *(f"{kind}.{group}" for kind in ("f8e4m3", "f8e5m2", "f4e2m1") for group in GROUPS),
    "mxfp4", "nvfp4", *LAYOUTS,
]  # fmt: skip
each_text = pytest.mark.parametrize("text", TEXTS)


def weight(rows: int = 5, width: int = 512, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, width, generator=generator) * torch.logspace(-3, 2, rows).unsqueeze(1)
    x[1, :256] = 0
    return x


def same(a: Parts, b: Parts) -> bool:
    """Bit for bit (float8 tensors cannot be compared by PyTorch)."""
    pairs = list(zip(a, b, strict=True))
    if any((x is None) != (y is None) for x, y in pairs):
        return False
    return all(
        x.dtype == y.dtype and torch.equal(x.contiguous().view(torch.uint8), y.contiguous().view(torch.uint8))
        for x, y in pairs
        if x is not None and y is not None
    )


# -------------------------------------------------------------------- every format


@each_text
def test_text_round_trip(text: str) -> None:
    chosen = formats.parse(text)
    assert str(chosen) == text
    assert formats.parse(str(chosen)) == chosen
    assert hash(formats.parse(text)) == hash(chosen)


@pytest.mark.parametrize(
    "text", ["int9.row", "int4", "f8e4m3", "f8e3m4.row", "mxfp4.g32", "q4_2", "int4.g0", "Q4_K", ""]
)
def test_unknown_text(text: str) -> None:
    with pytest.raises(ParseError, match=r"is not a quantization format; examples: int4\.g32"):
        formats.parse(text)


@each_text
def test_parts_have_the_declared_types(text: str) -> None:
    chosen, x = formats.parse(text), weight()
    for scale_dtype in (torch.float32, torch.float16):
        parts = quantize_tensor(x, chosen, scale_dtype)
        on_meta = quantize_tensor(x.to("meta"), chosen, scale_dtype)
        for real, typed in zip(parts, on_meta, strict=True):
            assert (real is None) == (typed is None)
            if real is not None and typed is not None:
                assert (real.shape, real.dtype) == (typed.shape, typed.dtype)
                assert typed.device.type == "meta"
        assert parts.num_bytes == chosen.num_bytes(tuple(x.shape), scale_dtype)
        assert tuple(parts.stored.shape) == chosen.stored_shape(tuple(x.shape))
        assert chosen.logical_shape(tuple(parts.stored.shape)) == tuple(x.shape)
        assert chosen.bits_per_weight(tuple(x.shape), scale_dtype) == 8 * parts.num_bytes / x.numel()


@each_text
def test_errors_stay_within_the_format(text: str) -> None:
    chosen, x = formats.parse(text), weight()
    if isinstance(chosen, QuantFormat) and chosen.symmetric and not chosen.signed:
        x = x.abs()  # such a format holds no negative numbers
    restored = formats.dequantize_tensor(quantize_tensor(x, chosen), chosen)
    group = chosen.check_group or x.shape[-1]
    groups = (x.reshape(1, 1, -1) if chosen.per_tensor else x.unflatten(-1, (-1, group))).float()
    errors = (restored - x).reshape(groups.shape).abs().amax(-1)
    assert bool((errors <= chosen.worst_errors(groups) * (1 + 2e-5) + 1e-9).all())
    assert bool((errors > 0).any())
    assert bool((restored[1, :256] == 0).all())


@each_text
def test_blocks_of_rows_do_not_matter(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen, x = formats.parse(text), weight(7)
    whole = quantize_tensor(x, chosen)
    monkeypatch.setattr("irc.core.formats.tensors.BLOCK", 2 * 512)
    assert same(whole, quantize_tensor(x, chosen))
    if isinstance(chosen, ScaledFormat):
        scales = formats.compute_scales(x, chosen)
        assert same(Parts(whole.stored, *scales), whole)
        # A division and a product with the reciprocal may round differently, nothing else may.
        assert same(Parts(chosen.quantize(x, *scales), *scales), whole)


@each_text
def test_rows_that_do_not_fit_are_refused(text: str) -> None:
    chosen = formats.parse(text)
    multiple = chosen.row_multiple
    assert chosen.why_not_rows_of(3 * multiple) is None
    if multiple > 1:
        reason = chosen.why_not_rows_of(3 * multiple + 1)
        assert reason is not None
        assert f"its rows {'have' if 'pairs' in reason else 'of'} {3 * multiple + 1}" in reason


BITS = {
    "int4.g32": 5, "uint4.g32.asym": 5.25, "int8.row": 8, "int3.g32": 9, "f8e4m3.row": 8, "f4e2m1.g32": 5,
    "mxfp4": 4.25, "nvfp4": 4.5, "q4_0": 4.5, "q4_1": 5, "q5_0": 5.5, "q5_1": 6, "q8_0": 8.5, "q2_k": 2.625,
    "q3_k": 3.4375, "q4_k": 4.5, "q5_k": 5.5, "q6_k": 6.5625,
}  # fmt: skip


@pytest.mark.parametrize("text", BITS)
def test_bits_per_weight(text: str) -> None:
    assert formats.parse(text).bits_per_weight() == BITS[text]


def test_scale_type_counts() -> None:
    assert formats.parse("int4.g32").bits_per_weight(scale_dtype=torch.float16) == 4.5
    assert formats.parse("mxfp4").bits_per_weight(scale_dtype=torch.float16) == 4.25


# -------------------------------------------------------------------- floats


def test_e2m1_is_nearest_ties_to_even() -> None:
    grid = torch.linspace(-8, 8, 4097)
    values = torch.tensor(E2M1 + [-v for v in E2M1])
    assert torch.equal(decode_e2m1(torch.arange(16, dtype=torch.uint8)), values)
    assert torch.equal(torch.signbit(decode_e2m1(torch.arange(16, dtype=torch.uint8))), torch.arange(16) >= 8)
    made = decode_e2m1(encode_e2m1(grid))
    distance = (grid.clamp(-6, 6).unsqueeze(1) - values).abs()
    assert torch.equal((grid.clamp(-6, 6) - made).abs(), distance.amin(1))
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    assert decode_e2m1(encode_e2m1(ties)).tolist() == [0, 1, 1, 2, 2, 4, 4]
    assert decode_e2m1(encode_e2m1(-ties)).tolist() == [0, -1, -1, -2, -2, -4, -4]


def test_mxfp4_against_the_specification() -> None:
    """Section 6.3: the scale is the power of two of the largest magnitude, over that of 6 (2^2)."""
    x = torch.zeros(1, 128)
    x[0, :32] = torch.tensor(E2M1 * 4) * 2**-5
    x[0, 40], x[0, 41], x[0, 70] = 7.9, -1.1, 2.0**-126
    parts = quantize_tensor(x, formats.parse("mxfp4"))
    assert parts.scale is not None
    assert parts.scale.tolist() == [[127 - 5, 127, 0, 127]]
    back = formats.dequantize_tensor(parts, formats.parse("mxfp4"))
    assert torch.equal(back[0, :32], x[0, :32])
    assert back[0, 40:42].tolist() == [6, -1]
    assert float(back[0, 70]) == 2.0**-126
    assert parts.stored[0, :4].tolist() == [0x10, 0x32, 0x54, 0x76]


def test_nvfp4_has_two_levels_of_scales() -> None:
    x = torch.cat((torch.tensor(E2M1 * 2) * 448, torch.tensor(E2M1 * 2) * 0.5)).reshape(1, 32)
    parts = quantize_tensor(x, formats.parse("nvfp4"))
    assert parts.scale is not None
    assert parts.tensor_scale is not None
    assert parts.scale.dtype == torch.float8_e4m3fn
    assert parts.tensor_scale.tolist() == [1.0]
    assert parts.scale.float().tolist() == [[448, 0.5]]
    assert torch.equal(formats.dequantize_tensor(parts, formats.parse("nvfp4")), x)


def test_float8_saturates() -> None:
    chosen = formats.parse("f8e4m3.tensor")
    stored = chosen.quantize(torch.tensor([[1e9, -500.0, 464.0, 0.3]]), torch.ones(1, 1))
    assert stored.float().tolist() == [[448, -448, 448, 0.3125]]
    wide = formats.parse("f8e5m2.row").quantize(torch.tensor([[1e9, -1e9]]), torch.ones(1, 1))
    assert wide.float().tolist() == [[57344, -57344]]


# -------------------------------------------------------------------- GGUF

gguf = pytest.importorskip("gguf", reason="the gguf package is not installed")


@pytest.mark.parametrize("text", ["int4.g32", "uint8.row.asym", "int8.g32", "uint3.g16.asym"])
@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_integers_are_rounded_once(text: str, scale_dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    chosen = formats.parse(text)
    assert isinstance(chosen, QuantFormat)
    parts = quantize_tensor(torch.randn(8, 64), chosen, scale_dtype)
    whole = chosen.unpack(parts.stored).double().unflatten(-1, (parts.scale.shape[-1], -1))
    zero = 0 if parts.zero_point is None else parts.zero_point.double().unsqueeze(-1)
    exact = ((whole - zero) * parts.scale.double().unsqueeze(-1)).flatten(-2)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        # f32 holds products with scales of half its width; those with f32 scales are rounded to it first.
        wanted = exact.float().to(dtype)
        assert torch.equal(formats.dequantize_tensor(parts, chosen, dtype), wanted)


@pytest.mark.parametrize("name", LAYOUTS)
def test_gguf_dequantizes_bit_for_bit(name: str) -> None:
    """Any bytes, so any integers, any scales, infinities and NaN among them."""
    chosen = GgufFormat(name)
    raw = torch.randint(256, (64, 4 * chosen.layout.num_bytes), generator=torch.Generator().manual_seed(1))
    raw = raw.to(torch.uint8)
    ours = chosen.dequantize(raw, None, None, torch.float32).numpy()
    with np.errstate(all="ignore"):
        theirs = gguf.quants.dequantize(raw.numpy(), gguf.GGMLQuantizationType[name.upper()])
    number = ~np.isnan(ours)
    assert np.array_equal(number, ~np.isnan(theirs))
    assert np.array_equal(ours.view(np.int32)[number], theirs.view(np.int32)[number])


@pytest.mark.parametrize("name", [name for name in LAYOUTS if LAYOUTS[name].simple is not None])
def test_gguf_rounds_as_the_reference_does(name: str) -> None:
    x = weight(64)
    x[5] = x[5].abs() + 1
    x[6, ::2] = 0
    theirs = gguf.quants.quantize(x.numpy(), gguf.GGMLQuantizationType[name.upper()])
    assert np.array_equal(quantize_tensor(x, GgufFormat(name)).stored.numpy(), theirs)


# Relative errors on normal numbers: what the simple type of as many bits loses, with its larger share of scales, is
# a bound for the search; rounding without search stays above.
@pytest.mark.parametrize(("name", "simple"), [("q4_k", "q4_1"), ("q5_k", "q5_1"), ("q6_k", "q5_1"), ("q3_k", "q2_k")])
def test_search_beats_rounding(name: str, simple: str) -> None:
    x = torch.randn(32, 512, generator=torch.Generator().manual_seed(3))
    errors = {}
    for one in (name, simple):
        chosen = GgufFormat(one)
        restored = formats.dequantize_tensor(quantize_tensor(x, chosen), chosen)
        errors[one] = float((restored - x).norm() / x.norm())
    assert errors[name] < errors[simple]


@pytest.mark.parametrize(
    ("name", "limit"), [("q2_k", 0.30), ("q3_k", 0.16), ("q4_k", 0.072), ("q5_k", 0.037), ("q6_k", 0.0185)]
)
def test_search_error_on_normal_numbers(name: str, limit: float) -> None:
    x = torch.randn(64, 1024, generator=torch.Generator().manual_seed(3))
    chosen = GgufFormat(name)
    restored = formats.dequantize_tensor(quantize_tensor(x, chosen), chosen)
    assert 0.8 * limit < float((restored - x).norm() / x.norm()) < limit


# -------------------------------------------------------------------- packing and repacking


@given(st.lists(st.integers(0, 15), min_size=2, max_size=40).filter(lambda values: len(values) % 2 == 0))
def test_nibbles_round_trip(values: list[int]) -> None:
    codes = torch.tensor([values], dtype=torch.uint8)
    packed = pack_nibbles(codes)
    assert packed.tolist() == [[a | b << 4 for a, b in zip(values[::2], values[1::2], strict=True)]]
    assert torch.equal(unpack_nibbles(packed), codes)


@given(st.integers(2, 8), st.booleans(), st.integers(0, 2**32 - 1))
def test_integers_round_trip(bits: int, signed: bool, seed: int) -> None:
    chosen = QuantFormat(bits, 8, signed=signed)
    values = torch.randint(
        chosen.lowest_stored, chosen.high + 1, (3, 16), generator=torch.Generator().manual_seed(seed), dtype=torch.int16
    )
    assert torch.equal(chosen.unpack(chosen.pack(values)), values)


@given(st.sampled_from(sorted(LAYOUTS)), st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_gguf_bytes_fall_apart_and_together(name: str, seed: int) -> None:
    """Quantizing what a block holds gives a block that holds it too, for the types that need no search."""
    chosen = GgufFormat(name)
    x = torch.randn(2, 2 * chosen.layout.block, generator=torch.Generator().manual_seed(seed))
    stored = quantize_tensor(x, chosen).stored
    integers, scales, offsets = chosen.split(stored)
    values = scales.double() * integers.double() + (0 if offsets is None else offsets.double())
    restored = chosen.dequantize(stored, None, None, torch.float32)
    torch.testing.assert_close(values.flatten(-3).float(), restored, rtol=1e-5, atol=1e-7)
    if chosen.layout.simple is not None:
        from irc.core.formats.gguf_simple import join_simple

        again = join_simple(
            chosen.layout.simple, integers.squeeze(-2).float(), scales.squeeze(-1),
            None if offsets is None else offsets.squeeze(-1),
        )  # fmt: skip
        assert torch.equal(again.flatten(-2), stored)


def exact(parts: Parts, chosen: Format) -> Tensor:
    """The numbers that are held, in f64 and without the library's own arithmetic on scales."""
    if isinstance(chosen, GgufFormat):
        integers, scales, offsets = chosen.split(parts.stored)
        return (scales.double() * integers.double() + (0 if offsets is None else offsets.double())).flatten(-3)
    assert parts.scale is not None
    wide = parts.scale.view(torch.float8_e8m0fnu) if str(chosen) == "mxfp4" else parts.scale
    scale = wide.double() * (1 if parts.tensor_scale is None else parts.tensor_scale.double())
    values = parts.stored.double() if "f8" in str(chosen) else chosen.unpack(parts.stored).double()
    if parts.zero_point is not None:
        values = values.unflatten(-1, (scale.shape[-1], -1)) - parts.zero_point.double().unsqueeze(-1)
    return (values.reshape(*values.shape[: parts.stored.ndim - 1], scale.shape[-1], -1) * scale.unsqueeze(-1)).flatten(
        -2
    )


FITS = [
    ("int4.g32", "q4_0"), ("int8.g32", "q8_0"), ("int4.g32", "q4_1"), ("int4.g32", "q5_0"), ("int4.g32", "q8_0"),
    ("int5.g32", "q5_0"), ("int3.g32", "q4_0"), ("int4.row", "q4_0"), ("int4.tensor", "int4.g32"),
    ("int4.g64", "int4.g32"), ("int4.g32", "uint4.g32.asym"), ("uint4.g32.asym", "uint8.g32.asym"),
    ("uint4.g32.asym", "int8.g32"), ("int8.row", "uint8.row.asym"), ("uint8.row.asym", "int8.row.asym"),
    ("q4_0", "int4.g32"), ("q4_0", "q4_1"), ("q4_0", "q5_0"), ("q8_0", "int8.g32"), ("q5_0", "q8_0"), ("q4_1", "q5_1"),
    ("q6_k", "int8.g16"), ("q3_k", "int3.g16"), ("mxfp4", "f4e2m1.g32"), ("mxfp4", "f8e4m3.g32"),
    ("f4e2m1.g32", "f4e2m1.g16"), ("f4e2m1.g32", "f8e5m2.g32"), ("mxfp4", "f4e2m1.g16"), ("int2.g32", "f4e2m1.g32"),
]  # fmt: skip


@pytest.mark.parametrize(("source_text", "target_text"), FITS)
@given(seed=st.integers(0, 2**32 - 1), rows=st.integers(1, 3), spread=st.integers(0, 6))
@settings(max_examples=12, deadline=None)
def test_repacking_loses_nothing(source_text: str, target_text: str, seed: int, rows: int, spread: int) -> None:
    source, target = formats.parse(source_text), formats.parse(target_text)
    x = torch.randn(rows, 512, generator=torch.Generator().manual_seed(seed)) * 10 ** -(spread / 3)
    x[0, :32] = 0
    scale_dtype = torch.float32 if source_text in ("q6_k", "q3_k") else torch.float16
    parts = quantize_tensor(x, source, scale_dtype)
    stored, scale, zero_point, tensor_scale = parts
    made = repack(stored, scale, zero_point, source, target, tensor_scale=tensor_scale, scale_dtype=scale_dtype)
    assert torch.equal(exact(made, target), exact(parts, source))
    shape = target.stored_shape(tuple(x.shape))
    assert tuple(made.stored.shape) == shape


def test_repacking_there_and_back_gives_the_bytes() -> None:
    x = weight().half().float()
    for a, b in (("q4_0", "int4.g32"), ("q8_0", "int8.g32")):
        source, target = formats.parse(a), formats.parse(b)
        parts = quantize_tensor(x, source)
        there = repack(parts.stored, None, None, source, target, scale_dtype=torch.float16)
        assert there.scale is not None
        assert there.scale.dtype == torch.float16
        back = repack(there.stored, there.scale, there.zero_point, target, source)
        assert same(back, parts)


REFUSED = [
    ("int8.g32", "q4_0", torch.float16, "numbers are no integers from -8 to 7"),
    ("int4.g32", "q4_0", torch.float32, "scales cannot be held as float16"),
    ("int4.g32", "q4_k", torch.float16, "only Q4_0, Q4_1, Q5_0, Q5_1 and Q8_0 are written from other formats"),
    ("int4.g16", "q4_0", torch.float16, "groups would join others of another scale"),
    ("uint4.g32.asym", "q4_1", torch.float16, "offsets cannot be held as float16"),
    ("uint8.g32.asym", "int8.g32", torch.float16, "numbers are no integers from -128 to 127"),
    ("q4_1", "int4.g32", torch.float16, "offsets are no whole number of steps"),
    ("int4.g32", "mxfp4", torch.float16, "scales are no powers of two|numbers are no e2m1 values"),
    ("nvfp4", "f4e2m1.g16", torch.float32, "scales cannot be held as float32"),
    ("int4.row", "int4.g48", torch.float16, "group size 48 does not divide its rows of 512"),
    ("int8.row", "f8e4m3.row", torch.float16, "numbers are no e4m3 values"),
]


@pytest.mark.parametrize(("source_text", "target_text", "scale_dtype", "reason"), REFUSED)
def test_repacking_refuses(source_text: str, target_text: str, scale_dtype: torch.dtype, reason: str) -> None:
    source, target = formats.parse(source_text), formats.parse(target_text)
    x = torch.randn(3, 512, generator=torch.Generator().manual_seed(0)) + (1 if "uint" in source_text else 0)
    stored, scale, zero_point, tensor_scale = quantize_tensor(x, source, scale_dtype)
    with pytest.raises(OptionError, match=reason) as caught:
        repack(stored, scale, zero_point, source, target, tensor_scale=tensor_scale)
    assert str(caught.value).startswith(f"{source} does not fit into {target}: ")


def test_every_pair_is_exact_or_refused() -> None:
    texts = ["int4.g32", "uint4.g32.asym", "int8.row", "f8e4m3.g32", "f4e2m1.g32", "mxfp4", "nvfp4", *LAYOUTS]
    x, done = weight(3), 0
    for a, b in itertools.product(texts, texts):
        source, target = formats.parse(a), formats.parse(b)
        parts = quantize_tensor(x, source, torch.float16)
        stored, scale, zero_point, tensor_scale = parts
        try:
            made = repack(stored, scale, zero_point, source, target, tensor_scale=tensor_scale)
        except OptionError:
            continue
        done += 1
        assert torch.equal(exact(made, target), exact(parts, source)), (a, b)
    assert done > 2 * len(texts)
