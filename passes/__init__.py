"""The passes that come with irc: one file each, grouped by what they are for.

Importing this package registers all of them; a new pass is a new file in one of its folders.
"""

from __future__ import annotations

import importlib
import pkgutil

from irc.core.contract import EXACT, Finding, Pass, PassContext, PassResult, Preserves, Skip, register_pass

_found: dict[str, type[Pass]] = {}
for _module in pkgutil.walk_packages(__path__, prefix=f"{__name__}."):
    _imported = importlib.import_module(_module.name)
    for _value in vars(_imported).values():
        if isinstance(_value, type) and issubclass(_value, Pass) and _value.__module__ == _module.name:
            _found[_value.__name__] = _value
globals().update(_found)

__all__ = [
    "EXACT", "Finding", "Pass", "PassContext", "PassResult", "Preserves", "Skip", "register_pass",
    *sorted(_found),
]  # fmt: skip
