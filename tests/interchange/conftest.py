"""The two programs that the tests write from and read into; nobody changes them."""

from __future__ import annotations

import pytest
import torch

from irc.core.program import Program
from tests.interchange.checkpoints import Model, program_of


@pytest.fixture(scope="session")
def plain() -> Program:
    return program_of(Model())


@pytest.fixture(scope="session")
def blank() -> Program:
    """The same model with other numbers."""
    model = Model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.5)
    return program_of(model)
