"""The precompiled header: made once, taken by the compiler, and without effect on what is built."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import pytest

from irc.core import toolchain
from irc.lowering.cpp import build

needs_gcc = pytest.mark.skipif(
    build.find_compiler() is None or "clang" in toolchain.compiler_version(toolchain.require_compiler()),
    reason="needs g++",
)
SOURCE = """#include "irc/program.h"
extern "C" float first(const float* x) { return _mm256_cvtss_f32(_mm256_loadu_ps(x)); }
"""


@needs_gcc
@pytest.mark.skipif("avx2" not in build.supported_isas(), reason="needs AVX2")
@pytest.mark.skipif(len(os.sched_getaffinity(0)) == 1, reason="is not made on one processor")
def test_it_is_made_beside_a_build_and_taken_by_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IRC_CACHE", str(tmp_path))
    first = build.building(SOURCE, isa="avx2")
    assert first.first is not None
    assert first.first.folder() is None
    without = first.make().read_bytes()
    first.first.start()  # begun: nothing more is done
    assert len(list(tmp_path.glob("cpp/precompiled-*/irc/*.begun"))) == 1
    end = time.monotonic() + 120
    while first.first.folder() is None and time.monotonic() < end:
        time.sleep(0.05)
    folder = first.first.folder()
    assert folder is not None

    commands: list[list[str]] = []
    run = toolchain._refusal

    def watched(command: list[str]) -> list[str]:
        commands.append(command)
        return run(command)

    monkeypatch.setattr(toolchain, "_refusal", watched)
    first.place().unlink()
    assert build.build(SOURCE, isa="avx2").read_bytes() == without
    assert commands[0][1] == f"-I{folder}"
    # g++ says which header it takes, and why not.
    text = tmp_path / "program.cpp"
    text.write_text(SOURCE)
    told = [*commands[0][:-3], "-fsyntax-only", str(text), "-Winvalid-pch", "-Werror", "-H"]
    answer = subprocess.run(told, capture_output=True, text=True, check=True)
    assert answer.stderr.startswith(f"! {folder}/irc/program.h.gch")
    (folder / "irc/program.h.gch").write_bytes(b"damaged")
    assert build.build(SOURCE + "// again\n", isa="avx2").is_file()


def test_builds_with_options_of_their_own_have_none() -> None:
    assert build.building(SOURCE, isa="plain", flags=("-O1",)).first is None
    assert build.building("#include <cmath>\n" + SOURCE, isa="plain").first is None


@needs_gcc
def test_few_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IRC_CACHE", str(tmp_path))
    monkeypatch.setattr(os, "posix_spawn", lambda *args, **kwargs: 0)
    folders = [tmp_path / "cpp" / f"precompiled-{number}" for number in range(6)]
    for number, folder in enumerate(folders):
        folder.mkdir(parents=True)
        os.utime(folder, (number, number))
    other = tmp_path / "cpp" / "an object"
    other.mkdir()
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    build.precompile("plain")
    assert [folder.is_dir() for folder in folders] == [False] * 3 + [True] * 3
    assert other.is_dir()
