"""Options of target `cpu`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from irc.core.errors import OptionError, nearest
from irc.lowering.cpp.build import ISA_FLAGS


@dataclass(frozen=True, kw_only=True)
class CpuOptions:
    """How a program is built and run.

    Attributes:
        isa: instruction set, `plain`, `avx2` or `avx512`; None: the most capable that this processor has.
        threads: of the pool; None: as many as PyTorch uses, but one for a small language model (4 MB of weights).
        flags: further options of the compiler.
        save_isas: instruction sets to build into a saved artifact (empty: the one in use).
        activations: `program`: quantized where the program says so; `int8`: also in front of quantized weights that the
            program multiplies with floats (a scale a token; an approximation, and said so in the notes).
        profile: measure what each kernel of a step takes (`CpuArtifact.kernel_times`), at the price of a barrier.
        winograd: convolutions of 3 x 3 in floats by F(2 x 2, 3 x 3), which may lose digits where neighbours differ
            by orders of magnitude (irc/winograd.h has the bound); without, by plain sums.
        templates: use the hand-written kernels; without, everything is printed from the kernel IR.
        printed: kinds of templates that are not used, their operations printed instead.
        share: innermost iterations of a printed kernel that a thread takes at least; None: some thousands.
        private_rows: with one token, kernels of one row are computed by every thread for itself, which saves barriers.
    """

    isa: str | None = None
    threads: int | None = None
    flags: Sequence[str] = ()
    save_isas: Sequence[str] = ()
    activations: Literal["program", "int8"] = "program"
    winograd: bool = True
    templates: bool = True
    profile: bool = False
    printed: Sequence[str] = ()
    share: int | None = None
    private_rows: bool = True

    def __post_init__(self) -> None:
        for isa in (*([self.isa] if self.isa is not None else []), *self.save_isas):
            if isa not in ISA_FLAGS:
                raise OptionError(f"no instruction set is called {isa!r}{nearest(isa, ISA_FLAGS)}")
        if self.activations not in ("program", "int8"):
            raise OptionError(f"activations must be program or int8, not {self.activations!r}")
        if self.share is not None and self.share < 1:
            raise OptionError(f"share must be positive, not {self.share}")
        if self.threads is not None and self.threads < 1:
            raise OptionError(f"threads must be positive, not {self.threads}")
