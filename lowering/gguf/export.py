"""`export_gguf`: a program to a GGUF file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from irc.core.contract import Progress
from irc.core.errors import OptionError
from irc.core.program import VAL, Program
from irc.lowering.gguf.describe import describe
from irc.lowering.gguf.description import Experts
from irc.lowering.gguf.encode import num_bytes, stored_kind
from irc.lowering.gguf.imatrix import ImportanceMatrix, checked, collect_importance, open_importance
from irc.lowering.gguf.layout import Layout, lay_out
from irc.lowering.gguf.match import find_architecture
from irc.lowering.gguf.mixes import FLOATS, MIXES, Place, choose_type, mix_name
from irc.lowering.gguf.pieces import FileTensor
from irc.lowering.gguf.tokenizers import tokenizer_metadata
from irc.lowering.gguf.writing import write_file

_FLOAT_NAMES = {"torch.float32": "f32", "torch.float16": "f16", "torch.bfloat16": "bf16", "torch.float64": "f32"}


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        architecture: name in llama.cpp's table.
        types: type of each tensor by its name in the file.
        num_bytes: of all tensors.
        lossy: whether numbers were rounded on the way.
    """

    path: Path
    architecture: str
    types: dict[str, str]
    num_bytes: int
    lossy: bool
    notes: list[str] = field(default_factory=list)


def export_gguf(
    program: Program,
    path: str | Path,
    *,
    type: str | None = None,
    types: Mapping[str, str] | None = None,
    tokenizer: Any = None,
    chat_template: str | None = None,
    imatrix: Any = None,
    architecture: str | None = None,
    context_length: int | None = None,
    metadata: Mapping[str, Any] | None = None,
    name: str | None = None,
    progress: Progress | None = None,
) -> Exported:
    """Write a program as a GGUF file that llama.cpp loads.

    Args:
        type: a type or mix (`f32`, `bf16`, `q8_0`, `q4_k_m`, …) for weights that are stored as floats; None: as they
            are. Weights that are quantized already keep their numbers whatever is asked for.
        types: exceptions, part of a tensor's name in the file (`ffn_down`, `blk.0.`) → type.
        tokenizer: of `tokenizers` or transformers, or a path to a `tokenizer.json`; None: the file has no vocabulary.
        chat_template: Jinja text; None: the tokenizer's own, if it has one.
        imatrix: an `ImportanceMatrix` or the path of one: what the quantizers weigh errors by.
        architecture: insist on this entry of the table.
        context_length: longest context; default: what the program says.
        metadata: further keys and values; they win over irc's own.

    Raises:
        TargetError: no architecture computes what the program does, or a quantized weight fits no GGUF type.
        OptionError: an unknown type or architecture.
    """
    mix = None if type is None else mix_name(type)
    special = {part: _plain_type(kind) for part, kind in (types or {}).items()}
    model = describe(program)
    entry = find_architecture(model, architecture)
    layout = lay_out(program, model, entry, context_length)
    chosen = _choose(program, layout, model, mix, special)
    values: dict[str, Any] = {
        "general.name": name or program.name,
        "general.file_type": MIXES[mix or _common_mix(chosen)].file_type,
        "general.quantization_version": 2,
    }
    values |= layout.metadata
    values |= _vocabulary(tokenizer, chat_template, model.vocabulary, layout, metadata or {})
    values |= metadata or {}
    importance = _importance(imatrix, chosen)
    target = Path(path)
    write_file(target, entry.name, values, program, chosen, importance, progress)
    total = sum(num_bytes(tensor.shape, kind) for tensor, kind in chosen)
    lossy = any(_is_lossy(program, tensor, kind) for tensor, kind in chosen)
    return Exported(target, entry.name, {t.name: kind for t, kind in chosen}, total, lossy, layout.notes)


def importance_matrix(program: Program, calibration: Any) -> ImportanceMatrix:
    """What the columns of a program's matrices are multiplied by on calibration data (`CalibrationData`).

    Raises:
        TargetError: the program matches no architecture, so its tensors have no names.
    """
    model = describe(program)
    layout = lay_out(program, model, find_architecture(model))
    return collect_importance(program, layout, calibration.batches, description=calibration.description)


def _plain_type(text: str) -> str:
    return MIXES[mix_name(text)].base


def _choose(
    program: Program, layout: Layout, model: Any, mix: str | None, special: Mapping[str, str]
) -> list[tuple[FileTensor, str]]:
    first = model.layers[0]
    experts = first.mlp.num_experts if isinstance(first.mlp, Experts) else 0
    names = {tensor.name for tensor in layout.tensors}
    chosen: list[tuple[FileTensor, str]] = []
    unused = set(special)
    for tensor in layout.tensors:
        place = Place(
            tensor.role, tensor.layer, len(model.layers), first.attention.num_heads // first.attention.num_kv_heads,
            experts, layout.architecture.name, "output.weight" not in names,
        )  # fmt: skip
        asked = [part for part in special if part in tensor.name]
        unused -= set(asked)
        chosen.append((tensor, _type_of(program, tensor, place, mix, special[asked[-1]] if asked else None)))
    if unused:
        raise OptionError(
            f"types: no tensor's name holds {', '.join(sorted(unused))}; names are like {sorted(names)[:5]}"
        )
    return chosen


def _type_of(program: Program, tensor: FileTensor, place: Place, mix: str | None, asked: str | None) -> str:
    kept = stored_kind(program, tensor) if asked is None else None
    if kept is not None:
        return kept
    if asked is not None and len(tensor.shape) > 1:
        return asked
    if mix is not None:
        return choose_type(mix, place, tensor.shape)
    return choose_type("f32", place, tensor.shape) if len(tensor.shape) < 2 else _own_type(tensor, place)


def _own_type(tensor: FileTensor, place: Place) -> str:
    """The type that a float tensor has in the program."""
    if choose_type("f16", place, tensor.shape) == "f32":
        return "f32"
    found = {
        _FLOAT_NAMES.get(str(piece.node.meta[VAL].dtype), "f32") if piece.node is not None else "f32"
        for piece in tensor.pieces
    }
    return found.pop() if len(found) == 1 else "f32"


def _common_mix(chosen: list[tuple[FileTensor, str]]) -> str:
    """The type that most numbers have, as a mix of its own."""
    sizes: dict[str, int] = {}
    for tensor, kind in chosen:
        sizes[kind] = sizes.get(kind, 0) + num_bytes(tensor.shape, kind)
    return mix_name(max(sizes, key=sizes.__getitem__))


def _is_lossy(program: Program, tensor: FileTensor, kind: str) -> bool:
    if kind == "f32":
        return False
    found = tensor.formats(program)
    if any(one is not None for one in found):
        return kind in FLOATS
    return any(_FLOAT_NAMES.get(str(piece.node.meta[VAL].dtype)) != kind for piece in tensor.pieces if piece.node)


def _vocabulary(
    tokenizer: Any, chat_template: str | None, size: int, layout: Layout, wanted: Mapping[str, Any]
) -> dict[str, Any]:
    if tokenizer is None:
        layout.notes.append("no tokenizer: the file holds no vocabulary, so only token ids go in and come out")
        return {"tokenizer.ggml.model": "no_vocab"}
    pre = wanted.get("tokenizer.ggml.pre")
    return tokenizer_metadata(tokenizer, size, chat_template=chat_template, pre=None if pre is None else str(pre))


def _importance(imatrix: Any, chosen: list[tuple[FileTensor, str]]) -> dict[str, Any] | None:
    if imatrix is None:
        return None
    return checked(open_importance(imatrix), {tensor.name: tensor.shape for tensor, _ in chosen})
