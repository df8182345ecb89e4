"""Data sets that need no download: held-out source files, scanned digits, pairs of sentences.

Two of them come with optional packages; without these, the error says what to install.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import torch

from irc.core.errors import OptionError
from irc.demo.corpus import read_documents
from irc.evaluation.data import EvaluationData, Kind

END_OF_TEXT = "<|endoftext|>"


def text_windows(
    texts: Iterable[str], tokenizer: Any, *, length: int = 512, count: int | None = None, description: str = "text"
) -> EvaluationData:
    """Consecutive windows i64[N, length] of the texts joined one behind the other.

    `count`: so many of them, taken evenly over the whole; None: all. A rest that fills no window is left out.

    Raises:
        OptionError: there is less text than one window.
    """
    ids = [token for text in texts for token in _encode(tokenizer, text)]
    windows = torch.tensor(ids[: len(ids) // length * length], dtype=torch.int64).view(-1, length)
    if not len(windows):
        raise OptionError(f"{description} has {len(ids)} tokens, fewer than one window of {length}")
    if count is not None and count < len(windows):
        if count < 1:
            raise OptionError(f"at least one window is needed, not {count}")
        windows = windows[torch.linspace(0, len(windows) - 1, count).round().long()]
    return EvaluationData(Kind.TEXT, (windows,), description=f"{description} ({len(windows)} × {length} tokens)")


def held_out_text(
    tokenizer: Any, *, length: int = 512, count: int | None = None, split: Literal["validation", "train"] = "validation"
) -> EvaluationData:
    """Files of Python's standard library that the demo model was not trained on (`split="train"`: the others)."""
    documents = (text + END_OF_TEXT for text in read_documents(split))
    name = "held-out files" if split == "validation" else "training files"
    return text_windows(documents, tokenizer, length=length, count=count, description=name)


def folder_text(path: str | Path, tokenizer: Any, *, length: int = 512, count: int | None = None) -> EvaluationData:
    """A text file, or all files of a folder that are UTF-8, sorted by path.

    Raises:
        OptionError: it does not exist, or holds no text.
    """
    root = Path(path)
    if not root.exists():
        raise OptionError(f"{root} does not exist")
    files = [root] if root.is_file() else sorted(p for p in root.rglob("*") if p.is_file())
    texts = []
    for file in files:
        try:
            texts.append(file.read_text(encoding="utf-8"))
        except UnicodeDecodeError:
            if root.is_file():
                raise OptionError(f"{root} is no UTF-8 text") from None
    return text_windows(texts, tokenizer, length=length, count=count, description=str(path))


def digits(split: Literal["train", "test"] = "test") -> EvaluationData:
    """scikit-learn's scans of written digits: f32[N, 1, 8, 8] in [0, 1], with classes 0 to 9.

    Every fifth sample is for the test: 360 of 1797.

    Raises:
        OptionError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise OptionError("the digits come with scikit-learn: pip install 'irc-compiler[digits]'") from None
    found = load_digits()
    images = torch.tensor(found.images, dtype=torch.float32).unsqueeze(1) / 16
    classes = torch.tensor(found.target, dtype=torch.int64)
    held_out = torch.arange(len(images)) % 5 == 0
    chosen = held_out if split == "test" else ~held_out
    return EvaluationData(Kind.CLASSES, (images[chosen],), classes[chosen], f"digits, {split} ({int(chosen.sum())})")


def sentence_pairs(tokenizer: Any) -> EvaluationData:
    """Pairs of sentences graded by how alike they are (0: unrelated, 4: the same said otherwise): ids and mask.

    `tokenizer`: of `tokenizers`; it pads to the longest sentence.
    """
    sentences = [sentence for first, second, _ in _PAIRS for sentence in (first, second)]
    encodings = [tokenizer.encode(sentence) for sentence in sentences]
    rows = [encoding.ids[: sum(encoding.attention_mask)] for encoding in encodings]
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    grades = torch.tensor([float(grade) for _, _, grade in _PAIRS])
    return EvaluationData(Kind.PAIRS, (ids, mask), grades, f"{len(_PAIRS)} pairs of sentences")


def _encode(tokenizer: Any, text: str) -> list[int]:
    encoded = tokenizer.encode(text)
    ids: list[int] = getattr(encoded, "ids", encoded)
    return ids


# Written for this project; grades by its authors.
_PAIRS = (
    ("A cat sleeps on the warm windowsill.", "The cat is napping by the window in the sun.", 4),
    ("He repaired the old bicycle in the garage.", "The man fixed his ancient bike.", 4),
    ("The train to Vienna leaves at noon.", "At twelve o'clock the Vienna train departs.", 4),
    ("She poured hot tea into two cups.", "Two cups were filled with hot tea by her.", 4),
    ("The committee rejected the proposal.", "The proposal was turned down by the committee.", 4),
    ("Snow fell on the mountains all night.", "All night long it snowed in the hills.", 3),
    ("The doctor told him to rest for a week.", "He was advised to take some days off work.", 3),
    ("Our neighbours bought a larger house.", "The family next door has moved to a bigger home.", 3),
    ("The children are building a sandcastle.", "Kids play in the sand at the beach.", 3),
    ("The bakery sells fresh bread every morning.", "Each morning people queue for rolls at the baker's.", 3),
    ("A violinist practised in the empty hall.", "A pianist gave a concert in the crowded hall.", 2),
    ("The river flooded several villages.", "The lake is a popular place for swimming.", 2),
    ("The company hired forty engineers.", "The company dismissed forty engineers.", 2),
    ("He ordered a coffee without sugar.", "She asked for lemonade with ice.", 2),
    ("The museum is closed on Mondays.", "The gallery opens late on Thursdays.", 2),
    ("The astronomer discovered a faint comet.", "The telescope on the hill was painted white.", 1),
    ("A farmer harvests wheat in August.", "The tractor stood in the rain.", 1),
    ("The programmer found a bug in the parser.", "The keyboard has a missing key.", 1),
    ("They crossed the desert in five days.", "The camel is a patient animal.", 1),
    ("The court announced its verdict.", "A lawyer had lunch in the park.", 1),
    ("Bananas ripen quickly in a warm kitchen.", "The senate voted on the budget.", 0),
    ("The goalkeeper saved a late penalty.", "Prime numbers have no other divisors.", 0),
    ("A storm delayed the ferry.", "She tunes harpsichords for a living.", 0),
    ("The stock market fell sharply today.", "Moss grows on the north side of trees.", 0),
    ("My sister learns Portuguese.", "The bridge was built of granite.", 0),
)
