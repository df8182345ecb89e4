"""Which type each tensor gets: llama.cpp's mixes as a table of rules.

A mix names a base type and exceptions: tensors that errors hurt most get more bits, in all layers or in those
where it pays (the first eighth, the last eighth, and every third between). Vectors, norms and routers stay f32.

Source: llama.cpp, `src/llama-quant.cpp` (llama_tensor_get_type), `include/llama.h` (file types).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from irc.core.errors import OptionError, nearest

FLOATS = ("f32", "f16", "bf16")
BLOCKS = {
    "q4_0": 32, "q4_1": 32, "q5_0": 32, "q5_1": 32, "q8_0": 32,
    "q2_k": 256, "q3_k": 256, "q4_k": 256, "q5_k": 256, "q6_k": 256,
}  # fmt: skip
# What a tensor gets whose rows no super-block divides; what it gets where blocks of 32 do not either: f16.
_WITHOUT_SUPER_BLOCKS = {"q2_k": "q4_0", "q3_k": "q4_0", "q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0"}
_F32_ROLES = ("norm", "bias", "rope", "router", "positions")


@dataclass(frozen=True)
class Place:
    """Where a tensor stands: its role, its layer, and what matters about the model."""

    role: str
    layer: int | None
    num_layers: int
    group: int  # query heads a key-value head
    num_experts: int
    architecture: str
    tied: bool


Rule = Callable[[Place], str | None]


@dataclass(frozen=True)
class Mix:
    """file_type: `general.file_type`; rules: role → type, or a function of the place."""

    base: str
    file_type: int
    rules: dict[str, str | Rule] = field(default_factory=dict)


def more_bits(place: Place) -> bool:
    """The layers where more bits pay."""
    layer, count = place.layer or 0, place.num_layers
    return layer < count // 8 or layer >= 7 * count // 8 or (layer - count // 8) % 3 == 2


def _where(test: Callable[[Place], bool], then: str, otherwise: str | None = None) -> Rule:
    return lambda place: then if test(place) else otherwise


def _first(share: int) -> Callable[[Place], bool]:
    return lambda place: (place.layer or 0) < place.num_layers // share


def _layer_below(count: int) -> Callable[[Place], bool]:
    return lambda place: (place.layer or 0) < count


def _grouped(place: Place) -> bool:
    return place.group >= 4


def _falcon_down(place: Place) -> str | None:
    if place.architecture != "falcon":
        return "q6_k" if more_bits(place) else None
    return "q6_k" if _first(16)(place) else "q5_k" if more_bits(place) else "q4_k"


def _q3_m_down(place: Place) -> str | None:
    if _first(16)(place):
        return "q5_k"
    return "q4_k" if place.architecture != "falcon" or more_bits(place) else "q3_k"


MIXES: dict[str, Mix] = {
    "f32": Mix("f32", 0),
    "f16": Mix("f16", 1),
    "bf16": Mix("bf16", 32),
    "q4_0": Mix("q4_0", 2),
    "q4_1": Mix("q4_1", 3),
    "q5_0": Mix("q5_0", 8),
    "q5_1": Mix("q5_1", 9),
    "q8_0": Mix("q8_0", 7),
    "q2_k": Mix("q2_k", 10, {
        "attn_v": _where(_grouped, "q4_k", "q3_k"), "ffn_down": "q3_k", "attn_output": "q3_k",
    }),
    "q2_k_s": Mix("q2_k", 21, {"attn_v": _where(_grouped, "q4_k"), "ffn_down": _where(_first(8), "q4_k")}),
    "q3_k_s": Mix("q3_k", 11),
    "q3_k_m": Mix("q3_k", 12, {
        "attn_v": _where(_layer_below(2), "q5_k", "q4_k"), "ffn_down": _q3_m_down, "attn_output": "q4_k",
        "attn_qkv": "q4_k",
    }),
    "q3_k_l": Mix("q3_k", 13, {
        "attn_v": "q5_k", "ffn_down": lambda place: "q4_k" if place.architecture == "falcon" else "q5_k",
        "attn_output": "q5_k", "attn_qkv": "q4_k",
    }),
    "q4_k_s": Mix("q4_k", 14, {
        "attn_v": _where(_layer_below(4), "q5_k"),
        "ffn_down": _where(lambda p: p.architecture != "falcon" and _first(8)(p), "q5_k"),
    }),
    "q4_k_m": Mix("q4_k", 15, {
        "attn_v": _where(more_bits, "q6_k"), "ffn_down": _falcon_down, "attn_qkv": "q5_k",
    }),
    "q5_k_s": Mix("q5_k", 16),
    "q5_k_m": Mix("q5_k", 17, {
        "attn_v": _where(more_bits, "q6_k"), "ffn_down": _where(more_bits, "q6_k"), "attn_qkv": "q6_k",
    }),
    "q6_k": Mix("q6_k", 18),
}  # fmt: skip
_ALIASES = {"q3_k": "q3_k_m", "q4_k": "q4_k_m", "q5_k": "q5_k_m"}
_FIVE_BITS_WITH_EXPERTS = ("q2_k", "q3_k_s", "q3_k_m", "q4_k_s", "q4_k_m")


def mix_name(text: str) -> str:
    """A mix by its name in any case, as llama.cpp spells it: `Q4_K_M`, `q4_k` (the same), `bf16`.

    Raises:
        OptionError: there is none of that name.
    """
    name = _ALIASES.get(text.lower(), text.lower())
    if name not in MIXES:
        raise OptionError(f"no GGUF type is called {text!r}{nearest(text.lower(), MIXES)}")
    return name


def choose_type(name: str, place: Place, shape: tuple[int, ...]) -> str:
    """The type of a tensor of a mix."""
    if place.role in _F32_ROLES or len(shape) < 2:
        return "f32"
    mix = MIXES[name]
    if mix.base in FLOATS:
        return mix.base
    return fitting(_wanted(name, mix, place, shape), shape[-1])


def _wanted(name: str, mix: Mix, place: Place, shape: tuple[int, ...]) -> str:
    if place.role == "output" or (place.role == "embedding" and place.tied):
        if place.architecture == "falcon" or shape[-1] % BLOCKS[mix.base]:
            return "q8_0"
        return mix.base if mix.base == "q8_0" else "q6_k"
    if place.num_experts == 8 and place.role in ("attn_v", "attn_k"):
        return "q8_0"
    if place.role == "attn_output":
        if place.architecture == "falcon":
            return "q4_k" if name == "q3_k_l" else mix.base
        if place.num_experts == 8:
            return "q5_k" if name in _FIVE_BITS_WITH_EXPERTS else mix.base
    rule = mix.rules.get(place.role)
    found = rule(place) if callable(rule) else rule
    return found or mix.base


def fitting(kind: str, width: int) -> str:
    """The type itself, or the nearest larger one whose blocks divide the rows."""
    if kind in FLOATS or width % BLOCKS[kind] == 0:
        return kind
    smaller = _WITHOUT_SUPER_BLOCKS.get(kind)
    if smaller is not None and width % BLOCKS[smaller] == 0:
        return smaller
    return "f16"
