"""Pipelines: list, text and YAML are the same thing; all problems are reported at once."""

from __future__ import annotations

import contextlib
import textwrap
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from irc.core.contract import Pass, registered_passes
from irc.core.errors import OptionError
from irc.core.pipeline import load_providers, parse_pipeline, print_pipeline
from tests.manager.toys import Colour, ManyOptions, NeedsOption, PowToSquare, SquareToPow

pytestmark = pytest.mark.usefixtures("registered")

PASSES = [SquareToPow(at_most=3, expect_matches=2), PowToSquare(), ManyOptions(colour=Colour.DARK_BLUE, fast=True)]
TEXT = "square-to-pow{expect-matches=2,at-most=3},pow-to-square,many-options{fast=true,colour=dark-blue}"
YAML = """\
- square-to-pow:
    expect-matches: 2
    at-most: 3
- pow-to-square
- many-options:
    fast: true
    colour: dark-blue
"""


def test_list_text_and_yaml_are_the_same(tmp_path: Path) -> None:
    file = tmp_path / "pipeline.yaml"
    file.write_text(YAML)
    wrapped = tmp_path / "wrapped.yml"
    wrapped.write_text("passes:\n" + textwrap.indent(YAML, "  "))
    mappings = [{"square-to-pow": {"expect-matches": 2, "at_most": 3}}, "pow-to-square", PASSES[2]]
    for source in (PASSES, TEXT, file, str(file), wrapped, TEXT.split(",pow")[0:1] + PASSES[1:], mappings):
        assert parse_pipeline(source) == PASSES


def test_prints_only_what_is_not_default() -> None:
    assert print_pipeline(PASSES) == TEXT
    assert print_pipeline(PASSES, style="yaml") == YAML
    assert print_pipeline([]) == ""
    assert parse_pipeline("") == parse_pipeline(" ") == parse_pipeline([]) == []


def test_spaces_and_underscores_are_allowed() -> None:
    assert parse_pipeline(" square_to_pow , ".replace("_", "-").rstrip(" ,")) == [SquareToPow()]
    assert parse_pipeline("square-to-pow { at_most = 3 , wrong = [ 1, 2, ] , }") == [
        SquareToPow(at_most=3, wrong=(1, 2))
    ]


WORDS = st.text(max_size=8) | st.sampled_from(
    ["none", "true", "1", "-1e5", "nan", "yes", "null", "~", "a b", '"', "é😀"]
)
FLOATS = st.floats(allow_nan=False)
OPTIONS = st.builds(
    ManyOptions,
    expect_matches=st.none() | st.integers(),
    num_bits=st.integers(),
    ratio=FLOATS,
    fast=st.booleans(),
    label=WORDS,
    maybe=st.none() | st.integers(),
    maybe_label=st.none() | WORDS,
    number=st.integers() | FLOATS | WORDS,
    colour=st.sampled_from(Colour),
    mode=st.sampled_from(["a", "b", 3, None]),
    sizes=st.lists(st.integers()).map(tuple),
    pair=st.tuples(st.integers(), WORDS),
    names=st.lists(WORDS).map(tuple),
    grid=st.lists(st.lists(FLOATS).map(tuple)).map(tuple),
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(passes=st.lists(OPTIONS | st.builds(PowToSquare), max_size=3))
def test_round_trip(passes: list[Pass], tmp_path: Path) -> None:
    def exact(found: list[Pass]) -> list[str]:
        return [repr(one) for one in found]  # 1 and 1.0 are equal; their repr is not

    assert exact(parse_pipeline(print_pipeline(passes))) == exact(passes)
    file = tmp_path / "pipeline.yaml"
    file.write_text(print_pipeline(passes, style="yaml"), encoding="utf-8", errors="surrogatepass")
    assert exact(parse_pipeline(file)) == exact(passes)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(alphabet='abpow-to-squre{}[],="\\ 13.', max_size=40))
def test_hostile_text_gives_option_errors(text: str) -> None:
    with contextlib.suppress(OptionError):
        parse_pipeline(text)


def test_all_offenders_at_once() -> None:
    text = (
        "square-to-pw,many-options{num-bit=3,mode=c,fast=1,sizes=[1,x],pair=[1],colour=green,maybe=\"4\"},"
        "needs-option{even=3},needs-option{width=1,even=3},pow-to-square{,pow-to-square{a=1}}"
    )  # fmt: skip
    with pytest.raises(OptionError) as caught:
        parse_pipeline(text)
    assert str(caught.value) == "\n".join(
        [
            "this pipeline cannot be used:",
            f"  - expected the name of an option, or '}}' at column 160 of {text!r}",
            "  - no pass is called 'square-to-pw' (did you mean 'square-to-pow'?)",
            "  - pass 'many-options' has no option 'num-bit' (did you mean 'num-bits' or 'number'?)",
            "  - option 'mode' of pass 'many-options': expected a or b or 3 or none, got \"c\"",
            "  - option 'fast' of pass 'many-options': expected true or false, got \"1\"",
            "  - option 'sizes' of pass 'many-options': expected int, got \"x\"",
            "  - option 'pair' of pass 'many-options': expected 2 values, got 1",
            "  - option 'colour' of pass 'many-options': expected red or dark-blue or THIRD, got \"green\"",
            "  - option 'maybe' of pass 'many-options': expected int or none, got \"4\"",
            "  - pass 'needs-option' needs option 'width' (int)",
            "  - pass 'needs-option': even must be even, not 3",
        ]
    )


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("pow-to-square{at-most=1}", "has no option 'at-most'"),
        ("pow-to-square pow-to-square", "expected ',' or '{' after the name of a pass at column 15"),
        ("pow-to-square,", "expected the name of a pass at column 15"),
        ("many-options{label=\"a}", "bad quoted text"),
        ("many-options{label=a,label=b}", "option 'label' is given twice"),
        ("many-options{sizes=" + "[" * 40, "nested too deep"),
        ([PowToSquare], "PowToSquare is a class: write PowToSquare()"),
        ([3], "3 is not a pass, a rule or the text of one"),
        ([{"many-options": {"num-bits": 4.5}}], "expected int, got \"4.5\""),
        ([{"many-options": [1]}], "the options of many-options must be a mapping"),
        ([{"many-options": {"label": object}}], "cannot be an option value"),
        ("missing.yaml", "cannot read missing.yaml"),
    ],
)  # fmt: skip
def test_refuses(source: object, message: str) -> None:
    with pytest.raises(OptionError) as caught:
        parse_pipeline(source)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- pow-to-square: [1]", "the options of pow-to-square must be a mapping"),
        ("- many-options: {sizes: {a: 1}}", "an option value is a scalar or a list"),
        ("- many-options: {fast: true, fast: false}", "option 'fast' is given twice"),
        ("- a: {}\n  b: {}", "expected the name of a pass"),
        ("- [", "this YAML is no list of passes"),
        ("- many-options: {sizes: &a [*a]}", "nested too deep"),
        ("- !!python/object/apply:os.system ['true']", "expected the name of a pass"),
    ],
)
def test_refuses_yaml(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "pipeline.yaml"
    file.write_text(text)
    with pytest.raises(OptionError) as caught:
        parse_pipeline(file)
    assert message in str(caught.value)


def test_yaml_numbers_mean_what_text_means(tmp_path: Path) -> None:
    file = tmp_path / "pipeline.yaml"
    file.write_text("- many-options: {ratio: 1e-5, maybe: null, label: no, fast: yes}\n")
    assert parse_pipeline(file) == [ManyOptions(ratio=1e-5, label="no", fast=True)]


def test_a_value_without_text_form_is_named() -> None:
    one = ManyOptions(label=object())
    with pytest.raises(OptionError, match="option label of pass many-options: a object has no text form"):
        print_pipeline([one])
    with pytest.raises(OptionError, match="prints as text or yaml, not 'toml'"):
        print_pipeline([], style="toml")


def test_wide_unions_prefer_numbers() -> None:
    found = parse_pipeline('many-options{number=4},many-options{number=4.0},many-options{number="4"}')
    assert [repr(one.number) for one in found] == ["4", "4.0", "'4'"]


def test_needs_option_builds() -> None:
    assert parse_pipeline("needs-option{width=4}") == [NeedsOption(width=4)]


def test_registry_here_holds_the_toys_only() -> None:
    load_providers()
    assert "square-to-pow" in registered_passes()
