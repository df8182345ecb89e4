"""A printed kernel alone, as a program: same numbers, and nothing that the sanitizers object to."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from irc.core.program import Program
from irc.frontend import capture
from irc.lowering.cpp.build import build, find_compiler
from irc.lowering.cpp.harness import print_harness
from irc.lowering.cpp.printer import print_kernel
from irc.lowering.kernels.fusion import make_schedule
from irc.lowering.kernels.kernel import Kernel

pytestmark = pytest.mark.skipif(find_compiler() is None, reason="needs a C++ compiler (g++ or clang++)")
SANITIZERS = ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")


class Normed(nn.Module):
    """A residual sum with a norm behind it."""

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        total = x + y
        return total, torch.ops.irc.rms_norm(total, None, 1e-5)


def normed() -> tuple[Program, Tensor, Tensor]:
    x, y = torch.randn(5, 3, 33), torch.randn(5, 3, 33)
    return capture(Normed(), (x, y), dynamic=({0: "B"}, {0: "B"}), name="normed"), x, y


def test_producer_and_norm_share_a_kernel() -> None:
    program, *_ = normed()
    (kernel,) = make_schedule(program).steps
    assert isinstance(kernel, Kernel)
    assert [origin.op for origin in kernel.origins] == ["aten.add.Tensor", "irc.rms_norm"]
    assert [str(axis.extent) for axis in kernel.outer] == ["3*B"]
    text = str(kernel)
    assert text.index("add[") < text.index("sum0 = sum(") < text.index("rms_norm[")
    assert [str(size) for size in kernel.sizes] == ["B"]


@pytest.mark.parametrize("batch", [1, 5])
def test_kernel_alone_under_the_sanitizers(batch: int, tmp_path: Path) -> None:
    program, x, y = normed()
    (kernel,) = make_schedule(program).steps
    assert isinstance(kernel, Kernel)
    printed = print_kernel(kernel)
    made = build(print_harness(kernel, printed), isa="plain", shared=False, flags=SANITIZERS, name="harness")
    values = {"x": x[:batch], "y": y[:batch]}
    paths = []
    for buffer in printed.arguments:
        paths.append(tmp_path / f"{buffer.origin}.bin")
        if buffer.name in values:
            paths[-1].write_bytes(values[buffer.name].contiguous().numpy().tobytes())
    subprocess.run([str(made), str(batch), *map(str, paths)], check=True)
    for node, expected in zip(program.outputs, program.run(*values.values()), strict=True):
        found = torch.frombuffer(bytearray((tmp_path / f"{node.name}.bin").read_bytes()), dtype=torch.float32)
        torch.testing.assert_close(found.view_as(expected), expected)
    paths[-1].write_bytes(b"")
    short = subprocess.run([str(made), str(batch), *map(str, paths)], check=False)
    assert short.returncode == 3
