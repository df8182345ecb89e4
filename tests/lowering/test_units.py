"""A printed program in units: which function is where, and that both ways of compiling it give the same numbers."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

import irc
from irc.lowering.cpp.build import build, building, find_compiler, supported_isas
from irc.lowering.cpp.function import PrintedFunction
from irc.lowering.cpu.library import Library
from irc.lowering.cpu.units import in_units, print_units


def functions(**counts: int) -> list[tuple[str, PrintedFunction]]:
    """So many functions of each kind of template; `loops` need no header."""
    made = []
    for kind, count in counts.items():
        includes = () if kind == "loops" else (f"{kind}.h",)
        seconds = 1.2 if kind == "attention" else 0.1 if kind == "loops" else 0.15
        one = PrintedFunction(kind, (), ("int x",), "", (), (), includes, seconds=seconds)
        made += [(f"{kind}{i}", one) for i in range(count)]
    return made


def test_a_kind_is_in_one_unit() -> None:
    given = functions(matmul=5, loops=9, attention=1)
    units = in_units(given)
    kinds = [{name.rstrip("0123456789") for name, _ in unit.functions} - {"loops"} for unit in units]
    assert sorted(kinds, key=str) == [{"attention"}, {"matmul"}]
    assert abs(units[0].cost - units[1].cost) < 0.2
    assert sorted(name for unit in units for name, _ in unit.functions) == sorted(name for name, _ in given)


def test_many_of_a_kind_are_shared() -> None:
    units = in_units(functions(conv=20, loops=2))
    assert [len(unit.functions) for unit in units] == [10, 12]
    assert all(unit.includes == ["conv.h"] for unit in units)


def test_little_is_one_unit() -> None:
    assert len(in_units(functions(loops=30))) == 1
    assert len(in_units(functions(loops=30, matmul=1))) == 1
    whole = print_units(in_units(functions(loops=1)), "main\n", ("m.h",))
    assert "IRC_UNIT" not in whole
    assert len(building(whole, isa="plain").units) == 0


def test_the_step_sees_what_its_scratch_is_made_of() -> None:
    given = [
        (name, replace(function, scratch="irc::room(B)" if "small" in name else "64 * B"))
        for name, function in functions(matmul=7, small=1, loops=3)
    ]
    units = in_units(given)
    assert "small.h" in units[0].includes
    assert "matmul.h" in units[1].includes


def test_a_unit_has_its_headers_only() -> None:
    text = print_units(in_units(functions(matmul=2, attention=1)), "main\n", ("m.h",))
    assert len(building(text, isa="plain").units) == 2
    parts = re.split(r"#if .*\n", text)
    assert [re.findall(r'#include "(.*)"', part) for part in parts] == [[], ["attention.h"], ["m.h", "matmul.h"]]
    assert text.count("main\n") == 1
    assert parts[2].endswith("main\n#endif\n")


@pytest.mark.skipif(find_compiler() is None, reason="needs a compiler")
def test_both_ways_give_the_same() -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.project, self.out = torch.nn.Linear(32, 96), torch.nn.Linear(32, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k, v = self.project(x).view(1, -1, 3, 4, 8).permute(2, 0, 3, 1, 4)
            mixed = torch.nn.functional.scaled_dot_product_attention(q, k, v)
            return self.out(mixed.transpose(1, 2).reshape(1, -1, 32))

    torch.manual_seed(0)
    x = torch.randn(1, 5, 32)
    compiled = irc.compile(Model(), example_inputs=x, target="cpu", options={"threads": 1})
    source = compiled.artifact.source
    assert "IRC_UNIT == 1" in source
    whole = build(source.replace("IRC_UNIT ==", "OTHER_UNIT =="), isa=supported_isas()[-1], name="whole")
    assert whole != compiled.artifact.object_path
    found = torch.empty(1, 5, 8)
    sizes = compiled.artifact.signature.sizes([x])
    Library(whole, compiled.artifact._weights, 1).run(sizes, [x], [found])
    assert torch.equal(found, compiled(x))


@pytest.mark.skipif(find_compiler() is None, reason="needs a compiler")
def test_attentions_of_several_sizes_beside_one_product() -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.project = torch.nn.Linear(32, 32)

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            attend = torch.nn.functional.scaled_dot_product_attention
            narrow = self.project(x).view(1, -1, 4, 8).transpose(1, 2)
            wide = y.view(1, -1, 2, 16).transpose(1, 2)
            both = [attend(z, z, z).transpose(1, 2).reshape(1, -1, 32) for z in (narrow, wide)]
            return both[0] + both[1]

    torch.manual_seed(0)
    x, y = torch.randn(2, 1, 5, 32).unbind()
    compiled = irc.compile(Model(), example_inputs=(x, y), target="cpu", options={"threads": 1})
    assert "IRC_UNIT == 1" in compiled.artifact.source
