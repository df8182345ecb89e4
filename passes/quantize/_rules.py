"""Mixed precision: which layer gets which format, as rules by pattern that quantizing passes share.

    rules=[layers.0.*=int8.row, *.down_proj*=int5.g32, lm_head=none]

The first rule that matches a layer decides; `none` leaves the layer alone; a layer that no rule matches gets the
pass's own format. Patterns are globs (`*`, `?`, `[ab]`) over the weight's name, that name without its last part, and
the module paths of the operations that use it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from functools import lru_cache

from irc.core import formats
from irc.core.errors import OptionError, ParseError
from irc.core.formats import QuantFormat
from irc.core.provenance import module_path
from irc.passes.quantize._weight_layers import WeightLayer

_LEAVE_ALONE = "none"


@dataclass(frozen=True)
class Rule:
    """Layers whose name matches `pattern` get `format`; None leaves them alone."""

    pattern: str
    format: QuantFormat | None

    def __str__(self) -> str:
        return f"{self.pattern}={self.format or _LEAVE_ALONE}"

    def matches(self, layer: WeightLayer) -> bool:
        """Whether the pattern fits one of the layer's names."""
        return any(fnmatchcase(name, self.pattern) for name in layer_names(layer))


def layer_names(layer: WeightLayer) -> list[str]:
    """What a rule may call a layer: `layers.0.up.weight`, `layers.0.up`, and the modules that use the weight."""
    names = [layer.name, layer.name.rpartition(".")[0], *(module_path(user) for user in layer.users)]
    return list(dict.fromkeys(name for name in names if name))


@lru_cache(maxsize=256)
def parse_rules(texts: tuple[str, ...]) -> tuple[Rule, ...]:
    """Read `pattern=format` texts.

    Raises:
        OptionError: lists every text that is no rule.
    """
    problems = rule_problems(texts)
    if problems:
        raise OptionError("; ".join(problems))
    return tuple(_parse(text) for text in texts)


def rule_problems(texts: Sequence[str]) -> list[str]:
    """What is wrong with each text that is no rule for weights."""
    problems = []
    for text in texts:
        try:
            rule = _parse(text)
        except ParseError as error:
            problems.append(f"rule {text!r}: {error}")
            continue
        reason = None if rule.format is None else why_not_for_weights(rule.format)
        if reason is not None:
            problems.append(f"rule {text!r}: {reason}")
    return problems


def why_not_for_weights(chosen: QuantFormat) -> str | None:
    """Why weights cannot be rounded to this format, or None if they can."""
    if chosen.per_tensor:
        return "weights take a scale a row or a group, not one for the whole tensor"
    if chosen.symmetric != chosen.signed:
        return "weights take symmetric signed numbers (int4.g32) or asymmetric unsigned ones (uint4.g32.asym)"
    if chosen.packs_two and chosen.group_size is not None and chosen.group_size % 2:
        return f"4-bit numbers are stored in pairs, and its groups have {chosen.group_size}"
    return None


def rule_for(rules: Sequence[Rule], layer: WeightLayer) -> Rule | None:
    """The first rule that matches the layer."""
    return next((rule for rule in rules if rule.matches(layer)), None)


def idle_rules(rules: Sequence[Rule], layers: Iterable[WeightLayer]) -> list[str]:
    """A problem for every rule that decides about no layer: it matches none, or earlier rules took what it matches."""
    layers = list(layers)
    names = sorted({name for layer in layers for name in layer_names(layer)})
    deciding = [rule_for(rules, layer) for layer in layers]
    problems = []
    for rule in dict.fromkeys(rules):
        if any(found is rule or found == rule for found in deciding):
            continue
        taken = [layer.name for layer in layers if rule.matches(layer)]
        if taken:
            problems.append(f"rule '{rule}' comes too late: earlier rules took {', '.join(taken[:3])}")
        else:
            problems.append(f"rule '{rule}' matches no layer{_nearest(rule.pattern, names)}")
    return problems


def _nearest(pattern: str, names: list[str]) -> str:
    """The layers whose name, or as much of its end as the pattern has parts, is spelled most like the pattern."""
    if not names:
        return ": there are no layers to quantize"
    wanted = pattern.strip("*.")
    parts = wanted.count(".") + 1
    ends: dict[str, list[str]] = {}
    for name in names:
        ends.setdefault(".".join(name.split(".")[-parts:]), []).append(name)
    close = [name for end in get_close_matches(wanted, ends, n=2, cutoff=0.5) for name in ends[end][:2]]
    if close:
        return " (nearest: " + ", ".join(close) + ")"
    return f" (layers are called {', '.join(names[:4])}{', …' if len(names) > 4 else ''})"


def _parse(text: str) -> Rule:
    pattern, equals, chosen = (part.strip() for part in text.rpartition("="))
    if not equals or not pattern:
        raise ParseError("expected PATTERN=FORMAT, for example *.down_proj=int5.g32, or PATTERN=none")
    return Rule(pattern, None if chosen == _LEAVE_ALONE else formats.parse(chosen))
