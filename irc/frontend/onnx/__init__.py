"""ONNX files as programs: `irc.from_onnx(path)`.

A file is read and checked (`reading`), becomes a module that runs its nodes with PyTorch (`module`, `operators/`), and
is captured like any other module (`importing`).
"""

from __future__ import annotations

from irc.frontend.onnx.importing import from_onnx

__all__ = ["from_onnx"]
