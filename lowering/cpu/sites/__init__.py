"""Where a program has a hand-written kernel: one file a kind of site; importing the package registers all of them."""

from __future__ import annotations

import importlib
import pkgutil

from irc.lowering.cpu.sites.registry import matchers, print_template

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["matchers", "print_template"]
