"""The target `cpu`: check, and lowering from a program to an artifact."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from irc.core import memory
from irc.core.contract import Pass, Progress
from irc.core.errors import TargetError
from irc.core.program import Program
from irc.core.target import Artifact, Coverage, Options, Target, read_options, register_target
from irc.lowering.cpp.build import Build, building, find_compiler, precompile, require_compiler
from irc.lowering.cpp.printer import unsupported
from irc.lowering.cpu.artifact import FORMAT, CpuArtifact, choose_isa
from irc.lowering.cpu.barriers import Private, find_private
from irc.lowering.cpu.options import CpuOptions
from irc.lowering.cpu.sites import matchers
from irc.lowering.cpu.source import dims_of, hints_of, print_program
from irc.lowering.cpu.tuning import tune
from irc.lowering.cpu.weights import WeightBlock
from irc.lowering.kernels.coverage import check
from irc.lowering.kernels.definitions import Definer
from irc.lowering.kernels.fusion import Schedule, make_schedule
from irc.lowering.kernels.kernel import Kernel
from irc.lowering.kernels.memory import plan_memory
from irc.lowering.kernels.prepare import fold_constants
from irc.lowering.kernels.signature import signature_of
from irc.lowering.kernels.sites import first_match
from irc.lowering.reference.target import merges_of_siblings, portable_passes


@register_target
class CpuTarget(Target):
    """C++ for the processor of this machine."""

    name: ClassVar[str] = "cpu"
    description: ClassVar[str] = "the whole program as one C++ function, built by the system's compiler"
    options_type: ClassVar[type] = CpuOptions
    artifact_type: ClassVar[type[Artifact]] = CpuArtifact

    def available(self) -> str | None:
        if find_compiler() is not None:
            return None
        return "no C++ compiler was found ($CXX, g++, clang++); install one, or use target 'reference'"

    def check(self, program: Program) -> Coverage:
        return _check(program, CpuOptions())

    def check_with(self, program: Program, options: Options | None) -> Coverage:
        return _check(program, read_options(CpuOptions, options, what="target cpu"))

    def get_ready(self, num_bytes: int, options: Options | None) -> None:
        memory.expect(num_bytes)
        chosen = read_options(CpuOptions, options, what="target cpu")
        if not chosen.flags:
            precompile(choose_isa(chosen.isa))

    def lower(self, program: Program, options: Options | None = None) -> CpuArtifact:
        chosen = read_options(CpuOptions, options, what="target cpu")
        require_compiler()
        return _lower(program, chosen, _Made())

    def lower_tuned(
        self, program: Program, options: Options | None, seconds: float, progress: Progress | None = None
    ) -> CpuArtifact:
        """As `lower`, with what is fastest here of the choices that options do not settle: see `tuning.py`."""
        chosen = read_options(CpuOptions, options, what="target cpu")
        require_compiler()
        return tune(partial(_lower, program, made=_Made()), program, chosen, _printable_kinds(program, chosen),
                    seconds, progress)  # fmt: skip

    def default_passes(self, program: Program) -> list[Pass]:
        """Sibling layers as one, where there are any: each layer of a step costs its threads a meeting."""
        return [*merges_of_siblings(program), *portable_passes(program)]


@dataclass
class _Made:
    """Of one program, what does not depend on all options: schedules, and packed weights by what lies where."""

    schedules: dict[str, tuple[Program, list[str], Schedule]] = field(default_factory=dict)
    blocks: dict[tuple[tuple[str, int, int], ...], Tensor] = field(default_factory=dict)

    def schedule(self, program: Program, chosen: CpuOptions) -> tuple[Program, list[str], Schedule]:
        """(program with folded constants, notes, schedule)."""
        # Options that only matter after the schedule is made are left out.
        key = repr(replace(chosen, threads=None, flags=(), save_isas=(), profile=False, share=None, private_rows=True))
        if key not in self.schedules:
            own, notes = fold_constants(program, _matchers(chosen))
            self.schedules[key] = own, notes, make_schedule(own, _matchers(chosen))
        own, notes, schedule = self.schedules[key]
        return own, list(notes), schedule


def _lower(program: Program, chosen: CpuOptions, made: _Made) -> CpuArtifact:
    """The artifact; what was made before for other options is used where it holds."""
    _check(program, chosen).require(program)
    own, notes, schedule = made.schedule(program, chosen)
    _require_printable(schedule)
    weights = WeightBlock()
    private = find_private(schedule) if chosen.private_rows else Private()
    plan = plan_memory(schedule, hints_of(own), private.buffers)
    printed = print_program(
        own, schedule, plan, weights, dims_of(own), private, profile=chosen.profile, share=chosen.share
    )
    kernels = sum(isinstance(step, Kernel) for step in schedule.steps)
    notes.append(
        f"{own.num_nodes} operations in {kernels} kernels ({printed.num_functions} distinct) and"
        f" {len(schedule.steps) - kernels} template calls, {printed.num_barriers} barriers a step"
        f" ({printed.num_barriers_alone} with one token)"
    )
    manifest = _manifest(own, schedule, weights, notes)
    if chosen.profile:
        manifest["parts"] = list(printed.parts)
    places = tuple((name, at, weights.sizes[name]) for name, at in weights.offsets.items())
    with _beside(building(printed.text, isa=choose_isa(chosen.isa), flags=chosen.flags)):
        if places not in made.blocks:
            made.blocks[places] = weights.bytes()
    return CpuArtifact(manifest, printed.text, made.blocks[places], chosen, notes=notes, program=program)


@contextlib.contextmanager
def _beside(build: Build) -> Iterator[None]:
    """Work while an object is built, which whoever needs it then finds.

    The compilers have a processor each: PyTorch's threads wait for the last of them, and would wait for one that a
    compiler keeps.
    """
    if build.place().is_file():
        yield
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads - max(1, len(build.units))))
    try:
        with ThreadPoolExecutor(1) as pool:
            made = pool.submit(build.make)
            yield
            made.result()
    finally:
        torch.set_num_threads(threads)


def _printable_kinds(program: Program, options: CpuOptions) -> list[str]:
    """Templates in use whose operations give the same numbers when they are printed (but for the order of sums)."""
    definer = Definer(program)
    sites = [first_match(_matchers(options), definer, node) for node in program.operations()]
    kinds = sorted({site.kind for site in sites if site is not None})
    return [kind for kind in kinds if kind != "quantized_matmul" or options.activations == "program"]


def _matchers(options: CpuOptions) -> list[Any]:
    return matchers(options) if options.templates else []


def _check(program: Program, options: CpuOptions) -> Coverage:
    return check("cpu", program, _matchers(options))


def _require_printable(schedule: Schedule) -> None:
    missing = sorted({op for step in schedule.steps if isinstance(step, Kernel) for op in unsupported(step)})
    if missing:
        raise TargetError(f"the C++ printer lacks {', '.join(missing)}")


def _manifest(program: Program, schedule: Schedule, weights: WeightBlock, notes: list[str]) -> dict[str, Any]:
    return {
        "format": FORMAT, "target": "cpu", **signature_of(program, schedule),
        "weight_bytes": max(weights.num_bytes, 64), "notes": notes,
    }  # fmt: skip
