"""Imports go one way, as docs/architecture.md says: command line → … → passes → core, and never in circles."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import networkx as nx
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
    "irc.compiled_folder",
    "irc.compiled",
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


def imports_that_run(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """(module, name) of each import, also of those in functions; not those that only type checkers see."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            yield from ((node.module, alias.name) for alias in node.names)
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            for other in node.orelse:
                yield from imports_that_run(other)
        else:
            yield from imports_that_run(node)


def circles(sources: dict[str, str]) -> list[list[str]]:
    """Modules that need each other, directly or by way of others. `sources`: text by module name."""
    graph = nx.DiGraph()
    for name, text in sources.items():
        for module, member in imports_that_run(ast.parse(text)):
            found = f"{module}.{member}" if f"{module}.{member}" in sources else module
            parts = found.split(".")
            # Packages on the way run, too, unless the importing module is in them.
            for package in (".".join(parts[:length]) for length in range(1, len(parts))):
                if not f"{name}.".startswith(f"{package}."):
                    graph.add_edge(name, package)
            graph.add_edge(name, found)
    return [sorted(group) for group in nx.strongly_connected_components(graph) if len(group) > 1]


def test_no_module_needs_itself() -> None:
    found = circles({module_name(path): path.read_text() for path in SOURCES})
    assert not found, "imports in a circle: " + "; ".join(", ".join(group) for group in found)


def test_circles_are_found() -> None:
    inside = {"a": "import b.c", "b": "", "b.c": "def f():\n    from a import x\n", "d": "import a"}
    assert circles(inside) == [["a", "b.c"]]
    package = {"a": "import b.c", "b": "from b.d import y", "b.c": "", "b.d": "from a import x"}
    assert circles(package) == [["a", "b", "b.d"]]
    types = {"a": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import b", "b": "import a"}
    assert circles(types) == []


def test_the_check_can_fail() -> None:
    assert imports_of(ast.parse("def f():\n    from irc.cli import main\n")) == {"irc.cli"}
    assert layer_of("irc.cli.main") > layer_of("irc.core.program")
