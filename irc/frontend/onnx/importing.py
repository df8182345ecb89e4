"""`from_onnx`: an ONNX file → a program, through capture."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from irc.core.errors import CaptureError, IrcError, StorageError
from irc.core.kv_cache import METADATA_KEY, KVCache
from irc.core.program import Program
from irc.frontend.capture import capture
from irc.frontend.onnx.module import OnnxModule
from irc.frontend.onnx.reading import DTYPES, read_model

# Sizes of the example inputs; all different, so that no two dimensions look alike.
_SIZES = (2, 5, 3, 7, 11, 13, 17, 19)
_METADATA = "irc.metadata"
_MOST_NUMBERS = 1 << 28


def from_onnx(
    path: str | os.PathLike[str],
    *,
    example_inputs: Any = None,
    canonicalize: bool = True,
    name: str | None = None,
) -> Program:
    """Read an ONNX file as a program.

    Dimensions that the file names stay symbolic under that name; weights keep the file's names; quantized weights keep
    their integers and scales. The program is canonical, so that every pass and target takes it.

    Args:
        path: of the file; external data is read from below its folder.
        example_inputs: a tuple in the order of the inputs; default: made from their types.
        canonicalize: as for `irc.capture`.
        name: of the program; default: the graph's.

    Raises:
        StorageError: no ONNX file, or a damaged or hostile one.
        CaptureError: operators, types or attributes that are not read; all unknown operators at once.
    """
    file = Path(path)
    model = read_model(file)
    _fix_head_widths(model.graph)
    module = OnnxModule(model, file.parent).eval()
    sizes: dict[str, int] = {}
    dynamic, made = [], []
    for value, given_name in zip(module.inputs, module.input_names, strict=True):
        names, shape, dtype = _described(value, given_name, sizes)
        dynamic.append(names)
        made.append(_example(value.name, shape, dtype, model))
    given = tuple(made) if example_inputs is None else tuple(example_inputs)
    if len(given) != len(made):
        raise CaptureError(f"{file} takes {len(made)} inputs ({', '.join(module.input_names)}), got {len(given)}")
    chosen = name or model.graph.name or file.stem
    try:
        program = capture(
            module, given, dynamic=dict(zip(module.input_names, dynamic, strict=True)), canonicalize=canonicalize,
            name=_plain(chosen),
        )  # fmt: skip
    except IrcError as error:
        raise _inner(error) from error
    _restore_cache(program, model)
    return program


def _fix_head_widths(graph: Any) -> None:
    """Caches whose width of a head is left open, though the attention's weights fix it, get that width."""
    values = {value.name: value for value in (*graph.input, *graph.output)}
    stored = {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    sizes = {out: a.i for node in graph.node for out in node.output for a in node.attribute if a.name == "N"}
    for node in graph.node:
        if node.op_type != "GroupQueryAttention" or len(node.input) < 5:
            continue
        heads = sum(
            {"num_heads": 1, "kv_num_heads": 2}.get(a.name, 0) * a.i for a in node.attribute if a.name.endswith("heads")
        )
        tables = stored.get(node.input[7], []) if len(node.input) > 7 else []
        width = 2 * tables[1] if len(tables) == 2 else sizes.get(node.input[0], 0) // max(heads, 1)
        for name in (*node.input[3:5], *node.output[1:3]):
            dims = values[name].type.tensor_type.shape.dim if name in values else []
            if len(dims) == 4 and width and not dims[3].HasField("dim_value"):
                dims[3].dim_value = width


def _inner(error: BaseException) -> IrcError:
    """The first complaint of ours in the chain: what an operator said, not what the tracer made of it."""
    found, cause = error, error.__cause__ or error.__context__
    while cause is not None:
        if isinstance(cause, IrcError):
            found = cause
        cause = cause.__cause__ or cause.__context__
    assert isinstance(found, IrcError)
    return found if type(found) is type(error) else CaptureError(str(found))


def _plain(name: str) -> str:
    return re.sub(r"\W+", "_", name).strip("_") or "model"


def _described(value: Any, name: str, sizes: dict[str, int]) -> tuple[dict[int, str], list[int], torch.dtype]:
    """Names of the symbolic dimensions of an input, an example's shape, and its type."""
    import onnx

    kind = value.type.tensor_type
    names = onnx.TensorProto.DataType
    text = names.Name(kind.elem_type) if kind.elem_type in names.values() else str(kind.elem_type)
    if not value.type.HasField("tensor_type") or text not in DTYPES:
        raise CaptureError(f"input {value.name!r} is no tensor of a type that irc has ({text})")
    if not kind.HasField("shape"):
        raise CaptureError(f"input {value.name!r} has no shape: even its number of dimensions is unknown")
    found: dict[int, str] = {}
    shape: list[int] = []
    for axis, dim in enumerate(kind.shape.dim):
        if dim.HasField("dim_value"):
            if dim.dim_value < 0:
                raise StorageError(f"input {value.name!r} has the impossible size {dim.dim_value}")
            shape.append(dim.dim_value)
            continue
        label = re.sub(r"\W+", "_", dim.dim_param).strip("_") or f"{name}_{axis}"
        label = f"d{label}" if label[0].isdigit() else label
        sizes.setdefault(label, _size(dim.dim_param, label, sizes))
        found[axis] = label
        shape.append(sizes[label])
    total = 1
    for size in shape:
        total *= size
    if total > _MOST_NUMBERS:
        raise StorageError(f"input {value.name!r} of shape {shape} is too large for an example: give example_inputs")
    return found, shape, DTYPES[text]


def _size(text: str, label: str, sizes: dict[str, int]) -> int:
    """An example of a named size: of its own, or the sum of others, as decoders with past keys declare it."""
    parts = [part.strip() for part in text.split("+")]
    if label == "total_sequence_length" and sizes:  # of the keys: the past ones, and those of the tokens listed before
        parts = ["past_sequence_length", "sequence_length" if "sequence_length" in sizes else list(sizes)[-1]]
    if len(parts) < 2:
        return _SIZES[len(sizes) % len(_SIZES)]
    return sum(sizes.setdefault(part, _SIZES[len(sizes) % len(_SIZES)]) for part in parts)


def _example(name: str, shape: list[int], dtype: torch.dtype, model: Any) -> Tensor:
    """Numbers that the graph can be run on: indices below the rows of the table they look up."""
    generator = torch.Generator().manual_seed(0)
    if dtype.is_floating_point:
        small = torch.randn(shape, generator=generator) if dtype.itemsize > 1 else torch.zeros(shape)
        return small.to(dtype)
    if dtype == torch.bool or "mask" in name:
        return torch.ones(shape, dtype=dtype)
    if "position" in name:
        return torch.arange(shape[-1] if shape else 1).expand(shape).to(dtype).contiguous()
    stored = {tensor.name: list(tensor.dims) for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Gather" and len(node.input) > 1 and node.input[1] == name and stored.get(node.input[0]):
            return torch.randint(0, max(1, stored[node.input[0]][0]), shape, generator=generator).to(dtype)
    return torch.zeros(shape, dtype=dtype)


def _restore_cache(program: Program, model: Any) -> None:
    """What an export of irc says about the cache of a step, if it fits the program."""
    text = next((entry.value for entry in model.metadata_props if entry.key == _METADATA), None)
    if text is None:
        return
    try:
        found = json.loads(text)
        entry = found.get(METADATA_KEY) if isinstance(found, Mapping) and "interface" not in found else None
        aliases = {int(k): int(v) for k, v in found.get("aliases", {}).items()} if entry else {}
        cache = KVCache.from_metadata({METADATA_KEY: entry}) if entry else None
    except (ValueError, TypeError, AttributeError, RecursionError, IrcError) as error:
        raise StorageError(f"the metadata {_METADATA} of the model is damaged: {error}") from error
    if cache is None:
        return
    fits = [c.name for c in cache.caches] == program.input_names[cache.num_inputs :] and all(
        0 <= output < len(program.outputs) and 0 <= source < len(program.input_names)
        for output, source in aliases.items()
    )
    if not fits:
        raise StorageError(f"the metadata {_METADATA} describes a cache that the graph does not have")
    program.metadata[METADATA_KEY] = entry
    program.aliases = aliases
