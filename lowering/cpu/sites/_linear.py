"""What the matmul sites share: x · wᵀ + bias with an activation, as graphs have it."""

from __future__ import annotations

import sympy

from irc.lowering.cpp.expressions import size_text
from irc.lowering.cpp.function import PrintedEpilogue, PrintedFunction
from irc.lowering.cpp.printer import print_epilogue
from irc.lowering.kernels.buffers import Buffer
from irc.lowering.kernels.sites import Memory, TemplateCall


def function(
    call: TemplateCall, parameters: tuple[str, ...], arguments: tuple[Buffer | Memory | str, ...], body: str, *,
    sizes: set[sympy.Symbol], includes: tuple[str, ...], scratch: str = "", epilogue: PrintedEpilogue | None = None,
) -> PrintedFunction:  # fmt: skip
    """A template's call with its epilogue as a function."""
    printed = epilogue or (print_epilogue(call.epilogue) if call.epilogue is not None else None)
    if printed is not None:
        parameters = (*parameters, *printed.parameters)
        arguments = (*arguments, *printed.arguments)
        sizes = sizes | set(printed.sizes)
    return PrintedFunction(
        call.name, tuple(str(origin) for origin in call.origins), parameters, body, arguments,
        tuple(sorted(sizes, key=lambda s: s.name)), includes, scratch,
    )  # fmt: skip


def rows_text(rows: sympy.Expr) -> str:
    return f"int64_t({size_text(rows, {})})"


def matmul_body(epilogue: PrintedEpilogue, call: str) -> str:
    """A matmul's call behind its epilogue, which it takes without its type (irc/columns.h) if that is a lambda."""
    if epilogue.takes_sums:
        return f"    const {epilogue.text};\n    {call}"
    return f"    const auto store = {epilogue.text};\n    const irc::Columns epilogue(store);\n    {call}"
