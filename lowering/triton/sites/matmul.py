"""Linear layers over float weights and over integers of 4 and 8 bits, dequantized while they are read."""

from __future__ import annotations

from typing import Any

import torch.fx as fx

from irc.core import formats
from irc.core.formats import QuantFormat
from irc.core.ops.registry import is_irc_op
from irc.lowering.kernels.definitions import Definer
from irc.lowering.kernels.layers import Linear, constant, dequantized_parts, rows_of
from irc.lowering.kernels.sites import Site, TemplateCall
from irc.lowering.triton.options import TritonOptions
from irc.lowering.triton.printer import INDEX, PrintedEpilogue, print_epilogue, wide_sizes
from irc.lowering.triton.sites.registry import SiteKind, StepWriter, register_site
from irc.lowering.triton.templates import matmul as template
from irc.lowering.triton.templates.matmul import MatmulProblem

_FLOATS = ("f32", "f16", "bf16")


def match(options: TritonOptions, definer: Definer, node: fx.Node) -> Site | None:
    """The site of a linear layer whose weight is known, or None."""
    layer = Linear.of(node)
    if layer is None or definer.dtype(node) not in _FLOATS or definer.dtype(layer.x) not in _FLOATS:
        return None
    wide = definer.shape(layer.weight)
    if len(wide) != 2 or not all(size.is_Integer for size in wide):
        return None
    shape = {"columns": int(wide[0]), "depth": int(wide[1]), "activation": definer.dtype(layer.x)}
    covers: tuple[fx.Node, ...] = ()
    if is_irc_op(layer.weight.target, "dequantize"):
        found = _quantized(definer, layer.weight)
        if found is None:
            return None
        problem, covers = MatmulProblem(**shape, **found), (layer.weight,)
    elif constant(layer.weight) and definer.dtype(layer.weight) == definer.dtype(layer.x):
        problem = MatmulProblem(**shape, weight=definer.dtype(layer.weight))
    else:
        return None
    if template.refuses(problem) is not None:
        return None
    return Site("matmul", node, ((layer.x, "rows"),), problem, covers=covers, finish=layer.finish())


def _quantized(definer: Definer, weight: fx.Node) -> dict[str, Any] | None:
    """How a dequantized weight is stored, or None where no kernel reads that."""
    parts, chosen = dequantized_parts(weight), formats.parse(str(weight.kwargs["format"]))
    if parts is None or parts[1] is None or parts[3] is not None or not isinstance(chosen, QuantFormat):
        return None
    if chosen.per_tensor or definer.dtype(parts[1]) not in _FLOATS:
        return None
    return {
        "weight": "int4" if chosen.packs_two else "int8", "group": chosen.group_size, "signed": chosen.signed,
        "asymmetric": parts[2] is not None, "scale": definer.dtype(parts[1]),
    }  # fmt: skip


def emit(call: TemplateCall, writer: StepWriter) -> list[str]:
    """The choice of block sizes, and the launch of the kernel for many rows or for few."""
    layer = Linear.of(call.site.node)
    assert layer is not None
    assert call.epilogue is not None
    problem: MatmulProblem = call.site.problem
    memory = call.reads[0]
    epilogue = print_epilogue(call.epilogue, problem.columns)
    stored = [layer.weight]
    if is_irc_op(layer.weight.target, "dequantize"):
        parts = dequantized_parts(layer.weight)
        assert parts is not None
        stored = [part for part in parts if part is not None]
    weights = [writer.weight(str(part.target)) for part in stored]
    constant_name = writer.constant("matmul", f"products.{problem!r}")
    rows = writer.size(rows_of(memory.shape))
    kinds = [kind for kind in template.KINDS if kind != "vector" or template.takes_vector(problem)]
    if rows_of(memory.shape) == 1:
        kinds = kinds[-1:]
    origins = tuple(map(str, call.origins))
    names = {kind: writer.kernel(f"{call.name}_{kind}", origins, _kernel(problem, epilogue, kind, writer.options))
             for kind in kinds}  # fmt: skip
    writer.imports.update(_IMPORTS)
    given = [*map(writer.argument, epilogue.arguments), writer.dense(memory), *weights, rows,
             *(size.name for size in epilogue.sizes), INDEX.lower()]  # fmt: skip
    kernels = "{" + ", ".join(f"{kind!r}: {name}" for kind, name in names.items()) + "}"
    return [
        f"config = products.choose({constant_name}, {rows}, device_of(memory.device).multiprocessors)",
        f"products.launch({constant_name}, config, {kernels}, {rows}, ({', '.join(given)}))",
    ]


_IMPORTS = (
    "from irc.lowering.triton.device import device_of",
    "from irc.lowering.triton.library import matmul, matvec",
    "from irc.lowering.triton.templates import matmul as products",
)


def _kernel(problem: MatmulProblem, epilogue: PrintedEpilogue, kind: template.Kind, options: TritonOptions) -> str:
    """The text of a kernel: the tile, then what is done with it."""
    operands = ["x", "weight"]
    if problem.bits is not None:
        operands += ["scale", *(["zero"] if problem.asymmetric else [])]
    parameters = [*epilogue.parameters, *operands, "M", *(size.name for size in epilogue.sizes)]
    parameters += [f"{name}: tl.constexpr" for name in (INDEX, *template.constants(kind))]
    body = "".join(f"    {line}\n" for line in template.printed(problem, kind, options.float32))
    return f"@triton.jit\ndef NAME({', '.join(parameters)}):\n{wide_sizes(epilogue.sizes)}{body}{epilogue.body}"


register_site(SiteKind("matmul", match, emit, order=1))
