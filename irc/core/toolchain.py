"""The system's C++ compiler: what it is, what this processor runs, and objects built and kept by hash."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from irc.core.errors import TargetError

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


@dataclass(frozen=True)
class Build:
    """What is built from C++ text, and how.

    Attributes:
        isa: a key of `ISA_FLAGS`.
        shared: a shared object, else a program.
        flags: further options of the compiler.
        name: of the file.
        version: of what the source includes: part of the object's identity.
        units: options of each unit that the source can be compiled as, side by side; without them it is compiled whole.
        first: the header that the source begins with, where that may be precompiled.
    """

    source: str
    isa: str
    shared: bool = True
    flags: tuple[str, ...] = ()
    name: str = "program"
    version: str = ""
    units: tuple[tuple[str, ...], ...] = ()
    first: Precompiled | None = None

    def place(self) -> Path:
        """Where the object is, or will be.

        Raises:
            TargetError: there is no compiler.
        """
        key = _key(
            [self.source, self.version, str(self.shared), *_options(self.isa, self.flags), *map(str, self.units)]
        )
        return cache_folder() / "cpp" / key / (f"{self.name}.so" if self.shared else self.name)

    def make(self) -> Path:
        """The object; one made before from the same is used again.

        Raises:
            TargetError: no compiler, or it refuses the source (its first errors are quoted).
        """
        target = self.place()
        if not target.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            first = self.first.folder() if self.first is not None else None
            command = [require_compiler(), *([] if first is None else [f"-I{first}"]), *_options(self.isa, self.flags)]
            _compile(command, ["-shared"] if self.shared else [], self.source, self.units, target)
            if self.first is not None and first is None:
                self.first.start()  # for the next one
        return target


_PRECOMPILED = "precompiled-"
# Of headers (50 MB each) in the cache; older ones go when one is made.
_KEPT = 4
# Seconds after which whoever began to make one, and did not finish, is taken to have been stopped.
_GIVEN_UP = 120


@dataclass(frozen=True)
class Precompiled:
    """A header in the form that g++ reads it into; other compilers read it anew each time.

    g++ takes it by itself where it is found before the header, its options and macros are the same, and nothing stands
    before it in the source; else it goes on to the header.

    Attributes:
        header: its file.
        included: the name by which sources include it.
        isa, flags: as of the build.
        version: of the header and what it includes.
    """

    header: Path
    included: str
    isa: str
    flags: tuple[str, ...]
    version: str

    def folder(self) -> Path | None:
        """The folder for the compiler to search first; None where nothing was made yet."""
        place = self._place()
        return place if place is not None and (place / f"{self.included}.gch").is_file() else None

    def start(self) -> None:
        """Make it in a process of its own, which goes on when this one ends, unless somebody did or does."""
        place = self._place()
        made = None if place is None else place / f"{self.included}.gch"
        if place is None or made is None or made.is_file() or len(os.sched_getaffinity(0)) == 1:
            return
        begun = made.with_suffix(".begun")
        command = [require_compiler(), *_options(self.isa, self.flags), "-x", "c++-header", "-o", f"{begun}.gch",
                   str(self.header)]  # fmt: skip
        script = 'to=$1; from=$2; shift 2; nice "$@" && mv "$from" "$to"'
        nothing = [(os.POSIX_SPAWN_OPEN, number, os.devnull, os.O_RDWR, 0) for number in range(3)]
        # Builds do without where somebody else has begun, or the cache cannot be written to.
        with contextlib.suppress(OSError):
            made.parent.mkdir(parents=True, exist_ok=True)
            if begun.exists() and time.time() - begun.stat().st_mtime > _GIVEN_UP:
                begun.unlink()
            begun.touch(exist_ok=False)
            _remove_old(place.parent)
            # Not by `subprocess`, which minds that nobody waits for it.
            os.posix_spawn("/bin/sh", ["/bin/sh", "-c", script, "sh", str(made), f"{begun}.gch", *command], os.environ,
                           file_actions=nothing)  # fmt: skip

    def _place(self) -> Path | None:
        compiler = find_compiler()
        if compiler is None or "clang" in compiler_version(compiler):
            return None
        key = _key([self.version, str(self.header), *_options(self.isa, self.flags)])
        return cache_folder() / "cpp" / f"{_PRECOMPILED}{key}"


def _remove_old(folder: Path) -> None:
    """Precompiled headers but for the newest."""
    for old in sorted(folder.glob(f"{_PRECOMPILED}*"), key=lambda one: one.stat().st_mtime)[:-_KEPT]:
        shutil.rmtree(old, ignore_errors=True)


def _options(isa: str, flags: Sequence[str]) -> list[str]:
    return [*COMMON, *ISA_FLAGS[isa], *flags]


def _key(parts: Sequence[str]) -> str:
    whole = [*parts, compiler_version(require_compiler()), platform.machine()]
    return hashlib.sha256("\0".join(whole).encode()).hexdigest()[:32]


def _compile(
    command: Sequence[str], linking: Sequence[str], source: str, units: Sequence[Sequence[str]], target: Path
) -> None:  # fmt: skip
    folder = target.parent
    text = folder / f"{target.stem}.cpp"
    with tempfile.TemporaryDirectory(dir=folder) as work:
        written = Path(work) / text.name
        written.write_text(source)
        made = Path(work) / target.name
        if len(units) < 2 or len(os.sched_getaffinity(0)) == 1:
            lines = _refusal([*command, *linking, "-o", str(made), str(written)])
        else:
            objects = [f"{written}.{number}.o" for number in range(len(units))]
            with ThreadPoolExecutor(len(units)) as pool:
                answers = pool.map(
                    lambda unit, to: _refusal([*command, *unit, "-c", "-o", to, str(written)]), units, objects
                )
                lines = next(filter(None, answers), []) or _refusal([*command, *linking, "-o", str(made), *objects])
        if lines:
            kept = folder / f"{target.stem}.failed.cpp"
            os.replace(written, kept)
            raise TargetError(f"{command[0]} refuses the printed source {kept}:\n" + "\n".join(lines))
        os.replace(written, text)
        os.replace(made, target)


def _refusal(command: Sequence[str]) -> list[str]:
    """The first errors of a command, empty when it succeeds."""
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    if answer.returncode == 0:
        return []
    lines = answer.stderr.splitlines()
    return [line for line in lines if "error" in line][:5] or lines[:5] or [f"exit status {answer.returncode}"]
