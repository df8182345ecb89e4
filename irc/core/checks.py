"""What the pass manager checks about a pass besides numbers: its claims, its weights, its matches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from irc.core import provenance
from irc.core.content_hash import fingerprint
from irc.core.contract import Finding, Pass, PassResult
from irc.core.errors import IrcError, PassError, VerificationError
from irc.core.excerpt import node_text, window
from irc.core.program import Program
from irc.core.report import nearest_miss, skip_text

_MAX_LISTED = 8


class WeightGuard:
    """Remembers the content of every weight and input, and finds those that were written into.

    With `content=False` only PyTorch's own write counter is compared, which misses writes through `.data`.
    """

    def __init__(self, program: Program, inputs: Sequence[Any], *, content: bool, known: WeightGuard | None = None):
        named: dict[str, Tensor] = {f"weight {name!r}": tensor for name, tensor in program.weights.items()}
        for index, value in enumerate(inputs):
            if isinstance(value, Tensor):
                named[f"example input {index}"] = value
        self._content = content
        # Tensors of the stage before were fingerprinted right after its pass: that work is not repeated.
        seen = {id(tensor): mark for tensor, mark in known.marks.values()} if known is not None else {}
        self.marks: dict[str, tuple[Tensor, Any]] = {
            name: (tensor, seen[id(tensor)] if id(tensor) in seen else self._mark(tensor))
            for name, tensor in named.items()
        }

    def check(self, one: Pass) -> None:
        """Raise `PassError` naming every tensor that has changed."""
        changed = [name for name, (tensor, mark) in self.marks.items() if self._mark(tensor) != mark]
        if not changed:
            return
        listed = ", ".join(changed[:_MAX_LISTED]) + (
            f" and {len(changed) - _MAX_LISTED} more" if len(changed) > _MAX_LISTED else ""
        )
        raise PassError(
            f"pass {one.name!r} wrote into {listed} in place. Stages share weights, so the programs of all"
            " earlier stages have changed too.\n  The author of the pass must make a new tensor"
            " (program.weight_node(name, tensor, before=node)) and use that.",
            pass_name=one.name,
        )

    def _mark(self, tensor: Tensor) -> Any:
        if tensor.device.type == "meta" or not self._content:
            return tensor._version
        with torch.no_grad():
            return fingerprint(tensor)


def check_requires(one: Pass, program: Program) -> None:
    """Raise `PassError` with everything that keeps the pass from running."""
    problems = one.requires(program)
    if problems:
        listed = "\n".join(f"  - {problem}" for problem in problems)
        raise PassError(f"pass {one.name!r} cannot run on program {program.name}:\n{listed}", pass_name=one.name)


def check_result(one: Pass, result: object) -> PassResult:
    """The result, if it is one."""
    if isinstance(result, PassResult) and isinstance(result.program, Program):
        return result
    raise PassError(
        f"pass {one.name!r} returned {type(result).__name__}; its run method must return PassResult(program, …)",
        pass_name=one.name,
    )


def check_matches(one: Pass, result: PassResult) -> None:
    """Raise `PassError` with the nearest miss where fewer places matched than were asked for."""
    if one.expect_matches is None or result.matches >= one.expect_matches:
        return
    places = "1 place" if result.matches == 1 else f"{result.matches} places"
    expected = "1 was" if one.expect_matches == 1 else f"{one.expect_matches} were"
    lines = [f"pass {one.name!r} rewrote {places}, {expected} expected"]
    miss = nearest_miss(list(result.skips))
    if miss is None:
        lines.append(f"  it saw no {'other ' if result.matches else ''}candidate")
    else:
        lines.append(f"  nearest miss: {skip_text(miss)}")
        reasons = Counter(skip.reason for skip in result.skips)
        if len(result.skips) > 1:
            lines.append(f"  all {len(result.skips)} candidates that were refused:")
            lines += [f"    {count} × {reason}" for reason, count in reasons.most_common(_MAX_LISTED)]
    lines.append("  change the model or the condition, or lower expect-matches")
    raise PassError("\n".join(lines), pass_name=one.name, node=miss.node if miss else None)


def check_claim(one: Pass, result: PassResult, modified: bool) -> None:
    """Raise `PassError` where the pass says wrongly that it did or did not change the program."""
    if result.modified is None or result.modified == modified:
        return
    said, did = ("changed", "the same") if result.modified else ("unchanged", "different")
    raise PassError(
        f"pass {one.name!r} says that the program is {said}, but its structural hash is {did}"
        f" ({result.matches} matches reported).\n  The author of the pass must return the truth as modified=…,"
        " or leave it out: the manager finds out by itself.",
        pass_name=one.name,
    )


def check_types(one: Pass, program: Program) -> None:
    """Type every node of the result that is not typed yet, and verify the whole."""
    from irc.core.verifier import verify

    try:
        program.infer_types()  # a pass need not type what it edits; what is typed already costs nothing
        _check_dims(program)
        verify(program)
    except VerificationError as error:
        raise VerificationError(
            f"pass {one.name!r} left a program that breaks the rules of the IR:\n{error}",
            pass_name=one.name,
            node=error.node,
        ) from error


def _check_dims(program: Program) -> None:
    """Raise where an operation made a dynamic dimension static, or two of them one.

    PyTorch's shape functions do that silently when, for example, `[B, 8]` and `[3, 8]` are added.
    """
    seen: dict[Any, str] = {}
    for dim in program.dims.values():
        symbol = dim.size.node.expr
        if not symbol.is_Symbol:
            raise VerificationError(
                f"  dimension {dim.name} was dynamic and is fixed at {symbol}: an operation needs just that"
                f" size. New operations:{_new_operations(program)}"
            )
        if symbol in seen:
            raise VerificationError(
                f"  dimensions {seen[symbol]} and {dim.name} may differ and were made equal."
                f" New operations:{_new_operations(program)}"
            )
        seen[symbol] = dim.name


def _new_operations(program: Program) -> str:
    """The first operations that the stage before did not have, a line each."""
    new = [node_text(n) for n in program.operations() if provenance.origin_of(n) != n.name]
    return "".join(f"\n    {text}" for text in new[:_MAX_LISTED])


def check_ensures(one: Pass, before: Program, result: PassResult) -> None:
    """Raise `VerificationError` with every rule that the pass's own check finds broken."""
    findings = list(one.ensures(before, result))
    if findings:
        raise VerificationError(
            f"pass {one.name!r} broke its own promise in {len(findings)} place{'s' * (len(findings) > 1)}:\n"
            + "\n".join(_finding_text(result.program, finding) for finding in findings[:_MAX_LISTED]),
            pass_name=one.name,
            node=findings[0].node,
        )


def _finding_text(program: Program, finding: Finding) -> str:
    node = next((n for n in program.graph.nodes if n.name == finding.node), None)
    if node is None:
        return f"  %{finding.node}: {finding.problem}"
    return f"  {node_text(node)}\n    {finding.problem}\n{window(program, node)}"


def named_error(error: Exception, one: Pass) -> IrcError:
    """An error of a pass as an `IrcError` that names the pass: itself, if it is one."""
    if not isinstance(error, IrcError):
        return PassError(f"pass {one.name!r} failed with {type(error).__name__}: {error}", pass_name=one.name)
    if error.pass_name is None:
        error.pass_name = one.name
        if repr(one.name) not in str(error):
            error.args = (f"pass {one.name!r}: {error}",)
    return error
