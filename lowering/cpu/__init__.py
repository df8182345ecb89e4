"""Target `cpu`: a whole program as one C++ function, built here, with its weights packed beside it."""

from __future__ import annotations

from irc.lowering.cpu.artifact import CpuArtifact
from irc.lowering.cpu.target import CpuOptions, CpuTarget

__all__ = ["CpuArtifact", "CpuOptions", "CpuTarget"]
