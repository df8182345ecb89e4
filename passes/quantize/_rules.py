"""Mixed precision: which layer gets which format, as rules by pattern that quantizing passes share.

    rules=[layers.0.*=int8.row, *.down_proj*=int5.g32, lm_head=none]

The first rule that matches a layer decides; `none` leaves the layer alone; a layer that no rule matches gets the
pass's own format. Patterns are globs (`*`, `?`, `[ab]`) over the weight's name, that name without its last part, and
the module paths of the operations that use it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from functools import lru_cache

from irc.core import formats
from irc.core.errors import OptionError, ParseError
from irc.core.formats import Format, QuantFormat
from irc.core.provenance import module_path
from irc.passes.quantize._weight_layers import WeightLayer

_LEAVE_ALONE = "none"


@dataclass(frozen=True)
class Rule:
    """Layers whose name matches `pattern` get `format`; None leaves them alone."""

    pattern: str
    format: Format | None

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
    problems = rule_problems(texts, lambda chosen: None)
    if problems:
        raise OptionError("; ".join(problems))
    return tuple(_parse(text) for text in texts)


def rule_problems(texts: Sequence[str], why_not: Callable[[Format], str | None]) -> list[str]:
    """What is wrong with each text that is no rule; `why_not` gives the reason if the pass cannot take a format."""
    problems = []
    for text in texts:
        try:
            rule = _parse(text)
        except ParseError as error:
            problems.append(f"rule {text!r}: {error}")
            continue
        reason = None if rule.format is None else why_not(rule.format)
        if reason is not None:
            problems.append(f"rule {text!r}: {reason}")
    return problems


def why_not_weights(chosen: Format) -> str | None:
    """Why weights cannot be rounded to this format, or None if they can."""
    if isinstance(chosen, QuantFormat) and chosen.symmetric and not chosen.signed:
        return f"{chosen} holds no negative weights: take int{chosen.bits} or .asym"
    return None


def why_not_integers(chosen: Format) -> str | None:
    """Why a method that gives integers with a scale a row or group cannot give this format, or None if it can."""
    if isinstance(chosen, QuantFormat) and not chosen.per_tensor:
        return why_not_weights(chosen)
    return f"only integers with a scale a row or group can be chosen here, not {chosen}"


def rule_for(rules: Sequence[Rule], layer: WeightLayer) -> Rule | None:
    """The first rule that matches the layer."""
    return next((rule for rule in rules if rule.matches(layer)), None)


def wanted_format(rules: tuple[str, ...], default: Format, layer: WeightLayer) -> Format | None:
    """The format that rules and the pass's own options ask for; None where a rule leaves the layer alone."""
    rule = rule_for(parse_rules(rules), layer)
    return default if rule is None else rule.format


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
