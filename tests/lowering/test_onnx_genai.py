"""Target `onnx-genai`: the folder, its numbers through ONNX Runtime, and, where it is installed, generation."""

from __future__ import annotations

import functools
import importlib.util
import json
from pathlib import Path

import onnx
import pytest

from irc.core.errors import OptionError, StorageError, TargetError
from irc.core.target import Artifact, get_target
from tests.lowering import steps

GENAI = get_target("onnx-genai")
INSTALLED = importlib.util.find_spec("onnxruntime_genai") is not None


@functools.cache
def lowered() -> Artifact:
    return GENAI.lower(steps.step(), {"eos_token_ids": [63], "pad_token_id": 1})


def test_the_interface_that_the_runtime_expects(tmp_path: Path) -> None:
    folder = lowered().save(tmp_path / "genai")
    assert sorted(p.name for p in folder.iterdir()) == ["genai_config.json", "model.onnx"]
    graph = onnx.load(folder / "model.onnx").graph
    shapes = {
        value.name: [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
        for value in (*graph.input, *graph.output)
    }
    assert shapes == {
        "input_ids": ["B", "S"], "attention_mask": ["B", "total_sequence_length"],
        "past_key_values.0.key": ["B", 4, "past_sequence_length", 8],
        "past_key_values.0.value": ["B", 4, "past_sequence_length", 8],
        "logits": ["B", "S", 64],
        "present.0.key": ["B", 4, "total_sequence_length", 8], "present.0.value": ["B", 4, "total_sequence_length", 8],
    }  # fmt: skip
    settings = json.loads((folder / "genai_config.json").read_text())["model"]
    assert (settings["context_length"], settings["eos_token_id"], settings["vocab_size"]) == (32, [63], 64)
    decoder = settings["decoder"]
    assert (decoder["head_size"], decoder["num_attention_heads"], decoder["num_hidden_layers"]) == (8, 4, 1)
    check = GENAI.load(folder).verify(steps.step())
    assert check.passed, str(check)
    with pytest.raises(StorageError, match="exists already"):
        lowered().save(folder)


@pytest.mark.skipif(not INSTALLED, reason="onnxruntime-genai is not installed")
def test_generated_tokens_are_those_of_the_reference(tmp_path: Path) -> None:
    import onnxruntime_genai

    model = onnxruntime_genai.Model(str(lowered().save(tmp_path / "genai")))
    for prompt in steps.PROMPTS:
        settings = onnxruntime_genai.GeneratorParams(model)
        settings.set_search_options(max_length=20, do_sample=False)
        generator = onnxruntime_genai.Generator(model, settings)
        generator.append_tokens(prompt)
        found: list[int] = []
        while not generator.is_done() and len(found) < 12:
            generator.generate_next_token()
            found.append(int(generator.get_next_tokens()[0]))
        expected = _reference(prompt)
        assert found == expected[: len(found)]
        assert len(found) >= 10 or 63 in found


def _reference(prompt: list[int]) -> list[int]:
    import irc

    compiled = irc.compile(steps.step(), [], target="reference", verify="off")
    return compiled.generate([prompt], max_new_tokens=12).token_ids[0]


def test_what_cannot_be_generated_from() -> None:
    with pytest.raises(TargetError, match="no contiguous key-value cache"):
        GENAI.lower(steps.decoder())
    with pytest.raises(OptionError, match="flavour must be ort, not 'portable'"):
        GENAI.lower(steps.step(), {"flavour": "portable"})
    with pytest.raises(OptionError, match="tokenizer /nowhere does not exist"):
        GENAI.lower(steps.step(), {"tokenizer": "/nowhere"})
    with pytest.raises(OptionError, match="tokenizer is a path or a tokenizer of tokenizers or transformers, not 3"):
        GENAI.lower(steps.step(), {"tokenizer": 3})


def test_the_compilations_own_tokenizer_is_written(tmp_path: Path) -> None:
    import irc
    from irc.demo.tinypy import load_tokenizer

    tokenizer = load_tokenizer()
    compiled = irc.compile(steps.step(), [], target="onnx-genai", tokenizer=tokenizer, verify="off")
    folder = compiled.save(tmp_path / "genai")
    assert json.loads((folder / "tokenizer.json").read_text()) == json.loads(tokenizer.to_str())
    assert json.loads((folder / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"

    given = GENAI.lower(steps.step(), {"tokenizer": folder / "tokenizer.json"}).save(tmp_path / "again")
    assert (given / "tokenizer.json").read_text() == (folder / "tokenizer.json").read_text()
