"""Layered drawing of a directed acyclic graph (Sugiyama, Tagawa & Toda 1981).

Layers by longest path, long edges split by dummy vertices, crossings reduced by barycentre sweeps,
then horizontal coordinates pulled towards the neighbours while keeping a minimum distance. The dummies of an edge
are pulled towards one another, so that it runs straight down; what it passes stays in line with its own neighbours.
"""

from __future__ import annotations

import math
from collections.abc import Container, Hashable, Iterable, Mapping
from dataclasses import dataclass

import networkx as nx

Vertex = Hashable
_ORDER_SWEEPS = 12
_ALIGN_SWEEPS = 60
_PULL_OF_BEND = 0.15  # of a long edge on the vertices at its ends, and of these on it; a short edge's is 1


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
    x = _coordinates(expanded, rows, room, gap, chains)
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
    graph: nx.DiGraph, rows: list[list[Vertex]], widths: Mapping[Vertex, float], gap: float,
    chains: Mapping[tuple[Vertex, Vertex], list[Vertex]],
) -> dict[Vertex, float]:  # fmt: skip
    chain_of = {dummy: edge for edge, chain in chains.items() for dummy in chain}
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
                pulls = _pulls(graph, vertex, x, chains, chain_of)
                total = sum(pull for _, pull in pulls)
                wanted[vertex] = sum(place * pull for place, pull in pulls) / total if pulls else x[vertex]
            _separate(row, wanted, widths, gap)
            x.update(wanted)
    _straighten(rows, x, widths, gap, [*_lines(graph, chain_of), *chains.values()])
    return x


def _lines(graph: nx.DiGraph, bends: Container[Vertex]) -> list[list[Vertex]]:
    """Runs of vertices that follow one another without a branch, long edges aside."""
    below, above = {}, {}
    for vertex in graph.nodes:
        users = [n for n in graph.successors(vertex) if n not in bends]
        if vertex not in bends and len(users) == 1:
            below[vertex] = users[0]
    for vertex in graph.nodes:
        sources = [n for n in graph.predecessors(vertex) if n not in bends]
        if len(sources) == 1 and below.get(sources[0]) == vertex:
            above[vertex] = sources[0]
    lines = []
    for first in graph.nodes:
        line = [first]
        while first not in above and above.get(below.get(line[-1])) == line[-1]:
            line.append(below[line[-1]])
        if len(line) > 1:
            lines.append(line)
    return lines


def _straighten(
    rows: list[list[Vertex]], x: dict[Vertex, float], widths: Mapping[Vertex, float], gap: float,
    columns: Iterable[list[Vertex]],
) -> None:  # fmt: skip
    """Put the vertices of a column below one another where there is room for that between their neighbours."""
    sides: dict[Vertex, tuple[Vertex | None, Vertex | None]] = {}
    for row in rows:
        sides |= zip(row, zip([None, *row[:-1]], [*row[1:], None], strict=True), strict=True)
    for column in columns:
        low, high = -math.inf, math.inf
        for vertex in column:
            before, after = sides[vertex]
            if before is not None:
                low = max(low, x[before] + (widths[before] + widths[vertex]) / 2 + gap)
            if after is not None:
                high = min(high, x[after] - (widths[after] + widths[vertex]) / 2 - gap)
        if column and low <= high:
            place = min(max(sum(x[vertex] for vertex in column) / len(column), low), high)
            x.update(dict.fromkeys(column, place))


def _pulls(
    graph: nx.DiGraph, vertex: Vertex, x: Mapping[Vertex, float],
    chains: Mapping[tuple[Vertex, Vertex], list[Vertex]], chain_of: Mapping[Vertex, tuple[Vertex, Vertex]],
) -> list[tuple[float, float]]:  # fmt: skip
    """Where a vertex is pulled to, and how strongly."""
    if vertex in chain_of:
        source, target = chain_of[vertex]
        chain = chains[source, target]
        return [
            (sum(x[dummy] for dummy in chain) / len(chain), 1.0),
            ((x[source] + x[target]) / 2, _PULL_OF_BEND),
        ]
    near = [*graph.predecessors(vertex), *graph.successors(vertex)]
    return [(x[n], _PULL_OF_BEND if n in chain_of else 1.0) for n in near]


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
