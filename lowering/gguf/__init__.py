"""Target `gguf`: a file that llama.cpp loads, and such files as programs."""

from __future__ import annotations

from irc.lowering.gguf.export import Exported, export_gguf, importance_matrix
from irc.lowering.gguf.imatrix import ImportanceMatrix
from irc.lowering.gguf.importing import from_gguf
from irc.lowering.gguf.target import GgufArtifact, GgufOptions, GgufTarget

__all__ = [
    "Exported",
    "GgufArtifact",
    "GgufOptions",
    "GgufTarget",
    "ImportanceMatrix",
    "export_gguf",
    "from_gguf",
    "importance_matrix",
]
