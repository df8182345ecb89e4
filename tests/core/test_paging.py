"""Weights from a mapped file leave memory when they are released, and are there again when they are read."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from irc.core.paging import release


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux is told")
def test_pages_of_a_file_leave_memory(tmp_path: Path) -> None:
    values = torch.arange(20_000_000, dtype=torch.float32)
    save_file({"weight": values}, tmp_path / "w.safetensors")
    weight = load_file(tmp_path / "w.safetensors")["weight"]
    total = weight.double().sum()
    before = resident_bytes()
    release(weight)
    assert resident_bytes() < before - 70_000_000
    assert weight.double().sum() == total


def test_other_memory_keeps_its_values() -> None:
    for tensor in (torch.arange(100_000), torch.arange(100_000).view(100, 1000).T, torch.empty(3, device="meta")):
        copy = tensor.clone()
        release(tensor)
        assert tensor.device.type == "meta" or torch.equal(tensor, copy)
