"""The kernel templates alone, against the machine's limits and PyTorch's best for the same operation.

    python benchmarks/kernels.py            # layer shapes of the 1.1B and the 135M model, attention, convolution
    python benchmarks/kernels.py --quick    # one shape of each kind, fewer rounds
    python benchmarks/kernels.py --busy     # one thread, processor time: for a machine that others use too

Kernel and peer take turns in every round; a round with one token also reads memory at full speed. Weights are copied
until they exceed the caches; a call of the kernel multiplies by all copies in turn, as a step does, one of the peer by
the next. Printed are medians over the rounds, the spread (half the distance of the quartiles), GB/s as a share of the
read bandwidth of the same rounds for one token, GFLOP/s (GOP/s) otherwise, and the ratio of the medians (peer / kernel:
above 1 the kernel is faster).
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from bandwidth import Meter
from rich.console import Console
from rich.table import Table
from torch import Tensor

from irc.core import formats
from irc.core.memory import large_memory
from irc.lowering.cpp import build
from irc.lowering.cpp.templates import attention, conv2d, float_matmul, quantized_matmul
from irc.lowering.cpp.templates.attention import AttentionProblem
from irc.lowering.cpp.templates.base import C_TYPES, MatmulProblem
from irc.lowering.cpp.templates.conv2d import ConvProblem

# (name, rows of the weight, depth): the fused layers of the 1.1B and the 135M shape.
LAYERS = (
    ("1.1B qkv", 2560, 2048),
    ("1.1B gate+up", 11264, 2048),
    ("1.1B down", 2048, 5632),
    ("135M gate+up", 3072, 576),
    ("135M down", 576, 1536),
)
CONVOLUTIONS = (
    ("7x7/2", ConvProblem(channels=3, out_channels=64, kernel=(7, 7), stride=(2, 2), padding=(3, 3)), 224),
    ("3x3 64", ConvProblem(channels=64, out_channels=64, kernel=(3, 3), padding=(1, 1)), 56),
    ("1x1 256-64", ConvProblem(channels=256, out_channels=64, kernel=(1, 1)), 56),
    ("3x3 512", ConvProblem(channels=512, out_channels=512, kernel=(3, 3), padding=(1, 1)), 7),
)
_BEYOND_CACHE = 96 << 20
# What time is read from; main() may change it to the processor time of the thread.
CLOCK: dict[str, Callable[[], float]] = {"now": time.perf_counter}
_PRELUDE = """
#include <vector>
extern "C" void* make_pool(int threads) { return new irc::Pool(threads); }
static void give_memory(irc::Worker& worker) {
    struct alignas(64) Block { std::uint8_t bytes[irc::worker_bytes]; };
    static std::vector<Block> blocks(worker.count);
    worker.memory = blocks[worker.index].bytes;
}
"""
_ROW_EPILOGUE = (
    "[&](int64_t m, int64_t n0, int64_t n1, const float* values)"
    " {{ for (int64_t n = n0; n < n1; ++n) out[m * {columns} + n] = values[n - n0]; }}"
)


@dataclass
class Case:
    """One kernel against one peer.

    Attributes:
        num_bytes: read from memory by a call, where that sets the pace; None: arithmetic does.
        operations: multiplications and additions of a product.
        products: of a call of the kernel; a call of the peer has one.
    """

    name: str
    kernel: Callable[[], None]
    peer: Callable[[], object] | None
    peer_name: str
    operations: float
    num_bytes: int | None = None
    products: int = 1


class Machine:
    """A compiled library, its pool of threads, and a buffer to read."""

    def __init__(self, functions: dict[str, str], includes: set[str], threads: int) -> None:
        isa = build.supported_isas()[-1]
        lines = [f'#include "{name}"' for name in ("irc/pool_impl.h", *sorted(includes))]
        source = "\n".join([*lines, _PRELUDE, *functions.values()])
        source = source.replace('extern "C"', 'extern "C" __attribute__((visibility("default")))')
        self.isa = isa
        self.library = ctypes.CDLL(str(build.build(source, isa=isa, name="kernels")))
        self.library.make_pool.restype = ctypes.c_void_p
        self.pool = ctypes.c_void_p(self.library.make_pool(threads))
        self._meter = Meter(threads, CLOCK["now"])

    def bandwidth(self) -> float:
        """Bytes a second that all threads read together."""
        return self._meter.read(rounds=1)

    def call(self, name: str, *arguments: object) -> None:
        getattr(self.library, name)(self.pool, *arguments)


def _pointer(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def _turns(items: list[Tensor]) -> Callable[[], Tensor]:
    """The next of the items, round and round."""
    state = {"next": 0}

    def take() -> Tensor:
        state["next"] = (state["next"] + 1) % len(items)
        return items[state["next"]]

    return take


def _function(name: str, parameters: str, body: str) -> str:
    return (
        f'extern "C" void {name}(void* pool, {parameters}) {{\n'
        f"    auto body = [&](irc::Worker& worker) {{\n        give_memory(worker);\n{body}    }};\n"
        "    static_cast<irc::Pool*>(pool)->run(body);\n}\n"
    )


def matmul_function(name: str, problem: MatmulProblem) -> str:
    """C++ of one matmul."""
    template = quantized_matmul if "int" in problem.weight else float_matmul
    args = {"worker": "worker", "x": "x", "stride": str(problem.depth), "packed": "packed + i * bytes",
            "scratch": "scratch"}  # fmt: skip
    call = template.call(problem, args, _ROW_EPILOGUE.format(columns=problem.columns))
    # As in a step: one product after the other, a barrier between, and the pool is woken once.
    body = f"        for (int64_t i = 0; i < copies; ++i) {{\n{call}            worker.barrier();\n        }}\n"
    kind = C_TYPES[problem.activation]
    return _function(name, f"const {kind}* x, const uint8_t* packed, int64_t bytes, int64_t copies, int64_t rows,"
                           " uint8_t* scratch, float* out", body)  # fmt: skip


def matmul_peer(weight: str, x: Tensor, dense: Tensor, copies: int) -> tuple[Callable[[], object], str]:
    """PyTorch's kernel for the same weight."""
    if weight == "int4.g32":
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(
            torch.randint(0, 15, tuple(dense.shape), dtype=torch.int32), 1
        )
        scales = torch.ones(dense.shape[1] // 32, dense.shape[0], 2, dtype=torch.bfloat16)
        half, take = x.bfloat16(), _turns([packed.clone() for _ in range(copies)])
        return lambda: torch.ops.aten._weight_int4pack_mm_for_cpu(half, take(), 32, scales), "_weight_int4pack_mm"
    if weight == "int8.row":
        if x.shape[0] > 1:
            layer = torch.ao.nn.quantized.dynamic.Linear(dense.shape[1], dense.shape[0])
            return lambda: layer(x), "dynamic int8 linear"
        take = _turns([torch.randint(-127, 127, tuple(dense.shape), dtype=torch.int8) for _ in range(copies)])
        half, scales = x.bfloat16(), torch.ones(dense.shape[0], dtype=torch.bfloat16)
        return lambda: torch.ops.aten._weight_int8pack_mm(half, take(), scales), "_weight_int8pack_mm"
    # PyTorch has no kernel for 8-bit floats here.
    dtype = {"f32": torch.float32, "bf16": torch.bfloat16, "f8e4m3.g32": torch.float32}[weight]
    take = _turns([dense.to(dtype) for _ in range(copies)])
    typed = x.to(dtype)
    return lambda: F.linear(typed, take()), "F.linear"


def matmul_cases(machine: Machine, layer: tuple[str, int, int], weight: str, rows: tuple[int, ...]) -> list[Case]:
    """One weight against several numbers of tokens."""
    label, columns, depth = layer
    problem = _problem(layer, weight)
    template = quantized_matmul if "int" in weight else float_matmul
    dense = torch.randn(columns, depth, generator=torch.Generator().manual_seed(0)) * 0.02
    if weight == "f8e4m3.g32":
        parts = formats.quantize_tensor(dense, formats.parse(weight))
        packed = float_matmul.pack(problem, parts.stored, parts.scale)
    elif "int" in weight:
        dtype = torch.float16 if problem.scale == "f16" else torch.float32
        packed = quantized_matmul.pack(problem, *formats.quantize_tensor(dense, formats.parse(weight), dtype))
    else:
        packed = float_matmul.pack(problem, dense.to({"f32": torch.float32, "bf16": torch.bfloat16}[weight]))
    threads = torch.get_num_threads()
    cases = []
    for count in rows:
        copies = max(1, _BEYOND_CACHE // packed.numel()) if count <= 16 else 1
        x = torch.randn(count, depth)
        typed = x.bfloat16() if problem.activation == "bf16" else x
        weights = large_memory(copies * packed.numel())
        weights.view(copies, -1).copy_(packed)
        scratch = torch.zeros(template.scratch_bytes(problem, count, threads) + 64, dtype=torch.uint8)
        out = torch.zeros(count, columns)

        def run(
            typed: Tensor = typed, weights: Tensor = weights, copies: int = copies, scratch: Tensor = scratch,
            out: Tensor = out,
        ) -> None:  # fmt: skip
            pointers = [
                _pointer(typed),
                _pointer(weights),
                ctypes.c_int64(packed.numel()),
                ctypes.c_int64(copies),
                ctypes.c_int64(typed.shape[0]),
                _pointer(scratch),
                _pointer(out),
            ]
            machine.call(_name(layer, weight), *pointers)

        peer, peer_name = matmul_peer(weight, x, dense, copies)
        num_bytes = packed.numel() if count == 1 else None
        name = f"{label} {weight}, {count} token{'s' if count > 1 else ''}"
        cases.append(Case(name, run, peer, peer_name, 2.0 * count * columns * depth, num_bytes, copies))
    return cases


def attention_case(machine: Machine, queries: int, length: int) -> Case:
    """Heads of the 1.1B shape: 32 query heads on 4 key-value heads of 64."""
    query, keys, values = torch.randn(32, queries, 64), torch.randn(4, length, 64), torch.randn(4, length, 64)
    out, scratch = torch.zeros(queries, 32, 64), torch.zeros(64 << 20, dtype=torch.uint8)

    def run() -> None:
        sizes = (ctypes.c_int64(queries), ctypes.c_int64(length))
        machine.call(
            "attend", _pointer(query), _pointer(keys), _pointer(values), *sizes, _pointer(scratch), _pointer(out)
        )

    def peer() -> object:
        return F.scaled_dot_product_attention(
            query[None], keys[None], values[None], is_causal=queries > 1, enable_gqa=True
        )

    seen = length * queries - (queries * (queries - 1) // 2 if queries > 1 else 0)
    name = f"attention, {queries} quer{'ies' if queries > 1 else 'y'} over {length} keys"
    return Case(name, run, peer, "scaled_dot_product_attention", 4.0 * 32 * 64 * seen)


def conv_case(machine: Machine, index: int) -> Case:
    """One convolution of ResNet-50, batch 1."""
    label, problem, size = CONVOLUTIONS[index]
    x = torch.randn(1, problem.channels, size, size)
    weight = torch.randn(problem.out_channels, problem.channels, *problem.kernel)
    packed = conv2d.pack(problem, weight)
    wanted = F.conv2d(x, weight, stride=problem.stride, padding=problem.padding)
    out = torch.zeros_like(wanted)

    def run() -> None:
        machine.call(f"conv{index}", _pointer(x), _pointer(packed), _pointer(out))

    def peer() -> object:
        return F.conv2d(x, weight, stride=problem.stride, padding=problem.padding)

    return Case(f"conv {label} at {size}", run, peer, "F.conv2d", 2.0 * wanted.numel() * problem.places)


def _name(layer: tuple[str, int, int], weight: str) -> str:
    return f"matmul_{layer[1]}_{layer[2]}_{weight.replace('.', '_')}"


def _problem(layer: tuple[str, int, int], weight: str) -> MatmulProblem:
    return MatmulProblem(
        rows="rows", columns=layer[1], depth=layer[2], weight=weight, scale="f16" if weight == "int4.g32" else "f32",
        activation="bf16" if weight == "bf16" else "f32",
    )  # fmt: skip


def _functions(layers: list[tuple[str, int, int]], weights: list[str]) -> tuple[dict[str, str], set[str]]:
    """All C++ functions by name, and the headers that they need."""
    functions = {_name(x, w): matmul_function(_name(x, w), _problem(x, w)) for x in layers for w in weights}
    problem = AttentionProblem(width=64, value_width=64, mask="causal", scale=0.125)
    args = {"worker": "worker", "scratch": "scratch", "batch": "1", "heads": "32", "kv_heads": "4",
            "queries": "queries", "length": "length", "query": "query", "keys": "keys", "values": "values",
            "query_strides": "0, queries * 64, 64"}  # fmt: skip
    args |= {f"{name}_strides": "0, length * 64, 64" for name in ("keys", "values")}
    copy = "[&](int64_t, int64_t h, int64_t s, const float* from) { std::memcpy(out + (s * 32 + h) * 64, from, 256); }"
    parameters = "const float* query, const float* keys, const float* values, int64_t queries, int64_t length,"
    functions["attend"] = _function(
        "attend", f"{parameters} uint8_t* scratch, float* out", attention.call(problem, args, copy)
    )
    for index, (_, convolution, size) in enumerate(CONVOLUTIONS):
        out_size = (size + 2 * convolution.padding[0] - convolution.kernel[0]) // convolution.stride[0] + 1
        args = {"worker": "worker", "x": "x", "packed": "packed", "batch": "1", "height": str(size), "width": str(size),
                "out_height": str(out_size), "out_width": str(out_size)}  # fmt: skip
        copy = (
            "[&](int64_t m, int64_t n0, int64_t n1, const float* from)"
            f" {{ std::memcpy(out + m * {convolution.out_channels} + n0, from, (n1 - n0) * 4); }}"
        )
        body = conv2d.call(convolution, args, copy)
        functions[f"conv{index}"] = _function(f"conv{index}", "const float* x, const uint8_t* packed, float* out", body)
    includes = {*quantized_matmul.INCLUDES, *float_matmul.INCLUDES, *attention.INCLUDES, *conv2d.INCLUDES}
    return functions, includes


def _timed(run: Callable[[], object]) -> float:
    """Seconds a call, over enough calls for 20 ms."""
    run()
    calls, start = 0, CLOCK["now"]()
    while True:
        run()
        calls += 1
        passed = CLOCK["now"]() - start
        if passed > 0.02:
            return passed / calls


def _spread(samples: list[float]) -> float:
    first, _, third = statistics.quantiles(samples, n=4)
    return (third - first) / 2


def measure(machine: Machine, case: Case, rounds: int) -> dict[str, object]:
    """Kernel, peer and read bandwidth in turn."""
    own: list[float] = []
    peers: list[float] = []
    shares: list[float] = []
    for _ in range(rounds):
        own.append(_timed(case.kernel) / case.products)
        if case.num_bytes is not None:
            shares.append(case.num_bytes / own[-1] / machine.bandwidth())
        if case.peer is not None:
            peers.append(_timed(case.peer))
    median = statistics.median(own)
    return {
        "name": case.name,
        "us": median * 1e6,
        "spread_us": _spread(own) * 1e6,
        "gflops": case.operations / median / 1e9,
        "bandwidth_share": statistics.median(shares) if shares else None,
        "peer": case.peer_name,
        "peer_us": statistics.median(peers) * 1e6 if peers else None,
        "ratio": statistics.median(peers) / median if peers else None,
        "ratio_spread": _spread([peer / mine for peer, mine in zip(peers, own, strict=True)]) if peers else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one shape of each kind, 5 rounds instead of 15")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--busy", action="store_true", help="one thread, measured in processor time")
    options = parser.parse_args()
    if options.busy:
        options.threads = 1
        CLOCK["now"] = time.thread_time
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    layers = list(LAYERS[:1] if options.quick else LAYERS)
    weights = ["int4.g32", "int8.row", "f8e4m3.g32", "bf16", "f32"]
    functions, includes = _functions(layers, weights)
    machine = Machine(functions, includes, options.threads)
    rounds = 5 if options.quick else 15
    table = Table("operation", "µs", "±", "GOP/s", "of bandwidth", "peer", "peer µs", "peer / ours", "±")
    results = []

    def show(case: Case) -> None:
        found = measure(machine, case, rounds)
        results.append(found)
        share = found["bandwidth_share"]
        table.add_row(
            case.name, f"{found['us']:.1f}", f"{found['spread_us']:.1f}", f"{found['gflops']:.0f}",
            "" if share is None else f"{share:.0%}", case.peer_name, f"{found['peer_us']:.1f}",
            f"{found['ratio']:.2f}", f"{found['ratio_spread']:.2f}",
        )  # fmt: skip

    with torch.no_grad():
        for layer in layers:
            for weight in weights:
                for case in matmul_cases(machine, layer, weight, (1, 8, 512)):
                    show(case)
        for queries, length in ((1, 1024), (1, 4096), (8, 1024), (512, 512)):
            show(attention_case(machine, queries, length))
        for index in range(1 if options.quick else len(CONVOLUTIONS)):
            show(conv_case(machine, index))
    console = Console(width=150)
    console.print(f"{options.threads} threads, {machine.isa}, read bandwidth {machine.bandwidth() / 1e9:.1f} GB/s")
    console.print(table)
    if options.json:
        print(json.dumps({"isa": machine.isa, "threads": options.threads, "results": results}))


if __name__ == "__main__":
    main()
