"""What the installed ONNX Runtime can do: operator sets, CPU kernels, execution providers.

The runtime is asked, not a table of releases: a translation is used where its kernel exists.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from irc.core.errors import OptionError, TargetError, nearest

CONTRIB = "com.microsoft"
OLDEST_OPSET, NEWEST_OPSET = 18, 25
"""Operator sets that the exporter writes and that were tested."""
_PREFERRED_OPSETS = (24, 23, 21, 20)
_CPU = "CPUExecutionProvider"

# Short names for people.
_PROVIDERS = {
    "cpu": _CPU,
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
    "openvino": "OpenVINOExecutionProvider",
    "coreml": "CoreMLExecutionProvider",
    "directml": "DmlExecutionProvider",
    "rocm": "ROCMExecutionProvider",
    "xnnpack": "XnnpackExecutionProvider",
    "qnn": "QNNExecutionProvider",
    "webgpu": "WebGpuExecutionProvider",
}


def providers(names: Sequence[str]) -> list[str]:
    """Execution providers by short or full name, in the same order.

    Raises:
        OptionError: a name that is none.
        TargetError: providers that this ONNX Runtime was built without; names all of them.
    """
    import onnxruntime

    known = set(onnxruntime.get_all_providers())
    chosen = [_PROVIDERS.get(name.lower(), name) for name in names]
    unknown = [name for name in chosen if name not in known]
    if unknown:
        hints = "; ".join(f"{name!r}{nearest(name, [*known, *_PROVIDERS])}" for name in unknown)
        raise OptionError(f"ONNX Runtime has no execution provider {hints}")
    here = onnxruntime.get_available_providers()
    missing = [name for name in chosen if name not in here]
    if missing:
        raise TargetError(f"ONNX Runtime here has no {', '.join(missing)}; it has {', '.join(here)}")
    return chosen


def newest_opset() -> int:
    """The newest operator set that is tested and that the runtime has kernels for."""
    for opset in _PREFERRED_OPSETS:
        if opset < 23 or has_kernel("Attention", "", opset):
            return opset
    return _PREFERRED_OPSETS[-1]


def has_kernel(op: str, domain: str, opset: int) -> bool:
    """True when the CPU provider runs this operator of this operator set."""
    return any(first <= opset <= last for first, last in _kernels().get((domain, op), ()))


def has_input(op: str, name: str) -> bool:
    """True when a contrib operator has an input of that name (contrib operators grow without a new version)."""
    schema = _contrib_schemas().get(op)
    return schema is not None and any(given.name == name for given in schema.inputs)


@functools.cache
def _kernels() -> dict[tuple[str, str], list[tuple[int, int]]]:
    try:
        from onnxruntime.capi.onnxruntime_pybind11_state import get_all_opkernel_def
    except ImportError:  # a build without it: nothing new is assumed to be there
        return {}
    found: dict[tuple[str, str], list[tuple[int, int]]] = {}
    for kernel in get_all_opkernel_def():
        if kernel.provider == _CPU:
            domain = "" if kernel.domain == "ai.onnx" else kernel.domain
            found.setdefault((domain, kernel.op_name), []).append(tuple(kernel.version_range))
    return found


@functools.cache
def _contrib_schemas() -> dict[str, Any]:
    try:
        from onnxruntime.capi.onnxruntime_pybind11_state import get_all_operator_schema
    except ImportError:
        return {}
    return {schema.name: schema for schema in get_all_operator_schema() if schema.domain == CONTRIB}
