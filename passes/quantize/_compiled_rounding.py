"""Round-to-nearest of large weights by compiled code: `round_to_nearest.cpp`, equal to the bit to what PyTorch makes.

PyTorch needs some twenty passes over each block of numbers and as many temporaries; compiled, it is one of each for
quantizing and for the check, four times as fast. Building takes about two seconds, once on a machine; `start_building`
does that beside other work. Where that was not called, there is no compiler, or the format is another one, the callers
do it in PyTorch.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from irc.core.errors import TargetError
from irc.core.formats import QuantFormat
from irc.core.toolchain import Build, find_compiler, supported_isas

_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_SCALE_TYPES = (torch.float32, torch.float16)
# Smaller weights are done sooner than a call is prepared.
_LARGE = 1 << 16


class _Format(ctypes.Structure):
    """`Format` of the C++ file."""

    _fields_ = (
        ("width", ctypes.c_int64), ("group", ctypes.c_int64), ("bits", ctypes.c_int32), ("symmetric", ctypes.c_int32),
        ("is_signed", ctypes.c_int32), ("weight", ctypes.c_int32), ("scale", ctypes.c_int32),
    )  # fmt: skip


def start_building() -> None:
    """Build the code in a thread of its own, unless that was done or cannot be."""
    _building()


def ready() -> ctypes.CDLL | None:
    """The built code, where building it was started: the end of that is waited for, as PyTorch would take longer."""
    building = _building.cache_info().currsize and _building()
    return building.result() if building else None


@functools.cache
def _building() -> Future[ctypes.CDLL | None]:
    pool = ThreadPoolExecutor(1, thread_name_prefix="irc-build")
    future = pool.submit(_library)
    pool.shutdown(wait=False)
    return future


def _library() -> ctypes.CDLL | None:
    if find_compiler() is None or "avx2" not in supported_isas():
        return None
    source = Path(__file__).with_name("round_to_nearest.cpp").read_text()
    try:
        # Contracted to one rounding, a product and a sum would give other numbers than PyTorch's.
        library = ctypes.CDLL(str(Build(source, "avx2", flags=("-ffp-contract=off", "-O2"), name="rounding").make()))
    except (TargetError, OSError):  # PyTorch makes the same numbers
        return None
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    library.irc_quantize_rows.argtypes = [pointer, integer, pointer, pointer, pointer, pointer]
    library.irc_quantize_rows.restype = ctypes.c_int32
    library.irc_worst_rows.argtypes = [pointer, integer, pointer, pointer, pointer, pointer]
    library.irc_worst_rows.restype = ctypes.c_float
    return library


def quantize_rows(weight: Tensor, chosen: QuantFormat, stored: Tensor, scale: Tensor, zero: Tensor | None) -> bool:
    """Fill stored, scale and zero point of a weight [N, K]; False where that has to be done otherwise."""
    library = _usable(weight, chosen, stored, scale, zero)
    if library is None:
        return False
    run = functools.partial(_run, library.irc_quantize_rows, weight, chosen, stored, scale, zero)
    return all(_by_parts(weight.shape[0], run))


def worst_error(
    weight: Tensor, chosen: QuantFormat, stored: Tensor, scale: Tensor, zero: Tensor | None, dtype: torch.dtype
) -> float | None:
    """The largest error of a weight [N, K] in steps of its own groups; None where that has to be found otherwise."""
    library = _usable(weight, chosen, stored, scale, zero)
    if library is None or dtype != weight.dtype:
        return None
    run = functools.partial(_run, library.irc_worst_rows, weight, chosen, stored, scale, zero)
    return max(_by_parts(weight.shape[0], run))


def _usable(
    weight: Tensor, chosen: QuantFormat, stored: Tensor, scale: Tensor, zero: Tensor | None
) -> ctypes.CDLL | None:
    parts = [part for part in (weight, stored, scale, zero) if part is not None]
    fits = (
        weight.numel() >= _LARGE
        and weight.dtype in _TYPES
        and scale.dtype in _SCALE_TYPES
        and (chosen.group_size or weight.shape[1]) % 8 == 0
        and all(part.device.type == "cpu" and part.is_contiguous() for part in parts)
    )
    return ready() if fits else None


def _run(
    function: Callable[..., int | float], weight: Tensor, chosen: QuantFormat, stored: Tensor, scale: Tensor,
    zero: Tensor | None, rows: slice,
) -> int | float:  # fmt: skip
    width = weight.shape[1]
    format = _Format(
        width, chosen.group_size or width, chosen.bits, chosen.symmetric, chosen.signed, _TYPES[weight.dtype],
        _TYPES[scale.dtype],
    )  # fmt: skip
    addresses = [None if part is None else part[rows].data_ptr() for part in (weight, stored, scale, zero)]
    return function(ctypes.addressof(format), rows.stop - rows.start, *addresses)


def _by_parts(rows: int, run: Callable[[slice], int | float]) -> list[int | float]:
    """The function on shares of the rows, a thread each (the call leaves Python's lock alone)."""
    threads = min(torch.get_num_threads(), rows)
    bounds = [rows * i // threads for i in range(threads + 1)]
    shares = [slice(start, stop) for start, stop in itertools.pairwise(bounds)]
    return [run(shares[0])] if threads == 1 else list(_threads(threads).map(run, shares))


@functools.lru_cache(1)
def _threads(count: int) -> ThreadPoolExecutor:
    """Kept between calls: a model has hundreds of weights, and starting threads takes as long as a small one."""
    return ThreadPoolExecutor(count, thread_name_prefix="irc-rounding")
