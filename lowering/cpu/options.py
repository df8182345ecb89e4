"""Options of target `cpu`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from irc.core.errors import OptionError, nearest
from irc.lowering.cpp.build import ISA_FLAGS


@dataclass(frozen=True, kw_only=True)
class CpuOptions:
    """How a program is built and run.

    Attributes:
        isa: instruction set, `plain`, `avx2` or `avx512`; None: the most capable that this processor has.
        threads: of the pool; None: as many as PyTorch uses.
        flags: further options of the compiler.
        save_isas: instruction sets to build into a saved artifact (empty: the one in use).
        templates: use the hand-written kernels; without, everything is printed from the kernel IR.
    """

    isa: str | None = None
    threads: int | None = None
    flags: Sequence[str] = ()
    save_isas: Sequence[str] = ()
    templates: bool = True

    def __post_init__(self) -> None:
        for isa in (*([self.isa] if self.isa is not None else []), *self.save_isas):
            if isa not in ISA_FLAGS:
                raise OptionError(f"no instruction set is called {isa!r}{nearest(isa, ISA_FLAGS)}")
        if self.threads is not None and self.threads < 1:
            raise OptionError(f"threads must be positive, not {self.threads}")
