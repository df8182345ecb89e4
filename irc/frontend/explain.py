"""Turns a failed export into a `CaptureError` that says where, why, and what to try."""

from __future__ import annotations

import re
import traceback
from types import TracebackType

from torch import nn

from irc.core.errors import CaptureError
from irc.frontend.provenance_reader import is_user_file, short_path

# (pattern in the exception's type and text, what it means, what to try)
_CAUSES: tuple[tuple[str, str, str], ...] = (
    (
        r"GuardOnDataDependentSymNode|data-dependent (?:guard|expression|control)|Could not guard on data",
        "a branch or a loop depends on values of a tensor, which are unknown at capture",
        "torch.where instead of `if`, a mask instead of indexing by a condition, or take the branch outside the model",
    ),
    (
        r"DataDependentOutputException|\.item\(\)|_local_scalar_dense",
        "a tensor's value is turned into a Python number (.item(), int(tensor), bool(tensor))",
        "keep the value in a tensor, or pass it as an argument",
    ),
    (
        r"DynamicOutputShapeException|nonzero|unbacked",
        "the shape of a result depends on values of a tensor (nonzero, boolean indexing, unique)",
        "torch.where with a fixed shape instead of selecting elements",
    ),
    (
        r"Constraints violated|ConstraintViolation|specialized",
        "a size asked to be dynamic must have one fixed value in this model",
        "leave that dimension out of `dynamic`",
    ),
    (
        r"missing \d+ required|unexpected keyword|takes \d+ positional|You have to specify|got an unexpected",
        "the example inputs do not fit the model's forward",
        "pass example_inputs as a tuple of positional inputs or a dict by argument name",
    ),
    (
        r"Unsupported input type|supported input types|not a valid input|pytree",
        "an input or output is of a type that export does not know",
        "use tensors, numbers, and lists, tuples and dicts of them, or torch.export.register_dataclass",
    ),
)


def explain(error: BaseException, model: nn.Module, prefix: str = "") -> CaptureError:
    """A `CaptureError` for an exception that export raised; the caller chains it."""
    module, line = _where(error.__traceback__, model)
    text = _plain(error)
    cause, advice = _cause(f"{type(error).__name__} {text}")
    lines = [f"cannot capture {type(model).__name__}: {cause}"]
    if module is not None:
        lines.append(f"  module: {module or '(the model itself)'}")
    if line:
        lines.append(f"  at: {line}")
    lines.append(f"  reason: {text}")
    lines.append(f"  try: {advice}")
    return CaptureError("\n".join(lines))


def _cause(text: str) -> tuple[str, str]:
    for pattern, cause, advice in _CAUSES:
        if re.search(pattern, text):
            return cause, advice
    return (
        "its forward failed while being traced",
        "run the model on the example inputs first; if that works, simplify the line above",
    )


def _plain(error: BaseException) -> str:
    """First paragraph of the message, without export's advice about itself."""
    text = str(error).strip() or type(error).__name__
    first = text.split("\n\n")[0].strip()
    return f"{type(error).__name__}: {' '.join(first.split())[:400]}"


def _where(trace: TracebackType | None, model: nn.Module) -> tuple[str | None, str]:
    """Path of the innermost module that was running, and the deepest line of user code."""
    paths = {id(module): path for path, module in model.named_modules()}
    module: str | None = None
    line = ""
    for frame, number in traceback.walk_tb(trace):
        owner = frame.f_locals.get("self")
        if id(owner) in paths:
            module = paths[id(owner)]
        file = frame.f_code.co_filename
        if is_user_file(file):
            line = f"{short_path(file)}:{number}"
    return module, line
