"""Tokenizers as metadata: which rule, which tokens, which special ones, and what is refused."""

from __future__ import annotations

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from irc.core.errors import OptionError, TargetError
from irc.demo.tinypy import load_tokenizer
from irc.lowering.gguf.tokenizers import tokenizer_metadata

QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def byte_level(*steps: pre_tokenizers.PreTokenizer) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")]))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(list(steps))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|endoftext|>", special=True)])
    return tokenizer


def test_the_demo_tokenizer_is_gpt2s_kind() -> None:
    values = tokenizer_metadata(load_tokenizer(), 2050)
    assert (values["tokenizer.ggml.model"], values["tokenizer.ggml.pre"]) == ("gpt2", "gpt-2")
    assert len(values["tokenizer.ggml.tokens"]) == 2050
    assert values["tokenizer.ggml.tokens"][-1] == "[PAD2049]"
    assert values["tokenizer.ggml.token_type"][:2] == [3, 1]
    assert values["tokenizer.ggml.eos_token_id"] == 0
    assert values["tokenizer.ggml.merges"][0] == "Ġ Ġ"
    assert values["tokenizer.ggml.add_bos_token"] is False


def test_rules_are_recognised_by_their_pattern() -> None:
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    qwen = byte_level(pre_tokenizers.Split(Regex(QWEN), "isolated"), plain)
    assert tokenizer_metadata(qwen, 4)["tokenizer.ggml.pre"] == "qwen2"
    odd = byte_level(pre_tokenizers.Split(Regex("[a-c]+"), "isolated"), plain)
    with pytest.raises(TargetError, match="give the rule's name"):
        tokenizer_metadata(odd, 4)
    assert tokenizer_metadata(odd, 4, pre="mine")["tokenizer.ggml.pre"] == "mine"


def test_sentence_piece_scores_follow_the_merges() -> None:
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, "<0x41>": 3, "▁": 4, "a": 5, "b": 6, "▁a": 7, "▁ab": 8}
    model = models.BPE(vocab, [("▁", "a"), ("▁a", "b")], unk_token="<unk>", byte_fallback=True)
    values = tokenizer_metadata(Tokenizer(model), 9)
    assert values["tokenizer.ggml.model"] == "llama"
    assert values["tokenizer.ggml.token_type"][:4] == [2, 1, 1, 6]
    assert values["tokenizer.ggml.scores"][7:] == [-1.0, -2.0]
    assert (values["tokenizer.ggml.bos_token_id"], values["tokenizer.ggml.eos_token_id"]) == (1, 2)


def test_word_pieces_are_marked_the_other_way_round() -> None:
    tokenizer = Tokenizer(models.WordPiece({"[UNK]": 0, "play": 1, "##ing": 2}, unk_token="[UNK]"))
    values = tokenizer_metadata(tokenizer, 3, chat_template="{{ x }}")
    assert values["tokenizer.ggml.tokens"] == ["[UNK]", "▁play", "ing"]
    assert values["tokenizer.chat_template"] == "{{ x }}"


def test_what_is_no_tokenizer_or_too_large_is_refused() -> None:
    with pytest.raises(OptionError, match="not a int"):
        tokenizer_metadata(3, 4)
    with pytest.raises(OptionError, match="2048 tokens, the model embeds 100"):
        tokenizer_metadata(load_tokenizer(), 100)
    with pytest.raises(TargetError, match="Unigram"):
        tokenizer_metadata(Tokenizer(models.Unigram([("a", -1.0)])), 4)
