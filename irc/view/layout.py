"""Layered drawing of a directed acyclic graph (Sugiyama, Tagawa & Toda 1981).

Layers by longest path, long edges split by dummy vertices, crossings reduced by barycentre sweeps,
then horizontal coordinates pulled towards the neighbours while keeping a minimum distance.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass

import networkx as nx

Vertex = Hashable
_ORDER_SWEEPS = 12
_ALIGN_SWEEPS = 60


@dataclass(frozen=True)
class Layout:
    """Places of vertices and bends of edges.

    Attributes:
        x: horizontal centre of each vertex, in the units of the given widths.
        layer: layer number of each vertex, 0 on top.
        bends: for each edge, the (x, layer) points between its ends, from source to destination.
    """

    x: dict[Vertex, float]
    layer: dict[Vertex, int]
    bends: dict[tuple[Vertex, Vertex], list[tuple[float, int]]]


def layered_layout(
    vertices: Iterable[Vertex], edges: Iterable[tuple[Vertex, Vertex]], widths: Mapping[Vertex, float], *, gap: float
) -> Layout:
    """Place the vertices of an acyclic graph in layers, edges pointing down."""
    graph = nx.DiGraph()
    graph.add_nodes_from(vertices)
    graph.add_edges_from(edges)
    layer = _assign_layers(graph)
    expanded, chains = _split_long_edges(graph, layer)
    rows: list[list[Vertex]] = [[] for _ in range(max(layer.values(), default=-1) + 1)]
    for vertex in expanded.nodes:
        rows[layer[vertex]].append(vertex)
    _order_rows(expanded, rows)
    # A dummy is a line, not a box: it needs little room.
    room = {v: widths.get(v, gap) for v in expanded.nodes}
    x = _coordinates(expanded, rows, room, gap)
    bends = {edge: [(x[v], layer[v]) for v in chain] for edge, chain in chains.items()}
    return Layout({v: x[v] for v in graph.nodes}, {v: layer[v] for v in graph.nodes}, bends)


def _assign_layers(graph: nx.DiGraph) -> dict[Vertex, int]:
    """Longest path from the top; then vertices without inputs move down next to their first user."""
    layer: dict[Vertex, int] = {}
    order = list(nx.topological_sort(graph))
    for vertex in order:
        layer[vertex] = max((layer[p] + 1 for p in graph.predecessors(vertex)), default=0)
    for vertex in reversed(order):
        users = [layer[s] for s in graph.successors(vertex)]
        if users and not graph.in_degree(vertex):
            layer[vertex] = min(users) - 1
    lowest = min(layer.values(), default=0)
    return {vertex: value - lowest for vertex, value in layer.items()}


def _split_long_edges(
    graph: nx.DiGraph, layer: dict[Vertex, int]
) -> tuple[nx.DiGraph, dict[tuple[Vertex, Vertex], list[Vertex]]]:
    expanded = nx.DiGraph()
    expanded.add_nodes_from(graph.nodes)
    chains: dict[tuple[Vertex, Vertex], list[Vertex]] = {}
    for source, target in graph.edges:
        chain: list[Vertex] = [("bend", source, target, i) for i in range(layer[source] + 1, layer[target])]
        for offset, dummy in enumerate(chain):
            layer[dummy] = layer[source] + 1 + offset
        nx.add_path(expanded, [source, *chain, target])
        chains[source, target] = chain
    return expanded, chains


def _order_rows(graph: nx.DiGraph, rows: list[list[Vertex]]) -> None:
    """Sort every row by the mean position of its neighbours in the row before, down and up in turn."""
    position = {v: float(i) for row in rows for i, v in enumerate(row)}
    for sweep in range(_ORDER_SWEEPS):
        downwards = sweep % 2 == 0
        for row in rows if downwards else reversed(rows):
            keys = {}
            for vertex in row:
                near = list(graph.predecessors(vertex) if downwards else graph.successors(vertex))
                keys[vertex] = sum(position[n] for n in near) / len(near) if near else position[vertex]
            row.sort(key=keys.__getitem__)
            for i, vertex in enumerate(row):
                position[vertex] = float(i)


def _coordinates(
    graph: nx.DiGraph, rows: list[list[Vertex]], widths: Mapping[Vertex, float], gap: float
) -> dict[Vertex, float]:
    x: dict[Vertex, float] = {}
    for row in rows:
        cursor = 0.0
        for vertex in row:
            x[vertex] = cursor + widths[vertex] / 2
            cursor += widths[vertex] + gap
        for vertex in row:
            x[vertex] -= (cursor - gap) / 2
    for sweep in range(_ALIGN_SWEEPS):
        for row in rows if sweep % 2 == 0 else reversed(rows):
            wanted = {}
            for vertex in row:
                near = [*graph.predecessors(vertex), *graph.successors(vertex)]
                wanted[vertex] = sum(x[n] for n in near) / len(near) if near else x[vertex]
            _separate(row, wanted, widths, gap)
            x.update(wanted)
    return x


def _separate(row: list[Vertex], wanted: dict[Vertex, float], widths: Mapping[Vertex, float], gap: float) -> None:
    """Least-squares places with minimum distances and fixed order (pool adjacent violators)."""
    blocks: list[tuple[float, int]] = []  # mean of (wanted - offset), number of vertices
    offsets, offset = [], 0.0
    for i, vertex in enumerate(row):
        if i:
            offset += (widths[row[i - 1]] + widths[vertex]) / 2 + gap
        offsets.append(offset)
        blocks.append((wanted[vertex] - offset, 1))
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            (a, n), (b, m) = blocks[-2], blocks[-1]
            blocks[-2:] = [((a * n + b * m) / (n + m), n + m)]
    places = [mean for mean, count in blocks for _ in range(count)]
    for vertex, place, shift in zip(row, places, offsets, strict=True):
        wanted[vertex] = place + shift
