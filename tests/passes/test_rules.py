"""Rules of formats by layer, in `quantize-weights`."""

from __future__ import annotations

import pytest
import torch

import irc
from irc.core.calibration import CALIBRATION_KEY
from irc.core.errors import OptionError
from irc.core.pipeline import parse_pipeline, print_pipeline
from irc.core.program import Program
from irc.passes import QuantizeClipped, QuantizeGptq, QuantizeWeights
from irc.passes.quantize._rules import Rule, parse_rules
from tests.lowering import steps
from tests.passes.running import assert_same, operations, reasons, run_pass, run_with_findings


def formats(program: Program) -> dict[str, str]:
    """Weight → format, of the quantized ones."""
    return {
        str(node.args[0].target).removesuffix("_stored"): str(node.kwargs["format"])
        for node in program.graph.nodes
        if "dequantize" in str(node.target)
    }


def test_first_match_wins() -> None:
    rules = ("*.up_proj=int5.g16", "layers.0.mlp.*=uint3.row.asym", "lm_head=none", "*.q_proj.weight=int8.row")
    result = run_pass(QuantizeWeights(group_size=32, rules=rules), steps.decoder())
    mlp = "layers.0.mlp"
    found = formats(result.program)
    assert {name: text for name, text in found.items() if text != "int4.g32"} == {
        f"{mlp}.up_proj.weight": "int5.g16",
        f"{mlp}.gate_proj.weight": "uint3.row.asym",
        f"{mlp}.down_proj.weight": "uint3.row.asym",
        "layers.0.attn.q_proj.weight": "int8.row",
    }
    assert len(found) == result.matches == 7
    assert operations(result.program)["dequantize"] == 7
    assert "weight lm_head.weight: rule 'lm_head=none' leaves it alone" in reasons(result)
    for batch, length in ((1, 1), (2, 7), (3, 12)):
        tokens = steps.tokens(batch, length)
        assert_same(steps.decoder(), result.program, (tokens,), rtol=QuantizeWeights(bits=2).preserves.rtol)
    assert run_pass(QuantizeWeights(rules=("lm_head=none",)), result.program).matches == 0


def test_no_rules_changes_nothing() -> None:
    plain = run_pass(QuantizeWeights(group_size=16), steps.decoder())
    ruled = run_pass(QuantizeWeights(bits=8, rules=("*=int4.g16",)), steps.decoder())
    assert str(plain.program) == str(ruled.program)


def test_a_tied_weight_is_called_by_all_its_modules() -> None:
    from irc.demo.tinypy import TinyPy, TinyPyConfig
    from irc.frontend import capture

    torch.manual_seed(0)
    model = TinyPy(TinyPyConfig(vocab_size=32, hidden_size=32, num_layers=1, num_heads=4, intermediate_size=32)).eval()
    program = capture(model, (torch.randint(32, (2, 5)),), name="tied")
    one = QuantizeWeights(include_embeddings=True, rules=("lm_head=int8.row",))
    assert formats(run_pass(one, program).program)["embed.weight"] == "int8.row"


def test_idle_rules_are_all_named() -> None:
    one = QuantizeWeights(rules=("*.upproj=int8.row", "*=int4.g32", "lm_head=int8.row", "layers.1.*=none"))
    problems = one.requires(steps.decoder())
    assert len(problems) == 3
    assert problems[0].startswith("rule '*.upproj=int8.row' matches no layer (nearest: layers.0.mlp.up_proj")
    assert problems[1] == "rule 'lm_head=int8.row' comes too late: earlier rules took lm_head.weight"
    assert problems[2].startswith("rule 'layers.1.*=none' matches no layer (")
    assert "layers.0" in problems[2]


def test_groups_that_do_not_divide_are_named() -> None:
    one = QuantizeWeights(rules=("*.down_proj=int8.g48", "*.up_proj=none", "*.q_proj=int3.g24"))
    problems = one.requires(steps.decoder())
    assert len(problems) == 2
    assert "group size 24 does not divide its rows of 32" in problems[0]
    assert "group size 48 does not divide its rows of 64" in problems[1]
    by_row = QuantizeWeights(rules=("*.down_proj=int8.g48",), indivisible="row")
    assert formats(run_pass(by_row, steps.decoder()).program)["layers.0.mlp.down_proj.weight"] == "int8.row"


def test_bad_rules_are_all_named() -> None:
    with pytest.raises(OptionError) as caught:
        QuantizeWeights(bits=9, rules=("a", "=int4.row", "b=int4", "d=uint4.g32", "f=none"))
    text = str(caught.value)
    for word in (
        "'a': expected PATTERN=FORMAT",
        "'=int4.row': expected",
        "'int4' is not a",
        "'d=uint4.g32': uint4.g32 holds no negative weights",
        "bits must be 2 to 8, not 9",
    ):
        assert word in text
    assert "'f" not in text


def test_any_format_may_be_asked_for() -> None:
    rules = ("*.down_proj=mxfp4", "*.up_proj=q8_0", "*.q_proj=int8.tensor", "*.k_proj=f8e4m3.row")
    found = formats(run_pass(QuantizeWeights(rules=rules), steps.decoder()).program)
    assert found["layers.0.mlp.down_proj.weight"] == "mxfp4"
    assert found["layers.0.mlp.up_proj.weight"] == "q8_0"
    assert found["layers.0.attn.q_proj.weight"] == "int8.tensor"
    assert found["layers.0.attn.k_proj.weight"] == "f8e4m3.row"


def test_calibrated_passes_follow_rules_of_integers() -> None:
    rules = ("*.up_proj=int8.row", "*.down_proj=uint3.g16.asym", "lm_head=none")
    ctx = irc.PassContext(options={CALIBRATION_KEY: steps.tokens(4, 12)})
    for one in (QuantizeGptq(rules=rules), QuantizeClipped(rules=rules)):
        result = irc.PassManager([one], verify="each", ctx=ctx).run(steps.decoder())
        found = formats(result.program)
        assert found["layers.0.mlp.up_proj.weight"] == "int8.row"
        assert found["layers.0.mlp.down_proj.weight"] == "uint3.g16.asym"
        assert found["layers.0.mlp.gate_proj.weight"] == "int4.g32"
        assert "lm_head.weight" not in found
        assert any("rule 'lm_head=none' leaves it alone" in str(skip.reason) for skip in result.report.rows[-1].skips)
        assert one.requires(result.program)[0].startswith("rule '*.up_proj=int8.row' matches no layer")
    with pytest.raises(OptionError, match="only integers with a scale a row or group can be chosen here, not mxfp4"):
        QuantizeGptq(rules=("*=mxfp4",))


def test_text_round_trip() -> None:
    text = "quantize-weights{rules=[layers.0.*=int8.row, *.down_proj*=int5.g32, lm_head=none]}"
    (one,) = parse_pipeline(text)
    assert one == QuantizeWeights(rules=("layers.0.*=int8.row", "*.down_proj*=int5.g32", "lm_head=none"))
    assert print_pipeline([one]) == text
    odd = QuantizeWeights(rules=("a[0]?.b=int8.row", "0.weight=none"))
    assert parse_pipeline(print_pipeline([odd])) == [odd]
    assert parse_pipeline([{"quantize-weights": {"rules": ["a=none"]}}]) == [QuantizeWeights(rules=("a=none",))]
    assert QuantizeWeights(rules=["a=none"]) == QuantizeWeights(rules=("a=none",))


@pytest.mark.parametrize("style", ["text", "yaml"])
def test_yaml_round_trip(style: str, tmp_path) -> None:
    one = QuantizeWeights(rules=("layers.0.*=int8.row", "*=int3.g32"))
    path = tmp_path / "p.yaml"
    path.write_text(print_pipeline([one], style="yaml"))
    assert parse_pipeline(path if style == "yaml" else print_pipeline([one])) == [one]


def test_the_promise_is_that_of_the_coarsest() -> None:
    assert QuantizeWeights(bits=8, rules=("a=int2.g32",)).preserves == QuantizeWeights(bits=2).preserves
    assert QuantizeWeights(bits=8, rules=("a=int4.row",)).preserves == QuantizeWeights(bits=3).preserves
    assert QuantizeWeights(bits=8, rules=("a=none",)).preserves == QuantizeWeights(bits=8).preserves


def test_a_layer_of_the_wrong_width_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the pass checks its own result by: each layer has the bits that its rule says."""
    one = QuantizeWeights(group_size=16, rules=("lm_head=int8.g16",))
    wrong = QuantizeWeights(group_size=16)
    result, _ = run_with_findings(wrong, steps.decoder())
    findings = one.ensures(steps.decoder(), result)
    assert [f.problem for f in findings] == ["has format int4.g16, not int8.g16"]


def test_rules_read_back() -> None:
    texts = ("a.*=int4.g32", "b=none")
    assert [str(rule) for rule in parse_rules(texts)] == list(texts)
    assert parse_rules(("b = none",)) == (Rule("b", None),)
    with pytest.raises(OptionError, match="expected PATTERN=FORMAT"):
        parse_rules(("b",))
