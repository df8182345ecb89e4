"""Steps that repeat: the same caches and shapes again, so that checks and addresses are worked out once.

A model of 30 layers hands 60 caches to its step. Looking at each of them costs more than a tenth of a millisecond,
which a small model notices; `BoundStep` remembers what was found, and looks only whether they are the same tensors.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

from irc.lowering.cpu.library import Library
from irc.lowering.kernels.signature import Signature


class BoundStep:
    """A step for inputs of fixed shapes, with caches that are written in place.

    Caches keep their memory while they are bound, and so do inputs that are handed over again: what `Tensor.resize_` or
    `set_` does to one of them goes unnoticed.
    """

    def __init__(
        self, library: Library, signature: Signature, sizes: Sequence[int], inputs: Sequence[Tensor],
        caches: Sequence[Tensor],
    ) -> None:  # fmt: skip
        self._library, self._sizes = library, tuple(sizes)
        self._shapes = [x.shape for x in inputs]
        self._caches = [weakref.ref(cache) for cache in caches]
        self._result = torch.Size(signature.results(sizes)[0])
        dtype = signature.outputs[0]
        assert dtype is not None
        self._dtype = dtype
        self._values = (ctypes.c_int64 * max(1, len(sizes)))(*sizes)
        self._given = (ctypes.c_void_p * (len(inputs) + len(caches)))(*[x.data_ptr() for x in (*inputs, *caches)])
        self._made = (ctypes.c_void_p * len(signature.outputs))()
        self._last = tuple(inputs)
        self._addresses = tuple(ctypes.addressof(x) for x in (self._values, self._given, self._made))

    @staticmethod
    def possible(signature: Signature, num_inputs: int, num_caches: int) -> bool:
        """Whether the program's results are the logits and the caches, in order and in place."""
        return signature.in_place == [None, *range(num_inputs, num_inputs + num_caches)]

    def fits(self, inputs: Sequence[Tensor], caches: Sequence[Tensor]) -> bool:
        """Whether these are the caches it was bound to, and dense inputs of its shapes."""
        if self._is_last(inputs):
            return self._has(caches)
        for x, shape in zip(inputs, self._shapes, strict=True):
            if x.shape != shape or x.dtype != torch.int64 or not x.is_contiguous() or not x.is_cpu:
                return False
        return self._has(caches)

    def _is_last(self, inputs: Sequence[Tensor]) -> bool:
        """Whether they are the very tensors of the last call: some callers write what is new into the same ones."""
        return all(x is last for x, last in zip(inputs, self._last, strict=True))

    def _has(self, caches: Sequence[Tensor]) -> bool:
        return len(caches) == len(self._caches) and all(
            known() is cache for known, cache in zip(self._caches, caches, strict=True)
        )

    def run(self, inputs: Sequence[Tensor]) -> Tensor:
        """The logits; caches are written."""
        logits = torch.empty(self._result, dtype=self._dtype)
        if not self._is_last(inputs):
            for i, x in enumerate(inputs):
                self._given[i] = x.data_ptr()
            self._last = tuple(inputs)
        self._made[0] = logits.data_ptr()
        self._library.call(self._sizes, *self._addresses)
        return logits
