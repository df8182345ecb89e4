"""Target triton: whole models against the reference, artifacts on disk, and what is said where it cannot run."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import irc
from irc.cli.models import load_model
from irc.core.errors import OptionError, StorageError, TargetError
from irc.core.target import get_target
from irc.frontend import capture
from irc.lowering.triton.artifact import TritonArtifact
from irc.lowering.triton.module import interpreting
from tests.lowering import steps

TRITON = get_target("triton")
ROOT = Path(__file__).parents[2]
CONTIGUOUS = "insert-kv-cache{max-length=32}"


@functools.cache
def lowered(name: str) -> TritonArtifact:
    artifact = TRITON.lower(getattr(steps, name)())
    assert isinstance(artifact, TritonArtifact)
    return artifact


def test_same_numbers_at_other_sizes() -> None:
    check = lowered("cnn").verify(steps.cnn())
    assert check.passed, str(check)
    assert check.relative < 2e-5


def step_inputs(artifact: TritonArtifact) -> tuple[Tensor, ...]:
    """A first step of one sequence."""
    positions = torch.arange(3).unsqueeze(0)
    caches = [cache.cpu() for cache in artifact.new_caches(1)]
    return steps.tokens(1, 3), positions, positions, *caches


def test_a_step_over_a_cache_of_half_floats() -> None:
    program = steps.step("insert-kv-cache{max-length=32,cache-dtype=f16}")
    artifact = TRITON.lower(program)
    inputs = step_inputs(artifact)
    for found, expected in zip(artifact.run(*inputs), program.run(*inputs), strict=True):
        torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-3)


def test_quantized_over_pages_it_generates_what_the_reference_does() -> None:
    passes = "quantize-weights{bits=4,group-size=16},insert-kv-cache{max-length=32,layout=paged,block-size=4}"
    arguments = {"example_inputs": (steps.tokens(1, 3),), "dynamic": ({0: "B", 1: "S"},)}
    compiled = irc.compile(steps.language_model(), passes, target="triton", verify="each", **arguments)
    reference = irc.compile(steps.language_model(), passes, target="reference", verify="off", **arguments)
    found, expected = (c.generate(steps.PROMPTS[:2], max_new_tokens=2).token_ids for c in (compiled, reference))
    assert found == expected


def test_step_writes_caches_in_place_and_run_leaves_them() -> None:
    artifact = lowered("step")
    caches = artifact.new_caches(2)
    tokens = steps.tokens(2, 4)
    positions = torch.arange(4).expand(2, -1).contiguous()
    outputs = artifact.run(tokens, positions, positions, *caches)
    assert all(not cache.any() for cache in caches)
    addresses = [cache.data_ptr() for cache in caches]
    logits = artifact.step(caches, tokens, positions, positions)
    assert [cache.data_ptr() for cache in caches] == addresses
    for cache, output in zip(caches, outputs[1:], strict=True):
        torch.testing.assert_close(cache.cpu(), output.cpu())
    torch.testing.assert_close(logits, outputs[0].to(logits.device))


class Copies(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("w", torch.arange(3.0))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = x + 1
        return y, y, x, self.w, y.t()


def test_outputs_that_are_inputs_weights_or_one_another() -> None:
    x = torch.randn(2, 3)
    program = capture(Copies(), (x,), name="copies")
    found = TRITON.lower(program).run(x)
    for a, b in zip(found, program.run(x), strict=True):
        assert torch.equal(a, b)
    assert len({value.data_ptr() for value in found}) == 5


def test_inputs_may_lie_in_any_order() -> None:
    x = torch.randn(2, 3, 8, 8).transpose(2, 3)
    torch.testing.assert_close(lowered("cnn").run(x)[0], steps.cnn().run(x)[0], rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- on disk


def test_saved_and_loaded_without_the_program(tmp_path: Path) -> None:
    program = steps.step()
    written = lowered("step").save(tmp_path / "step.triton")
    assert {p.name for p in written.iterdir()} == {"graph.irc", "manifest.json", "program.py", "weights.safetensors"}
    loaded = irc.load(written)
    assert str(loaded.program).splitlines()[0] == str(program).splitlines()[0]
    assert loaded.kv_cache == lowered("step").kv_cache
    inputs = step_inputs(loaded)
    for found, expected in zip(loaded.run(*inputs), program.run(*inputs), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    lowered("step").save(written)  # over itself


def _without(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).unlink()


def _short(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-9])


def _manifest(change: Callable[[dict], object]) -> Callable[[Path], object]:
    def damage(folder: Path) -> None:
        manifest = json.loads((folder / "manifest.json").read_text())
        change(manifest)
        (folder / "manifest.json").write_text(json.dumps(manifest))

    return damage


def _fewer_weights(folder: Path) -> None:
    weights = safetensors.torch.load_file(folder / "weights.safetensors")
    weights.popitem()
    safetensors.torch.save_file(weights, folder / "weights.safetensors")


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no manifest": (_without("manifest.json"), r"has no manifest\.json"),
    "no source": (_without("program.py"), "is damaged"),
    "no weights": (_without("weights.safetensors"), "is damaged"),
    "short weights": (_short("weights.safetensors"), "is damaged"),
    "short manifest": (_short("manifest.json"), "is damaged"),
    "a list": (lambda folder: (folder / "manifest.json").write_text("[]"), "is of format None"),
    "another format": (_manifest(lambda m: m.update(format=99)), "is of format 99"),
    "no inputs": (_manifest(lambda m: m.pop("inputs")), "is damaged"),
    "a hostile size": (_manifest(lambda m: m["inputs"][0].update(shape=["().__class__"])), "is no size"),
    "a type that is none": (_manifest(lambda m: m["inputs"][0].update(dtype="f31")), "f31"),
    "a weight less": (_fewer_weights, "lacks"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_artifacts(name: str, tmp_path: Path) -> None:
    damage, told = DAMAGE[name]
    written = lowered("cnn").save(tmp_path / "a")
    damage(written)
    with pytest.raises(StorageError, match=told):
        TRITON.load(written)


def test_folders_that_are_no_artifacts_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    steps.cnn().save(tmp_path / "program")  # has a manifest.json too
    for name in ("mine", "program"):
        with pytest.raises(StorageError, match="left alone"):
            lowered("cnn").save(tmp_path / name)
    with pytest.raises(StorageError, match=r"has no manifest\.json"):
        TRITON.load(tmp_path / "nowhere")


def test_compiled_on_the_command_line(run, tmp_path: Path) -> None:
    written = tmp_path / "draft.triton"
    code, out, err = run("compile", "draft", "-t", "triton", "-p", CONTIGUOUS, "--verify", "off", "-o", written)
    assert code == 0, err
    assert "triton artifact" in out
    compiled = irc.Compiled.load(written)
    model = load_model("draft")
    reference = irc.compile(
        model.model, CONTIGUOUS, example_inputs=model.example_inputs, dynamic=model.dynamic,
        verify="off",
    )  # fmt: skip
    prompt = [[5, 9, 2]]
    compiled.save(tmp_path / "again")
    again = irc.Compiled.load(tmp_path / "again")
    expected = reference.generate(prompt, max_new_tokens=1).token_ids
    assert again.generate(prompt, max_new_tokens=1).token_ids == expected


# ---------------------------------------------------------------- what is refused, and what falls back


def test_wrong_inputs_and_options() -> None:
    artifact = lowered("cnn")
    with pytest.raises(OptionError, match=r"takes f32\[B, 3, 8, 8\]"):
        artifact.run(torch.zeros(2, 3, 8, 9))
    with pytest.raises(OptionError, match=r"is f64\[2, 3, 8, 8\]"):
        artifact.run(torch.zeros(2, 3, 8, 8, dtype=torch.float64))
    with pytest.raises(OptionError, match="float32"):
        TRITON.lower(steps.cnn(), {"float32": "f16"})
    with pytest.raises(OptionError, match=r"no kind of template is called 'atention'.*attention"):
        TRITON.lower(steps.cnn(), {"printed": ("atention",)})


def test_fallbacks_are_named() -> None:
    coverage = TRITON.check(steps.cnn())
    assert coverage.complete
    assert [(c.op, c.count) for c in coverage.fallbacks] == [("aten.conv2d", 1)]
    assert "PyTorch" in coverage.fallbacks[0].reason


class _Sorted(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sort().values


def test_what_has_no_definition_is_computed_by_pytorch() -> None:
    x = torch.randn(3, 4)
    program = capture(_Sorted(), (x,), name="sorted")
    assert [c.op for c in TRITON.check(program).fallbacks] == ["aten.sort"]
    assert torch.equal(TRITON.lower(program).run(x)[0], x.sort().values)


def test_what_is_not_supported_is_listed() -> None:
    program = capture(nn.Identity(), (torch.randn(3).to(torch.complex64),), name="same")
    assert [c.reason for c in TRITON.check(program).refused] == ["input has numbers of type torch.complex64"]
    with pytest.raises(TargetError, match="complex64"):
        TRITON.lower(program)


@pytest.mark.skipif(not interpreting(), reason="there is a GPU")
def test_without_a_gpu_it_is_said_what_to_do() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = (
        "import torch, irc\n"
        "from irc.core.errors import TargetError\n"
        "made = irc.compile(torch.nn.ReLU(), target='triton', example_inputs=(torch.ones(2),), verify='off')\n"
        "try: made.artifact.run(torch.ones(2))\n"
        "except TargetError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, cwd=ROOT)
    assert "finds no GPU to run on" in done.stdout, done.stderr[-2000:]
    assert "TRITON_INTERPRET=1" in done.stdout
