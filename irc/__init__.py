"""irc: an inference compiler for PyTorch models.

    import irc
    compiled = irc.compile(model, passes=["quantize-weights{bits=4,group-size=32}", "insert-kv-cache"])
    print(compiled.report)

What there is, by what you want to do:

    deploy a model        compile → Compiled: call it, .generate, .save; load, Compiled.load
    get a graph           capture, from_onnx, from_gguf, load, parse → Program; save, export_gguf
    rewrite it            PassManager, irc.passes (passes and what to write one with), PassContext
    look at it            print(program), diff, draw, verify, bisect
    quantize              CalibrationData, QuantFormat, sensitivity and assign_bits, irc.interchange
    judge a result        evaluate, EvaluationData, irc.evaluation
    decode faster         make_draft, irc.runtime
    add a target          irc.core.target, irc.lowering

All errors that are raised on purpose are `IrcError`s. Names are imported when first used, so that `import irc` and
`irc --help` are quick; `help(irc.compile)` and so on describe each.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from irc.compiled import Compiled as Compiled
    from irc.compiler import compile as compile
    from irc.compiler import load as load
    from irc.core.bisect import bisect as bisect
    from irc.core.calibration import CalibrationData as CalibrationData
    from irc.core.contract import PassContext as PassContext
    from irc.core.errors import IrcError as IrcError
    from irc.core.formats import QuantFormat as QuantFormat
    from irc.core.manager import PassManager as PassManager
    from irc.core.program import Program as Program
    from irc.core.storage import save as save
    from irc.core.text import parse as parse
    from irc.core.verifier import verify as verify
    from irc.drafting import make_draft as make_draft
    from irc.evaluation import EvaluationData as EvaluationData
    from irc.evaluation import assign_bits as assign_bits
    from irc.evaluation import evaluate as evaluate
    from irc.evaluation import sensitivity as sensitivity
    from irc.frontend import capture as capture
    from irc.frontend.onnx import from_onnx as from_onnx
    from irc.lowering.gguf import export_gguf as export_gguf
    from irc.lowering.gguf import from_gguf as from_gguf
    from irc.view.difference import diff as diff
    from irc.view.picture import draw as draw

__version__ = "0.1.0"

_EXPORTS = {
    "CalibrationData": "irc.core.calibration",
    "Compiled": "irc.compiled",
    "EvaluationData": "irc.evaluation.data",
    "IrcError": "irc.core.errors",
    "PassContext": "irc.core.contract",
    "PassManager": "irc.core.manager",
    "Program": "irc.core.program",
    "QuantFormat": "irc.core.formats",
    "assign_bits": "irc.evaluation.assign_bits",
    "bisect": "irc.core.bisect",
    "capture": "irc.frontend",
    "compile": "irc.compiler",
    "diff": "irc.view.difference",
    "draw": "irc.view.picture",
    "evaluate": "irc.evaluation.evaluate",
    "export_gguf": "irc.lowering.gguf",
    "from_gguf": "irc.lowering.gguf",
    "from_onnx": "irc.frontend.onnx",
    "load": "irc.compiler",
    "make_draft": "irc.drafting",
    "parse": "irc.core.text",
    "save": "irc.core.storage",
    "sensitivity": "irc.evaluation.sensitivity",
    "verify": "irc.core.verifier",
}
_SUBPACKAGES = ("evaluation", "interchange", "lowering", "passes", "runtime")

__all__ = [*sorted(_EXPORTS), "__version__"]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name]), name)
    if name in _SUBPACKAGES:
        return importlib.import_module(f"irc.{name}")
    raise AttributeError(f"module 'irc' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTS, *_SUBPACKAGES})
