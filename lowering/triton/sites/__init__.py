"""Places in graphs that have a kernel of their own shape: importing this package registers them all."""

from __future__ import annotations

import importlib
import pkgutil

from irc.lowering.triton.sites.registry import fallback_of, matchers, print_template

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["fallback_of", "matchers", "print_template"]
