"""Peak memory of attention and of flash attention over the sequence length.

Counted bytes: the most that was alive at once of the tensors that PyTorch operations made, inputs left
out. Measured bytes (Linux): growth of the process's resident peak, buffers inside kernels included.

    python benchmarks/flash_memory.py            S = 512 … 8192
    python benchmarks/flash_memory.py --quick    S = 256 … 1024
    python benchmarks/flash_memory.py --json     last line: one JSON object, with the fitted exponents
"""

from __future__ import annotations

import argparse
import json
import math
import time
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import irc.core.ops  # noqa: F401  (registers the operators)

HEADS, KV_HEADS, HEAD_DIM = 4, 2, 32
SOFTCAP = 30.0


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages made inside it while they are alive; `peak` is the most at once."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {x.untyped_storage()._cdata for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in pytree.tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in given | self._known:
                self._watch(tensor.untyped_storage())
        return out

    def _watch(self, storage: torch.UntypedStorage) -> None:
        address, size = storage._cdata, storage.nbytes()
        self._known.add(address)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, address, size)

    def _forget(self, address: int, size: int) -> None:
        self._known.discard(address)
        self.live -= size


def counted_peak(run: Callable[[], Tensor]) -> int:
    """Most bytes alive at once of what `run` makes, its result included."""
    with torch.no_grad(), LiveBytes() as mode:
        run()
    return mode.peak


def measured_peak(run: Callable[[], Tensor]) -> int | None:
    """Growth of the resident peak while `run` runs; None where the system cannot tell."""
    reset, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
    try:
        reset.write_text("5")
        before = _resident(status, "VmRSS")
        with torch.no_grad():
            run()
        return max(0, _resident(status, "VmHWM") - before)
    except OSError:
        return None


def _resident(status: Path, field: str) -> int:
    line = next(line for line in status.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def exponent(sizes: Sequence[int], values: Sequence[int]) -> float:
    """Slope of log(value) over log(size), by least squares: 1 for linear growth, 2 for quadratic."""
    xs, ys = [math.log(s) for s in sizes], [math.log(max(v, 1)) for v in values]
    mean_x, mean_y = sum(xs) / len(xs), sum(ys) / len(ys)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True))
    return slope / sum((x - mean_x) ** 2 for x in xs)


def cases() -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    """Attention, flash attention, and flash attention in a form that PyTorch has no kernel for."""
    ops = torch.ops.irc
    scale = HEAD_DIM**-0.5
    return {
        "attention": lambda q, k, v: ops.attention(q, k, v, mask="causal", scale=scale),
        "flash_attention": lambda q, k, v: ops.flash_attention(q, k, v, mask="causal", scale=scale),
        "flash_attention, soft-capped": lambda q, k, v: ops.flash_attention(
            q, k, v, mask="causal", scale=scale, softcap=SOFTCAP
        ),
    }


def measure(sizes: Sequence[int], *, resident: bool = True) -> dict[str, Any]:
    """Peaks by case and size, and the exponents fitted to the counted ones."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for name, case in cases().items():
        for size in sizes:
            generator = torch.Generator().manual_seed(size)
            q = torch.randn(1, HEADS, size, HEAD_DIM, generator=generator)
            k, v = (torch.randn(1, KV_HEADS, size, HEAD_DIM, generator=generator) for _ in range(2))
            counted = counted_peak(lambda: case(q, k, v))  # noqa: B023  (called at once)
            start = time.perf_counter()
            measured = measured_peak(lambda: case(q, k, v)) if resident else None  # noqa: B023  (likewise)
            elapsed_ms = (time.perf_counter() - start) * 1e3
            rows.setdefault(name, []).append(
                {"size": size, "counted_bytes": counted, "measured_bytes": measured, "ms": round(elapsed_ms, 1)}
            )
    return {
        "shape": {"batch": 1, "heads": HEADS, "kv_heads": KV_HEADS, "head_dim": HEAD_DIM, "dtype": "f32"},
        "rows": rows,
        "exponents": {name: round(exponent(sizes, [r["counted_bytes"] for r in rs]), 3) for name, rs in rows.items()},
    }


def _print_table(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"Peak memory of attention, {result['shape']}")
    for column in ("op", "S", "counted MB", "resident MB", "ms", "growth"):
        table.add_column(column, justify="left" if column == "op" else "right")
    for name, rows in result["rows"].items():
        for i, row in enumerate(rows):
            measured = "–" if row["measured_bytes"] is None else f"{row['measured_bytes'] / 1e6:.1f}"
            growth = f"S^{result['exponents'][name]:.2f}" if i == len(rows) - 1 else ""
            counted = f"{row['counted_bytes'] / 1e6:.2f}"
            table.add_row(name if i == 0 else "", str(row["size"]), counted, measured, f"{row['ms']:.0f}", growth)
        table.add_section()
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="shorter sequences")
    parser.add_argument("--json", action="store_true", help="print a JSON object as the last line")
    options = parser.parse_args()
    result = measure((256, 512, 1024) if options.quick else (512, 1024, 2048, 4096, 8192))
    _print_table(result)
    if options.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
