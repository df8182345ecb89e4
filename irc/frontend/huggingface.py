"""Frontend for Hugging Face transformers models: inputs, outputs and switches arranged for export.

Everything is decided by what the model and its config declare (main input, encoder–decoder, sizes),
never by its class name. The model's switches are restored afterwards.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from irc.core.errors import CaptureError
from irc.frontend.arranged import Arranged
from irc.frontend.importer import Naming

_RESULTS = ("logits", "logits_per_image", "last_hidden_state", "prediction_logits")
_TOKEN_NAMES = {"input_ids": ("B", "S"), "decoder_input_ids": ("B", "T")}


def is_transformers_model(model: object) -> bool:
    """True for a transformers `PreTrainedModel`; the library is not imported to find out."""
    library = sys.modules.get("transformers.modeling_utils")
    return library is not None and isinstance(model, library.PreTrainedModel)


class OneResult(nn.Module):
    """Calls the model with keyword inputs and returns the one result that matters."""

    def __init__(self, model: nn.Module, names: list[str], fixed: dict[str, Any]) -> None:
        super().__init__()
        self.model = model
        self.fixed = fixed

        def forward(*args: Any, **kwargs: Any) -> Any:
            return self._call(**dict(zip(names, args, strict=False)), **kwargs)

        # Export names the inputs after the signature, and cannot handle **kwargs.
        parameters = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in names]
        setattr(forward, "__signature__", inspect.Signature(parameters))  # noqa: B010  (no attribute of a function's type)
        self.forward = forward

    def _call(self, **inputs: Tensor) -> Any:
        result = self.model(**inputs, **self.fixed)
        if not isinstance(result, Mapping):
            return result
        for name in _RESULTS:
            if isinstance(result.get(name), Tensor):
                return result[name]
        return {name: value for name, value in result.items() if isinstance(value, Tensor)}


def arrange(model: Any, inputs: Mapping[str, Any] | None, names: Mapping[str, Any] | None) -> Arranged:
    """A transformers model with example inputs (made up if none are given) and named sizes.

    Args:
        model: the `PreTrainedModel`.
        inputs: example inputs by argument name.
        names: argument name → {dimension: name}; None: batch and token dimensions.
    """
    parameters = inspect.signature(model.forward).parameters
    given = dict(inputs) if inputs is not None else example_inputs(model)
    unknown = sorted(set(given) - set(parameters))
    if unknown and not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        raise CaptureError(f"{type(model).__name__}.forward has no argument {', '.join(unknown)}")
    given = {key: value for key, value in given.items() if value is not None}
    fixed: dict[str, Any] = {}
    if hasattr(model.config, "use_cache") or "use_cache" in parameters:
        fixed["use_cache"] = False
    if "return_dict" in parameters:
        fixed["return_dict"] = True
    keys = list(given)
    found: dict[tuple[int, int], str] = {}
    for index, key in enumerate(keys):
        for dim, name in dict(_suggest(key, given[key]) if names is None else names.get(key, {})).items():
            found[index, dim] = name
    return Arranged(
        module=OneResult(model, keys, fixed),
        args=(),
        kwargs=given,
        names=found,
        strict=names is not None,
        naming=Naming(prefix="model"),
        around=lambda: switches(model),
        metadata={"frontend": "transformers"},
    )


def _suggest(key: str, value: Any) -> dict[int, str]:
    if not isinstance(value, Tensor) or value.ndim == 0:
        return {}
    if key in _TOKEN_NAMES:
        return dict(enumerate(_TOKEN_NAMES[key][: value.ndim]))
    integer = not value.is_floating_point()
    prefix = "decoder_" in key
    return {0: "B", 1: "T" if prefix else "S"} if integer and value.ndim == 2 else {0: "B"}


def example_inputs(model: Any) -> dict[str, Tensor]:
    """Seeded example inputs with sizes that no number in the config equals.

    A size that happens to equal a hidden size could be mistaken for it by code that compares shapes.
    """
    config = model.config
    text = _sub_config(config, "text_config")
    taken = _integers(config)
    generator = torch.Generator().manual_seed(0)
    device = next((p.device for p in model.parameters() if p.device.type != "meta"), torch.device("cpu"))
    batch = next(n for n in range(3, 1000) if n not in taken)
    limit = _limit(text)
    length = next((n for n in range(11, limit + 1) if n not in taken and n != batch), min(limit, 11))
    parameters = inspect.signature(model.forward).parameters
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)

    def tokens(size: int) -> Tensor:
        vocabulary = int(getattr(text, "vocab_size", 0) or 0)
        if vocabulary < 2:
            raise CaptureError(
                "the model's config has no vocab_size to make example token ids from: pass example_inputs"
            )
        low = 4 if vocabulary > 16 else 0  # the first few are usually padding and markers
        return torch.randint(low, vocabulary, (batch, size), generator=generator).to(device)

    def pixels(vision: Any) -> Tensor:
        size = getattr(vision, "image_size", None) or 64
        height, width = (size, size) if isinstance(size, int) else tuple(size)
        channels = int(getattr(vision, "num_channels", 3))
        return torch.randn(batch, channels, height, width, generator=generator).to(device, dtype)

    main = getattr(model, "main_input_name", "input_ids")
    found: dict[str, Tensor] = {}
    if main == "input_ids":
        found["input_ids"] = tokens(length)
        if (
            hasattr(model, "get_image_features")
            and hasattr(model, "get_text_features")
            and "pixel_values" in parameters
        ):
            found["pixel_values"] = pixels(_sub_config(config, "vision_config"))
    elif main == "pixel_values":
        found["pixel_values"] = pixels(_sub_config(config, "vision_config"))
    elif main == "input_features" and hasattr(config, "num_mel_bins"):
        frames = int(getattr(config, "max_source_positions", 0)) * _time_stride(model) or 100
        found["input_features"] = torch.randn(batch, config.num_mel_bins, frames, generator=generator).to(device, dtype)
    elif main == "input_values":
        found["input_values"] = torch.randn(batch, 4000, generator=generator).to(device, dtype)
    else:
        raise CaptureError(f"cannot make example inputs: {type(model).__name__} takes {main!r}; pass example_inputs")
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in parameters:
        found["decoder_input_ids"] = tokens(max(2, length - 4))
    return found


def _time_stride(model: nn.Module) -> int:
    """Product of the strides of the 1-D convolutions, which come before the position table."""
    product = 1
    for module in model.modules():
        if isinstance(module, nn.Conv1d):
            product *= module.stride[0]
    return product


def _sub_config(config: Any, name: str) -> Any:
    return getattr(config, name, None) or config


def _limit(config: Any) -> int:
    for name in ("max_position_embeddings", "n_positions", "max_target_positions"):
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return min(max(value - 4, 2), 512)
    return 512


def _integers(config: Any) -> set[int]:
    found: set[int] = set()

    def collect(value: Any) -> None:
        if isinstance(value, bool):
            return
        if isinstance(value, int):
            found.add(value)
        elif isinstance(value, Mapping):
            for item in value.values():
                collect(item)
        elif isinstance(value, (list, tuple)):
            for item in value:
                collect(item)

    collect(config.to_dict())
    return found


@contextlib.contextmanager
def switches(model: Any) -> Iterator[dict[str, str]]:
    """Attention and experts implementations that export to plain ops; restored on exit."""
    chosen: dict[str, str] = {}
    attention = [(config, config._attn_implementation) for config in _configs(model)]
    experts = model.get_experts_implementation() if hasattr(model, "get_experts_implementation") else None
    try:
        if attention:
            chosen["attention"] = _choose_attention(model)
        if experts is not None and model._can_set_experts_implementation():
            # The grouped form is an opaque op and the eager one loops over data-dependent sizes.
            model.set_experts_implementation("batched_mm")
            chosen["experts"] = "batched_mm"
        yield chosen
    finally:
        for config, implementation in attention:
            config._attn_implementation_internal = implementation
        if "experts" in chosen:
            model.set_experts_implementation(experts)


def _configs(model: nn.Module) -> list[Any]:
    """Every config in the model that chooses an attention implementation: submodels may have their own."""
    found: dict[int, Any] = {}
    pending = [getattr(module, "config", None) for module in model.modules()]
    while pending:
        config = pending.pop()
        if id(config) not in found and hasattr(config, "_attn_implementation_internal"):
            found[id(config)] = config
            pending.extend(getattr(config, name, None) for name in getattr(config, "sub_configs", ()))
    return list(found.values())


def _choose_attention(model: Any) -> str:
    """SDPA where every part of the model supports it (one op), else eager."""
    parts = [m for m in model.modules() if hasattr(type(m), "_supports_sdpa")]
    wanted = "sdpa" if all(type(m)._supports_sdpa for m in parts) else "eager"
    if model.config._attn_implementation != wanted:
        model.set_attn_implementation(wanted)
    return str(model.config._attn_implementation)
