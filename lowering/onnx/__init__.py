"""Target `onnx`: an ONNX model, run and checked with ONNX Runtime."""

from __future__ import annotations

from irc.lowering.onnx.target import OnnxArtifact, OnnxOptions, OnnxTarget

__all__ = ["OnnxArtifact", "OnnxOptions", "OnnxTarget"]
