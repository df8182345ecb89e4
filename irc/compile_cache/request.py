"""What decides a compilation besides the code: model, inputs, passes, target, options, settings of PyTorch, machine."""

from __future__ import annotations

import dataclasses
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from irc.compile_cache.identity import Describer, Doubt
from irc.core.contract import Pass
from irc.core.target import Target, get_target, read_options
from irc.lowering.cpp.build import supported_isas
from irc.lowering.cpp.digest import digests

# Switches of the libraries that a capture reads; others of a program's own are not seen.
_PREFIXES = ("TRANSFORMERS_", "HF_", "TORCH", "PYTORCH", "OMP_", "MKL_", "DIFFUSERS_", "CXX")
_OTHERS = ("TORCHINDUCTOR_",)  # set by PyTorch itself when parts of it are loaded


def request_key(
    model: Any, passes: Sequence[Pass] | None, target: Target, options: Mapping[str, Any] | None, key: bytes,
    **others: Any,
) -> str:  # fmt: skip
    """A digest of one call of `irc.compile`, under a secret key.

    Args:
        others: further arguments of the call that decide its result.

    Raises:
        Doubt: something cannot be compared with what it will be in another process.
    """
    if not isinstance(model, nn.Module):
        raise Doubt(f"the model is a {type(model).__name__}, not a module")
    if get_target(target.name) is not target:
        raise Doubt("the target is one of the caller's own")
    described = Describer(model, partial(digests, key=key))
    described.add("passes", None if passes is None else [_pass(one) for one in passes])
    described.add("target", target.name)
    described.add("options", _fields(read_options(target.options_type, options, what=f"target {target.name}")))
    described.add("settings", _settings())
    for name, value in others.items():
        described.add(name, value)
    return described.text()


def _pass(one: Pass) -> Any:
    return (type(one), _fields(one)) if dataclasses.is_dataclass(one) else one


def _fields(value: Any) -> Any:
    """Class and fields of a dataclass; containers and plain values only, for others say nothing of what they do."""
    return (type(value), {field.name: getattr(value, field.name) for field in dataclasses.fields(value)})


def _settings() -> Any:
    if torch.is_autocast_enabled("cpu"):
        raise Doubt("autocast is on")
    return (
        sys.version, platform.machine(), platform.node(), list(supported_isas()), str(torch.__version__),
        torch.get_num_threads(), torch.get_default_dtype(), torch.are_deterministic_algorithms_enabled(),
        torch.backends.mkldnn.enabled, torch.get_float32_matmul_precision(),
        sorted(x for x in os.environ.items() if x[0].startswith(_PREFIXES) and not x[0].startswith(_OTHERS)),
    )  # fmt: skip
