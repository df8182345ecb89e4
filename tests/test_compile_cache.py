"""`irc.compile(…, cache=folder)`: the same compilation is taken from it, any other is not."""

from __future__ import annotations

import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from irc.compile_cache import sources
from irc.compile_cache.lookup import Lookup, look_up
from irc.compiler import Compiled, compile
from irc.core.contract import Pass
from irc.core.instruments import Instrument
from irc.core.pipeline import parse_pipeline
from irc.core.target import get_target
from irc.passes.canonicalize.drop_noise import DropNoise

SOURCE = """
import torch
from torch import nn

def scaled(x):
    return x * 2

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.gain, self.act = 3.0, torch.relu
        self.sizes = {"a": [1, 2]}

    def forward(self, x):
        return scaled(self.act(self.linear(x))) * self.gain
"""
X = torch.linspace(-1, 1, 12).reshape(2, 6)


@pytest.fixture(autouse=True)
def program(monkeypatch) -> None:
    """The program that runs has a file: processes of `pytest -n` have none."""
    monkeypatch.setattr(sys.modules["__main__"], "__file__", __file__, raising=False)


@pytest.fixture
def module(tmp_path) -> types.ModuleType:
    """A Python module of the user's, imported from a file."""
    path = tmp_path / "users_model.py"
    path.write_text(SOURCE)
    spec = importlib.util.spec_from_file_location("users_model", path)
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    sys.modules["users_model"] = made
    spec.loader.exec_module(made)
    yield made
    del sys.modules["users_model"]


@pytest.fixture
def model(module) -> nn.Module:
    torch.manual_seed(0)
    return module.Block().eval()


def run(model: nn.Module, folder, passes="simplify-algebra", **options) -> Compiled:
    given = {"example_inputs": (X,), "dynamic": ({0: "B"},), **options}
    return compile(model, passes, cache=folder / "kept", **given)


def ask(model: nn.Module, folder, passes="simplify-algebra", target="reference", options=None, **others) -> Lookup:
    given = {"example_inputs": (X,), "dynamic": ({0: "B"},), "verify": "off", "name": None, **others}
    return look_up(folder / "kept", model, parse_pipeline(passes), get_target(target), options, {}, **given)


def test_the_same_is_taken_from_the_cache(model, tmp_path) -> None:
    first = run(model, tmp_path)
    assert not first.from_cache
    assert f"kept in {tmp_path / 'kept'}" in first.report.rows[-1].notes[-1]
    second = run(model, tmp_path)
    assert second.from_cache
    assert "was compiled before and is taken from" in second.report.rows[0].notes[-1]
    assert "was compiled before and is" in str(second.report)
    assert [row.name for row in second.report.rows] == [row.name for row in first.report.rows]
    other = torch.randn(5, 6)
    assert torch.equal(second(other), first(other))
    assert list(second.stages) == ["capture", "simplify-algebra"]
    assert second.stages["capture"].num_nodes == first.stages["capture"].num_nodes


def test_an_equal_model_made_again_is_the_same(module, tmp_path) -> None:
    for expected in (False, True):
        torch.manual_seed(0)
        assert run(module.Block().eval(), tmp_path).from_cache is expected


def test_target_cpu(model, tmp_path) -> None:
    pytest.importorskip("irc.lowering.cpp.build").require_compiler()
    first = run(model, tmp_path, target="cpu")
    second = run(model, tmp_path, target="cpu")
    assert (first.from_cache, second.from_cache) == (False, True)
    assert torch.equal(second(X), first(X))


def _patch_class(model, module, monkeypatch) -> None:
    monkeypatch.setattr(module.Block, "forward", lambda self, x: self.linear(x))


def _patch_function(model, module, monkeypatch) -> None:
    monkeypatch.setattr(module, "scaled", lambda x: x * 5)


def _patch_torch(model, module, monkeypatch) -> None:
    monkeypatch.setattr(torch.nn.functional, "linear", lambda x, w, b: x @ w.t() - b)


CHANGES = {
    "a number of a weight": lambda m, *_: m.linear.weight.data[0, 0].add_(1e-6),
    "two numbers exchanged": lambda m, *_: m.linear.weight.data.copy_(m.linear.weight.data.flip(0)),
    "the type of a weight": lambda m, *_: m.linear.double(),
    "requires grad": lambda m, *_: m.linear.weight.requires_grad_(False),
    "an attribute": lambda m, *_: setattr(m, "gain", 4.0),
    "the type of an attribute": lambda m, *_: setattr(m, "gain", 3),
    "deep in an attribute": lambda m, *_: m.sizes["a"].append(3),
    "a new attribute": lambda m, *_: setattr(m, "more", 1),
    "a function held": lambda m, *_: setattr(m, "act", torch.sigmoid),
    "a lambda held": lambda m, *_: setattr(m, "act", lambda x: x + 1),
    "a submodule": lambda m, *_: m.add_module("linear", nn.Linear(6, 6)),
    "the class of a submodule": lambda m, *_: setattr(m.linear, "__class__", type("Other", (nn.Linear,), {})),
    "a method of the class": _patch_class,
    "a function of its file": _patch_function,
    "a function of PyTorch": _patch_torch,
    "a flag of PyTorch": lambda m, _, monkeypatch: monkeypatch.setenv("TORCH_SOMETHING", "1"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_the_model_is_seen(change, model, module, tmp_path, monkeypatch) -> None:
    key = ask(model, tmp_path).key
    assert key is not None
    assert ask(model, tmp_path).key == key
    CHANGES[change](model, module, monkeypatch)
    assert ask(model, tmp_path).key != key


OTHERS: dict[str, dict[str, Any]] = {
    "other inputs": {"example_inputs": (X + 1,)},
    "other dimensions": {"dynamic": ({},)},
    "other verification": {"verify": "each"},
    "another name": {"name": "other"},
    "other passes": {"passes": "simplify-algebra,eliminate-dead-code"},
    "a pass with options": {"passes": "simplify-algebra,quantize-weights{bits=8}"},
    "another option of it": {"passes": "simplify-algebra,quantize-weights{bits=4}"},
    "another target": {"target": "cpu"},
    "options of the target": {"target": "cpu", "options": {"winograd": False}},
    "another value of it": {"target": "cpu", "options": {"threads": 7}},
}


def test_another_request_is_another_compilation(model, tmp_path) -> None:
    keys = [ask(model, tmp_path, **options).key for options in ({}, *OTHERS.values())]
    assert None not in keys
    assert len(set(keys)) == len(keys)


class Slots:
    __slots__ = ("x",)


def _hook(model) -> None:
    model.linear.register_forward_hook(lambda *_: None)


DOUBTS = {
    "has hooks": _hook,
    "has a forward function of its own": lambda m: setattr(m.linear, "forward", lambda x: x),
    "may hold what cannot be seen": lambda m: setattr(m, "thing", Slots()),
    "is no submodule": lambda m: m.__dict__.update(other=nn.Linear(2, 2)),
    "attribute made": lambda m: setattr(m, "made", (lambda held: lambda: held)(Slots())),
}


@pytest.mark.parametrize("reason", DOUBTS)
def test_what_cannot_be_told_is_not_kept(reason, model, tmp_path) -> None:
    DOUBTS[reason](model)
    found = ask(model, tmp_path)
    assert found.key is None
    assert reason in found.reason


def test_the_report_says_why_nothing_is_kept(model, tmp_path) -> None:
    for _ in range(2):
        compiled = run(model, tmp_path, verify="off", instruments=[Instrument()])
        assert not compiled.from_cache
        assert compiled.report.rows[-1].notes[-1] == f"not kept in {tmp_path / 'kept'}: observing passes is asked for"


def test_a_pass_of_the_callers_own_counts_by_its_code(model, tmp_path) -> None:
    def made(change) -> Pass:
        return type("Own", (DropNoise,), {"__post_init__": change})()

    key = ask(model, tmp_path, [made(lambda self: None)]).key
    assert key is not None
    assert ask(model, tmp_path, [made(lambda self: None)]).key == key
    assert ask(model, tmp_path, [made(lambda self: print())]).key != key


def test_a_changed_file_is_compiled_again(model, module, tmp_path) -> None:
    run(model, tmp_path, verify="off")
    Path(module.__file__).write_text(SOURCE + "# more")
    again = run(model, tmp_path, verify="off")
    assert not again.from_cache
    assert f"{module.__file__} has changed" in again.report.rows[-1].notes[-1]


def test_files_of_the_process(module, tmp_path, monkeypatch) -> None:
    noted = sources.loaded()
    assert sources.why_changed(noted) is None
    monkeypatch.setitem(sys.modules, "stranger", types.ModuleType("stranger"))
    assert sources.why_changed(noted) == "stranger is loaded, which was not"
    monkeypatch.delitem(sys.modules, "stranger")
    path = next(iter(noted["installed"]))
    assert sources.why_changed({**noted, "installed": {path: [0, 0]}}) == f"{path} has changed"
    assert "it was made by" in str(sources.why_changed({**noted, "main": "/another.py"}))


def test_a_damaged_entry_is_compiled_again(model, tmp_path) -> None:
    run(model, tmp_path, verify="off")
    (entry,) = (tmp_path / "kept").glob("*/entry.json")
    for damage in (lambda: entry.write_text("{"), lambda: (entry.parent / "model" / "manifest.json").write_text("{")):
        damage()
        again = run(model, tmp_path, verify="off")
        assert not again.from_cache
        assert str(entry.parent) in again.report.rows[-1].notes[-1]
    assert run(model, tmp_path, verify="off").from_cache
