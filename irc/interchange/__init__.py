"""Quantized checkpoints of other tools: compressed-tensors, GPTQ and AWQ folders, read and written without rounding.

    irc.interchange.save_quantized(program, folder, layout="gptq", config=model.config)
    program = irc.interchange.load_quantized(folder, irc.capture(model, inputs))

A folder holds `config.json` with `quantization_config`, and `model.safetensors`: what transformers and vLLM load.
Integers and scales are only ever moved, never computed again; what a layout cannot say is refused, all of it at once.
"""

from __future__ import annotations

from irc.interchange.layouts import LAYOUTS as LAYOUTS
from irc.interchange.loading import load_quantized as load_quantized
from irc.interchange.saving import save_quantized as save_quantized
