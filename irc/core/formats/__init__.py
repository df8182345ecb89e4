"""Number formats as values: how stored bits stand for real numbers, and how they are stored.

| family | text | file |
| --- | --- | --- |
| integers | `int4.g32`, `int8.row`, `uint4.g32.asym`, `uint8.tensor.asym` | `integer.py` |
| 8-bit floats | `f8e4m3.row`, `f8e5m2.g32`, `f8e4m3.tensor` | `float8.py` |
| 4-bit floats | `f4e2m1.g32`, `mxfp4`, `nvfp4` | `float4.py` |
| GGUF blocks | `q4_0`, `q4_1`, `q5_0`, `q5_1`, `q8_0`, `q2_k` … `q6_k` | `gguf.py` |

`parse(text)` is the inverse of `str(format)`; graph nodes carry that text. docs/formats.md has the whole table.
"""

from __future__ import annotations

from functools import lru_cache

from irc.core.errors import ParseError
from irc.core.formats.base import Format as Format
from irc.core.formats.base import Parts as Parts
from irc.core.formats.base import ScaledFormat as ScaledFormat
from irc.core.formats.base import Scales as Scales
from irc.core.formats.float4 import Float4Format as Float4Format
from irc.core.formats.float4 import MxFloat4Format as MxFloat4Format
from irc.core.formats.float4 import NvFloat4Format as NvFloat4Format
from irc.core.formats.float4 import read_float4
from irc.core.formats.float8 import Float8Format as Float8Format
from irc.core.formats.float8 import read_float8
from irc.core.formats.gguf import GgufFormat as GgufFormat
from irc.core.formats.gguf import read_gguf
from irc.core.formats.integer import QuantFormat as QuantFormat
from irc.core.formats.integer import read_integer
from irc.core.formats.repacking import repack as repack
from irc.core.formats.tensors import compute_scales as compute_scales
from irc.core.formats.tensors import dequantize_tensor as dequantize_tensor
from irc.core.formats.tensors import quantize_tensor as quantize_tensor

_READERS = (read_integer, read_float8, read_float4, read_gguf)


@lru_cache(maxsize=256)
def parse(text: str) -> Format:
    """Read `int4.g32`, `f8e4m3.row`, `nvfp4`, `q4_k`, …: the inverse of `str(format)`."""
    for read in _READERS:
        found = read(text)
        if found is not None:
            return found
    raise ParseError(
        f"{text!r} is not a quantization format;"
        " examples: int4.g32, int8.row, uint8.tensor.asym, f8e4m3.row, mxfp4, nvfp4, q4_0, q4_k"
    )
