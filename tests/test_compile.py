"""`irc.compile`: the whole way, with the report, the stages and the model's own signature."""

from __future__ import annotations

import functools

import pytest
import torch

from irc.compiler import Compiled, compile
from irc.core.errors import IrcError, NumericError, OptionError, StorageError
from irc.core.program import Program
from irc.core.target import Artifact
from irc.lowering.reference import ReferenceTarget
from tests.lowering import steps


@functools.cache
def compiled() -> Compiled:
    return compile(steps.language_model(), example_inputs=(steps.tokens(),), dynamic=({0: "B", 1: "S"},), name="tiny")


def test_default_pipeline_inserts_a_cache_and_keeps_the_signature() -> None:
    assert list(compiled().stages) == ["capture", "insert-kv-cache"]
    for batch, length in ((1, 1), (3, 7)):
        tokens = steps.tokens(batch, length)
        with torch.no_grad():
            torch.testing.assert_close(compiled()(tokens), steps.language_model()(tokens), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(compiled()(input_ids=tokens), compiled()(tokens))


def test_report_has_the_error_of_the_artifact() -> None:
    row = compiled().report["lower to reference"]
    assert row.relative_error is not None
    assert row.relative_error <= 1e-5
    assert "lower to reference" in str(compiled().report)


def test_generates_the_same_with_and_without_a_cache() -> None:
    plain = compile(steps.decoder(), [])
    assert list(plain.stages) == ["capture"]
    found = compiled().generate(steps.PROMPTS, max_new_tokens=6)
    again = plain.generate(steps.PROMPTS, max_new_tokens=6)
    assert found.token_ids == again.token_ids
    assert not found.notices
    assert "no key-value cache" in again.notices[0]
    assert [e.token_id for e in compiled().stream(steps.PROMPTS[0], max_new_tokens=6)] == found.token_ids[0]


def test_too_long_for_the_cache() -> None:
    short = compile(steps.decoder(), "insert-kv-cache{max-length=8}", verify="off")
    with pytest.raises(OptionError, match=r"9 tokens do not fit into a key-value cache of 8"):
        short(steps.tokens(1, 9))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (steps.tokens()[0], r"input_ids is i64\[\d+\], not i64\[B, S\]"),
        (steps.tokens().float(), r"is f32\[\d+, \d+\], not"),
    ],
)
def test_an_input_that_does_not_fit_is_named(given: torch.Tensor, said: str) -> None:
    with pytest.raises(IrcError, match=said) as caught:
        compiled()(given)
    assert caught.value.__cause__ is not None


def test_a_wrong_artifact_is_an_error() -> None:
    class Wrong(ReferenceTarget):
        name = "wrong"

        def lower(self, program: Program, options=None) -> Artifact:
            artifact = super().lower(program, options)
            run = artifact.run
            artifact.run = lambda *inputs: [out * 1.01 for out in run(*inputs)]
            return artifact

    with pytest.raises(NumericError, match="the reference artifact does not compute what its program does"):
        compile(steps.cnn(), [], target=Wrong())
    assert compile(steps.cnn(), [], target=Wrong(), verify="off").report.rows[-1].relative_error is None


def test_wrong_names_come_before_the_work() -> None:
    with pytest.raises(OptionError, match="no target is called 'referense'"):
        compile(None, target="referense")
    with pytest.raises(OptionError, match="no pass is called 'insert-kv-cash'"):
        compile(None, "insert-kv-cash")
    with pytest.raises(OptionError, match="no option 'devise'"):
        compile(None, options={"devise": "cpu"})


def test_saved_and_loaded(tmp_path) -> None:
    compiled().save(tmp_path / "saved")
    compiled().save(tmp_path / "saved")  # over itself
    loaded = Compiled.load(tmp_path / "saved")
    found = loaded.generate(steps.PROMPTS, max_new_tokens=5).token_ids
    assert found == compiled().generate(steps.PROMPTS, max_new_tokens=5).token_ids


def test_loading_what_is_not_there(tmp_path) -> None:
    with pytest.raises(StorageError, match="is no compiled model"):
        Compiled.load(tmp_path)
