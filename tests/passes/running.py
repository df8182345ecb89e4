"""Runs one pass as the manager does: on a copy, with provenance, and with its own checks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from irc.core.contract import Finding, Pass, PassContext, PassResult
from irc.core.program import VAL, Program
from irc.core.provenance import mark_stage_start, track


def run_pass(one: Pass, program: Program) -> PassResult:
    """The result of a pass that must break no rule: not its own, not those of the IR, not that of untouched weights."""
    result, findings = run_with_findings(one, program)
    assert findings == []
    return result


def run_with_findings(one: Pass, program: Program) -> tuple[PassResult, list[Finding]]:
    """The result of a pass, and what its own check says about it."""
    assert one.requires(program) == []
    weights = {name: (w, w._version) for name, w in program.weights.items()}
    copy = program.copy()
    mark_stage_start(copy.graph)
    with track(copy.graph_module):
        result = one.run(copy, PassContext())
    findings = one.ensures(program, result)
    after = result.program
    after.graph.lint()
    kept = {node.name: node.meta[VAL] for node in after.graph.nodes if node.op != "output"}
    after.infer_types()
    for node in after.graph.nodes:
        if isinstance(node.meta.get(VAL), Tensor):
            assert str(kept[node.name].shape) == str(node.meta[VAL].shape), node
            assert str(kept[node.name].stride()) == str(node.meta[VAL].stride()), node
    assert all(w._version == version for w, version in weights.values())
    assert result.modified == (result.matches > 0)
    return result, findings


def operations(program: Program) -> Counter[str]:
    """How many of each operation, by name without namespace and overload."""
    return Counter(str(node.target).split(".")[1] for node in program.operations())


def assert_same(before: Program, after: Program, inputs: Sequence[Any], *, rtol: float = 1e-5) -> None:
    """Both programs agree to `rtol` of the largest value, on inputs that they were not captured with."""
    for expected, actual in zip(before.run(*inputs), after.run(*inputs), strict=True):
        assert expected.shape == actual.shape
        assert expected.dtype == actual.dtype
        torch.testing.assert_close(actual, expected, rtol=0, atol=rtol * float(expected.abs().max()))


def reasons(result: PassResult) -> str:
    """All reasons of a result's skips."""
    return "\n".join(skip.reason for skip in result.skips)
