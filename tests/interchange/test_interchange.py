"""Checkpoints of other tools: what is written, read by independent readers; what is read back; what is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from irc.core import formats
from irc.core.errors import OptionError, StorageError
from irc.core.formats import Parts
from irc.core.program import Program
from irc.core.verifier import verify
from irc.frontend import capture
from irc.interchange import load_quantized, save_quantized
from irc.interchange.packing import pack_words, unpack_words
from irc.passes import QuantizeWeights
from irc.passes.quantize._weight_layers import WeightLayer
from tests.interchange.unpacking import awq_weight, bits_of, compressed_weight, gptq_weight
from tests.passes.running import run_pass

READERS: dict[str, Callable[[dict[str, Tensor], str, dict[str, Any]], np.ndarray]] = {
    "gptq": gptq_weight, "gptq_v2": gptq_weight, "awq": awq_weight,
    "compressed-tensors": compressed_weight, "int-quantized": compressed_weight,
}  # fmt: skip
MODULES = ["inner.down", "up"]


class Model(nn.Module):
    """A table tied to the head, two linear layers (one with a bias), a norm and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(12, 64)
        self.up = nn.Linear(64, 96)
        self.inner = nn.ModuleDict({"down": nn.Linear(96, 64, bias=False)})
        self.norm = nn.LayerNorm(64)
        self.head = nn.Linear(64, 12, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("shift", torch.ones(64), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.inner["down"](torch.relu(self.up(self.embed(ids)))) + self.shift
        return self.head(self.norm(x))


def program_of(model: nn.Module) -> Program:
    ids = torch.randint(12, (3, 5), generator=torch.Generator().manual_seed(0))
    return capture(model.eval(), (ids,), dynamic=({0: "B", 1: "S"},), canonicalize=False)


@pytest.fixture(scope="module")
def plain() -> Program:
    return program_of(Model())


@pytest.fixture(scope="module")
def blank() -> Program:
    """The same model with other numbers."""
    model = Model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.5)
    return program_of(model)


def quantized(program: Program, **options: Any) -> Program:
    return run_pass(QuantizeWeights(**{"scale_dtype": "f16"} | options), program).program


def opened(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    return json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")


def parts_of(program: Program) -> dict[str, tuple[str, Parts]]:
    found = {}
    for node in program.graph.nodes:
        if "dequantize" in str(node.target):
            parts = [None if part is None else program.weight(part) for part in node.args]
            found[str(node.args[0].target).removesuffix(".weight_stored")] = (node.kwargs["format"], Parts(*parts))
    return found


def exact(text: str, parts: Parts) -> np.ndarray:
    """The numbers held, in f64."""
    chosen = formats.parse(text)
    assert parts.scale is not None
    values = parts.stored.double() if text.startswith("f8") else chosen.unpack(parts.stored).double()  # type: ignore[attr-defined]
    values = values.unflatten(-1, (parts.scale.shape[-1], -1))
    if parts.zero_point is not None:
        values = values - parts.zero_point.double().unsqueeze(-1)
    return (values * parts.scale.double().unsqueeze(-1)).flatten(-2).numpy()


def assert_equal_parts(a: Program, b: Program) -> None:
    first, second = parts_of(a), parts_of(b)
    assert first.keys() == second.keys()
    for module, (text, parts) in first.items():
        assert second[module][0] == text
        for x, y in zip(parts, second[module][1], strict=True):
            assert (x is None) == (y is None)
            if x is not None and y is not None:
                assert x.dtype == y.dtype
                assert torch.equal(x.view(torch.uint8), y.view(torch.uint8))


# -------------------------------------------------------------------- packing


@given(
    st.integers(2, 8).flatmap(
        lambda bits: st.tuples(
            st.just(bits), st.lists(st.integers(0, 2**bits - 1), min_size=1, max_size=100), st.sampled_from([0, 1])
        )
    )
)
def test_words_round_trip(case: tuple[int, list[int], int]) -> None:
    bits, values, axis = case
    tensor = torch.tensor([values], dtype=torch.int16)
    tensor = tensor.t().contiguous() if axis == 0 else tensor
    words = pack_words(tensor, bits, axis=axis)
    assert words.dtype == torch.int32
    assert words.numel() == -(-len(values) * bits // 32)
    assert [bits_of(words.flatten().tolist(), bits, i) for i in range(len(values))] == values
    assert torch.equal(unpack_words(words, bits, len(values), axis=axis), tensor)


# -------------------------------------------------------------------- round trips

CASES: list[tuple[str, dict[str, Any]]] = [
    *(("gptq", {"bits": bits, "group_size": 32}) for bits in (2, 3, 4, 8)),
    ("gptq", {"group_size": None}),
    *(("gptq_v2", {"bits": bits, "group_size": 16, "symmetric": False}) for bits in (2, 3, 4, 8)),
    ("awq", {"group_size": 32, "symmetric": False}),
    ("awq", {"group_size": None, "symmetric": False}),
    ("awq", {"group_size": 32}),
    ("compressed-tensors", {"group_size": 32}),
    ("compressed-tensors", {"group_size": 16, "symmetric": False, "scale_dtype": "f32"}),
    ("compressed-tensors", {"bits": 8, "group_size": None}),
    ("compressed-tensors", {"bits": 8, "group_size": 32, "symmetric": False}),
    ("compressed-tensors", {"format": "f8e4m3.row", "scale_dtype": "f32"}),
    ("compressed-tensors", {"format": "f8e4m3.tensor"}),
    ("int-quantized", {"bits": 8, "group_size": None}),
    ("int-quantized", {"format": "int8.tensor"}),
    ("int-quantized", {"format": "int8.row.asym"}),
]


@pytest.mark.parametrize(("layout", "options"), CASES)
def test_round_trip(layout: str, options: dict[str, Any], plain: Program, blank: Program, tmp_path: Path) -> None:
    program = quantized(plain, **options)
    save_quantized(program, tmp_path / "model", layout, config={"model_type": "mine"}, only=Model().state_dict())
    config, tensors = opened(tmp_path / "model")
    assert config["model_type"] == "mine"
    for module, (text, parts) in parts_of(program).items():
        written = READERS[layout](tensors, module, config["quantization_config"])
        assert np.array_equal(written, exact(text, parts)), module
    assert not [name for name in tensors if name.endswith(("_stored", "_scale_1", "shift"))]
    assert torch.equal(tensors["up.bias"], plain.weight("up.bias"))
    back = load_quantized(tmp_path / "model", blank)
    verify(back)
    assert_equal_parts(program, back)
    ids = torch.randint(12, (2, 7))
    assert torch.equal(back(ids), program(ids))
    assert not torch.equal(blank(ids), back(ids))
    # A second writing gives the same file, byte for byte.
    save_quantized(back, tmp_path / "again", layout, config={"model_type": "mine"})
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "model" / name).read_bytes()


def test_every_layer_may_have_its_own_format(plain: Program, blank: Program, tmp_path: Path) -> None:
    class OnlyUp(QuantizeWeights):
        def _find(self, program: Program) -> Any:
            return (x for x in super()._find(program) if isinstance(x, WeightLayer) and x.name == "up.weight")

    one = OnlyUp(bits=8, group_size=None).run(plain.copy(), _context()).program
    program = quantized(one, group_size=32)
    save_quantized(program, tmp_path, "compressed-tensors")
    config, tensors = opened(tmp_path)
    groups = config["quantization_config"]["config_groups"]
    assert [(g["targets"], g["weights"]["num_bits"]) for g in groups.values()] == [(["up"], 8), (["inner.down"], 4)]
    for module, (text, parts) in parts_of(program).items():
        assert np.array_equal(compressed_weight(tensors, module, config["quantization_config"]), exact(text, parts))
    assert_equal_parts(program, load_quantized(tmp_path, blank))
    with pytest.raises(StorageError, match=r"8 bits, group size None; .*4 bits, group size 32; one configuration must"):
        save_quantized(program, tmp_path / "gptq", "gptq")


def _context() -> Any:
    from irc.core.contract import PassContext

    return PassContext()


def test_configuration(plain: Program, tmp_path: Path) -> None:
    program = quantized(plain, group_size=32)
    save_quantized(program, tmp_path / "a", "gptq")
    assert opened(tmp_path / "a")[0] == {
        "quantization_config": {
            "quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False, "static_groups": False,
            "lm_head": False, "checkpoint_format": "gptq", "dynamic": {r"-:head$": {}},
        }
    }  # fmt: skip
    qzeros = opened(tmp_path / "a")[1]["up.qzeros"]
    assert set(qzeros.flatten().tolist()) == {0x77777777}
    save_quantized(program, tmp_path / "b", "compressed-tensors")
    config = opened(tmp_path / "b")[0]["quantization_config"]
    assert (config["format"], config["ignore"]) == ("pack-quantized", ["head"])
    assert config["config_groups"]["group_0"]["targets"] == ["Linear"]
    save_quantized(program, tmp_path / "c", "awq")
    assert opened(tmp_path / "c")[0]["quantization_config"] == {
        "quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm",
        "modules_to_not_convert": ["head"],
    }  # fmt: skip


def test_act_order(blank: Program, tmp_path: Path) -> None:
    """Inputs of a group need not be neighbours: `g_idx` says which group each belongs to."""
    config = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True}
    generator = torch.Generator().manual_seed(5)
    state: dict[str, Tensor] = {"embed.weight": torch.randn(12, 64), "up.bias": torch.randn(96)}
    state |= {"norm.weight": torch.randn(64), "norm.bias": torch.randn(64)}
    for module, (rows, width) in {"up": (96, 64), "inner.down": (64, 96)}.items():
        draw = lambda high, *shape: torch.randint(high, shape, generator=generator)  # noqa: E731
        groups = width // 32
        state[f"{module}.qweight"] = pack_words(draw(16, width, rows), 4, axis=0)
        state[f"{module}.qzeros"] = pack_words(draw(15, groups, rows), 4, axis=1)
        state[f"{module}.scales"] = torch.rand(groups, rows, generator=generator).half() + 0.01
        order = torch.randperm(width, generator=generator)
        state[f"{module}.g_idx"] = (order // 32).to(torch.int32)
    program = load_quantized(state, blank, config=config)
    verify(program)
    weights = {}
    for node in program.graph.nodes:
        if "index_select" in str(node.target):
            parts = [None if part is None else program.weight(part) for part in node.args[0].args]
            numbers = exact(node.args[0].kwargs["format"], Parts(*parts))
            name = str(node.args[0].args[0].target).removesuffix(".weight_stored")
            weights[name] = numbers[:, program.weight(node.args[2]).numpy()]
    assert weights.keys() == {"up", "inner.down"}
    for module, numbers in weights.items():
        assert np.array_equal(numbers, gptq_weight(state, module, config | {"checkpoint_format": "gptq"}))
    save_quantized(program, tmp_path, "gptq")
    saved, tensors = opened(tmp_path)
    assert saved["quantization_config"]["desc_act"] is True
    for name, tensor in tensors.items():
        assert torch.equal(tensor, state[name]), name
    with pytest.raises(StorageError, match=r"inner\.down: its inputs are sorted by group") as caught:
        save_quantized(program, tmp_path / "awq", "awq")
    assert "up: its inputs are sorted by group" in str(caught.value)


def test_shards_and_ties(plain: Program, blank: Program, tmp_path: Path) -> None:
    program = quantized(plain, group_size=32)
    save_quantized(program, tmp_path, "gptq")
    _, tensors = opened(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    tensors["head.weight"] = tensors["embed.weight"].clone()  # some writers store both names of a tie
    names = sorted(tensors)
    shards = {name: f"model-{i % 2}.safetensors" for i, name in enumerate(names)}
    for shard in set(shards.values()):
        save_file({name: tensors[name] for name in names if shards[name] == shard}, tmp_path / shard)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    assert_equal_parts(program, load_quantized(tmp_path, blank))
    tensors["head.weight"] += 1
    save_file(
        {name: tensors[name] for name in names if shards[name] == "model-0.safetensors"},
        tmp_path / "model-0.safetensors",
    )
    save_file(
        {name: tensors[name] for name in names if shards[name] == "model-1.safetensors"},
        tmp_path / "model-1.safetensors",
    )
    with pytest.raises(StorageError, match=r"it is tied to embed\.weight in the program, and differs"):
        load_quantized(tmp_path, blank)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../x.safetensors"}}))
    with pytest.raises(StorageError, match="no weight_map of file names beside it"):
        load_quantized(tmp_path, blank)


def test_program_on_the_meta_device(plain: Program, tmp_path: Path) -> None:
    program = quantized(plain, group_size=32)
    save_quantized(program, tmp_path, "awq")
    on_meta = plain.copy(replace_weights={
        name: tensor if name == "shift" else nn.Parameter(tensor.detach().to("meta"), False)
        for name, tensor in plain.weights.items()
    })  # fmt: skip
    assert_equal_parts(program, load_quantized(tmp_path, on_meta))
    with pytest.raises(StorageError, match=r"has no values for \d+ weights \(first: embed\.weight"):
        save_quantized(quantized(on_meta, group_size=32), tmp_path / "x", "awq")


# -------------------------------------------------------------------- refusals of writing


def refused(program: Program, tmp_path: Path, layout: str, **options: Any) -> str:
    folder = tmp_path / "refused"
    with pytest.raises(StorageError) as caught:
        save_quantized(program, folder, layout, **options)
    assert not folder.exists(), "nothing is written after a refusal"
    return str(caught.value)


@pytest.mark.parametrize(
    ("layout", "options", "reason"),
    [
        ("gptq", {"bits": 5}, "GPTQ stores 2, 3, 4, 8 bits, not 5"),
        ("gptq", {"scale_dtype": "f32"}, "scales of type torch.float32 cannot be held as f16"),
        ("gptq", {"format": "nvfp4", "scale_dtype": "f32"}, "nvfp4 is no integer format with scales a group or row"),
        ("awq", {"bits": 8}, "AWQ stores 4 bits, not 8"),
        ("compressed-tensors", {"bits": 3}, "int3.g32: integers must have 4 or 8 bits"),
        ("compressed-tensors", {"format": "q4_0", "scale_dtype": "f32"}, "q4_0 cannot be stored"),
        ("compressed-tensors", {"format": "f8e5m2.row"}, "f8e5m2.row cannot be stored"),
        ("int-quantized", {"bits": 4}, "int4.g32: integers must have 8 bits"),
    ],
)
def test_what_a_layout_cannot_say(
    plain: Program, tmp_path: Path, layout: str, options: dict[str, Any], reason: str
) -> None:
    message = refused(quantized(plain, **options), tmp_path, layout)
    assert reason in message
    if "stores" not in reason:
        assert message.count(reason.partition(" of type")[0].split(":")[0]) >= 2, "both layers are named"


def test_zero_point_zero(plain: Program, tmp_path: Path, blank: Program) -> None:
    positive = {n: w.detach().abs() + 0.1 if n == "up.weight" else w for n, w in plain.weights.items()}
    program = quantized(plain.copy(replace_weights=positive), symmetric=False)
    assert "up: a zero point of 0 cannot be stored: layout 'gptq_v2' can" in refused(program, tmp_path, "gptq")
    save_quantized(program, tmp_path / "v2", "gptq_v2")
    assert_equal_parts(program, load_quantized(tmp_path / "v2", blank))
    config, tensors = opened(tmp_path / "v2")
    tensors["up.qzeros"] = torch.full_like(tensors["up.qzeros"], -1)
    config["quantization_config"]["checkpoint_format"] = "gptq"
    with pytest.raises(StorageError, match="up: qzeros holds a zero point of 0 minus one"):
        load_quantized(tensors, blank, config=config)


def test_other_refusals_of_writing(plain: Program, tmp_path: Path) -> None:
    assert "the program has no quantized linear layer" in refused(plain, tmp_path, "gptq")
    with_table = quantized(plain, group_size=32, include_embeddings=True)
    assert "embed: it is used by embedding, aten.embedding.default, which is no linear layer" in refused(
        with_table, tmp_path, "awq"
    )
    padded = quantized(plain, group_size=40, indivisible="pad")
    message = refused(padded, tmp_path, "compressed-tensors")
    assert "up: it is used by slice" in message
    assert "inner.down: it is used by slice" in message
    names = set(Model().state_dict())
    message = refused(quantized(plain), tmp_path, "gptq", only=names - {"up.weight"} | {"lost.weight"})
    assert "up.weight is no weight of the model" in message
    assert "lost.weight of the model is not in the program" in message
    with pytest.raises(OptionError, match=r"unknown checkpoint layout 'gptp' \(did you mean 'gptq'"):
        save_quantized(plain, tmp_path / "x", "gptp")


def test_quantized_activations_are_refused(plain: Program, tmp_path: Path) -> None:
    program = quantized(plain, group_size=32).copy()
    linear = next(node for node in program.graph.nodes if node.target is torch.ops.aten.linear.default)
    scale = program.weight_node("scale", torch.ones(1, 1, 1), before=linear)
    text = {"format": "int8.tensor"}
    made = program.insert(torch.ops.irc.quantize.default, linear.args[0], scale, None, before=linear, **text)
    back = program.insert(torch.ops.irc.dequantize.default, made, scale, None, before=linear, **text)
    linear.replace_input_with(linear.args[0], back)
    message = refused(program, tmp_path, "compressed-tensors")
    assert f"{made.name} quantizes an activation, which is not written" in message


def test_names_can_be_given(plain: Program, tmp_path: Path) -> None:
    program = quantized(plain, group_size=32)
    names = {"up.weight_stored": "left.weight"}
    save_quantized(program, tmp_path, "gptq", names=names)
    assert "left.qweight" in opened(tmp_path)[1]
    clash = {"up.weight_stored": "inner.down.weight"}
    assert "inner.down: it is stored twice" in refused(program, tmp_path, "gptq", names=clash)
    assert "stands for no weight that is known" in refused(program, tmp_path, "gptq", names={"up.weight_stored": "up"})


# -------------------------------------------------------------------- hostile checkpoints

Checkpoint = tuple[dict[str, Any], dict[str, Tensor]]


def _config(path: str, value: Any) -> Callable[[Checkpoint], None]:
    def change(checkpoint: Checkpoint) -> None:
        *steps, last = path.split("/")
        place: Any = checkpoint[0]["quantization_config"]
        for step in steps:
            place = place[step]
        place[last] = value

    return change


def _tensor(name: str, change: Callable[[Tensor], Tensor | None]) -> Callable[[Checkpoint], None]:
    def apply(checkpoint: Checkpoint) -> None:
        made = change(checkpoint[1].pop(name))
        if made is not None:
            checkpoint[1][name] = made.contiguous()

    return apply


def _nan(scale: Tensor) -> Tensor:
    scale[0, 0] = torch.nan
    return scale


GROUP = "config_groups/group_0"
HOSTILE = [
    ("gptq", _tensor("up.scales", lambda t: None), "up: scales is missing"),
    ("gptq", _tensor("up.qweight", lambda t: None), "up: qweight is missing"),
    ("gptq", _tensor("up.qweight", lambda t: t[1:]), "up: qweight has shape [7, 96], not [8, 96]"),
    ("gptq", _tensor("up.qweight", lambda t: t.float()), "up: qweight has type torch.float32, not torch.int32"),
    ("gptq", _tensor("up.scales", _nan), "up: scales holds numbers that are not finite"),
    ("gptq", _tensor("up.g_idx", lambda t: t + 7), "up: g_idx names groups outside of 0 to 1"),
    ("gptq", _tensor("up.g_idx", lambda t: t * 0), "up: g_idx gives groups of 0 to 64 inputs, not 32"),
    ("gptq", _config("bits", 8), "up: qweight has shape [8, 96], not [16, 96]"),
    ("gptq", _config("bits", "four"), "bits must be a whole number, not 'four'"),
    ("gptq", _config("bits", 7), "bits must be one of 2, 3, 4, 8, not 7"),
    ("gptq", _config("group_size", 0), "group_size must be positive or -1, not 0"),
    ("gptq", _config("group_size", 48), "up: group size 48 does not divide its 64 inputs"),
    ("gptq", _config("checkpoint_format", "marlin"), "checkpoint_format must be gptq or gptq_v2, not 'marlin'"),
    ("gptq", _config("dynamic", {"+:up": {"bits": 8}}), "settings per layer (dynamic"),
    ("gptq", _config("quant_method", "gptk"), "has quant_method 'gptk' (did you mean 'gptq'?)"),
    ("gptq", _config("quant_method", 3), "has quant_method 3"),
    ("gptq", _tensor("up.bias", lambda t: None), "up.bias: the program has it, the checkpoint does not"),
    ("gptq", _tensor("up.bias", lambda t: t[:5]), "up.bias: it has shape [5], the program's [96]"),
    ("gptq", _tensor("up.bias", lambda t: t.double()), "up.bias: torch.float64 cannot become the program's"),
    ("awq", _config("version", "gemv"), "the packing (version) must be gemm, not 'gemv'"),
    ("awq", _config("bits", 8), "AWQ has 4 bits, not 8"),
    ("awq", _tensor("up.qzeros", lambda t: t.t()), "up: qzeros has shape [12, 2], not [2, 12]"),
    ("compressed-tensors", _config("config_groups", {}), "config_groups is missing or empty"),
    ("compressed-tensors", _config(GROUP, 5), "group_0: it has no weights"),
    ("compressed-tensors", _config(f"{GROUP}/targets", "Linear"), "targets must be a list of names"),
    ("compressed-tensors", _config(f"{GROUP}/targets", ["re:("]), "up: '(' is no regular expression"),
    ("compressed-tensors", _config(f"{GROUP}/targets", ["other"]), "up: no group of the configuration is about it"),
    ("compressed-tensors", _config(f"{GROUP}/weights/num_bits", 8), "up: weight_packed has shape [96, 8], not [96,"),
    ("compressed-tensors", _config(f"{GROUP}/weights/group_size", 16), "up: weight_scale has shape [96, 2], not [96,"),
    ("compressed-tensors", _config(f"{GROUP}/weights/symmetric", False), "up: weight_zero_point is missing"),
    ("compressed-tensors", _config(f"{GROUP}/weights/strategy", "block"), "strategy 'block' with group_size 32"),
    ("compressed-tensors", _config(f"{GROUP}/weights/actorder", "group"), "a group index (actorder) is not read"),
    ("compressed-tensors", _config(f"{GROUP}/input_activations", {"num_bits": 8}), "weights_only=True reads"),
    ("compressed-tensors", _config(f"{GROUP}/format", "naive-quantized"), "int weights of 4 bits are not read"),
    ("compressed-tensors", _config("ignore", ["re:u.*"]), "up: the configuration lists it under ignore"),
    ("compressed-tensors", _config("kv_cache_scheme", {}), "a quantized cache (kv_cache_scheme) is not read"),
    ("compressed-tensors", _tensor("up.weight_shape", lambda t: t + 1), "up: weight_shape says [97, 65], the"),
]  # fmt: skip


@pytest.mark.parametrize(("layout", "damage", "reason"), HOSTILE)
def test_hostile_checkpoint(
    layout: str, damage: Callable[[Checkpoint], None], reason: str, plain: Program, blank: Program, tmp_path: Path
) -> None:
    save_quantized(quantized(plain, group_size=32), tmp_path, layout)
    checkpoint = opened(tmp_path)
    damage(checkpoint)
    (tmp_path / "config.json").write_text(json.dumps(checkpoint[0]))
    save_file(checkpoint[1], tmp_path / "model.safetensors")
    with pytest.raises(StorageError, match=re.escape(reason)):
        load_quantized(tmp_path, blank)


def test_all_offenders_are_listed(plain: Program, blank: Program, tmp_path: Path) -> None:
    save_quantized(quantized(plain, group_size=32), tmp_path, "gptq")
    config, state = opened(tmp_path)
    del state["up.scales"], state["norm.bias"]
    state["inner.down.qweight"] = state["inner.down.qweight"][1:]
    state["strange.inv_freq"] = torch.ones(3)
    state["what.qweight"] = torch.ones(3)
    with pytest.raises(StorageError) as caught:
        load_quantized(state, blank, config=config)
    for text in (
        "the state dict does not fit program", "up: scales is missing", "norm.bias: the program has it",
        "inner.down: qweight has shape [11, 64], not [12, 64]", "strange.inv_freq: the checkpoint has it",
        "what: what.weight is not in the program",
    ):  # fmt: skip
        assert text in str(caught.value)


def test_ignored_tensors_and_weights_only(plain: Program, blank: Program, tmp_path: Path) -> None:
    program = quantized(plain, group_size=32)
    save_quantized(program, tmp_path, "compressed-tensors")
    config, state = opened(tmp_path)
    state["layer.inv_freq"] = torch.ones(3)
    config["quantization_config"]["config_groups"]["group_0"]["input_activations"] = {"num_bits": 8}
    back = load_quantized(state, blank, config=config, ignore=["*.inv_freq"], weights_only=True)
    assert_equal_parts(program, back)


@pytest.mark.parametrize("options", [{"bits": 8, "group_size": None}, {"format": "f8e4m3.row"}])
def test_naive_quantized(plain: Program, blank: Program, tmp_path: Path, options: dict[str, Any]) -> None:
    program = quantized(plain, **options)
    save_quantized(program, tmp_path, "int-quantized")
    config, state = opened(tmp_path)
    settings = config["quantization_config"]
    settings["format"] = settings["config_groups"]["group_0"]["format"] = "naive-quantized"
    assert_equal_parts(program, load_quantized(state, blank, config=settings))


def test_damaged_folders(blank: Program, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="cannot read"):
        load_quantized(tmp_path / "missing", blank)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(StorageError, match="cannot read"):
        load_quantized(tmp_path, blank)
    (tmp_path / "config.json").write_text("[" * 100000)
    with pytest.raises(StorageError, match="cannot read"):
        load_quantized(tmp_path, blank)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(StorageError, match="holds no JSON object"):
        load_quantized(tmp_path, blank)
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "gptq"}}')
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(StorageError, match="cannot read"):
        load_quantized(tmp_path, blank)
    with pytest.raises(StorageError, match="has no quantization_config with a quant_method"):
        load_quantized({}, blank)
    with pytest.raises(StorageError, match="1 entries that are no tensors"):
        load_quantized({"a": 3}, blank, config={"quant_method": "awq"})  # type: ignore[dict-item]


# -------------------------------------------------------------------- against the library


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(
    ("layout", "options"),
    [
        ("compressed-tensors", {"group_size": 32}),
        ("compressed-tensors", {"group_size": 32, "symmetric": False}),
        ("compressed-tensors", {"bits": 8, "group_size": None}),
        ("compressed-tensors", {"format": "f8e4m3.row", "scale_dtype": "f32"}),
        ("int-quantized", {"bits": 8, "group_size": None}),
    ],
)
def test_against_compressed_tensors(layout: str, options: dict[str, Any], plain: Program, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    program = quantized(plain, **options)
    save_quantized(program, tmp_path, layout)
    config, tensors = opened(tmp_path)
    theirs = QuantizationConfig.model_validate(config["quantization_config"])
    scheme = theirs.config_groups["group_0"]
    compressor = BaseCompressor.load_from_registry(theirs.format)
    for module, (text, parts) in parts_of(program).items():
        local = {
            name.removeprefix(module + "."): tensor
            for name, tensor in tensors.items()
            if name.startswith(module + ".weight")
        }
        restored = compressor.decompress(local, scheme)["weight"]
        assert parts.scale is not None
        ours = formats.dequantize_tensor(parts, formats.parse(text), restored.dtype)
        assert torch.equal(restored, ours), module
        given = {"weight": restored, "weight_scale": local["weight_scale"]}
        if parts.zero_point is not None:
            given["weight_zero_point"] = (parts.zero_point.to(torch.int16) - 8).to(torch.int8)
        again = compressor.compress(given, scheme)
        assert again.keys() == local.keys()
        for name, tensor in again.items():
            assert tensor.dtype == local[name].dtype
            assert torch.equal(tensor.view(torch.uint8), local[name].view(torch.uint8)), (module, name)
