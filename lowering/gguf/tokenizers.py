"""A tokenizer as GGUF metadata: byte-level BPE, SentencePiece-style BPE, and WordPiece.

llama.cpp splits text by rules of its own, chosen by `tokenizer.ggml.pre`. The rule is recognised by what the
tokenizer's pre-tokenizer does; one that is not known is refused, since a wrong rule gives other tokens without a word.

Source: llama.cpp, `src/llama-vocab.cpp` (rules by name, merging by score).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from irc.core.errors import OptionError, TargetError

_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
_SPACE = "▁"

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# Split patterns by the name of the rule that splits the same way.
_PATTERNS = {
    _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|" + _REST: "llama-bpe",
    _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|" + _REST: "qwen2",
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+": "gpt-2",
}
_NAMES = {
    "bos": ("<s>", "<|begin_of_text|>", "<bos>", "[CLS]", "<|startoftext|>"),
    "eos": ("</s>", "<|end_of_text|>", "<eos>", "<|endoftext|>", "<|im_end|>", "[SEP]", "<|eot_id|>"),
    "unknown": ("<unk>", "[UNK]"),
    "padding": ("<pad>", "[PAD]", "<|pad|>"),
    "seperator": ("[SEP]",),
    "mask": ("[MASK]", "<mask>"),
}
_ATTRIBUTES = {"bos": "bos_token_id", "eos": "eos_token_id", "unknown": "unk_token_id", "padding": "pad_token_id"}


def tokenizer_metadata(
    tokenizer: Any, vocabulary: int, *, chat_template: str | None = None, pre: str | None = None
) -> dict[str, Any]:
    """`tokenizer.*` keys of a tokenizer for a model with `vocabulary` rows of embeddings.

    Args:
        tokenizer: of `tokenizers` or transformers, or the path of a `tokenizer.json`.
        pre: name of the splitting rule, where irc does not know the tokenizer's.

    Raises:
        TargetError: llama.cpp has no such tokenizer, or irc does not know which rule it follows.
        OptionError: it is no tokenizer, or has more tokens than the model.
    """
    inner, text = _open(tokenizer)
    description = json.loads(text)
    model = description.get("model") or {}
    kind = model.get("type")
    if kind not in ("BPE", "WordPiece"):
        raise TargetError(f"tokenizers of type {kind!r} are not written yet: irc writes BPE and WordPiece")
    tokens, types = _tokens(description, vocabulary)
    if kind == "BPE" and not model.get("byte_fallback"):
        values = _byte_level(description, model, pre)
    elif kind == "BPE":
        values = _sentence_piece(model, tokens)
    else:
        tokens, values = _word_piece(model, tokens, types)
    values |= {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types}
    values |= _special(tokenizer, inner, tokens if kind != "WordPiece" else [t.lstrip(_SPACE) for t in tokens])
    template = chat_template or getattr(tokenizer, "chat_template", None)
    if isinstance(template, str) and template:
        values["tokenizer.chat_template"] = template
    return values


def _open(tokenizer: Any) -> tuple[Any, str]:
    from tokenizers import Tokenizer

    if isinstance(tokenizer, (str, Path)):
        path = Path(tokenizer)
        path = path / "tokenizer.json" if path.is_dir() else path
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain exceptions
            raise OptionError(f"{path} is no tokenizer: {error}") from error
    inner = getattr(tokenizer, "backend_tokenizer", tokenizer)
    if not isinstance(inner, Tokenizer):
        raise OptionError(f"a tokenizer of `tokenizers` or transformers is needed, not a {type(tokenizer).__name__}")
    return inner, inner.to_str()


def _tokens(description: Mapping[str, Any], size: int) -> tuple[list[str], list[int]]:
    """Token texts and their types by id, padded to the model's vocabulary."""
    model = description["model"]
    texts: dict[int, str] = {int(index): text for text, index in model.get("vocab", {}).items()}
    types = dict.fromkeys(texts, _NORMAL)
    for index, text in texts.items():
        if model.get("byte_fallback") and len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
            types[index] = _BYTE
        if text == model.get("unk_token"):
            types[index] = _UNKNOWN
    for added in description.get("added_tokens") or ():
        texts[added["id"]] = added["content"]
        if types.get(added["id"]) != _UNKNOWN:
            types[added["id"]] = _CONTROL if added.get("special") else _USER
    if texts and max(texts) >= size:
        raise OptionError(f"the tokenizer has {max(texts) + 1} tokens, the model embeds {size}")
    return (
        [texts.get(index, f"[PAD{index}]") for index in range(size)],
        [types.get(index, _UNUSED) for index in range(size)],
    )


def _merges(model: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Merges as pairs: old files hold one text with a space between."""
    pairs = (merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model.get("merges", ()))
    return [(first, second) for first, second in pairs]


def _byte_level(description: Mapping[str, Any], model: Mapping[str, Any], pre: str | None) -> dict[str, Any]:
    merges = [f"{left} {right}" for left, right in _merges(model)]
    values: dict[str, Any] = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": pre or _rule(description)}
    return values | ({"tokenizer.ggml.merges": merges} if merges else {})


def _rule(description: Mapping[str, Any]) -> str:
    """The splitting rule of a byte-level tokenizer."""
    splitter = description.get("pre_tokenizer") or {}
    steps = splitter.get("pretokenizers", [splitter])
    kinds = [step.get("type") for step in steps]
    normalizer = (description.get("normalizer") or {}).get("type")
    if "ByteLevel" not in kinds:
        raise TargetError(f"a BPE tokenizer without byte fallback must work on bytes; its pre-tokenizer is {kinds}")
    last = steps[kinds.index("ByteLevel")]
    if kinds == ["ByteLevel"] and last.get("use_regex", True) and not last.get("add_prefix_space") and not normalizer:
        return "gpt-2"
    if kinds == ["Split", "ByteLevel"] and not last.get("use_regex", True):
        pattern = steps[0].get("pattern", {}).get("Regex")
        if pattern in _PATTERNS and steps[0].get("behavior") == "Isolated" and not steps[0].get("invert"):
            return _PATTERNS[pattern]
    if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits") and last.get("use_regex", True):
        return "smollm"
    raise TargetError(
        f"irc does not know which of llama.cpp's rules splits text like this tokenizer's {kinds}: give the rule's name"
        " as metadata, {'tokenizer.ggml.pre': '…'}"
    )


def _sentence_piece(model: Mapping[str, Any], tokens: list[str]) -> dict[str, Any]:
    """Merging by rank, as scores: llama.cpp joins the pair whose whole has the highest score."""
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(_merges(model)):
        ranks.setdefault(left + right, rank)
    scores = [-float(ranks[token] + 1) if token in ranks else -1e6 for token in tokens]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.add_space_prefix": True,
    }


def _word_piece(model: Mapping[str, Any], tokens: list[str], types: list[int]) -> tuple[list[str], dict[str, Any]]:
    """llama.cpp marks the first piece of a word, where WordPiece marks the others."""
    prefix = model.get("continuing_subword_prefix", "##")
    marked = [
        token if kind not in (_NORMAL, _USER) else token[len(prefix) :] if token.startswith(prefix) else _SPACE + token
        for token, kind in zip(tokens, types, strict=True)
    ]
    return marked, {
        "tokenizer.ggml.model": "bert",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.token_type_count": 2,
    }


def _special(given: Any, inner: Any, tokens: list[str]) -> dict[str, Any]:
    places = {token: index for index, token in reversed(list(enumerate(tokens)))}
    values: dict[str, Any] = {}
    for name, texts in _NAMES.items():
        known = getattr(given, _ATTRIBUTES.get(name, ""), None)
        if not isinstance(known, int):
            known = next((places[text] for text in texts if text in places), None)
        if known is not None:
            values[f"tokenizer.ggml.{name}_token_id"] = known
    framed = inner.encode("a").ids
    bos, eos = (values.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos"))
    values["tokenizer.ggml.add_bos_token"] = bos is not None and framed[:1] == [bos]
    values["tokenizer.ggml.add_eos_token"] = eos is not None and len(framed) > 1 and framed[-1:] == [eos]
    return values
