"""`capture`: a model → a `Program`, through `torch.export` (non-strict)."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from irc.core.collection import walking_once
from irc.core.errors import CaptureError, OptionError, nearest
from irc.core.program import Program
from irc.frontend import exporter, frontends
from irc.frontend.arranged import Arranged
from irc.frontend.importer import import_exported, weight_aliases
from irc.frontend.naming import DimNamer

FRONTENDS = ("auto", "torch", "transformers")


@walking_once()
def capture(
    model: Any,
    example_inputs: Any = None,
    *,
    dynamic: Any = None,
    frontend: str = "auto",
    canonicalize: bool = True,
    name: str | None = None,
) -> Program:
    """Capture a model as a program.

    The model is captured in evaluation mode, without gradients, and is left as it was.

    Args:
        model: an `nn.Module` (transformers models included), an `ExportedProgram`, or the path of a `.pt2` file.
        example_inputs: a tensor, a tuple of positional inputs or a dict of keyword inputs. Not needed for
            transformers models and exported programs.
        dynamic: which sizes stay symbolic, and their names: `{"input_ids": {0: "B", 1: "S"}}` or a tuple
            aligned with the inputs, `({0: "B"}, None)`. None: batch and token dimensions where the model
            allows it. `{}`: none.
        frontend: `auto`, `torch` (treat the model as a plain module) or `transformers`.
        canonicalize: rewrite to canonical ops (attention, norms, rotary positions, …) after capture.
        name: of the program; default: from the class of the model.

    Raises:
        CaptureError: the model cannot be captured; says where, why, and what to try.
        OptionError: unknown frontend, or `dynamic` is no description of sizes.
    """
    if not (dynamic is None or isinstance(dynamic, (Mapping, tuple, list))):
        raise OptionError(
            f"dynamic is a dict or a tuple that says which sizes stay symbolic, such as ({{0: 'B'}},), not {dynamic!r}"
        )
    if frontend not in FRONTENDS:
        raise OptionError(f"unknown frontend {frontend!r}{nearest(frontend, FRONTENDS)}")
    if isinstance(model, (str, os.PathLike)):
        from irc.frontend.archive import load_pt2

        name = name or os.path.splitext(os.path.basename(os.fspath(model)))[0]
        model = load_pt2(os.fspath(model))
    if isinstance(model, ExportedProgram):
        program = _from_exported(model, example_inputs, dynamic, name or "model")
    elif isinstance(model, nn.Module):
        program = _from_module(model, example_inputs, dynamic, frontend, name)
    else:
        raise CaptureError(
            f"cannot capture a {type(model).__name__}: pass an nn.Module, an ExportedProgram or a .pt2 path"
            + ("\n  try: wrap the function in an nn.Module" if callable(model) else "")
        )
    return _canonicalize(program) if canonicalize else program


def _from_module(model: nn.Module, inputs: Any, dynamic: Any, frontend: str, name: str | None) -> Program:
    arranged = frontends.arrange(model, inputs, dynamic, frontend)
    return from_arranged(arranged, model, name or type(model).__name__, canonicalize=False)


def from_arranged(arranged: Arranged, model: nn.Module, name: str, *, canonicalize: bool) -> Program:
    """The program of a model that a frontend has made ready."""
    exported, example = exporter.export(arranged, model)
    namer = DimNamer(arranged.names, bounds=exported.range_constraints, strict=arranged.strict)
    program = import_exported(exported, name=name, namer=namer, example_inputs=example, naming=arranged.naming)
    names = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    program.tied.update(weight_aliases(names, program.weights))
    _record(program, arranged.metadata, namer)
    return _canonicalize(program) if canonicalize else program


def _from_exported(exported: ExportedProgram, inputs: Any, dynamic: Any, name: str) -> Program:
    functional = exporter.functionalize(exported)
    leaves = None
    if inputs is not None:
        args, kwargs = frontends.split_inputs(inputs)
        leaves = frontends.flat(args, kwargs)
    names = exporter.exported_names(functional, dynamic)
    namer = DimNamer(names, bounds=functional.range_constraints, strict=dynamic is not None)
    program = import_exported(functional, name=name, namer=namer, example_inputs=leaves)
    _record(program, {"frontend": "exported"}, namer)
    return program


def _record(program: Program, metadata: Mapping[str, Any], namer: DimNamer) -> None:
    for dim in program.dims.values():
        if not isinstance(dim.size, torch.SymInt) or not dim.size.node.expr.free_symbols:
            raise CaptureError(f"dimension {dim.name} did not survive type inference: it is {dim.size}")
    program.metadata["capture"] = {
        **metadata,
        "torch": str(torch.__version__),
        "dynamic": {key: dim.hint for key, dim in program.dims.items()},
        **({"static": namer.notes} if namer.notes else {}),
    }


def _canonicalize(program: Program) -> Program:
    from irc.core.manager import PassManager
    from irc.passes.canonicalize import canonical_passes

    return PassManager(canonical_passes(), verify="off").run(program).program
