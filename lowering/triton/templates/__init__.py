"""Which library kernels a target's sites use, with what block sizes, and their launch."""
