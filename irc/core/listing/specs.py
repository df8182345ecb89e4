"""Input and output structures as text: `((*, *), {"mask": *})`, a `*` for each flat value.

Tuples, lists and dicts with string or integer keys are written as they are. Any other container (a model's
own output class, say) has no text form that could be read without importing its code: it is written `flat
"its.name" (*, *)`, and the program that is read back takes or gives a flat tuple there. Such a program says so
in `metadata["flattened"]`.
"""

from __future__ import annotations

from typing import Any

import torch.utils._pytree as pytree
from torch.fx.immutable_collections import immutable_dict, immutable_list

from irc.core.listing.values import quoted
from irc.core.typed_graph import TypedGraph

FLATTENED = "flattened"


def spec_text(program: TypedGraph, which: str) -> str:
    """Text of `program.in_spec` or `program.out_spec` (`which` names the attribute)."""
    spec: pytree.TreeSpec = getattr(program, which)
    was = program.metadata.get(FLATTENED, {})
    if isinstance(was, dict) and isinstance(was.get(which), str):
        return f"flat {quoted(was[which])} {_text(spec)}"
    strange = _first_strange(spec)
    if strange is not None:
        stars = ", ".join("*" * spec.num_leaves)
        flat = f"({stars},)" if spec.num_leaves == 1 else f"({stars})"
        return f"flat {quoted(strange)} " + (f"({flat}, {{}})" if which == "in_spec" else flat)
    return _text(spec)


def _first_strange(spec: pytree.TreeSpec) -> str | None:
    """Name of the first container that has no text form."""
    if spec.is_leaf():
        return None
    plain = spec.type in (tuple, list, immutable_list)
    plain = plain or (spec.type in (dict, immutable_dict) and all(type(k) in (str, int) for k in spec.context))
    if not plain:
        return f"{spec.type.__module__}.{spec.type.__qualname__}"
    return next((s for s in map(_first_strange, spec.children()) if s is not None), None)


def _text(spec: pytree.TreeSpec) -> str:
    if spec.is_leaf():
        return "*"
    parts = [_text(child) for child in spec.children()]
    if spec.type in (dict, immutable_dict):
        keys = [quoted(k) if isinstance(k, str) else str(k) for k in spec.context]
        return "{" + ", ".join(f"{k}: {v}" for k, v in zip(keys, parts, strict=True)) + "}"
    if spec.type in (list, immutable_list):
        return "[" + ", ".join(parts) + "]"
    return f"({parts[0]},)" if len(parts) == 1 else f"({', '.join(parts)})"


def spec_of(structure: Any) -> pytree.TreeSpec:
    """The spec of a Python structure whose leaves are anything."""
    return pytree.tree_flatten(structure)[1]
