"""Checkpoints of compressed-tensors (llm-compressor, vLLM): `weight_packed` or `weight`, `weight_scale`, and so on.

| format | of a layer [N, K] |
| --- | --- |
| `pack-quantized` | weight_packed [N, K * bits / 32]: integers plus 2^(bits-1), packed along the inputs; weight_shape |
| | [2]; weight_zero_point [N * bits / 32, groups] packed along the outputs, if asymmetric |
| `int-quantized`, `naive-quantized` | weight [N, K] int8; weight_zero_point int8, if asymmetric |
| `float-quantized`, `naive-quantized` | weight [N, K] f8e4m3 |

weight_scale is [N, groups], [N, 1] per channel or [1] per tensor. Does not take: block scales, act-order, quantized
activations (unless told to read the weights alone), quantized caches; other bits than 4 and 8, whose packing has
changed between releases.

Source: compressed-tensors 0.20, `compressors/pack_quantized`, `compressors/naive_quantized`, `quantization/quant_args`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from irc.core.formats import Float8Format, Format, Parts, QuantFormat
from irc.interchange.layout import (
    Layout,
    QuantizedWeight,
    Refusal,
    from_codes,
    groups_in,
    need,
    need_scale,
    number,
)
from irc.interchange.packing import num_words, pack_words, unpack_words

PACKED = "pack-quantized"
_PLAIN = ("int-quantized", "float-quantized", "naive-quantized")


@dataclass(frozen=True)
class Scheme:
    """How one configuration group stores its weights."""

    targets: tuple[str, ...]
    packed: bool
    kind: str
    bits: int
    symmetric: bool
    strategy: str
    group_size: int | None

    def matches(self, module: str) -> int:
        """2: by name; 1: as a linear layer; 0: not."""
        if any(t == module or (t.startswith("re:") and _matches(t[3:], module)) for t in self.targets):
            return 2
        return int("Linear" in self.targets)

    def scale_shape(self, rows: int, width: int) -> tuple[int, ...]:
        if self.strategy == "tensor":
            return (1,)
        return (rows, groups_in(width, self.group_size))


@dataclass(frozen=True)
class CompressedTensors(Layout):
    """Layers by the groups of a configuration.

    Attributes:
        ignore: modules that the configuration leaves in full precision.
        pack_integers: how integers are written: packed, or as int8.
    """

    method: ClassVar[str] = "compressed-tensors"
    schemes: tuple[Scheme, ...]
    ignore: tuple[str, ...] = ()
    pack_integers: bool = True

    @property
    def marks(self) -> tuple[str, ...]:
        return ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape")

    @property
    def tensors(self) -> tuple[str, ...]:
        return ("weight", *self.marks)

    def _scheme(self, module: str) -> Scheme:
        if any(one == module or (one.startswith("re:") and _matches(one[3:], module)) for one in self.ignore):
            raise Refusal("the configuration lists it under ignore, but its tensors are quantized")
        best = max(self.schemes, key=lambda scheme: scheme.matches(module))
        if not best.matches(module):
            raise Refusal("no group of the configuration is about it")
        return best

    def unpack(self, module: str, tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> QuantizedWeight:
        scheme = self._scheme(module)
        rows, width = shape
        scale_shape = scheme.scale_shape(rows, width)
        unexpected = {"weight"} if scheme.packed else {"weight_packed", "weight_shape"}
        if scheme.symmetric:
            unexpected.add("weight_zero_point")
        wrong = sorted(unexpected & set(tensors))
        if wrong:
            raise Refusal(f"{', '.join(wrong)} is there, which its configuration has no use for")
        scale = need_scale(tensors, "weight_scale", scale_shape)
        if scheme.strategy == "tensor":
            scale = scale.reshape(1, 1)
        if scheme.packed:
            return self._unpack_words(scheme, tensors, shape, scale)
        if scheme.kind == "float":
            stored = need(tensors, "weight", (torch.float8_e4m3fn,), shape)
            return QuantizedWeight(Parts(stored, scale), _float_format(scheme))
        stored = need(tensors, "weight", (torch.int8,), shape)
        chosen = QuantFormat(8, scheme.group_size, scheme.symmetric, per_tensor=scheme.strategy == "tensor")
        if scheme.symmetric:
            return QuantizedWeight(Parts(stored, scale), chosen)
        zero = need(tensors, "weight_zero_point", (torch.int8,), scale_shape).reshape(scale.shape)
        return QuantizedWeight(Parts(stored, scale, zero), chosen)

    def _unpack_words(
        self, scheme: Scheme, tensors: Mapping[str, Tensor], shape: tuple[int, int], scale: Tensor
    ) -> QuantizedWeight:
        rows, width = shape
        if scheme.strategy == "tensor":
            raise Refusal("one scale for a packed tensor is not read")
        declared = need(tensors, "weight_shape", (torch.int64, torch.int32), (2,)).tolist()
        if declared != [rows, width]:
            raise Refusal(f"weight_shape says {declared}, the program has {[rows, width]}")
        words = need(tensors, "weight_packed", (torch.int32,), (rows, num_words(width, scheme.bits)))
        codes = unpack_words(words, scheme.bits, width, axis=1)
        middle = 1 << (scheme.bits - 1)
        if scheme.symmetric:
            zero = torch.full(scale.shape, middle, dtype=torch.int16)
        else:
            zero_shape = (num_words(rows, scheme.bits), scale.shape[1])
            zero_words = need(tensors, "weight_zero_point", (torch.int32,), zero_shape)
            zero = unpack_words(zero_words, scheme.bits, rows, axis=0)
        return from_codes(codes, zero, scale, scheme.bits, scheme.group_size)

    def pack(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        if weight.order is not None:
            raise Refusal("its inputs are sorted by group, and this layout has no group index")
        scheme = _scheme_of(weight.format, packed=self.pack_integers)
        if weight.parts.scale is None or weight.parts.scale.dtype == torch.float64:
            raise Refusal("it has no scales of 16 or 32 bits")
        scale = weight.parts.scale.reshape(1) if scheme.strategy == "tensor" else weight.parts.scale
        if scheme.packed:
            codes, zero = weight.codes(scheme.bits)
            made = {
                "weight_packed": pack_words(codes, scheme.bits, axis=1),
                "weight_scale": scale.contiguous(),
                "weight_shape": torch.tensor(weight.shape),
            }
            if not scheme.symmetric:
                made["weight_zero_point"] = pack_words(_in_range(zero, scheme.bits), scheme.bits, axis=0)
            return made
        if scheme.kind == "float":
            return {"weight": weight.parts.stored, "weight_scale": scale.contiguous()}
        codes, zero = weight.codes(8)
        made = {"weight": (codes - 128).to(torch.int8), "weight_scale": scale.contiguous()}
        if not scheme.symmetric:
            made["weight_zero_point"] = (_in_range(zero, 8) - 128).to(torch.int8).reshape(scale.shape)
        return made


def _in_range(zero: Tensor, bits: int) -> Tensor:
    if bool((zero < 0).any()) or bool((zero >= 1 << bits).any()):
        raise Refusal(f"its zero points leave the range of {bits} bits")
    return zero


def _matches(pattern: str, module: str) -> bool:
    try:
        return re.match(pattern, module) is not None
    except re.error as error:
        raise Refusal(f"{pattern!r} is no regular expression: {error}") from None


def _float_format(scheme: Scheme) -> Float8Format:
    return Float8Format("e4m3", scheme.group_size, scheme.strategy == "tensor")


def _scheme_of(chosen: Format, *, packed: bool) -> Scheme:
    """How a format is stored; raises `Refusal`."""
    strategy = "tensor" if chosen.per_tensor else "channel" if chosen.group_size is None else "group"
    if isinstance(chosen, Float8Format) and chosen.kind == "e4m3":
        return Scheme((), False, "float", 8, True, strategy, chosen.group_size)
    if not isinstance(chosen, QuantFormat) or (packed and chosen.per_tensor):
        raise Refusal(f"{chosen} cannot be stored")
    if chosen.bits not in (4, 8) or (not packed and chosen.bits != 8):
        raise Refusal(f"{chosen}: integers must have {'4 or 8' if packed else '8'} bits")
    if chosen.symmetric and not chosen.signed:
        raise Refusal(f"{chosen} has neither a sign nor a zero point")
    return Scheme((), packed, "int", chosen.bits, chosen.symmetric, strategy, chosen.group_size)


# -------------------------------------------------------------------- configuration


def read(config: Mapping[str, Any], weights_only: bool) -> CompressedTensors:
    if config.get("kv_cache_scheme") is not None:
        raise Refusal("a quantized cache (kv_cache_scheme) is not read")
    groups = config.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise Refusal("config_groups is missing or empty")
    problems, schemes = [], []
    for name, group in groups.items():
        try:
            schemes.append(_read_group(group, config, weights_only))
        except Refusal as refusal:
            problems.append(f"{name}: {refusal}")
    ignore = config.get("ignore") or []
    if not isinstance(ignore, list) or not all(isinstance(one, str) for one in ignore):
        problems.append("ignore must be a list of names")
    if problems:
        raise Refusal("; ".join(problems))
    return CompressedTensors(tuple(schemes), tuple(ignore))


def _read_group(group: Any, config: Mapping[str, Any], weights_only: bool) -> Scheme:
    if not isinstance(group, Mapping) or not isinstance(group.get("weights"), Mapping):
        raise Refusal("it has no weights")
    targets = group.get("targets")
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        raise Refusal("targets must be a list of names")
    for role in ("input_activations", "output_activations"):
        if group.get(role) is not None and not weights_only:
            raise Refusal(f"{role} are quantized; weights_only=True reads the weights alone")
    weights, form = group["weights"], group.get("format") or config.get("format")
    if form != PACKED and form not in _PLAIN:
        raise Refusal(f"format must be one of {', '.join((PACKED, *_PLAIN))}, not {form!r}")
    kind, bits = weights.get("type", "int"), number(weights, "num_bits")
    allowed = {"int": (4, 8) if form == PACKED else (8,), "float": () if form == PACKED else (8,)}.get(str(kind), ())
    if form in ("int-quantized", "float-quantized") and not form.startswith(str(kind)):
        allowed = ()
    if bits not in allowed:
        raise Refusal(f"{kind} weights of {bits} bits are not read in format {form}")
    if weights.get("actorder") not in (None, False, "weight", "static"):
        raise Refusal("a group index (actorder) is not read")
    symmetric = weights.get("symmetric", True)
    if not isinstance(symmetric, bool) or (kind == "float" and not symmetric):
        raise Refusal(f"symmetric={symmetric!r} does not go with {kind} weights")
    size = None if weights.get("group_size") in (None, -1) else number(weights, "group_size")
    strategy = weights.get("strategy") or ("group" if size else "channel" if weights.get("group_size") else "tensor")
    if strategy not in ("tensor", "channel", "group") or (strategy == "group") != (size is not None):
        raise Refusal(f"strategy {strategy!r} with group_size {size} is not read")
    if size is not None and size < 1:
        raise Refusal(f"group_size must be positive, not {size}")
    return Scheme(tuple(targets), form == PACKED, str(kind), bits, symmetric, strategy, size)


def plan(weights: Mapping[str, QuantizedWeight], kept: list[str]) -> tuple[CompressedTensors, dict[str, Any]]:
    """Integers packed, floats as they are."""
    return _plan(weights, kept, packed=True)


def plan_plain(weights: Mapping[str, QuantizedWeight], kept: list[str]) -> tuple[CompressedTensors, dict[str, Any]]:
    """8-bit integers as int8."""
    return _plan(weights, kept, packed=False)


def _plan(
    weights: Mapping[str, QuantizedWeight], kept: list[str], *, packed: bool
) -> tuple[CompressedTensors, dict[str, Any]]:
    found: dict[Scheme, list[str]] = {}
    problems = []
    for module, weight in weights.items():
        try:
            found.setdefault(_scheme_of(weight.format, packed=packed), []).append(module)
        except Refusal as refusal:
            problems.append(f"{module}: {refusal}")
    if problems:
        raise Refusal("; ".join(problems))
    if not found:
        raise Refusal("the program has no quantized linear layer")
    by_class = len(found) == 1
    schemes = [replace(s, targets=("Linear",) if by_class else tuple(names)) for s, names in found.items()]
    forms = {_form(scheme) for scheme in schemes}
    groups = {f"group_{i}": _group(scheme) for i, scheme in enumerate(schemes)}
    config = {
        "quant_method": "compressed-tensors",
        "format": next(iter(forms)) if len(forms) == 1 else "mixed-precision",
        "config_groups": groups,
        "ignore": kept,
        "kv_cache_scheme": None,
        "quantization_status": "compressed",
    }
    return CompressedTensors(tuple(schemes), tuple(kept), packed), config


def _form(scheme: Scheme) -> str:
    return PACKED if scheme.packed else "float-quantized" if scheme.kind == "float" else "int-quantized"


def _group(scheme: Scheme) -> dict[str, Any]:
    weights = {
        "num_bits": scheme.bits,
        "type": scheme.kind,
        "symmetric": scheme.symmetric,
        "strategy": scheme.strategy,
        "group_size": scheme.group_size,
        "dynamic": False,
    }
    return {
        "targets": list(scheme.targets),
        "weights": weights,
        "input_activations": None,
        "output_activations": None,
        "format": _form(scheme),
    }
