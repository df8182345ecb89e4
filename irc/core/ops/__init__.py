"""The `irc::` operators: one file per family, each op with reference, fake and cost function.

A new op is one `@define_op` in a file of this folder; importing the package registers all of them.
"""

from __future__ import annotations

import importlib
import pkgutil

from irc.core.ops.registry import OpDefinition, Shape, all_ops, define_op, find_op, is_irc_op

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["OpDefinition", "Shape", "all_ops", "define_op", "find_op", "is_irc_op"]
