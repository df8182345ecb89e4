"""Quantize a Hugging Face folder with llmcompressor or torchao, and hand the weights back in full precision.

Run by `quantization_peers.py` with the Python of an environment that has the peers; irc need not be there.

    python peer_quantizers.py METHOD MODEL_FOLDER TOKENS.safetensors BITS GROUP OUT_FOLDER

GROUP 0 stands for one scale a row. OUT_FOLDER gets `weights.safetensors` (what the quantized layers compute with) and
`figures.json` (seconds, peak bytes).
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


def memory_bytes(which: str) -> int:
    """`VmRSS`, what is resident now, or `VmHWM`, the most since `forget_peak`; 0 where the system does not tell."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(which)), 0)


def forget_peak() -> int:
    """Start to look for the most memory; what is resident now."""
    reset = Path("/proc/self/clear_refs")
    if reset.exists():
        reset.write_text("5")
    return memory_bytes("VmRSS")


def llmcompressor_recipe(method: str, bits: int, group: int) -> list[Any]:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier

    size: dict[str, Any] = {"strategy": "group", "group_size": group} if group else {"strategy": "channel"}
    weights = QuantizationArgs(num_bits=bits, type="int", symmetric=True, **size)
    scheme = {"all": QuantizationScheme(targets=["Linear"], weights=weights)}
    if method == "gptq":
        return [GPTQModifier(config_groups=scheme, ignore=["lm_head"])]
    rounding = QuantizationModifier(config_groups=scheme, ignore=["lm_head"])
    return [AWQModifier(duo_scaling="both"), rounding] if method == "awq" else [rounding]


def run_llmcompressor(method: str, model: nn.Module, tokens: Tensor, bits: int, group: int, folder: str) -> None:
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.pipelines.cache import IntermediatesCache
    from transformers import AutoTokenizer

    # Pages are pinned for copies to an accelerator; without one PyTorch refuses to.
    IntermediatesCache.pin_memory = lambda *_, **__: None
    rows = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in tokens.tolist()]
    oneshot(
        model=model,
        processor=AutoTokenizer.from_pretrained(folder),
        dataset=Dataset.from_list(rows),
        recipe=llmcompressor_recipe(method, bits, group),
        max_seq_length=tokens.shape[1],
        num_calibration_samples=len(tokens),
        shuffle_calibration_samples=False,
    )


def llmcompressor_weights(model: nn.Module) -> dict[str, Tensor]:
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize

    found = dict(model.state_dict())
    for name, module in model.named_modules():
        scheme = getattr(module, "quantization_scheme", None)
        if scheme is not None and scheme.weights is not None:
            zero = getattr(module, "weight_zero_point", None)
            found[f"{name}.weight"] = fake_quantize(module.weight, module.weight_scale, zero, scheme.weights)
    return {name: tensor for name, tensor in found.items() if name.endswith("weight")}


def run_torchao(model: nn.Module, bits: int, group: int) -> None:
    from torchao.quantization import IntxWeightOnlyConfig, PerAxis, PerGroup, quantize_

    config = IntxWeightOnlyConfig(
        weight_dtype=getattr(torch, f"int{bits}"), granularity=PerGroup(group) if group else PerAxis(0)
    )
    quantize_(model, config, filter_fn=lambda module, name: isinstance(module, nn.Linear) and "lm_head" not in name)


def torchao_weights(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: tensor.dequantize() if hasattr(tensor, "dequantize") and type(tensor) is not Tensor else tensor
        for name, tensor in ((n, p.data) for n, p in model.named_parameters())
    }


def main() -> None:
    method, folder, tokens_file, bits, group, out = sys.argv[1:]
    from transformers import LlamaForCausalLM

    tokens = load_file(tokens_file)["tokens"]
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tool, _, kind = method.partition("-")
    base, started = forget_peak(), time.perf_counter()
    weights: Callable[[nn.Module], dict[str, Tensor]]
    if tool == "torchao":
        run_torchao(model, int(bits), int(group))
        weights = torchao_weights
    else:
        run_llmcompressor(kind, model, tokens, int(bits), int(group), folder)
        weights = llmcompressor_weights
    figures = {"seconds": time.perf_counter() - started, "peak_bytes": memory_bytes("VmHWM") - base}
    with torch.no_grad():
        dense = {name: tensor.detach().float().contiguous().clone() for name, tensor in weights(model).items()}
    dense.pop("lm_head.weight", None)  # tied to the embedding
    save_file(dense, Path(out) / "weights.safetensors")
    (Path(out) / "figures.json").write_text(json.dumps(figures))


if __name__ == "__main__":
    main()
