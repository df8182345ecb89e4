"""Memory of tensors that lie in a mapped file: given back to the system once they were read.

A weight that comes from a file need not stay in memory after its turn: the pages are read again if anybody asks. Only
Linux is told; elsewhere, and for memory that no file stands behind, nothing happens.
"""

from __future__ import annotations

import ctypes
import mmap
import sys

from torch import Tensor

# From <linux/mman.h>, Linux 5.4: reclaim these pages. Contents are kept, whatever is behind the mapping.
_MADV_PAGEOUT = 21


def release(tensor: Tensor) -> None:
    """Let the system take back the pages of a dense CPU tensor whose memory is a mapped file; values are kept."""
    if sys.platform != "linux" or tensor.device.type != "cpu" or not tensor.is_contiguous():
        return
    start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    stop = (tensor.data_ptr() + tensor.numel() * tensor.element_size()) // mmap.PAGESIZE * mmap.PAGESIZE
    if stop > start:
        # An old kernel answers "invalid argument": then the pages stay, which is what would happen without this.
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), _MADV_PAGEOUT)
