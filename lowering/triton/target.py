"""The target `triton`: check, and lowering from a program to an artifact."""

from __future__ import annotations

from collections import Counter
from typing import Any, ClassVar

from irc.core.contract import Pass
from irc.core.errors import TargetError
from irc.core.program import Program
from irc.core.target import Artifact, Concern, Coverage, Options, Target, op_name, read_options, register_target
from irc.lowering.kernels import coverage as kernels
from irc.lowering.kernels.definitions import Definer
from irc.lowering.kernels.fusion import Schedule, make_schedule
from irc.lowering.kernels.kernel import Kernel
from irc.lowering.kernels.memory import plan_memory
from irc.lowering.kernels.prepare import fold_constants
from irc.lowering.kernels.signature import signature_of
from irc.lowering.reference.target import merges_of_siblings, portable_passes
from irc.lowering.triton.artifact import FORMAT, TritonArtifact
from irc.lowering.triton.module import installed
from irc.lowering.triton.options import TritonOptions
from irc.lowering.triton.printer import unsupported
from irc.lowering.triton.sites import fallback_of, matchers
from irc.lowering.triton.source import print_program


@register_target
class TritonTarget(Target):
    """Triton kernels for a GPU."""

    name: ClassVar[str] = "triton"
    description: ClassVar[str] = "kernels in Triton for an NVIDIA GPU, launched as CUDA graphs"
    options_type: ClassVar[type] = TritonOptions
    artifact_type: ClassVar[type[Artifact]] = TritonArtifact

    def available(self) -> str | None:
        return None if installed() else "the package triton is missing: pip install 'irc-compiler[triton]'"

    def check(self, program: Program) -> Coverage:
        return _check(program, TritonOptions())

    def check_with(self, program: Program, options: Options | None) -> Coverage:
        return _check(program, read_options(TritonOptions, options, what="target triton"))

    def lower(self, program: Program, options: Options | None = None) -> TritonArtifact:
        chosen = read_options(TritonOptions, options, what="target triton")
        _check(program, chosen).require(program)
        own, notes = fold_constants(program, matchers(chosen))
        schedule = make_schedule(own, matchers(chosen))
        _require_printable(schedule)
        plan = plan_memory(schedule, _hints(own))
        printed = print_program(own, schedule, plan, chosen)
        launched = sum(isinstance(step, Kernel) for step in schedule.steps)
        notes.append(
            f"{own.num_nodes} operations in {launched} printed kernels and {len(schedule.steps) - launched} template"
            f" calls, {printed.num_kernels} of them distinct"
        )
        weights = {name: own.weight(name).detach() for name in printed.weights}
        manifest = {
            "format": FORMAT, "target": self.name, **signature_of(own, schedule), "weights": printed.weights,
            "notes": notes,
        }  # fmt: skip
        return TritonArtifact(manifest, printed.text, weights, chosen, notes=notes, program=program)

    def default_passes(self, program: Program) -> list[Pass]:
        """Sibling layers as one, where there are any: fewer and larger products."""
        return [*merges_of_siblings(program), *portable_passes(program)]


def _check(program: Program, options: TritonOptions) -> Coverage:
    """What has a kernel, what PyTorch computes, and what cannot be done."""
    found: list[Any] = matchers(options)
    coverage = kernels.check("triton", program, found, anything={"torch"})
    definer = Definer(program)
    theirs: Counter[tuple[str, str]] = Counter()
    for node in program.operations():
        reasons = [fallback_of(site) for site in kernels.templates_of(node, definer, found)]
        if any(reasons):
            theirs[op_name(node), next(filter(None, reasons))] += 1
    coverage.fallbacks += [Concern(op, count, reason) for (op, reason), count in theirs.items()]
    return coverage


def _require_printable(schedule: Schedule) -> None:
    kernels = [s if isinstance(s, Kernel) else s.epilogue for s in schedule.steps]
    missing = sorted({what for kernel in kernels if kernel is not None for what in unsupported(kernel)})
    if missing:
        raise TargetError(f"the Triton printer lacks {', '.join(missing)}")


def _hints(program: Program) -> dict[Any, int]:
    """Sizes to plan by: those of the example."""
    from irc.core.dims import dim_symbol

    return {dim_symbol(name): dim.hint for name, dim in program.dims.items()}


__all__ = ["TritonOptions", "TritonTarget"]
