"""Canonicalization: after it, each meaning has one operator, whatever the model's source spelled."""

from __future__ import annotations

from irc.core.contract import Pass, registered_passes

CANONICAL_ORDER = (
    "drop-noise",
    "raise-linear",
    "normalize-windows",
    "raise-layer-norm",
    "raise-rms-norm",
    "raise-attention",
    "raise-rope",
    "raise-glu",
    "simplify-algebra",
    "fold-constants",
    "eliminate-common-subexpressions",
    "eliminate-dead-code",
)


def canonical_passes() -> list[Pass]:
    """The passes that always run after capture, in order.

    Norms come before attention (query and key norms sit between projection and attention) and
    attention before RoPE; cleaning up comes last, when everything that can be raised is.
    """
    import irc.passes  # noqa: F401  (registers every pass)

    known = registered_passes()
    return [known[name]() for name in CANONICAL_ORDER]
