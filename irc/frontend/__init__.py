"""Capture: from a PyTorch model, an ExportedProgram or a `.pt2` file to a `Program`."""

from __future__ import annotations

from irc.frontend.capture import capture

__all__ = ["capture"]
