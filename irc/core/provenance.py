"""Where a node came from: source nodes, module paths and the user's file:line, kept through every rewrite.

The pass manager keeps this up to date by itself (see `track`): a pass that edits the FX graph with
plain FX calls loses nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch.fx as fx

SOURCES_KEY = "irc_sources"
ORIGIN_KEY = "irc_origin"


@dataclass(frozen=True, order=True)
class Source:
    """One captured operation: its node name at capture, the module that ran it, the user's line."""

    node: str
    module: str = ""
    location: str = ""


def sources_of(node: fx.Node) -> frozenset[Source]:
    """All captured operations that this node stands for."""
    return node.meta.get(SOURCES_KEY, frozenset())


def origin_of(node: fx.Node) -> str | None:
    """Name of the node of the previous stage whose value this node is meant to compute.

    A node that was kept computes what the node of its own name computed; a node that took over the
    uses of another computes what that one did; a helper node in between has no counterpart (None).
    """
    return node.meta.get(ORIGIN_KEY)


def module_path(node: fx.Node) -> str:
    """The deepest module path common to the node's sources, e.g. `layers.0.attn`; its own, if it was captured."""
    paths = [source.module.split(".") for source in _telling(node) if source.module]
    if not paths:
        return ""
    common = paths[0]
    for path in paths[1:]:
        length = next((i for i, (a, b) in enumerate(zip(common, path, strict=False)) if a != b), None)
        common = common[: min(len(common), len(path)) if length is None else length]
    return ".".join(common)


def location(node: fx.Node) -> str:
    """The user's `file:line` of one of the node's sources (its own first), or an empty string."""
    return next((source.location for source in _telling(node) if source.location), "")


def _telling(node: fx.Node) -> list[Source]:
    """The node's own source if it was captured itself (others are no-ops that it took over), else all of them."""
    sources = sources_of(node)
    own = [source for source in sources if source.node == node.name]
    return sorted(own or sources) if len(sources) > 1 else list(sources)


def mark_stage_start(graph: fx.Graph) -> None:
    """Make every node its own origin: what follows is compared with the graph as it is now."""
    for node in graph.nodes:
        node.meta[ORIGIN_KEY] = node.name


@contextlib.contextmanager
def track(graph_module: fx.GraphModule) -> Iterator[None]:
    """Keep provenance and origins while the body edits the graph with any FX calls."""
    created: list[fx.Node] = []
    replaced: set[str] = set()
    before = {n.name: ([i.name for i in n.all_input_nodes], sources_of(n)) for n in graph_module.graph.nodes}
    by_name = {node.name: node for node in graph_module.graph.nodes}

    def on_create(node: fx.Node) -> None:
        node.meta.pop(ORIGIN_KEY, None)
        created.append(node)
        by_name[node.name] = node

    def on_replace(old: fx.Node, new: str, user: fx.Node) -> None:
        # FX calls this once per user, with the replacing node's name.
        node = by_name.get(new)
        if node is None or node is old:
            return
        replaced.add(old.name)
        node.meta[SOURCES_KEY] = sources_of(node) | sources_of(old)
        if ORIGIN_KEY not in node.meta and old.meta.get(ORIGIN_KEY) is not None:
            node.meta[ORIGIN_KEY] = old.meta[ORIGIN_KEY]

    graph_module._register_create_node_hook(on_create)
    graph_module._register_replace_node_hook(on_replace)
    try:
        yield
    finally:
        graph_module._unregister_create_node_hook(on_create)
        graph_module._unregister_replace_node_hook(on_replace)
    _absorb(created, before, kept={node.name for node in graph_module.graph.nodes} | replaced)
    fill_missing_sources(created)


def _absorb(created: list[fx.Node], before: dict[str, tuple[list[str], frozenset[Source]]], kept: set[str]) -> None:
    """A node that took over from another stands also for what fed only that one and is gone now.

    `kept`: names that are still there, or that some node took over from: there the walk stops.
    """
    for node in created:
        origin = node.meta.get(ORIGIN_KEY)
        if node._erased or origin not in before:
            continue
        pending, seen = list(before[origin][0]), set()
        while pending:
            name = pending.pop()
            if name in kept or name in seen or name not in before:
                continue
            seen.add(name)
            inputs, sources = before[name]
            node.meta[SOURCES_KEY] = sources_of(node) | sources
            pending.extend(inputs)


def fill_missing_sources(created: list[fx.Node]) -> None:
    """Give helper nodes, which replaced nothing themselves, the sources of their users or inputs."""
    for node in reversed(created):
        if not node._erased and not sources_of(node):
            node.meta[SOURCES_KEY] = frozenset().union(*(sources_of(user) for user in node.users))
    for node in created:
        if not node._erased and not sources_of(node):
            node.meta[SOURCES_KEY] = frozenset().union(*(sources_of(i) for i in node.all_input_nodes))
