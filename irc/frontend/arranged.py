"""What a frontend hands to the exporter: a module, its inputs, and the sizes that should be dynamic."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch.utils._pytree as pytree
from torch import Tensor, nn

from irc.frontend.importer import Naming

Path = tuple[Any, ...]
"""Where a leaf is among `(args, kwargs)`: keys of the pytree."""


@dataclass
class Arranged:
    """A model ready for export.

    Attributes:
        module: what is exported; its forward returns what the program should return.
        args: positional example inputs, tensors cloned.
        kwargs: keyword example inputs, tensors cloned.
        names: dimension names by (flat leaf index, dimension).
        strict: the names were asked for by the caller.
        naming: how to get from the module's names to the user's.
        around: context that is active while exporting and restores the model afterwards.
        metadata: for `program.metadata["capture"]`.
    """

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    names: dict[tuple[int, int], str]
    strict: bool = False
    naming: Naming = field(default_factory=Naming)
    around: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def leaves(self) -> list[Any]:
        return pytree.tree_leaves((self.args, self.kwargs))

    def enlarge(self) -> None:
        """Give dynamic dimensions of size 1 a larger size: tracing treats 1 as a constant."""
        leaves, spec = pytree.tree_flatten((self.args, self.kwargs))
        ones: set[str] = set()
        for (index, dim), name in self.names.items():
            if isinstance(leaves[index], Tensor) and leaves[index].shape[dim] == 1:
                ones.add(name)
        for (index, dim), name in self.names.items():
            if name in ones and isinstance(leaves[index], Tensor) and leaves[index].shape[dim] == 1:
                leaves[index] = leaves[index].repeat_interleave(_ENLARGED.get(name, 4), dim=dim)
        if ones:
            self.args, self.kwargs = pytree.tree_unflatten(leaves, spec)
            self.metadata["enlarged"] = sorted(ones)


_ENLARGED = {"B": 2}
