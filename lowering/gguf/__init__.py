"""Target `gguf`: a file that llama.cpp loads, and such files as programs."""

from __future__ import annotations

from irc.lowering.gguf.export import Exported, export_gguf

__all__ = ["Exported", "export_gguf"]
