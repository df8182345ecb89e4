"""Chooses and runs the frontend: plain modules here, transformers models in `huggingface`."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch.utils._pytree as pytree
from torch import Tensor, nn

from irc.core.errors import CaptureError
from irc.frontend import huggingface
from irc.frontend.arranged import Arranged


def arrange(model: nn.Module, inputs: Any, dynamic: Any, frontend: str) -> Arranged:
    """The model, its inputs (cloned) and names of dynamic sizes, ready for export."""
    recognised = huggingface.is_transformers_model(model)
    if frontend == "transformers" and not recognised:
        raise CaptureError(f"{type(model).__name__} is not a transformers model: use frontend='torch'")
    args, kwargs = ((), {}) if inputs is None else clone_inputs(*split_inputs(inputs))
    if recognised and frontend != "torch":
        given = None if inputs is None else bind(model, args, kwargs)
        arranged = huggingface.arrange(model, given, dynamic_by_name(model, given, dynamic))
    else:
        if inputs is None and required_arguments(model):
            raise CaptureError(
                f"{type(model).__name__} needs example inputs ({', '.join(required_arguments(model))})\n"
                "  try: irc.capture(model, (x,)) with a tensor of the right shape and type;"
                " on the command line, FILE.py:NAME may be a function that returns (model, (x,))"
            )
        arranged = Arranged(model, *_drop_none(model, args, kwargs), names={}, metadata={"frontend": "torch"})
        arranged.strict = dynamic is not None
        arranged.names = _plain_names(model, arranged, dynamic)
    _refuse_empty(arranged)
    arranged.enlarge()
    return arranged


def split_inputs(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword inputs from what the caller gave."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    if isinstance(inputs, (tuple, list)):
        return tuple(inputs), {}
    return (inputs,), {}


def clone_inputs(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Copies: a view as example input would leak its base into the guards, and nobody's tensor is touched."""
    cloned = pytree.tree_map_only(Tensor, lambda t: t.detach().clone(), (args, kwargs))
    return tuple(cloned[0]), dict(cloned[1])


def flat(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """Flat leaves of cloned inputs."""
    return pytree.tree_leaves(clone_inputs(args, kwargs))


def required_arguments(model: nn.Module) -> list[str]:
    """Arguments of forward without a default."""
    return [
        key
        for key, parameter in inspect.signature(model.forward).parameters.items()
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]


def bind(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Inputs by argument name.

    Raises:
        CaptureError: the inputs do not fit forward's signature.
    """
    try:
        bound = inspect.signature(model.forward).bind(*args, **kwargs)
    except TypeError as error:
        raise CaptureError(f"the example inputs do not fit {type(model).__name__}.forward: {error}") from error
    found: dict[str, Any] = {}
    for key, value in bound.arguments.items():
        kind = bound.signature.parameters[key].kind
        if kind is inspect.Parameter.VAR_KEYWORD:
            found.update(value)
        else:
            found[key] = value
    return found


def dynamic_by_name(model: nn.Module, given: Mapping[str, Any] | None, dynamic: Any) -> dict[str, Any] | None:
    """The caller's `dynamic` as argument name → {dimension: name}; None stays None."""
    if dynamic is None:
        return None
    if isinstance(dynamic, Mapping):
        pairs = dict(dynamic)
    else:
        order = list(given) if given is not None else list(inspect.signature(model.forward).parameters)
        pairs = dict(zip(order, dynamic, strict=False))
    return {key: leaf_names(value) for key, value in pairs.items()}


def leaf_names(spec: Any) -> dict[int, str]:
    """`{0: "B"}`, `("B", None)` or None as {dimension: name}; torch.export Dims give their names."""
    if spec is None:
        return {}
    pairs = spec.items() if isinstance(spec, Mapping) else enumerate(spec)
    return {int(dim): _dim_name(value) for dim, value in pairs if value is not None}


def _dim_name(value: Any) -> str:
    text = value if isinstance(value, str) else getattr(value, "__name__", None)
    if not isinstance(text, str) or not text.isidentifier():
        raise CaptureError(f"a dynamic dimension is named by an identifier such as 'B', not {value!r}")
    return text


def _drop_none(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Trailing None inputs are left out: they are the defaults, and no inputs of the program."""
    order = list(bind(model, args, kwargs))
    kwargs = {key: kwargs[key] for key in sorted(kwargs, key=order.index)}
    while args and args[-1] is None and len(args) > len(required_arguments(model)):
        args = args[:-1]
    return args, {key: value for key, value in kwargs.items() if value is not None or key in required_arguments(model)}


def _plain_names(model: nn.Module, arranged: Arranged, dynamic: Any) -> dict[tuple[int, int], str]:
    names: dict[tuple[int, int], str] = {}
    if dynamic is None:
        for index, leaf in enumerate(arranged.leaves):
            if isinstance(leaf, Tensor) and leaf.ndim > 0:
                names[index, 0] = "B"
                if leaf.ndim == 2 and not leaf.is_floating_point():
                    names[index, 1] = "S"  # token ids
        return names
    by_name = bind(model, arranged.args, arranged.kwargs)
    specs = dict(dynamic) if isinstance(dynamic, Mapping) else dict(zip(by_name, dynamic, strict=False))
    unknown = sorted(set(specs) - set(by_name))
    if unknown:
        raise CaptureError(f"`dynamic` names {', '.join(unknown)}; the inputs are {', '.join(by_name)}")
    index = 0
    # The flat order is that of the call: positional inputs first, then keywords as given.
    for key, value in by_name.items():
        leaves = pytree.tree_leaves(value)
        for offset, spec in enumerate(_spread(specs.get(key), value)):
            for dim, name in leaf_names(spec).items():
                leaf = leaves[offset]
                if not isinstance(leaf, Tensor) or not -leaf.ndim <= dim < leaf.ndim:
                    raise CaptureError(f"`dynamic` names dimension {dim} of {key}, which has no such dimension")
                names[index + offset, dim % leaf.ndim] = name
        index += len(leaves)
    return names


def _spread(spec: Any, value: Any) -> list[Any]:
    """One spec a leaf, for an input that is a tensor or a nest of lists, tuples and dicts."""
    if isinstance(value, Mapping):
        keys = list(value)
        return [s for key in keys for s in _spread(None if spec is None else spec.get(key), value[key])]
    if isinstance(value, (list, tuple)):
        parts = [None] * len(value) if spec is None else list(spec)
        return [s for part, item in zip(parts, value, strict=True) for s in _spread(part, item)]
    return [spec]


def _refuse_empty(arranged: Arranged) -> None:
    for index, leaf in enumerate(arranged.leaves):
        if isinstance(leaf, Tensor) and leaf.numel() == 0:
            raise CaptureError(
                f"example input {index} is empty (shape {tuple(leaf.shape)}): give it at least one element"
            )
