"""Target `triton`: GPU kernels in Triton, printed from the kernel IR.

compiled = irc.compile(model, target="triton", example_inputs=x)
print(compiled.artifact.source)
"""

from irc.lowering.triton.target import TritonOptions, TritonTarget

__all__ = ["TritonOptions", "TritonTarget"]
