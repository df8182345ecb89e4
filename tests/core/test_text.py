from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from irc.core.errors import IrcError, ParseError
from irc.core.hashing import structural_hash
from irc.core.text import parse, print_program
from irc.demo.tinypy import TinyPy, TinyPyConfig
from irc.frontend import capture
from tests.core.programs import TEXT, small


def test_text_without_weights_prints_back_exactly() -> None:
    assert str(parse(TEXT)) == TEXT


def test_round_trip_with_weights() -> None:
    program = small()
    other = parse(str(program), weights=program.weights)
    assert str(other) == str(program)
    assert structural_hash(other) == structural_hash(program)
    for a, b in zip(program.run(*program.example_inputs), other.run(*program.example_inputs), strict=True):
        assert torch.equal(a, b)
    assert other.tied == {"head.weight": "embed.weight"}
    assert other.aliases == {1: 1}
    assert other.in_spec == program.in_spec
    assert isinstance(other.weights["embed.weight"], torch.nn.Parameter)


def test_demo_model_round_trips() -> None:
    torch.manual_seed(0)
    model = TinyPy(TinyPyConfig(vocab_size=64, hidden_size=32, num_layers=1, num_heads=2, intermediate_size=48)).eval()
    ids = torch.randint(0, 60, (2, 6))
    program = capture(model, (ids,))
    text = str(program)
    other = parse(text, weights=program.weights)
    assert str(other) == text
    assert torch.equal(program(ids), other(ids))
    assert torch.equal(program(ids[:1, :1]), other(ids[:1, :1]))


def test_provenance_can_be_left_out() -> None:
    assert "# embed" not in print_program(small(), provenance=False)


BROKEN = [
    ("irc 1", "irc 9", "format version 1"),
    (
        "f32[B*S, 8] = aten.view",
        "f32[B*S, 9] = aten.view",
        "than the operation gives: f32[B*S, 8]",
    ),
    ("%rms_norm: f32[B, S, 8] = irc.rms_norm", "%rms_norm: f32[B, S, 8] = irc.rms_nrom", "did you mean 'rms_norm'"),
    ("aten.cat([%getitem_1", "aten.cat([%getitem_2", "did you mean"),
    ("@table, 1e-05", "@tabel, 1e-05", "did you mean 'table'"),
    ("aten.view(%rms_norm, [B*S, 8])", "aten.view(%rms_norm, [B*T, 8])", "unknown dimension 'T'"),
    ("aten.mul.Tensor(%cache, 0.5)", "aten.mul_.Tensor(%cache, 0.5)", "writes into an argument"),
    ("aten.mul.Tensor(%cache, 0.5)", "aten.mul.Tensor(%cache)", "'other' is missing"),
    ("aten.mul.Tensor(%cache, 0.5)", "os.system(%cache)", "is no operator"),
    ("aten.mul.Tensor(%cache, 0.5)", 'aten.from_file("x", size=3)', "reaches outside"),
    ("buffer @table: f32", "buffer @__class__.weight: f32", "cannot be called"),
    ("%getitem_1: f32[B*S, 4] = %split[1]", "%getitem_1: f32[B*S, 4] = %split[7]", "there is no [7]"),
    ("%getitem_1:", "%getitem:", "is defined twice"),
    ("alias output 1 = input 1", "alias output 1 = input 9", "no such output or input"),
    ("tied @head.weight = @embed.weight", "tied @head.weight = @nothing", "must be a declared weight"),
    ("return %add, %mul", "return %add", "1 values for 2 declared outputs"),
    ("[B*S, 8])", "[B**9**9, 8])", "whole powers"),
    ("[B*S, 8])", "[" * 99 + "8", "nested more than"),
    ("f32[16, 8] = meta", "f32[99999999999, 99999999999] = meta", "too large"),
]


@pytest.mark.parametrize(("old", "new", "message"), BROKEN, ids=[b[1][:30] for b in BROKEN])
def test_errors_say_where_and_what(old: str, new: str, message: str) -> None:
    assert old in TEXT
    with pytest.raises(ParseError) as error:
        parse(TEXT.replace(old, new, 1))
    assert message in str(error.value)
    assert re.search(r"line \d+:\d+: ", str(error.value))
    assert "^" in str(error.value)


def test_split_into_absurdly_many_pieces_is_refused() -> None:
    text = TEXT.replace("aten.split.Tensor(%view, 4, -1)", "aten.chunk(%view, 99999999999, 1)")
    with pytest.raises(ParseError, match="pieces"):
        parse(text)


def test_given_weights_are_checked() -> None:
    program = small()
    text, weights = str(program), dict(program.weights)
    with pytest.raises(ParseError, match="other values"):
        parse(text, weights=weights | {"table": torch.zeros(8)})
    with pytest.raises(ParseError, match="declared otherwise"):
        parse(text, weights=weights | {"table": torch.zeros(9)})
    with pytest.raises(ParseError, match="no weights given for table"):
        parse(text, weights={"embed.weight": weights["embed.weight"]})


_WORDS = [*sorted(set(re.findall(r"\S+", TEXT))), "**", "//", "9" * 30, "((((", '"', "\x00", "-1", "inf", "%", "nan"]
_OPERATORS = [
    "aten.lstm.input",
    "aten.split.Tensor",
    "aten.zeros",
    "aten.arange",
    "aten.item",
    "irc.attention",
    "aten.unbind.int",
    "aten.einsum",
    "aten.resize_",
    "aten.nonzero",
    "irc.quantize",
    "irc.__class__",
]


def _edit(text: str, kind: int, where: int, word: str) -> str:
    pieces = re.split(r"(\s+)", text)
    spot = where % len(pieces)
    if kind == 0:
        pieces[spot] = word
    elif kind == 1:
        del pieces[spot]
    elif kind == 2:
        pieces.insert(spot, word)
    else:
        spot = where % len(text)
        return text[:spot] + word[:1] + text[spot + kind - 3 :]
    return "".join(pieces)


edits = st.lists(
    st.tuples(st.integers(0, 5), st.integers(0, 5000), st.sampled_from(_WORDS + _OPERATORS)), min_size=1, max_size=4
)


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(edits)
def test_mutated_text_gives_a_program_or_an_irc_error(changes: list[tuple[int, int, str]]) -> None:
    text = TEXT
    for change in changes:
        text = _edit(text, *change)
    try:
        program = parse(text)
    except IrcError:
        return
    assert str(parse(str(program))) == str(program)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.text(max_size=200))
def test_any_text_is_refused(text: str) -> None:
    with pytest.raises(IrcError):
        parse(text)


def _prefixes() -> Iterator[str]:
    for stop in range(0, len(TEXT) - 2, 97):
        yield TEXT[:stop]


def test_truncated_text_is_refused() -> None:
    for text in _prefixes():
        with pytest.raises(ParseError):
            parse(text)
