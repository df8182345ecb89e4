"""What the whole suite shares: its part of the processors, where Triton runs, and the command line.

Where several processes run the tests (`pytest -n`), each takes its share of the processors. Without a GPU, kernels in
Triton run in its interpreter.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

_WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))

if _WORKERS > 1:  # before anything imports PyTorch; programs that tests start inherit it
    os.environ.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // _WORKERS, 1)))

if not Path("/dev/nvidia0").exists():  # before anything imports Triton, which decides then
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str, str]]:
    """Run the command line through its real entry point; gives (exit code, stdout, stderr)."""
    from irc.cli import main as cli

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["irc", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "160")
        code = 0
        try:
            cli.main()
        except SystemExit as stopped:
            code = int(stopped.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call
