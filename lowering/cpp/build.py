"""Building C++ with the system's compiler, cached by hash of source, headers, options, compiler and processor."""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from irc.core.errors import TargetError

INCLUDE = Path(__file__).resolve().parent / "include"
ISA_FLAGS = {
    "plain": (),
    "avx2": ("-mavx2", "-mfma", "-mf16c"),
    "avx512": ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni", "-mavx512bf16", "-mavx2",
               "-mfma", "-mf16c"),
}  # fmt: skip
"""Instruction set → compiler flags, the least capable first."""
COMMON = (
    "-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-fopenmp-simd", "-fno-ipa-cp-clone", "-fPIC",
    "-fvisibility=hidden", "-pthread",
)  # fmt: skip
_CPU_NEEDS = {
    "plain": set[str](),
    "avx2": {"avx2", "fma", "f16c"},
    "avx512": {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni", "avx512_bf16"},
}


def find_compiler() -> str | None:
    """The C++ compiler: `$CXX`, g++ or clang++; None without one."""
    for name in (os.environ.get("CXX"), "g++", "clang++", "c++"):
        if name and (found := shutil.which(name)):
            return found
    return None


def require_compiler() -> str:
    """The compiler's path.

    Raises:
        TargetError: there is none; says what to do.
    """
    found = find_compiler()
    if found is None:
        raise TargetError(
            "target 'cpu' prints C++ and needs a compiler, but neither $CXX nor g++ nor clang++ was found:"
            " install one (Debian: apt install g++), or use target 'reference'"
        )
    return found


@functools.cache
def compiler_version(compiler: str) -> str:
    """What `--version` says, for the cache's key."""
    answer = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False)
    return answer.stdout.splitlines()[0] if answer.stdout else compiler


@functools.cache
def supported_isas() -> tuple[str, ...]:
    """Instruction sets that this processor has, the least capable first."""
    try:
        line = Path("/proc/cpuinfo").read_text().split("flags", 1)[1].split("\n", 1)[0]
        flags = set(line.split())
    except (OSError, IndexError):
        flags = set()
    return tuple(isa for isa in ISA_FLAGS if _CPU_NEEDS[isa] <= flags)


def cache_folder() -> Path:
    """Where built objects are kept: `$IRC_CACHE`, else below `$XDG_CACHE_HOME` or `~/.cache`."""
    given = os.environ.get("IRC_CACHE")
    base = os.environ.get("XDG_CACHE_HOME")
    return Path(given) if given else (Path(base) if base else Path.home() / ".cache") / "irc"


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
    """A shared object (or program) made from C++ text; one made before from the same is used again.

    Args:
        isa: a key of `ISA_FLAGS`.
        flags: further options of the compiler.

    Raises:
        TargetError: no compiler, or it refuses the source (its first errors are quoted).
    """
    compiler = require_compiler()
    options = [*COMMON, *ISA_FLAGS[isa], f"-I{INCLUDE}", *flags, *(["-shared"] if shared else [])]
    key = hashlib.sha256("\0".join(
        [source, _headers_hash(), compiler_version(compiler), platform.machine(), *options[:-1]]
    ).encode()).hexdigest()[:32]  # fmt: skip
    folder = cache_folder() / "cpp" / key
    target = folder / (f"{name}.so" if shared else name)
    if not target.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        _compile(compiler, source, options, folder, target)
    return target


def _compile(compiler: str, source: str, options: Sequence[str], folder: Path, target: Path) -> None:
    text = folder / f"{target.stem}.cpp"
    with tempfile.TemporaryDirectory(dir=folder) as work:
        written = Path(work) / text.name
        written.write_text(source)
        made = Path(work) / target.name
        answer = subprocess.run(
            [compiler, *options, "-o", str(made), str(written)], capture_output=True, text=True, check=False
        )
        if answer.returncode != 0:
            kept = folder / f"{target.stem}.failed.cpp"
            os.replace(written, kept)
            lines = [line for line in answer.stderr.splitlines() if "error" in line][:5] or answer.stderr.splitlines()[
                :5
            ]
            raise TargetError(f"{compiler} refuses the printed source {kept}:\n" + "\n".join(lines))
        os.replace(written, text)
        os.replace(made, target)
