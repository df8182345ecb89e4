"""How good a program still is: evaluation, sensitivity of layers, and the formats that a size budget should buy.

Sits on top of the compiler; the demo and the command line use it.
"""

from __future__ import annotations

from irc.evaluation.assign_bits import Assignment, assign_bits
from irc.evaluation.data import EvaluationData
from irc.evaluation.evaluate import compare, evaluate
from irc.evaluation.results import Comparison, Evaluation
from irc.evaluation.sensitivity import LayerSensitivity, Sensitivity, sensitivity

__all__ = [
    "Assignment", "Comparison", "Evaluation", "EvaluationData", "LayerSensitivity", "Sensitivity", "assign_bits",
    "compare", "evaluate", "sensitivity",
]  # fmt: skip
