"""Matrix products of target `triton`: which tile computes a linear layer, and the lines of the kernel that call it.

`choose` decides by arithmetic, for a device with `multiprocessors`; `candidates` lists what measurement may choose
from. `printed` gives the lines in which a kernel gets `m`, `n` and `acc` from the library; K, N and the format stand in
them as numbers, the sizes of the tile as names of the kernel's constexpr parameters (`constants`), so that one kernel
serves every configuration of a kind. `launch` runs the kernel of the kind that a configuration is of.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from math import ceil
from typing import Any, Literal

Kind = Literal["tiles", "vector"]
KINDS: tuple[Kind, ...] = ("tiles", "vector")

# Bytes of a number in memory.
WEIGHT_BYTES: Mapping[str, float] = {"f32": 4, "f16": 2, "bf16": 2, "int8": 1, "int4": 0.5}
SCALE_BYTES: Mapping[str, float] = {"f32": 4, "f16": 2, "bf16": 2}
_CONSTANTS: Mapping[Kind, tuple[str, ...]] = {"tiles": ("BM", "BN", "BK", "SPLIT"), "vector": ("BN", "BK", "STAGES")}

# What the choices are weighed with: an H100, per multiprocessor and clock.
_BYTES_PER_CLOCK = 13.0  # of 3.0 TB/s
_MACS_PER_CLOCK = {"f32": 170.0, "f16": 2048.0, "bf16": 2048.0}  # f32: three products of tf32
_UNPACKED_PER_CLOCK = 24.0  # integers made into numbers: five instructions each
_SHARED_BYTES = 160 << 10  # that a block may use; sm_80 has 163 KiB
_MULTIPROCESSOR_BYTES = 220 << 10  # shared memory of a multiprocessor
_LATENCY_CLOCKS = 1000.0  # from asking for bytes of the weight until they are there
_FILL_CLOCKS = 2000.0  # until the first products of a tile, and for its end
# Share of the peak that tiles reach: small ones read more of shared memory for each product.
_EFFICIENCY = {16: 0.15, 32: 0.3, 64: 0.5, 128: 0.75, 256: 0.85}


@dataclass(frozen=True, kw_only=True)
class MatmulProblem:
    """y[M, N] = x[M, K] · w[N, K]ᵀ.

    Attributes:
        columns: N.
        depth: K.
        activation: type of x, and of the layer: `f32`, `f16`, `bf16`.
        weight: `f32`, `f16`, `bf16`, or integers `int8`, `int4` (two to a byte).
        group: neighbours along K that share a scale; None: a scale a row (or a float weight).
        signed: the integers are: int8, or int4 stored with 8 added.
        asymmetric: integers have zero points.
        scale: type of the scales: `f32`, `f16`, `bf16`.
    """

    columns: int
    depth: int
    activation: str
    weight: str
    group: int | None = None
    signed: bool = True
    asymmetric: bool = False
    scale: str = "f32"

    @property
    def bits(self) -> int | None:
        """Bits of an integer; None for a float weight."""
        return {"int8": 8, "int4": 4}.get(self.weight)

    @property
    def weight_bytes(self) -> float:
        """Bytes per number of the weight, with its scale."""
        group = 0.0 if self.bits is None else SCALE_BYTES[self.scale] / (self.group or self.depth)
        return WEIGHT_BYTES[self.weight] + group


@dataclass(frozen=True, kw_only=True)
class Config:
    """How a kernel computes tiles of [BM, BN] results, BK of K at a time.

    `vector`: one row, on the general cores. `tiles`: on the tensor cores; with SPLIT above 1, different warps multiply
    different parts of BK.
    """

    kind: Kind
    BM: int
    BN: int
    BK: int
    SPLIT: int = 1
    num_warps: int = 4
    num_stages: int = 3

    @property
    def constants(self) -> dict[str, int]:
        """Values of the kernel's constexpr parameters."""
        values = {"BM": self.BM, "BN": self.BN, "BK": self.BK, "SPLIT": self.SPLIT, "STAGES": self.num_stages}
        return {name: values[name] for name in constants(self.kind)}

    def blocks(self, rows: int, columns: int) -> int:
        """Size of the launch grid."""
        return -(-rows // self.BM) * -(-columns // self.BN)


def refuses(problem: MatmulProblem) -> str | None:
    """Why no kernel takes a product, or None if they do."""
    if problem.activation not in SCALE_BYTES:
        return f"products of {problem.activation}"
    if problem.weight not in WEIGHT_BYTES:
        return f"weights of {problem.weight}"
    if problem.bits is None:
        return None
    if problem.scale not in SCALE_BYTES:
        return f"scales of {problem.scale}"
    if problem.weight == "int4" and problem.depth % 2:
        return f"two integers to a byte in rows of {problem.depth}"
    if problem.group is not None and problem.depth % problem.group:
        return f"groups of {problem.group} in rows of {problem.depth}"
    return None


def takes_vector(problem: MatmulProblem) -> bool:
    """Whether the kernel of kind `vector` takes the weight: groups are powers of two of at least a word's integers."""
    if problem.bits is None or problem.group in (None, problem.depth):
        return True
    return problem.group & (problem.group - 1) == 0 and problem.group >= 32 // problem.bits


def constants(kind: Kind) -> tuple[str, ...]:
    """Names of the constexpr parameters of a kernel of that kind."""
    return _CONSTANTS[kind]


def printed(problem: MatmulProblem, kind: Kind, precision: str = "tf32x3") -> list[str]:
    """Lines that define m [BM, 1], n [1, BN] and acc f32[BM, BN] of a kernel.

    They read its pointers x (dense rows), weight, scale and zero (the last two only if the problem has them), the
    number of rows M, its constexpr parameters, and the library's modules `matmul` and `matvec`. Programs are numbered
    on axis 0; m and n run beyond M and N, so an epilogue masks both. `precision`: of f32 products, as in `tl.dot`.
    """
    height, sizes = ("BM", "BK, SPLIT") if kind == "tiles" else ("1", "BK, STAGES")
    numbers = f"m, n, M, {problem.columns}, {problem.depth}, {problem.depth}"
    exact = f", {precision!r}" if kind == "tiles" and problem.activation == "f32" else ""
    function = "matmul.{}_tile" if kind == "tiles" else "matvec.{}_vector"
    if problem.bits is None:
        call = f"{function.format('float')}(x, weight, {numbers}, {sizes}{exact})"
    else:
        zero = "zero" if problem.asymmetric else "None"
        form = f"{problem.bits}, {problem.signed}, {problem.group or problem.depth}"
        call = f"{function.format('integer')}(x, weight, scale, {zero}, {numbers}, {form}, {sizes}{exact})"
    return [f"m, n = matmul.tile_of(tl.program_id(0), M, {problem.columns}, {height}, BN)", f"acc = {call}"]


def printed_module(problem: MatmulProblem, precision: str = "tf32x3") -> str:
    """A module with the kernels alone, which store y [M, N]: for tests and measurements."""
    pointers = ["out", "x", "weight", *(["scale"] if problem.bits else []), *(["zero"] if problem.asymmetric else [])]
    lines = ["import triton", "import triton.language as tl", "from irc.lowering.triton.library import matmul, matvec"]
    for kind in KINDS:
        parameters = ", ".join([*pointers, "M", *(f"{name}: tl.constexpr" for name in constants(kind))])
        lines += ["", "@triton.jit", f"def {kind}({parameters}):"]
        lines += [f"    {line}" for line in printed(problem, kind, precision)]
        store = f"out + m.to(tl.int64) * {problem.columns} + n, acc.to(out.dtype.element_ty)"
        lines.append(f"    tl.store({store}, mask=(m < M) & (n < {problem.columns}))")
    return "\n".join(lines) + "\n"


def launch(
    problem: MatmulProblem, config: Config, kernels: Mapping[str, Any], rows: int, arguments: tuple[Any, ...]
) -> None:
    """Run the kernel of the configuration's kind; nothing for 0 rows."""
    if rows:
        grid = (config.blocks(rows, problem.columns),)
        kernels[config.kind][grid](
            *arguments, **config.constants, num_warps=config.num_warps, num_stages=config.num_stages
        )


@cache
def choose(problem: MatmulProblem, rows: int, multiprocessors: int = 132) -> Config:
    """The configuration for `rows` rows that the arithmetic below finds fastest."""
    if rows == 1 and takes_vector(problem):
        return _vector(problem, multiprocessors)
    if rows <= 16:
        return _few_rows(problem, multiprocessors)
    found = list(_tiles(problem))
    return min(found, key=lambda config: _clocks(problem, config, rows, multiprocessors))


def candidates(problem: MatmulProblem, rows: int, multiprocessors: int = 132) -> list[Config]:
    """Configurations worth measuring, the chosen one first."""
    found = [choose(problem, rows, multiprocessors)]
    if rows <= 4 and takes_vector(problem):  # a block for each row, the weight from the L2 cache for all but one
        found += [
            Config(kind="vector", BM=1, BN=columns, BK=depth, num_warps=warps, num_stages=stages)
            for columns in (2, 4, 8, 16)
            for depth in {_depth(problem, 512), _depth(problem, 1024)}
            for warps in (2, 4, 8)
            for stages in (3, 5)
            if columns >= warps // 2 and columns * depth <= 128 * 32 * warps  # numbers a thread
        ]
    if rows <= 16:
        found += [
            _few(problem, columns, split, multiprocessors)
            for columns in (16, 32, 64, 128)
            for split in (1, 2, 4)
            if columns * split >= 8 * 4  # each of 4 warps has an instruction's columns
        ]
    else:
        found += sorted(_tiles(problem), key=lambda config: _clocks(problem, config, rows, multiprocessors))[:8]
    return list(dict.fromkeys(found))


def _vector(problem: MatmulProblem, multiprocessors: int) -> Config:
    """One row. What counts is the number of bytes under way: about 20 KiB a multiprocessor for 3 TB/s at 0.8 µs.

    A warp copies 512 bytes of a row of the weight at once, 16 a thread. A block of 4 warps takes 8 rows, two a warp, so
    that what a thread holds of x serves twice: 4 KiB a step, up to 16 KiB in the 4 steps ahead. With less than 3 blocks
    a multiprocessor, fewer rows a block: an uneven end costs more than reading x from the L2 cache again.
    """
    columns = 8
    while columns > 2 and problem.columns < 3 * multiprocessors * columns:
        columns //= 2
    depth = _depth(problem, 512)
    return Config(kind="vector", BM=1, BN=columns, BK=depth, num_warps=4, num_stages=5)


def _depth(problem: MatmulProblem, row_bytes: int) -> int:
    """BK whose part of a row of the weight is that many bytes; half of it where that divides K; less for short rows."""
    depth = int(row_bytes / WEIGHT_BYTES[problem.weight])
    if problem.depth % depth and problem.depth % (depth // 2) == 0:
        depth //= 2
    while depth // 2 >= max(problem.depth, 64):
        depth //= 2
    return depth


def _few_rows(problem: MatmulProblem, multiprocessors: int) -> Config:
    """Up to 16 rows, one instruction high; the weight's bytes count, and x is read again by every block.

    The most columns a block that leave two blocks a multiprocessor, down to 16: x of 16 rows is as many bytes as 64
    rows of 4 bits.
    """
    columns = 32 if problem.activation == "f32" else 128
    while columns > 16 and problem.columns < 2 * multiprocessors * columns:
        columns //= 2
    return _few(problem, columns, 4 if columns <= 32 else 2, multiprocessors)


def _few(problem: MatmulProblem, columns: int, split: int, multiprocessors: int) -> Config:
    """BK: 4 KiB of the weight a step, but each of the split's parts at least 32 deep; up to 4 steps ahead.

    A block that has a multiprocessor to itself may use all of its shared memory, others half.
    """
    depth = int(4096 / columns / WEIGHT_BYTES[problem.weight])
    depth = min(max(depth, 32 * split, 64), 512)
    if problem.activation == "f32":  # each number is taken apart in registers: 16 a thread
        depth = max(min(depth, 2048 // columns), 16 * split)
    alone = problem.columns <= multiprocessors * columns
    stages = 5
    while stages > 2 and _shared(problem, 16, columns, depth, stages) > _SHARED_BYTES // (1 if alone else 2):
        stages -= 1
    return Config(kind="tiles", BM=16, BN=columns, BK=depth, SPLIT=split, num_warps=4, num_stages=stages)


def _tiles(problem: MatmulProblem) -> Iterator[Config]:
    """Tiles for many rows.

    f32[BM, BN] lies in registers, 64 a thread with 8 warps at 128 x 128. The parts of f32 and integers that become
    numbers need as many again, so their tiles are smaller; two blocks on a multiprocessor then unpack and multiply in
    turns. Height saves unpacking, which is done for each row block again.
    """
    wide, integers = problem.activation == "f32", problem.bits is not None
    largest = 64 * 128 if wide else 128 * 128 if integers else 128 * 256
    for height in (32, 64, 128, 256) if integers and not wide else (32, 64, 128):
        for columns in (16, 32, 64, 128, 256):
            area = height * columns
            if not 512 <= area <= largest:
                continue
            depth = 32 if wide else 64 if area > 64 * 64 else 128  # small tiles wait for memory, not for products
            warps = 8 if area >= (64 * 128 if wide or integers else 128 * 128) else 4
            stages = 4
            while stages > 2 and _shared(problem, height, columns, depth, stages) > _SHARED_BYTES:
                stages -= 1
            yield Config(kind="tiles", BM=height, BN=columns, BK=depth, num_warps=warps, num_stages=stages)


def _shared(problem: MatmulProblem, height: int, columns: int, depth: int, stages: int) -> float:
    """Bytes of shared memory: x and the weight for each stage, and the weight once more as numbers."""
    number = WEIGHT_BYTES[problem.activation]
    unpacked = columns * depth * number if problem.bits is not None else 0.0
    return stages * depth * (height * number + columns * WEIGHT_BYTES[problem.weight]) + unpacked


def _clocks(problem: MatmulProblem, config: Config, rows: int, multiprocessors: int) -> float:
    """Estimate for a whole product: rounds of tiles, each limited by memory, by its latency, or by arithmetic.

    Blocks that share a multiprocessor share its arithmetic and its part of the bandwidth, but wait at the same time.
    Unpacking is added to the products: within a block, the same warps do both in turn.
    """
    share = (_EFFICIENCY[config.BM] * _EFFICIENCY[config.BN]) ** 0.5
    arithmetic = config.BM * config.BN / (_MACS_PER_CLOCK[problem.activation] * share)
    if problem.bits is not None:
        arithmetic += config.BN / _UNPACKED_PER_CLOCK
    # From the L2 cache, twice as fast as memory; the weight once from memory for all its row blocks.
    number = WEIGHT_BYTES[problem.activation]
    memory = (config.BM * number + config.BN * problem.weight_bytes) / (2 * _BYTES_PER_CLOCK)
    latency = _LATENCY_CLOCKS / ((config.num_stages - 1) * config.BK)
    tiles = config.blocks(rows, problem.columns)
    together = min(ceil(tiles / multiprocessors), _blocks_that_fit(problem, config))
    rounds = ceil(tiles / (multiprocessors * together))
    return rounds * (problem.depth * max(together * arithmetic, together * memory, latency) + _FILL_CLOCKS)


def _blocks_that_fit(problem: MatmulProblem, config: Config) -> int:
    """Blocks on a multiprocessor, by its shared memory and its 65536 registers."""
    shared = _shared(problem, config.BM, config.BN, config.BK, config.num_stages)
    threads = 32 * config.num_warps
    registers = 60 + config.BM * config.BN / threads * (2 if problem.activation == "f32" else 1)
    return max(1, min(int(_MULTIPROCESSOR_BYTES / shared), int(65536 / (threads * registers))))
