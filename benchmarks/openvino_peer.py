"""OpenVINO as a peer: installed once into an environment of its own, asked through a process that answers lines.

    python benchmarks/openvino_peer.py          # install it, print the path of its Python

It needs other versions of packages than the compiler, so it is never imported here: scripts of `workers/` run in its
environment, print one JSON line when they are ready, and answer each line with one JSON line.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import venv
from pathlib import Path
from typing import Any

from llama_cpp import cache_folder

PACKAGES = ("openvino==2026.4.*", "nncf==3.4.*", "safetensors")


def python() -> Path:
    """Python of an environment with OpenVINO and NNCF, made if it is not there."""
    folder = cache_folder() / "openvino"
    found, done = folder / "bin" / "python", folder / "installed"
    if not done.exists():
        venv.create(folder, with_pip=True, clear=True)
        subprocess.run([str(found), "-m", "pip", "install", "--quiet", *PACKAGES], check=True)
        done.write_text("\n".join(PACKAGES) + "\n")
    return found


class Worker:
    """A script of `workers/` in that environment."""

    def __init__(self, interpreter: str | Path, script: str, *arguments: object) -> None:
        path = Path(__file__).resolve().parent / "workers" / script
        # Not a pipe: nobody reads it while the worker runs.
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  (lives as long as the worker)
        self._process = subprocess.Popen(
            [str(interpreter), str(path), *map(str, arguments)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True,
        )  # fmt: skip
        self.about: dict[str, Any] = self._answer()

    def ask(self, line: object) -> Any:
        """The answer to one line."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{json.dumps(line)}\n")
        self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        self._process.communicate()

    def _answer(self) -> Any:
        """The next line that is JSON: its libraries print messages of their own."""
        assert self._process.stdout is not None
        for line in iter(self._process.stdout.readline, ""):
            if line.startswith(("{", "[")):
                return json.loads(line)
        self._process.wait()
        self._errors.seek(0)
        raise SystemExit(f"OpenVINO's worker failed:\n{self._errors.read()[-2000:]}")


def main() -> None:
    sys.stdout.write(f"{python()}\n")


if __name__ == "__main__":
    main()
