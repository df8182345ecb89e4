"""Does an artifact compute what its program does? Both are run on the same inputs, at several sizes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor

from irc.core import formats
from irc.core.errors import IrcError, NumericError
from irc.core.kv_cache import KVCache
from irc.core.numeric import coarsest_eps, compare_outputs, inputs_at
from irc.core.ops.registry import is_irc_op
from irc.core.paged import StepInputs, tables_in_order
from irc.core.program import Program

Run = Callable[..., list[Any]]

_BATCHES = (1, 3)
_SMALL_LENGTH = 5
# Rounding steps of the coarsest type in use that a lowering may differ by, relative to the largest value:
# other kernels add up in another order.
_SLACK = 256
# Where values are quantized at run time, one that lies on a tie may round the other way for a difference of one bit,
# and so may others behind it: outputs may then differ by a few steps of that format.
_STEPS = 2
# Layers behind layers can make more of it (the demo model in 4 bits with int8 activations, run by PyTorch, moves by up
# to 3.6 steps where its norms change by 1e-7): then the program's own movement under such a change, so many times, is
# the bound. It is one sample of many roundings.
_MOVEMENTS = 2
_NUDGE = 4
# What PyTorch raises when a program is run at sizes it does not accept.
_RUN_ERRORS = (RuntimeError, ValueError, IndexError, TypeError)


@dataclass(frozen=True)
class CheckedRun:
    """One comparison: what was run, and the largest error over all outputs.

    Attributes:
        moves: by how much the program's own outputs move, relatively, where that had to be found out.
    """

    what: str
    absolute: float
    relative: float
    top1: float | None = None
    problem: str = ""
    moves: float = 0.0

    def passed(self, tolerance: float) -> bool:
        return not self.problem and self.relative <= max(tolerance, _MOVEMENTS * self.moves)


@dataclass
class ArtifactCheck:
    """Error figures of an artifact against the program it came from.

    Attributes:
        tolerance: largest relative error that counts as the same numbers.
        skipped: sizes at which the program itself does not run, with its reason.
    """

    artifact: str
    tolerance: float
    runs: list[CheckedRun] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)

    @property
    def absolute(self) -> float:
        return max((run.absolute for run in self.runs), default=0.0)

    @property
    def relative(self) -> float:
        return max((run.relative for run in self.runs), default=0.0)

    @property
    def top1(self) -> float | None:
        return min((run.top1 for run in self.runs if run.top1 is not None), default=None)

    @property
    def passed(self) -> bool:
        return bool(self.runs) and all(run.passed(self.tolerance) for run in self.runs)

    def require(self) -> None:
        """Raise unless every run agreed.

        Raises:
            NumericError: an output differs in type or shape, or by more than the tolerance.
        """
        if not self.passed:
            raise NumericError(f"the {self.artifact} artifact does not compute what its program does\n{self}")

    def __str__(self) -> str:
        lines = [f"{self.artifact} against its program, relative error (at most {self.tolerance:.1e}):"]
        width = max((len(run.what) for run in self.runs), default=0)
        for run in self.runs:
            top1 = "" if run.top1 is None else f", same top token {run.top1:.1%}"
            moves = f"; the program itself moves by {run.moves:.1e} for a bit in its weights" if run.moves else ""
            lines.append(f"  {run.what:<{width}}  {run.problem or f'{run.relative:.1e}{top1}{moves}'}")
        if not self.runs:
            lines.append("  nothing could be run")
        lines += [f"  not run: {text}" for text in self.skipped]
        return "\n".join(lines)


def check_artifact(
    name: str, run: Run, program: Program, inputs: Sequence[Any] | None = None, *, tolerance: float | None = None
) -> ArtifactCheck:
    """Run artifact and program on the inputs (default: the example's) at three lengths and two batch sizes.

    Raises:
        IrcError: there are no inputs.
    """
    given = inputs if inputs is not None else program.example_inputs
    if given is None:
        raise IrcError(f"program {program.name} has no example inputs to compare on: give inputs")
    allowed = tolerance if tolerance is not None else _allowed(program)
    result = ArtifactCheck(name, allowed)
    makers = _step_inputs(program, given) if KVCache.of(program) is not None else _sized_inputs(program, given)
    seen: set[str] = set()
    nudged: Program | None = None
    for what, make in makers:
        if what in seen:
            continue
        seen.add(what)
        try:
            made = make()
            expected = program.run(*_cloned(made))
        except (*_RUN_ERRORS, IrcError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            result.skipped.append(f"{what}: the program itself does not run there ({reason})")
            continue
        one = _compared(what, expected, run(*_cloned(made)))
        if tolerance is None and not one.problem and not one.passed(allowed) and _quantizing(program):
            nudged = nudged or _nudged(program)
            one = replace(one, moves=compare_outputs(expected, nudged.run(*_cloned(made))).relative)
        result.runs.append(one)
    return result


def _quantizing(program: Program) -> list[fx.Node]:
    """Nodes that quantize values at run time."""
    return [node for node in program.operations() if is_irc_op(node.target, "quantize")]


def _allowed(program: Program) -> float:
    steps = [_STEPS * 2.0 ** -formats.parse(str(node.kwargs["format"])).precision for node in _quantizing(program)]
    return max([_SLACK * coarsest_eps(program), *steps])


def _nudged(program: Program) -> Program:
    """The program with its vectors of floats (norms, biases, scales of activations) changed by about a rounding."""
    signs = torch.Generator().manual_seed(0)
    changed = {}
    for name, weight in program.weights.items():
        if weight.ndim <= 1 and weight.dtype.is_floating_point and weight.dtype.itemsize > 1:
            sign = torch.randint(0, 2, weight.shape, generator=signs).to(weight.device) * 2 - 1
            changed[name] = weight.detach() * (1 + sign * _NUDGE * torch.finfo(weight.dtype).eps).to(weight.dtype)
    return program.copy(replace_weights=changed)


def _compared(what: str, expected: Sequence[Any], found: Sequence[Any]) -> CheckedRun:
    found = [f.to(e.device) if isinstance(f, Tensor) and isinstance(e, Tensor) else f
             for e, f in zip(expected, found, strict=False)] + list(found[len(expected):])  # fmt: skip
    comparison = compare_outputs(expected, found)
    problems = [f"output {d.output} {d.problem}" for d in comparison.differences if d.problem]
    return CheckedRun(what, comparison.absolute, comparison.relative, comparison.top1, "; ".join(problems))


def _cloned(inputs: Sequence[Any]) -> list[Any]:
    return [value.clone() if isinstance(value, Tensor) else value for value in inputs]


Maker = tuple[str, Callable[[], Sequence[Any]]]


def _sized_inputs(program: Program, example: Sequence[Any]) -> Iterator[Maker]:
    """The example, then for its dynamic dimensions: the first at 1 and 3, the others at 1, 5 and the example's."""
    names = list(program.dims)
    hints = {name: dim.hint for name, dim in program.dims.items()}
    if not names:
        yield "the example inputs", lambda: example
        return
    first, rest = names[0], names[1:]
    lengths = {name: (1, _SMALL_LENGTH, hints[name]) for name in rest}
    for batch in _BATCHES:
        for index in range(3 if rest else 1):
            sizes = {first: batch} | {name: lengths[name][index] for name in rest}
            sizes = {name: _bounded(program, name, size) for name, size in sizes.items()}
            text = ", ".join(f"{name}={size}" for name, size in sizes.items())
            yield text, functools.partial(inputs_at, program, example, sizes)


def _bounded(program: Program, name: str, size: int) -> int:
    dim = program.dims[name]
    return max(dim.minimum, size if dim.maximum is None else min(size, dim.maximum))


def _step_inputs(program: Program, example: Sequence[Any]) -> Iterator[Maker]:
    """Steps of 1, 5 and the example's number of tokens, after a prefill of as many, for 1 and 3 sequences."""
    cache = KVCache.of(program)
    assert cache is not None
    tokens = cache.split(example)[0] if cache.layout == "contiguous" else example[0].view(1, -1)
    longest = max(1, min(tokens.shape[1], cache.max_length // 2))

    def make(batch: int, length: int) -> Sequence[Any]:
        rows = torch.arange(batch, device=tokens.device) % tokens.shape[0]
        columns = torch.arange(2 * length, device=tokens.device) % tokens.shape[1]
        ids = tokens[rows][:, columns]
        if cache.block_size is not None:
            return _paged_step(program, cache, cache.block_size, ids)
        positions = torch.arange(2 * length, device=tokens.device).expand(batch, -1)
        wanted = torch.arange(length, device=tokens.device).expand(batch, -1).contiguous()
        caches = cache.empty(batch, device=tokens.device)
        first = program.run(ids[:, :length].contiguous(), positions[:, :length].contiguous(), wanted, *caches)
        return [ids[:, length:].contiguous(), positions[:, length:].contiguous(), wanted, *first[1:]]

    for batch in _BATCHES:
        for length in sorted({1, min(_SMALL_LENGTH, longest), longest}):
            yield (
                f"B={batch}, {length} token{'s' if length > 1 else ''} after {length}",
                functools.partial(make, batch, length),
            )


def _paged_step(program: Program, cache: KVCache, block_size: int, ids: Tensor) -> list[Any]:
    """Inputs of a step over the second half of each row, after one over the first; blocks in mixed order."""
    batch, total = ids.shape
    tables = tables_in_order(batch, total, block_size, ids.device)
    pages = cache.empty(tables.numel(), device=ids.device)
    tables = (tables.numel() - 1 - tables).flip(0).contiguous()
    first = StepInputs.of_rows(ids[:, : total // 2], 0, tables, block_size)
    second = StepInputs.of_rows(ids[:, total // 2 :], total // 2, tables, block_size)
    return [*second.flat(), *program.run(*first.flat(), *pages)[1:]]
