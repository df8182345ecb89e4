"""Calls `torch.export`, decides sizes that cannot be dynamic, and makes the result functional."""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch._dynamo.config
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind

from irc.core.errors import CaptureError
from irc.frontend import expansion, inplace, repeats
from irc.frontend.arranged import Arranged
from irc.frontend.explain import explain
from irc.frontend.frontends import leaf_names

Position = tuple[int, int]
# The second one prints the traceback of every shape that does not fit, which is what the exception says, too.
_LOGGED_FROM = {"torch.export": logging.ERROR, "torch._subclasses.fake_tensor": logging.CRITICAL}


def export(arranged: Arranged, model: nn.Module) -> tuple[ExportedProgram, list[Any]]:
    """Export; gives the exported program and its flat example inputs.

    Raises:
        CaptureError: export failed.
    """
    leaves, spec = pytree.tree_flatten((arranged.args, arranged.kwargs))
    if any(isinstance(leaf, Tensor) and leaf.is_sparse for leaf in leaves):
        raise CaptureError("an example input is sparse: only dense tensors can be captured")
    shapes = [
        {dim: Dim.AUTO for (index, dim) in arranged.names if index == i} if isinstance(leaf, Tensor) else None
        for i, leaf in enumerate(leaves)
    ]
    with evaluation_mode(model), arranged.around() as chosen, quiet():
        if chosen:
            arranged.metadata.update(chosen)
        try:
            exported = _export(arranged, _dynamic_shapes(arranged, pytree.tree_unflatten(shapes, spec)))
        except Exception as error:
            raise explain(error, model, arranged.naming.prefix) from error
        return functionalize(exported), leaves


def _export(arranged: Arranged, shapes: dict[str, Any]) -> ExportedProgram:
    """Export, tracing blocks that are alike once where that is right, else all of them."""

    def plain() -> ExportedProgram:
        # Where sizes are symbolic, taking a type from PyTorch's memory of types takes as long as computing it, and
        # putting it there as long again: without that memory, export takes two thirds of the time.
        with torch._dynamo.config.patch(fake_tensor_cache_enabled=False):
            return torch.export.export(
                arranged.module, arranged.args, arranged.kwargs, dynamic_shapes=shapes, strict=False
            )

    with contextlib.suppress(Exception), repeats.recorded(arranged.module) as found:
        exported = plain()
        right = expansion.expand(exported, found)
        if right and (found.repeated == 0 or inplace.plan(exported.graph_module) is not None):
            return exported
    return plain()


def _dynamic_shapes(arranged: Arranged, shapes: Any) -> dict[str, Any]:
    """By argument name, as export wants it: extra keywords beside the named ones, not under their own key."""
    bound = inspect.signature(arranged.module.forward).bind(*shapes[0], **shapes[1])
    found: dict[str, Any] = {}
    for key, value in bound.arguments.items():
        if bound.signature.parameters[key].kind is inspect.Parameter.VAR_KEYWORD:
            found.update(value)
        else:
            found[key] = value
    return found


def functionalize(exported: ExportedProgram) -> ExportedProgram:
    """A program whose in-place operations the importer can replace; mostly the one given, unchanged."""
    if inplace.plan(exported.graph_module) is not None:
        return exported
    with quiet():
        return exported.run_decompositions({})


def exported_names(exported: ExportedProgram, dynamic: Any) -> dict[Position, str]:
    """Names for the symbolic sizes of a program that somebody else exported."""
    specs = [s for s in exported.graph_signature.input_specs if s.kind is InputKind.USER_INPUT]
    values = {n.name: n.meta.get("val") for n in exported.graph.nodes if n.op == "placeholder"}
    names: dict[Position, str] = {}
    for index, spec in enumerate(specs):
        value = values.get(spec.arg.name)
        if not isinstance(value, Tensor):
            continue
        if dynamic is not None:
            given = dynamic.get(spec.arg.name) if isinstance(dynamic, Mapping) else dict(enumerate(dynamic)).get(index)
            names.update({(index, dim % value.ndim): text for dim, text in leaf_names(given).items()})
            continue
        for dim, size in enumerate(value.shape):
            if isinstance(size, torch.SymInt) and len(size.node.expr.free_symbols) == 1:
                names[index, dim] = "B" if dim == 0 else ("S" if dim == 1 else f"D{dim}")
    return names


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Every submodule in evaluation mode; each one's own flag restored."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Export's own warnings, logs and printed graphs are about its internals; failures arrive as exceptions."""
    loggers = {logging.getLogger(name): level for name, level in _LOGGED_FROM.items()}
    before = {logger: logger.level for logger in loggers}
    for logger, level in loggers.items():
        logger.setLevel(level)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()), torch.no_grad():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in before.items():
            logger.setLevel(level)
