"""Choices by measurement: `irc.compile(..., target="cpu", tune=seconds)`.

Every choice is an option of the target with a value that is right without measuring. Here other values are tried, one
option at a time, each against the best so far in turns on the same inputs; what is clearly faster stays. The outcome is
kept below `$IRC_CACHE`, in a file for each program and kind of hardware, with what each trial gave, so that the next
compilation takes it over at once and goes on with what there was no time for.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from irc.core.contract import Progress
from irc.core.cost import evaluate_cost, program_flops
from irc.core.errors import OptionError, TargetError
from irc.core.hashing import structural_hash
from irc.core.instruments import write_text
from irc.core.program import VAL, Program, dtype_name
from irc.lowering.cpp.build import cache_folder, toolchain_hash
from irc.lowering.cpu.artifact import CpuArtifact
from irc.lowering.cpu.library import default_threads
from irc.lowering.cpu.options import CpuOptions

Lower = Callable[[CpuOptions], CpuArtifact]
Measured = tuple[float, ...]
"""Seconds of each kind of run of a program."""

GAIN = 0.97
"""A candidate replaces the best so far if it takes less than this part of its time."""
_SMALL_FLOPS = 1 << 28
"""Above, loops without a template are never the faster, and trying them would take longer than everything else."""
_ROUNDS, _LEAST_SECONDS, _MOST_RUNS = 5, 0.01, 50


@dataclass(frozen=True)
class Candidate:
    """Another value for one option."""

    option: str
    value: Any

    def __str__(self) -> str:
        return f"{self.option}={self.value if not isinstance(self.value, tuple) else ' '.join(self.value)}"

    def applied(self, options: CpuOptions) -> CpuOptions:
        return dataclasses.replace(options, **{self.option: self.value})


@dataclass
class Memory:
    """What is known about a program on this hardware.

    Attributes:
        tried: candidate → its time over that of the best before it.
        kept: candidates that are part of the choice.
        gain: how much faster all of these together are than the analytic choices.
    """

    path: Path
    tried: dict[str, float] = field(default_factory=dict)
    kept: list[str] = field(default_factory=list)
    gain: float = 1.0

    @staticmethod
    def read(path: Path) -> Memory:
        """The file's content; nothing where there is none, or something else."""
        memory = Memory(path)
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            memory.tried = {str(name): float(ratio) for name, ratio in found["tried"].items()}
            memory.kept = [name for name in map(str, found["kept"]) if name in memory.tried]
            memory.gain = float(found["gain"])
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return Memory(path)
        return memory

    def write(self, hardware: dict[str, Any]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        content = {"hardware": hardware, "kept": self.kept, "gain": self.gain, "tried": self.tried}
        write_text(self.path, json.dumps(content, indent=1) + "\n")


def tune(
    lower: Lower, program: Program, options: CpuOptions, kinds: Sequence[str], seconds: float, progress: Progress | None
) -> CpuArtifact:
    """The artifact with the options that are fastest here, as far as `seconds` allow to find out.

    Args:
        lower: makes the artifact for some options.
        options: as given; what they say about an option stays.
        kinds: templates that the program uses.
        seconds: for all trials together, the compiler's time included; 0: only what was measured before.
        progress: told how many candidates are done.

    Raises:
        OptionError: the seconds are negative, or there is nothing to run the program on.
    """
    if seconds < 0:
        raise OptionError(f"tune takes seconds, not {seconds}")
    started = time.perf_counter()
    hardware = describe_hardware()
    memory = Memory.read(_place(program, options, hardware))
    listed = candidates(program, options, kinds)
    chosen = options
    for candidate in listed:
        if str(candidate) in memory.kept:
            chosen = candidate.applied(chosen)
    best, pending = lower(chosen), [one for one in listed if str(one) not in memory.tried]
    done, cost = len(listed) - len(pending), 0.0
    for candidate in pending:
        begun = time.perf_counter()
        if begun - started + cost > seconds:
            break
        other, ratio = best, math.inf
        with contextlib.suppress(TargetError):  # a flag that this compiler does not have
            other = lower(candidate.applied(best.options))
            ratio = compare(best, other, program)
            if ratio < GAIN:  # twice, lest it was somebody else's doing
                ratio = max(ratio, compare(best, other, program))
        memory.tried[str(candidate)] = ratio
        if ratio < GAIN:
            best, memory.gain = other, memory.gain / ratio
            memory.kept.append(str(candidate))
        done, cost = done + 1, time.perf_counter() - begun
        if progress is not None:
            progress("tuning", done, len(listed))
    if done > len(listed) - len(pending):
        memory.write(hardware)
    best.notes = [*best.notes, _note(memory, done, listed, done - len(listed) + len(pending))]
    return best


def candidates(program: Program, options: CpuOptions, kinds: Sequence[str]) -> list[Candidate]:
    """What is tried, what promises most first. Options that were given are left as they are."""
    found: list[Candidate] = []
    given = {f.name for f in dataclasses.fields(options) if getattr(options, f.name) != f.default}
    if "threads" not in given:
        most = default_threads()
        found += [Candidate("threads", count) for count in (1 << i for i in range(10)) if count < most]
    if "printed" not in given and evaluate_cost(program_flops(program), program) < _SMALL_FLOPS:
        found += [Candidate("printed", (kind,)) for kind in kinds]
    if "winograd" not in given and "conv2d" in kinds:
        found.append(Candidate("winograd", False))
    if "private_rows" not in given and (options.threads or default_threads()) > 1:
        found.append(Candidate("private_rows", False))
    if "share" not in given:
        found += [Candidate("share", count) for count in (512, 16384)]
    if "flags" not in given:
        found += [Candidate("flags", ("-mtune=native",)), Candidate("flags", ("-O2",))]
    return found


# -------------------------------------------------------------------- measuring


def compare(best: CpuArtifact, other: CpuArtifact, program: Program) -> float:
    """Time of the other over that of the best, in turns; of several kinds of runs the geometric mean."""
    runs = [workload(best, program), workload(other, program)]
    for side in runs:
        measure(side)
    ratios = []
    for _ in range(_ROUNDS):
        first, second = (measure(side) for side in runs)
        ratios.append(math.exp(statistics.fmean(math.log(b / a) for a, b in zip(first, second, strict=True))))
    return statistics.median(ratios)


def measure(runs: Sequence[Callable[[], Any]]) -> Measured:
    """Seconds of each run: the median of as many as take a hundredth of a second."""
    found = []
    for run in runs:
        times: list[float] = []
        while not times or (sum(times) < _LEAST_SECONDS and len(times) < _MOST_RUNS):
            started = time.perf_counter()
            run()
            times.append(time.perf_counter() - started)
        found.append(max(statistics.median(times), 1e-9))
    return tuple(found)


def workload(artifact: CpuArtifact, program: Program) -> list[Callable[[], Any]]:
    """What is measured: of a language model a token and a prompt, of anything else a run on the example inputs.

    Raises:
        OptionError: the program has no example inputs.
    """
    cache = artifact.kv_cache
    if cache is not None and cache.layout == "contiguous":
        return [_step(artifact, length, cache.max_length) for length in (1, min(64, cache.max_length // 2))]
    if program.example_inputs is None:
        raise OptionError("tune needs example inputs to measure on")
    inputs = program.example_inputs
    return [lambda: artifact.run(*inputs)]


def _step(artifact: CpuArtifact, length: int, capacity: int) -> Callable[[], Any]:
    caches, start = artifact.new_caches(1), capacity // 2 - 1 if length == 1 else 0
    tokens = torch.zeros(1, length, dtype=torch.int64)
    positions = torch.arange(start, start + length).unsqueeze(0)
    wanted = torch.tensor([[length - 1]])
    return lambda: artifact.step(caches, tokens, positions, wanted)


# -------------------------------------------------------------------- memory


def describe_hardware() -> dict[str, Any]:
    """What a measurement holds for: the processor, how many of them, the compiler and the templates."""
    model = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return {"processor": model, "threads": default_threads(), "toolchain": toolchain_hash()}


def _place(program: Program, options: CpuOptions, hardware: dict[str, Any]) -> Path:
    """The file of a program: its operations and types, not the numbers in its weights, and the options given."""

    def kind(tensor: torch.Tensor) -> str:
        return f"{dtype_name(tensor.dtype)}{list(tensor.shape)}"

    sizes = [list(value.shape) for value in program.example_inputs or () if isinstance(value, torch.Tensor)]
    types = [str(program.type_text(node)) for node in program.placeholders if VAL in node.meta]
    given = {name: value for name, value in dataclasses.asdict(options).items() if name != "profile"}
    text = json.dumps([structural_hash(program, kind), types, sizes, given], default=list)

    def digest(value: str) -> str:
        return hashlib.sha256(value.encode()).hexdigest()[:32]

    return cache_folder() / "tuned" / digest(json.dumps(hardware)) / f"{digest(text)}.json"


def _note(memory: Memory, done: int, listed: Sequence[Candidate], measured: int) -> str:
    """For the report."""
    kept = [name for name in memory.kept if name in map(str, listed)]
    result = "nothing beats the analytic choices"
    if kept:
        result = f"{', '.join(kept)}: {memory.gain:.2f} × as fast as without"
    how = f"{measured} candidates measured now" if measured else "measured before, nothing measured now"
    if done == 0:
        return "tuned: no candidate was measured, there were too few seconds"
    return f"tuned on this hardware: {result} ({done} of {len(listed)} candidates; {how})"
