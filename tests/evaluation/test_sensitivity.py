"""Sensitivity: each measure against its definition, resuming, and that damage finds the layer that was made fragile."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import irc
from irc.core.calibration import CalibrationData
from irc.core.errors import OptionError, PassError, StorageError
from irc.core.manager import PassManager
from irc.core.numeric import logits_metrics
from irc.core.program import Program
from irc.evaluation import Sensitivity, sensitivity
from irc.frontend import capture
from irc.passes.quantize._round_to_nearest import round_to_nearest
from tests.lowering import steps

UP = "layers.0.mlp.up_proj.weight"


def data(batches: int = 2, batch_size: int = 2) -> CalibrationData:
    return CalibrationData.from_tensors(steps.tokens(batches * batch_size, 9), batch_size=batch_size)


def rounded(weight: Tensor, text: str) -> Tensor:
    chosen = irc.core.formats.parse(text)
    return chosen.dequantize(*round_to_nearest(weight, chosen, torch.float32), torch.float32)


def layer_inputs(program: Program, name: str, batches: CalibrationData) -> Tensor:
    """All inputs of the linear layer over a weight: [positions, K]."""
    found = []
    for batch in batches.batches:
        values = {}
        with torch.no_grad():
            irc.core.evaluate.evaluate(program.graph, program.weight, batch, values.__setitem__)
        weight = next(n for n in program.graph.nodes if n.op == "get_attr" and n.target == name)
        user = next(iter(weight.users))
        found.append(values[user.args[0]].flatten(0, -2))
    return torch.cat(found)


def test_sqnr_is_the_trace_formula() -> None:
    program = steps.decoder()
    found = sensitivity(program, data(), bits=(3, 8), group_size=16)
    assert found.formats == ["int3.g16", "int8.g16"]
    assert len(found.layers) == 8  # seven projections and the head
    inputs = layer_inputs(program, UP, data()).double()
    weight = program.weight(UP).detach()
    gram = inputs.T @ inputs
    for text in found.formats:
        error = (weight - rounded(weight, text)).double()
        noise, signal = (float(((w @ gram) * w).sum()) for w in (error, weight.double()))
        assert found[UP].damage[text] == pytest.approx(noise / signal, rel=1e-4)
    assert found[UP].bits["int3.g16"] == 3 + 16 / 16
    assert found[UP].num_weights == weight.numel()


def test_kl_is_that_of_the_quantized_program() -> None:
    program = steps.decoder()
    found = sensitivity(program, data(3, 1), bits=(2,), group_size=16, metric="kl")
    changed = program.copy(replace_weights={UP: rounded(program.weight(UP).detach(), "int2.g16")})
    windows = torch.cat([batch[0] for batch in data(3, 1).batches])
    wanted = logits_metrics(program.run(windows)[0], changed.run(windows)[0])[0]
    assert wanted > 1e-4
    assert found[UP].damage["int2.g16"] == pytest.approx(wanted, rel=1e-3)


def test_second_order_is_the_weighted_trace() -> None:
    """For one linear layer with softmax, gradients are labels minus probabilities: everything can be written out."""
    torch.manual_seed(0)
    program = capture(nn.Linear(16, 6, bias=False), (torch.randn(4, 16),), dynamic=({0: "B"},), name="one")
    x = torch.randn(40, 16)
    found = sensitivity(program, CalibrationData.from_tensors(x, batch_size=40), bits=(3,), group_size=None,
                        metric="second-order", seed=5)  # fmt: skip
    (name,) = program.weights
    weight = program.weight(name).detach()
    p = (x @ weight.T).softmax(-1)
    labels = torch.multinomial(p, 1, generator=torch.Generator().manual_seed(5))
    gradient = torch.zeros_like(p).scatter_(1, labels, 1.0) - p
    error = weight - rounded(weight, "int3.row")
    per_row = ((error @ (x.T @ x)) * error).sum(-1)
    wanted = 0.5 * float((gradient.square().mean(0) * per_row).sum()) / len(x)
    assert found[name].damage["int3.row"] == pytest.approx(wanted, rel=1e-4)


def test_second_order_estimates_the_divergence() -> None:
    program = steps.decoder()
    windows = CalibrationData.from_tensors(
        torch.randint(steps.VOCABULARY, (64, 32), generator=torch.Generator().manual_seed(2)), batch_size=16
    )
    measured = sensitivity(program, windows, bits=(4,), group_size=16, metric="kl")
    estimated = sensitivity(program, windows, bits=(4,), group_size=16, metric="second-order")
    for one in measured.layers:
        assert estimated[one.name].damage["int4.g16"] == pytest.approx(one.damage["int4.g16"], rel=0.5), one.name


def test_channels_of_a_convolution_are_its_second_axis() -> None:
    torch.manual_seed(0)
    gain = torch.tensor([0.0, 0.0, 3.0])  # only the last channel matters

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(2, 3, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x).mean((2, 3)) * gain
            return torch.cat((y, -y), 1)

    program = capture(Net(), (torch.randn(2, 2, 6, 5),), dynamic=({0: "B"},), name="net")
    weight = program.weight("conv.weight").detach().clone()
    weight[2] = 0  # nothing to round there, and all damage elsewhere is invisible
    program = program.copy(replace_weights={"conv.weight": weight})
    images = CalibrationData.from_tensors(torch.randn(8, 2, 6, 5), batch_size=8)
    found = sensitivity(program, images, formats=["int3.row"], metric="second-order", include_convolutions=True)
    assert found.layers[0].damage["int3.row"] == 0
    visible = sensitivity(program, images, formats=["int3.row"], include_convolutions=True)
    assert visible.layers[0].damage["int3.row"] > 1e-3


@pytest.mark.parametrize("metric", ["sqnr", "kl", "second-order"])
def test_fewer_bits_do_more_damage(metric: str) -> None:
    found = sensitivity(steps.decoder(), data(), bits=(2, 4, 8), group_size=16, metric=metric)
    for one in found.layers:
        values = [one.damage[text] for text in ("int2.g16", "int4.g16", "int8.g16")]
        assert values[0] > values[1] > values[2] >= 0


def test_tied_embeddings_and_convolutions() -> None:
    torch.manual_seed(0)
    embed = nn.Embedding(12, 16)

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = embed

        def forward(self, ids: Tensor) -> Tensor:
            return torch.nn.functional.linear(torch.relu(self.embed(ids)), self.embed.weight)

    program = capture(Tied(), (torch.randint(12, (2, 5)),), name="tied")
    batches = CalibrationData.from_tensors(torch.randint(12, (2, 5)), batch_size=2)
    with pytest.raises(PassError, match="no layer to measure"):
        sensitivity(program, batches, group_size=16)
    for metric in ("sqnr", "kl", "second-order"):
        found = sensitivity(program, batches, bits=(3, 8), group_size=16, metric=metric, include_embeddings=True)
        assert [one.name for one in found.layers] == ["embed.weight"]
        assert found.layers[0].damage["int3.g16"] > found.layers[0].damage["int8.g16"] > 0
    images = CalibrationData.from_tensors(torch.randn(4, 3, 8, 8), batch_size=4)
    for metric in ("sqnr", "kl", "second-order"):
        found = sensitivity(steps.cnn(), images, bits=(3,), metric=metric, include_convolutions=True)
        assert {text for one in found.layers for text in one.damage} == {"int3.row", "int3.g32"}
        assert len(found.layers) == 2
    assert any("convolution" in reason for reason in sensitivity(steps.cnn(), images, bits=(3,)).skips)


def test_resumes_where_it_was_killed(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    for metric in ("sqnr", "kl", "second-order"):
        path.unlink(missing_ok=True)
        options = {"bits": (3, 8), "group_size": 16, "metric": metric}
        whole = sensitivity(steps.decoder(), data(3), **options)

        def kill(what: str, done: int, total: int) -> None:
            if "batch 2" in what and done == total // 2:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            sensitivity(steps.decoder(), data(3), **options, resume=path, progress=kill)
        kept = json.loads(path.read_text())
        assert kept["result"] is None
        seen = {entry["batches"] for entry in kept["layers"].values()}
        assert seen == ({1, 2} if metric == "kl" else {1})
        with pytest.raises(StorageError, match="not come to its end"):
            Sensitivity.load(path)
        told: list[str] = []
        resumed = sensitivity(
            steps.decoder(), data(3), **options, resume=path, progress=lambda what, *_, told=told: told.append(what)
        )
        assert not any("batch 1" in what for what in told if metric != "sqnr")
        assert resumed == whole
        assert Sensitivity.load(path) == whole
        assert [p.name for p in tmp_path.iterdir()] == ["run.json"]


def test_results_of_something_else_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    sensitivity(steps.decoder(), data(), bits=(8,), group_size=16, resume=path)
    before = path.read_bytes()
    for change in ({"bits": (4,)}, {"metric": "kl"}):
        with pytest.raises(OptionError, match="results of another program, data, metric or formats"):
            sensitivity(steps.decoder(), data(), **{"bits": (8,), "group_size": 16, "resume": path} | change)
    with pytest.raises(OptionError, match="another program"):
        sensitivity(steps.decoder(), data(3), bits=(8,), group_size=16, resume=path)
    assert path.read_bytes() == before
    path.write_text("{")
    with pytest.raises(StorageError, match="cannot be read"):
        sensitivity(steps.decoder(), data(), bits=(8,), group_size=16, resume=path)


@pytest.mark.parametrize("damage", [[], {"layers": []}, {"layers": [{"name": 1}], "skips": []}])
def test_damaged_results(damage: object) -> None:
    with pytest.raises(StorageError, match="no complete sensitivity result"):
        Sensitivity.from_json(damage)


def test_table_is_sorted(tmp_path: Path) -> None:
    found = sensitivity(steps.decoder(), data(), bits=(3, 8), group_size=16)
    lines = [line for line in str(found).splitlines() if ".weight" in line]
    shown = [float(line.split("│")[3]) for line in lines]
    assert shown == sorted(shown)
    assert len(lines) == len(found.layers)
    found.save(tmp_path / "s.json")
    assert Sensitivity.load(tmp_path / "s.json") == found


def test_bad_input() -> None:
    with pytest.raises(OptionError) as caught:
        sensitivity(steps.decoder(), data(), formats=["int4.tensor", "int4", "uint4.g16"], metric="sqrn")
    for word in ("not 'sqrn'", "int4.tensor", "'int4' is not a quantization format", "uint4.g16"):
        assert word in str(caught.value)
    with pytest.raises(OptionError, match="bits must be 2 to 8, not 9"):
        sensitivity(steps.decoder(), data(), bits=(9,))
    with pytest.raises(OptionError, match="no formats"):
        sensitivity(steps.decoder(), data(), bits=())
    with pytest.raises(OptionError, match="not at a TinyPy"):
        sensitivity(steps.language_model(), data())
    with pytest.raises(PassError, match="quantize before the KV cache"):
        sensitivity(steps.step(), data())
    bad = steps.decoder().copy(replace_weights={UP: torch.full_like(steps.decoder().weight(UP), torch.nan)})
    with pytest.raises(PassError, match="not finite"):
        sensitivity(bad, data(), bits=(8,), group_size=16)


def test_the_rules_do_what_was_measured() -> None:
    """The rules of an assignment, run as a pass, give each layer the format it was assigned."""
    program = steps.decoder()
    found = sensitivity(program, data(), bits=(2, 3, 4, 8), group_size=16)
    chosen = irc.assign_bits(found, average_bits=5.5)
    assert len(set(chosen.formats.values())) > 1
    after = PassManager(chosen.pipeline, verify="off").run(program).program
    formats = {
        str(node.args[0].target).removesuffix("_stored"): node.kwargs["format"]
        for node in after.graph.nodes
        if "dequantize" in str(node.target)
    }
    assert formats == chosen.formats
