"""Kernels that several files of tests build alike, from what the file calls `template`, `CASES` and `ENDS`."""

from __future__ import annotations

import ctypes

import pytest

from tests.kernels.building import build, runnable_isas
from tests.kernels.integers import adding_function, ending_function


@pytest.fixture(scope="module", params=runnable_isas())
def adding_kernels(request: pytest.FixtureRequest) -> ctypes.CDLL:
    """For each case a function that adds scaled integer sums (`check_sums`)."""
    template, cases = request.module.template, request.module.CASES
    functions = [adding_function(template, f"case{i}", case) for i, case in enumerate(cases)]
    return build(template.INCLUDES, functions, request.param)


@pytest.fixture(scope="module", params=runnable_isas())
def ending_kernels(request: pytest.FixtureRequest) -> ctypes.CDLL:
    """For each ending a function that stores integers (`check_ending`)."""
    template, endings = request.module.template, request.module.ENDS
    functions = [ending_function(template, f"end{i}", ending) for i, ending in enumerate(endings)]
    return build(template.INCLUDES, functions, request.param)
