"""Target `onnx`: an ONNX model, run and checked with ONNX Runtime."""

from __future__ import annotations

import irc.lowering.onnx.fusions
import irc.lowering.onnx.translations  # noqa: F401  (registers every fusion and translation)
from irc.lowering.onnx.artifact import OnnxArtifact
from irc.lowering.onnx.genai_target import GenaiArtifact, GenaiOptions, GenaiTarget
from irc.lowering.onnx.options import OnnxOptions
from irc.lowering.onnx.target import OnnxTarget

__all__ = ["GenaiArtifact", "GenaiOptions", "GenaiTarget", "OnnxArtifact", "OnnxOptions", "OnnxTarget"]
