"""Building printed C++ against the templates' headers, whose text is part of an object's identity."""

from __future__ import annotations

import functools
import hashlib
import platform
from collections.abc import Sequence
from pathlib import Path

from irc.core.toolchain import COMMON as COMMON
from irc.core.toolchain import ISA_FLAGS as ISA_FLAGS
from irc.core.toolchain import Build as Build
from irc.core.toolchain import Precompiled, compiler_version, require_compiler
from irc.core.toolchain import cache_folder as cache_folder
from irc.core.toolchain import find_compiler as find_compiler
from irc.core.toolchain import supported_isas as supported_isas

INCLUDE = Path(__file__).resolve().parent / "include"
# What printed sources include first.
_FIRST = "irc/program.h"


@functools.cache
def _headers_hash() -> str:
    digest = hashlib.sha256()
    for path in sorted(INCLUDE.rglob("*.h")):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def toolchain_hash() -> str:
    """What a measurement of built code depends on besides the processor: compiler, its options, templates."""
    parts = [compiler_version(require_compiler()), _headers_hash(), platform.machine(), *COMMON]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def build(source: str, *, isa: str, shared: bool = True, flags: Sequence[str] = (), name: str = "program") -> Path:
    """A shared object (or program) from C++ text that may include the templates; see `irc.core.toolchain.Build`.

    Raises:
        TargetError: no compiler, or it refuses the source (its first errors are quoted).
    """
    return building(source, isa=isa, shared=shared, flags=flags, name=name).make()


def building(source: str, *, isa: str, shared: bool = True, flags: Sequence[str] = (), name: str = "program") -> Build:
    """What `build` makes; a source that tells its units apart (`#if … IRC_UNIT == 1`) is compiled in these."""
    count = 1
    while f"IRC_UNIT == {count}\n" in source:
        count += 1
    units = () if count == 1 else tuple((f"-DIRC_UNIT={number}",) for number in range(count))
    # Builds with flags of their own are rare: each kind would need a header of its own.
    first = _precompiled(isa) if source.startswith(f'#include "{_FIRST}"\n') and not flags else None
    return Build(source, isa, shared, (f"-I{INCLUDE}", *flags), name, _headers_hash(), units, first)


def precompile(isa: str) -> None:
    """Have the header that printed sources begin with precompiled, beside other work, unless that was done.

    It saves 0.8 of the 1.2 seconds that a compiler needs to read a unit.
    """
    _precompiled(isa).start()


def _precompiled(isa: str) -> Precompiled:
    return Precompiled(INCLUDE / _FIRST, _FIRST, isa, (f"-I{INCLUDE}",), _headers_hash())
