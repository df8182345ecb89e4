"""Imports go one way, as docs/architecture.md says: command line → … → passes → core."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# From bottom to top. A module may import its own layer and any layer before it.
LAYERS = (
    "irc.core",
    "irc.passes",
    "irc.interchange",
    "irc.frontend",
    "irc.lowering",
    "irc.runtime",
    "irc.view",
    "irc.compile_cache",
    "irc.compiler",
    "irc.drafting",
    "irc.serving",
    "irc.torch_backend",
    "irc.demo.corpus",
    "irc.evaluation",
    "irc.demo",
    "irc.cli",
)
# Names reached through a function body, where a lower layer offers a convenience of a higher one.
ALLOWED = {
    ("irc.core.pipeline", "irc.passes"),  # providers of pass names
}


def module_name(path: Path) -> str:
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    if parts[0] in ("passes", "lowering", "runtime"):
        parts.insert(0, "irc")
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def layer_of(name: str) -> int | None:
    for index, layer in enumerate(LAYERS):
        if name == layer or name.startswith(layer + "."):
            return index
    return None


def imports_of(tree: ast.AST) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found.add(node.module)
    return {name for name in found if name.startswith("irc.")}


SOURCES = sorted(p for folder in ("irc", "passes", "lowering", "runtime") for p in (ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_imports_point_down(path: Path) -> None:
    name = module_name(path)
    own = layer_of(name)
    if own is None:
        assert name == "irc", f"{name} belongs to no layer: add it to LAYERS and to docs/architecture.md"
        return
    for imported in imports_of(ast.parse(path.read_text())):
        other = layer_of(imported)
        assert other is not None, f"{name} imports {imported}, which belongs to no layer"
        allowed = other <= own or any(name == a and imported.startswith(b) for a, b in ALLOWED)
        assert allowed, f"{name} ({LAYERS[own]}) imports {imported} ({LAYERS[other]}), a higher layer"


def test_the_check_can_fail() -> None:
    assert imports_of(ast.parse("def f():\n    from irc.cli import main\n")) == {"irc.cli"}
    assert layer_of("irc.cli.main") > layer_of("irc.core.program")
