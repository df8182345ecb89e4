"""Target cpu: same numbers as the reference, caches in place, artifacts that run without the program."""

from __future__ import annotations

import functools
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import irc
from irc.core.errors import OptionError, StorageError, TargetError
from irc.core.paged import StepInputs, tables_in_order
from irc.core.program import Program
from irc.core.target import Artifact, get_target
from irc.frontend import capture
from irc.lowering.cpp.build import find_compiler, supported_isas
from tests.lowering import steps

CPU = get_target("cpu")
QUICK = {"threads": 2, "flags": ("-O1",)}
pytestmark = pytest.mark.skipif(find_compiler() is None, reason="needs a C++ compiler (g++ or clang++)")


@functools.cache
def lowered(name: str, isa: str | None = None) -> Artifact:
    return CPU.lower(getattr(steps, name)(), {"isa": isa, **QUICK})


@pytest.mark.parametrize("name", ["decoder", "step", "cnn"])
def test_same_numbers_at_other_sizes(name: str) -> None:
    check = lowered(name).verify(getattr(steps, name)())
    assert check.passed, str(check)
    assert check.relative < 4e-6


def test_plain_instructions_give_the_same_numbers() -> None:
    check = lowered("step", "plain").verify(steps.step())
    assert check.passed, str(check)


def test_attention_reads_caches_in_half_floats_as_they_lie() -> None:
    program = steps.step("insert-kv-cache{max-length=32,cache-dtype=f16}")
    artifact = CPU.lower(program, dict(QUICK))
    assert "f16[B, 4, 32, 8]" in artifact.source
    assert "f32[B, 4, 32, 8]" not in artifact.source  # no kernel widens the whole cache
    check = artifact.verify(program)
    assert check.passed, str(check)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_large_convolutions_keep_halves_in_memory(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Conv2d(1024, 2048, 1).to(dtype).eval()
    program = capture(model, (torch.randn(1, 1024, 3, 5).to(dtype),), dynamic=({0: "B"},))
    artifact = CPU.lower(program, dict(QUICK))
    assert artifact.weight_bytes < 2.1 * model.weight.numel()
    check = artifact.verify(program)
    assert check.passed, str(check)


def test_default_passes_merge_sibling_layers() -> None:
    names = [p.name for p in CPU.default_passes(steps.decoder())]
    assert names == ["merge-qkv", "merge-gate-up", "insert-kv-cache"]
    assert [p.name for p in CPU.default_passes(steps.cnn())] == ["fold-conv-batch-norm"]


class Halves(nn.Module):
    """Rounds twice, the second time behind an activation."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        half = x.bfloat16()
        return half, torch.relu(half + half)


@pytest.mark.parametrize("isa", supported_isas())
def test_rounds_to_brain_floats_as_pytorch_does(isa: str) -> None:
    # Ties, infinities, the largest and subnormal numbers, and NaN whose payload rounding would lose or carry out of.
    special = [0x3F808000, 0x3F818000, 0x3F818001, 0x7F800000, 0x7F7FFFFF, 0x00008000, 0x00018000, 0x00000001, 0]
    special += [0x7FC00000, 0x7F800001, 0x7FFFFFFF, 0x7FA0FFFF]
    bits = torch.tensor(special + [bit | 0x80000000 for bit in special], dtype=torch.int64)
    some = torch.randint(0, 2**32, (4070,), generator=torch.Generator().manual_seed(0))
    x = torch.cat([bits, some]).to(torch.int32).view(torch.float32)
    found = CPU.lower(capture(Halves().eval(), (x,)), {"isa": isa, **QUICK}).run(x)
    for one, wanted in zip(found, Halves()(x), strict=True):
        assert torch.equal(one.isnan(), wanted.isnan())
        assert torch.equal(one.nan_to_num(), wanted.nan_to_num())


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
        assert torch.equal(cache, output)
    assert torch.equal(logits, outputs[0])


def test_steps_with_caches_seen_before_and_with_others() -> None:
    """What a step remembers about its caches is used for those alone."""
    artifact = lowered("step")
    tokens, positions = steps.tokens(1, 4), torch.arange(4).unsqueeze(0)
    first, second = artifact.new_caches(1), artifact.new_caches(1)
    wanted = artifact.step(first, tokens, positions, positions)
    assert torch.equal(artifact.step(first, tokens, positions, positions), wanted)
    assert torch.equal(artifact.step(second, tokens, positions, positions), wanted)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    swapped = [*reversed(second)]
    artifact.step(swapped, tokens, positions, positions)
    assert torch.equal(second[1], first[0])
    # Tensors of the same shapes that are not dense are read in their own order.
    wide = tokens.t().contiguous().t()
    assert torch.equal(artifact.step(first, wide, positions, positions), wanted)
    with pytest.raises(OptionError, match=r"input tokens|input .* is"):
        artifact.step(first, tokens.int(), positions, positions)


def test_saved_and_loaded_without_the_program(tmp_path: Path) -> None:
    program = steps.step()
    written = lowered("step").save(tmp_path / "step.irca")
    assert {p.name for p in written.iterdir()} == {
        "graph.irc", "manifest.json", "program.cpp", "program.h", "weights.bin", f"program.{supported_isas()[-1]}.so",
    }  # fmt: skip
    loaded = irc.load(written)
    assert str(loaded.program).splitlines()[0] == str(program).splitlines()[0]
    assert loaded.kv_cache == lowered("step").kv_cache
    assert loaded.verify(program).relative < 2e-6
    lowered("step").save(written)  # over itself


def test_damaged_artifacts(tmp_path: Path) -> None:
    written = lowered("cnn").save(tmp_path / "a")
    weights = (written / "weights.bin").read_bytes()
    (written / "weights.bin").write_bytes(weights[:-64])
    with pytest.raises(StorageError, match=r"has \d+ bytes, its manifest says"):
        CPU.load(written)
    (written / "weights.bin").write_bytes(weights)
    manifest = (written / "manifest.json").read_text()
    (written / "manifest.json").write_text(manifest.replace('"B"', '"__import__"', 1))
    with pytest.raises((StorageError, TargetError)):
        CPU.load(written)
    (written / "manifest.json").write_text(manifest.replace('"3"', '"().__class__"', 1))
    with pytest.raises(StorageError, match="is no size"):
        CPU.load(written)
    with pytest.raises(StorageError, match=r"has no manifest\.json"):
        CPU.load(tmp_path / "nowhere")
    (tmp_path / "mine").mkdir()
    steps.cnn().save(tmp_path / "program")  # has a manifest.json too
    for name in ("mine", "program"):
        with pytest.raises(StorageError, match="left alone"):
            lowered("cnn").save(tmp_path / name)


def test_wrong_inputs_and_options() -> None:
    artifact = lowered("cnn")
    with pytest.raises(OptionError, match=r"takes f32\[B, 3, 8, 8\]"):
        artifact.run(torch.zeros(2, 3, 8, 9))
    with pytest.raises(OptionError, match=r"is f64\[2, 3, 8, 8\]"):
        artifact.run(torch.zeros(2, 3, 8, 8, dtype=torch.float64))
    with pytest.raises(OptionError, match="no instruction set is called 'avx3'"):
        CPU.lower(steps.cnn(), {"isa": "avx3"})
    with pytest.raises(OptionError, match="threads must be positive"):
        CPU.lower(steps.cnn(), {"threads": 0})


def test_no_compiler_is_said_clearly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CXX", raising=False)
    assert "no C++ compiler was found" in (CPU.available() or "")
    with pytest.raises(TargetError, match=r"install one .* or use target 'reference'"):
        CPU.lower(steps.cnn())


class _Sorted(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sort().values


def test_what_is_not_supported_is_listed() -> None:
    program = capture(_Sorted(), (torch.randn(3, 4),), name="sorted")
    assert [(c.op, c.reason) for c in CPU.check(program).refused] == [
        ("aten.sort", "no definition of the operation by element")
    ]
    with pytest.raises(TargetError, match=r"aten\.sort × 1"):
        CPU.lower(program)
    complex_input = capture(nn.Identity(), (torch.randn(3).to(torch.complex64),), name="same")
    assert [c.reason for c in CPU.check(complex_input).refused] == ["input has numbers of type torch.complex64"]


def _program(module: nn.Module, *inputs: Tensor) -> Program:
    return capture(module, inputs, name="small")


class _Copies(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("w", torch.arange(3.0))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = x + 1
        return y, y, x, self.w, y.t()


def test_outputs_that_are_inputs_weights_or_one_another() -> None:
    x = torch.randn(2, 3)
    program = _program(_Copies(), x)
    found = CPU.lower(program, QUICK).run(x)
    for a, b in zip(found, program.run(x), strict=True):
        assert torch.equal(a, b)
    assert len({value.data_ptr() for value in found}) == 5


def test_engine_gives_the_tokens_of_the_reference() -> None:
    paged = "insert-kv-cache{max-length=32,layout=paged,block-size=4}"
    arguments = {"example_inputs": (steps.tokens(),), "dynamic": ({0: "B", 1: "S"},)}
    compiled = irc.compile(steps.language_model(), paged, target="cpu", options=QUICK, **arguments)
    reference = irc.compile(steps.language_model(), "insert-kv-cache{max-length=32}", **arguments)
    expected = reference.generate(steps.PROMPTS, max_new_tokens=12).token_ids
    assert compiled.generate(steps.PROMPTS, max_new_tokens=12).token_ids == expected
    model = compiled.paged_model()
    pages = model.new_pages(8)
    places = [page.data_ptr() for page in pages]
    inputs = StepInputs.of_rows(steps.tokens()[:1], 0, tables_in_order(1, 32, 4), 4)
    model.paged_step(pages, inputs)
    assert [page.data_ptr() for page in pages] == places  # however large, they are not copied
    with pytest.raises(OptionError, match="pages must be dense"):
        model.paged_step([page[::2] for page in pages], inputs)


@pytest.mark.parametrize(
    "weights", ["bits=4,group-size=16", "bits=8,group-size=none", "format=f8e4m3.row", "format=f8e5m2.g16"]
)
def test_quantized_steps(weights: str) -> None:
    dynamic = "" if "f8" in weights else "quantize-activations{mode=dynamic},"
    program = steps.step(f"quantize-weights{{{weights}}},{dynamic}insert-kv-cache{{max-length=32}}")
    artifact = CPU.lower(program, QUICK)
    kind = "scaled_linear" if "f8" in weights else "quantized_matmul"
    assert artifact.source.count(f"irc::{kind}<") > 0
    check = artifact.verify(program)
    assert check.passed, str(check)


def test_activations_quantized_by_option_are_allowed_their_error() -> None:
    program = steps.step("quantize-weights{bits=8,group-size=none},insert-kv-cache{max-length=32}")
    check = CPU.lower(program, QUICK | {"activations": "int8"}).verify(program)
    assert check.passed, str(check)
    assert check.relative > 1e-3
    exact = CPU.lower(program, QUICK).verify(program)
    assert exact.tolerance < 1e-3
    assert exact.passed, str(exact)


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler (cc)")
def test_the_c_example_decodes_like_python(tmp_path: Path) -> None:
    written = lowered("step").save(tmp_path / "step.irca")
    source, made = Path(__file__).parents[2] / "examples" / "decode.c", tmp_path / "decode"
    program = written / f"program.{supported_isas()[-1]}.so"
    options = ["-O1", "-Wall", "-Werror", "-I", str(written), f"-Wl,-rpath,{written}"]
    subprocess.run(["cc", *options, str(source), str(program), "-o", str(made)], check=True)
    prompt = steps.PROMPTS[0]
    answer = subprocess.run([str(made), str(written / "weights.bin"), "8", *map(str, prompt)],
                            check=True, capture_output=True, text=True)  # fmt: skip
    assert list(map(int, answer.stdout.split())) == _greedy(prompt, 8)


def _greedy(prompt: list[int], count: int) -> list[int]:
    """The likeliest continuation by the model itself, recomputed for every token."""
    tokens = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            tokens.append(int(steps.language_model()(torch.tensor([tokens]))[0, -1].argmax()))
    return tokens[len(prompt) :]
