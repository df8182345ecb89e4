"""Every model of the zoo on a target, against its program; minutes.

    python -m tests.zoo_on_targets cpu
    TRITON_INTERPRET=1 python -m tests.zoo_on_targets triton qwen3 mpt      # the interpreter is slow: some of them

Prints a line a model, and ends with 1 if one computes something else. Refused models say why.
"""

from __future__ import annotations

import sys
import time

import torch
from torch import Tensor

from irc.core.errors import IrcError
from irc.core.target import get_target
from tests import zoo

TOLERANCE = 1e-4


def outcome(target: str, name: str) -> tuple[bool, str]:
    """(whether the model computes what its program does, or is refused; what to print)."""
    program = zoo.captured(name)
    coverage = get_target(target).check(program)
    if not coverage.complete:
        return True, f"refused: {coverage.refused[0]}"
    try:
        found = get_target(target).lower(program).run(*program.example_inputs or ())
    except IrcError as error:
        return False, f"{type(error).__name__}: {error}"
    wanted = program.run(*program.example_inputs or ())
    pairs = [(a.double().cpu(), b.double()) for a, b in zip(found, wanted, strict=True) if isinstance(a, Tensor)]
    error = max(float((a - b).abs().max() / b.abs().max().clamp(min=1e-12)) for a, b in pairs)
    return error < TOLERANCE, f"{error:.1e}" + (f", {len(coverage.fallbacks)} fallbacks" if coverage.fallbacks else "")


def main() -> None:
    target, *names = sys.argv[1:]
    wrong = []
    with torch.no_grad():
        for name in names or list(zoo.ZOO):
            started = time.perf_counter()
            good, text = outcome(target, name)
            wrong += [] if good else [name]
            print(
                f"{name:16} {'ok   ' if good else 'WRONG'} {text} ({time.perf_counter() - started:.0f} s)", flush=True
            )
    print(f"wrong: {', '.join(wrong)}" if wrong else "all compute what their programs do, or are refused")
    raise SystemExit(bool(wrong))


if __name__ == "__main__":
    main()
