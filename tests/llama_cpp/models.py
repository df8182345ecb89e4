"""Tiny random models that `make llama-cpp` holds llama.cpp against: at least one of each architecture of the table."""

from __future__ import annotations

from typing import Any

import torch

from irc.core.program import Program

ZOO = (
    "llama", "qwen2", "qwen3", "qwen3-moe", "mixtral", "phi3", "gpt2", "gpt-neox", "falcon", "stablelm", "olmo2",
    "granite", "phi", "gemma3",
)  # fmt: skip
HAND_WRITTEN = ("odd", "plain", "pruned")
# Encoders: llama.cpp gives hidden states, and there is nothing to generate.
ENCODERS = ("bert",)
# As in the zoo, but with windows that the architectures have, or none, so that 32 tokens can be compared.
_SMALL = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
_FALCON = {
    "vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "alibi": False,
    "max_position_embeddings": 64, "bias": False,
}  # fmt: skip
EXTRA: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert": ("BertModel", "BertConfig", _SMALL),
    "mixtral, no window": (
        "MixtralForCausalLM", "MixtralConfig", _SMALL | {"num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "phi3, no window": ("Phi3ForCausalLM", "Phi3Config", _SMALL | {"partial_rotary_factor": 0.5}),
    "gemma": ("GemmaForCausalLM", "GemmaConfig", _SMALL | {"head_dim": 16}),
    "gemma2": (
        "Gemma2ForCausalLM", "Gemma2Config",
        _SMALL | {"head_dim": 16, "sliding_window": 8, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0,
                  "query_pre_attn_scalar": 12},
    ),
    "starcoder2": ("Starcoder2ForCausalLM", "Starcoder2Config", _SMALL | {"use_bias": True}),
    "falcon, one norm": ("FalconForCausalLM", "FalconConfig", _FALCON | {"multi_query": True, "parallel_attn": True}),
    "falcon, two norms": (
        "FalconForCausalLM", "FalconConfig", _FALCON | {"num_kv_heads": 2, "new_decoder_architecture": True},
    ),
    "olmoe": (
        "OlmoeForCausalLM", "OlmoeConfig",
        _SMALL | {"num_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 4},
    ),
    "olmo2, tied": ("Olmo2ForCausalLM", "Olmo2Config", _SMALL | {"tie_word_embeddings": True}),
    "cohere": ("CohereForCausalLM", "CohereConfig", _SMALL | {"logit_scale": 0.25}),
}  # fmt: skip

# Architectures to insist on, where another one would do as well.
ASKED = {"starcoder2": "starcoder2"}


def program(name: str) -> Program:
    """The captured program of a model by its name in one of the lists."""
    if name in HAND_WRITTEN:
        from tests.lowering.gguf.models import program as own

        return own(name)
    if name in EXTRA:
        return _extra(name)
    from tests.zoo import captured

    return captured(name)


def _extra(name: str) -> Program:
    import transformers

    from irc.frontend import capture

    model, config, options = EXTRA[name]
    torch.manual_seed(0)
    more = {"add_pooling_layer": False} if model == "BertModel" else {}
    built = getattr(transformers, model)(getattr(transformers, config)(**options), **more).eval()
    with torch.no_grad():
        for parameter in built.parameters():  # norms at 1 and biases at 0 would hide a dropped one
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return capture(built, dynamic={"input_ids": {0: "B", 1: "S"}}, name=name)
