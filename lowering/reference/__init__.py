"""Target `reference`: the graph run by PyTorch. Runs every program; the yardstick of the other targets."""

from __future__ import annotations

from irc.lowering.reference.target import ReferenceArtifact, ReferenceOptions, ReferenceTarget

__all__ = ["ReferenceArtifact", "ReferenceOptions", "ReferenceTarget"]
