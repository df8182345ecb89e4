"""`irc::cache_write` → `TensorScatter`: the tokens of a row go to consecutive places, from its first position on.

`irc::cache_write` takes any positions. A step's positions are consecutive in each row; the artifact checks that before
it runs (`CONSECUTIVE` in the model's metadata).
"""

from __future__ import annotations

import torch.fx as fx
from torch import Tensor

from irc.core.kv_cache import KVCache
from irc.core.operands import input_node
from irc.core.ops.cache import as_bytes
from irc.core.program import VAL, Program
from irc.lowering.onnx.registry import Setting, emit, translates


def _why_not(setting: Setting, program: Program, node: fx.Node) -> str | None:
    cache, value, _positions = (input_node(node, n).meta[VAL] for n in range(3))
    cached = KVCache.of(program)
    if cached is None or cached.layout != "contiguous" or node.args[2] is not program.placeholders[1]:
        return "only a step's own positions are known to be consecutive"
    if cache.dtype != value.dtype or as_bytes(cache).dtype != cache.dtype:
        return "TensorScatter writes values of the cache's own type"
    return None


@translates("cache_write", "TensorScatter", opset=24, why_not=_why_not)
def cache_write(setting: Setting, cache: Tensor, value: Tensor, positions: Tensor) -> Tensor:
    """The row's first position is where its tokens go."""
    return emit(
        "TensorScatter",
        (cache, value, positions[:, 0]),
        {"axis": 2, "mode": "linear"},
        dtype=cache.dtype,
        shape=cache.shape,
        version=setting.opset,
    )
