"""The attention kernels of target triton on a GPU, against PyTorch's scaled_dot_product_attention: prefill and decode.

    python benchmarks/triton_attention.py --quick          # a minute on an H100
    python benchmarks/triton_attention.py --sweep          # further block sizes for each shape: is `choose` right?
    python benchmarks/triton_attention.py --quick --json   # one JSON object as the last line

32 query heads on 4 key-value heads, bf16. PyTorch has the best of its backends (cuDNN, FlashAttention, memory
efficient) and, for decode, of one call with the heads of a group as queries. Times are medians over replays of CUDA
graphs, a call each, on copies of the operands that together exceed the L2, as in a model whose weights pass through it
between two attentions: launches by Python would be longer than the kernels. Every result is compared with f32.

Only the kernels and their templates are imported, so it runs where the rest of irc cannot: torch ≥ 2.6, triton ≥ 3.6.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

HEADS, KV_HEADS = 32, 4
PAGE = 16
_BEYOND_L2 = 128 << 20
_REPLAYS = 12


def import_template() -> Any:
    """`irc.lowering.triton.templates.attention` without the packages around it, which need all that irc needs."""
    root = Path(__file__).resolve().parent.parent
    folders = {
        "irc": "irc",
        "irc.core": "irc/core",
        "irc.lowering": "lowering",
        "irc.lowering.triton": "lowering/triton",
    }
    for name, folder in folders.items():
        if name not in sys.modules:
            package = types.ModuleType(name)
            package.__path__ = [str(root / folder)]
            sys.modules[name] = package
    from irc.lowering.triton.templates import attention

    return attention


@dataclass(frozen=True)
class Case:
    """One shape. `pages`: keys and values lie in shuffled pages of 16 tokens."""

    kind: str
    batch: int
    queries: int
    length: int
    width: int
    pages: bool = False

    def __str__(self) -> str:
        size = f"S={self.queries}" if self.kind == "prefill" else f"B={self.batch} T={self.length}"
        return f"{self.kind}{' pages' if self.pages else ''} D={self.width} {size}"

    @property
    def flops(self) -> float:
        seen = self.length - (self.queries - 1) / 2  # keys of a query, on average
        return 4.0 * self.batch * HEADS * self.queries * seen * self.width

    @property
    def cache_bytes(self) -> int:
        return 2 * 2 * self.batch * KV_HEADS * self.length * self.width


@dataclass
class Operands:
    """query [B, H, S, D], keys and values [B, Hkv, T, D] in memory order [B, T, Hkv, D], and the same as pages."""

    query: Tensor
    keys: Tensor
    values: Tensor
    out: Tensor
    tables: Tensor
    paged: tuple[Tensor, Tensor] | None


def operands(case: Case) -> Operands:
    def rows(length: int, heads: int) -> Tensor:
        return torch.randn(case.batch, length, heads, case.width, device="cuda", dtype=torch.bfloat16).transpose(1, 2)

    query, keys, values = rows(case.queries, HEADS), rows(case.length, KV_HEADS), rows(case.length, KV_HEADS)
    blocks = case.batch * case.length // PAGE
    tables = torch.randperm(blocks, device="cuda").view(case.batch, -1)
    paged = None
    if case.pages:
        paged = (torch.empty(blocks, PAGE, KV_HEADS, case.width, device="cuda", dtype=torch.bfloat16),
                 torch.empty(blocks, PAGE, KV_HEADS, case.width, device="cuda", dtype=torch.bfloat16))  # fmt: skip
        for pages, x in zip(paged, (keys, values), strict=True):
            pages[tables.flatten()] = x.transpose(1, 2).reshape(blocks, PAGE, KV_HEADS, case.width)
    return Operands(query, keys, values, torch.empty_like(query), tables, paged)


class Ours:
    """The kernels on one shape."""

    def __init__(self, template: Any, case: Case, config: Any = None) -> None:
        self.template, self.case = template, case
        self.problem = template.AttentionProblem(
            width=case.width, value_width=case.width, query="bf16", cache="bf16", mask="causal", scale=case.width**-0.5
        )
        properties = torch.cuda.get_device_properties(0)
        queries = case.batch * case.queries if case.pages else case.queries
        self.config = config or template.choose(
            self.problem, case.batch, HEADS, KV_HEADS, queries, case.length, properties.multi_processor_count,
            capability=10 * properties.major + properties.minor, page_size=PAGE if case.pages else None,
        )  # fmt: skip
        count = template.scratch_elements(self.problem, self.config, case.batch * case.queries, HEADS)
        self.scratch = torch.empty(max(count, 1), device="cuda") if self.config.splits > 1 else None
        self.sequence_ids = torch.arange(case.batch, device="cuda").repeat_interleave(case.queries)
        last = torch.arange(case.length - case.queries, case.length, device="cuda")
        self.positions = last.repeat(case.batch)

    def call(self, given: Operands) -> Tensor:
        case, paged = self.case, given.paged
        if paged is None:
            self.template.launch(
                self.problem, self.config, given.out, given.query, given.keys, given.values, batch=case.batch,
                heads=HEADS, kv_heads=KV_HEADS, queries=case.queries, length=case.length,
                out_strides=given.out.stride()[:3], query_strides=given.query.stride()[:3],
                key_strides=given.keys.stride()[:3], value_strides=given.values.stride()[:3], scratch=self.scratch,
            )  # fmt: skip
            return given.out
        # Flat tokens: B = 1 has tokens in order, and decode has one a sequence, so [B, S, H, D] in memory is [N, H, D].
        tokens = (0, case.width, HEADS * case.width)
        rows = (PAGE * KV_HEADS * case.width, case.width, KV_HEADS * case.width)
        self.template.launch(
            self.problem, self.config, given.out, given.query, *paged, batch=1, heads=HEADS, kv_heads=KV_HEADS,
            queries=case.batch * case.queries, length=case.length, out_strides=tokens, query_strides=tokens,
            key_strides=rows, value_strides=rows, positions=self.positions, tables=given.tables,
            table_stride=given.tables.shape[1], sequence_ids=self.sequence_ids, page_size=PAGE, scratch=self.scratch,
        )  # fmt: skip
        return given.out


def theirs(case: Case) -> Iterator[tuple[str, Callable[[Operands], Tensor]]]:
    """PyTorch's ways; some backends refuse."""

    def call(backend: SDPBackend, packed: bool) -> Callable[[Operands], Tensor]:
        def run(x: Operands) -> Tensor:
            with sdpa_kernel([backend]):
                if packed:  # one query: its heads of a group are the queries of the group's key-value head
                    query = x.query.reshape(case.batch, KV_HEADS, HEADS // KV_HEADS, case.width)
                    out = scaled_dot_product_attention(query, x.keys, x.values)
                    return out.reshape(x.query.shape)
                causal = case.queries > 1
                return scaled_dot_product_attention(x.query, x.keys, x.values, is_causal=causal, enable_gqa=True)

        return run

    for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):
        for packed in (False, True) if case.queries == 1 else (False,):
            yield f"{backend.name.split('_')[0].lower()}{' packed' if packed else ''}", call(backend, packed)


def milliseconds(call: Callable[[Operands], Tensor], copies: list[Operands]) -> float:
    """Median of a call's time, over replays of a graph of calls on all copies in turn."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles, and lets libraries allocate
        call(copies[0])
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    calls = -(-8 // len(copies)) * len(copies)
    with torch.cuda.graph(graph):
        for i in range(calls):
            call(copies[i % len(copies)])
    times = []
    graph.replay()
    for _ in range(_REPLAYS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / calls)
    return statistics.median(times)


def error(case: Case, given: Operands, out: Tensor) -> float:
    """Largest difference to attention in f32, of the first sequence."""
    query, keys, values = (x[:1].float() for x in (given.query, given.keys, given.values))
    rows = slice(max(0, case.queries - 256), case.queries)
    keys, values = (x.repeat_interleave(HEADS // KV_HEADS, 1) for x in (keys, values))
    scores = query[:, :, rows] @ keys.transpose(-1, -2) * case.width**-0.5
    p = torch.arange(case.length - case.queries, case.length, device="cuda")[rows]
    seen = torch.arange(case.length, device="cuda") <= p.unsqueeze(-1)
    expected = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ values
    return float((out[:1, :, rows].float() - expected).abs().max())


def copy_gb_per_s() -> float:
    """What a copy on the device moves, read and written together: the limit of decode."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target, times = torch.empty_like(source), []
    for _ in range(_REPLAYS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        target.copy_(source)
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return 2 * source.numel() / statistics.median(times) / 1e6


def cases(quick: bool, sweep: bool) -> list[Case]:
    found = [Case("prefill", 1, s, s, d) for d in (64, 128) for s in (512, 2048, 8192)]
    found += [Case("prefill", 1, 2048, 2048, 128, pages=True)]
    found += [Case("decode", b, 1, t, d) for d in ((128,) if quick or sweep else (64, 128)) for b in (1, 8, 64)
              for t in (1024, 4096, 32768)]  # fmt: skip
    found += [Case("decode", b, 1, 4096, 128, pages=True) for b in (1, 8, 64)]
    most = 8 * 4096 if sweep else 1 << 30  # more keys: bound by copying, whatever the blocks
    return [case for case in found if case.batch * case.length <= most or case.kind == "prefill"]


def measure(template: Any, case: Case, limit: float, sweep: bool) -> dict[str, Any]:
    """Times of one shape."""
    torch.manual_seed(0)
    first = operands(case)
    size = case.cache_bytes * (2 if case.pages else 1)
    copies = [
        first,
        *(operands(case) for _ in range(min(64, _BEYOND_L2 // size) if case.kind == "decode" else 0)),
    ]
    ours = Ours(template, case)
    off = error(case, first, ours.call(first))
    row: dict[str, Any] = {
        "case": str(case),
        "error": off,
        "config": str(ours.config),
        "ours_ms": milliseconds(ours.call, copies),
    }
    peers, refused = {}, {}
    for name, call in theirs(case):
        try:
            peers[name] = milliseconds(call, copies)
        except RuntimeError as problem:
            refused[name] = str(problem).splitlines()[0]
            torch.cuda.synchronize()
    if peers:
        row["best"] = min(peers, key=lambda name: peers[name])
        row["torch_ms"] = peers[row["best"]]
        row["ratio"] = row["torch_ms"] / row["ours_ms"]
    row["peers_ms"], row["refused"] = peers, refused
    row["tflops"] = case.flops / row["ours_ms"] / 1e9
    row["bandwidth"] = case.cache_bytes / row["ours_ms"] / 1e6 / limit
    if sweep:
        row["sweep"] = dict(swept(template, case, ours.config, copies))
    return row


def swept(template: Any, case: Case, chosen: Any, copies: list[Operands]) -> Iterator[tuple[str, float]]:
    """Times of other configurations near the chosen one, the best ones first."""
    if case.kind == "prefill":
        shapes = [(128, 64, 8, 3), (128, 128, 8, 3), *(() if case.pages else ((64, 64, 4, 3),))]
        shapes += [(128, 64, 8, 4)] if case.width > 64 else [(128, 64, 4, 3), (128, 64, 4, 4)]
    else:
        shapes = [(chosen.block_rows, *shape) for shape in ((64, 4, 3), (64, 4, 4), (128, 4, 3), (128, 8, 3))]
    splits = (1,) if case.kind == "prefill" else sorted({chosen.splits, min(64, chosen.splits * 2)})
    others = [replace(chosen, block_rows=m, block_keys=n, warps=w, stages=2 * s - 1 if case.pages else s, splits=k)
              for m, n, w, s in shapes for k in splits]  # fmt: skip
    found: list[tuple[float, str]] = []
    for config in others:
        try:
            found.append((milliseconds(Ours(template, case, config).call, copies), str(config)))
        except Exception as problem:  # more shared memory than there is: a configuration that does not exist here
            if "out of resource" not in str(problem):
                raise
    yield from ((text, time) for time, text in sorted(found)[:6])


def show(row: dict[str, Any]) -> None:
    print(
        f"{row['case']:32} ours {row['ours_ms'] * 1e3:9.1f} µs"
        f"  {row['tflops']:6.1f} TFLOP/s  {row['bandwidth']:5.0%} of copy"
        f"  torch {row.get('torch_ms', float('nan')) * 1e3:9.1f} µs ({row.get('best', 'none')})"
        f"  ratio {row.get('ratio', float('nan')):5.2f}  error {row['error']:.1e}",
        flush=True,
    )
    for config, time in row.get("sweep", {}).items():
        print(f"    {time * 1e3:9.1f} µs {config}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="heads of 128 only for decode")
    parser.add_argument("--sweep", action="store_true", help="time further block sizes, too")
    parser.add_argument("--only", default="", help="shapes whose name contains this")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("no GPU: nothing is measured")
        if options.json:
            print(json.dumps({"gpu": None, "results": []}))
        return
    template = import_template()
    limit = copy_gb_per_s()
    name = torch.cuda.get_device_name()
    print(f"{name}, torch {torch.__version__}, a copy moves {limit:.0f} GB/s")
    rows = []
    for case in cases(options.quick, options.sweep):
        if options.only in str(case):
            rows.append(measure(template, case, limit, options.sweep))
            show(rows[-1])
            torch.cuda.empty_cache()
    if options.json:
        print(json.dumps({"gpu": name, "copy_gb_per_s": limit, "results": rows}))


if __name__ == "__main__":
    main()
