"""Linear layers whose weights are stored as floats: f32, bf16, f16, or 8-bit floats with a scale a row."""

from __future__ import annotations

import torch.fx as fx

from irc.core.ops.registry import is_irc_op
from irc.core.program import Program
from irc.lowering.cpp.function import PrintedFunction
from irc.lowering.cpp.printer import print_epilogue
from irc.lowering.cpp.templates import float_matmul as template
from irc.lowering.cpp.templates.base import C_TYPES, MatmulProblem
from irc.lowering.cpu.options import CpuOptions
from irc.lowering.cpu.sites._linear import function, matmul_body, rows_text
from irc.lowering.cpu.sites.registry import SiteKind, register_site
from irc.lowering.cpu.weights import WeightBlock
from irc.lowering.kernels.definitions import Definer
from irc.lowering.kernels.layers import Linear, constant, dequantized_parts, rows_of
from irc.lowering.kernels.sites import Site, TemplateCall

_ROUND = 64


def match(options: CpuOptions, definer: Definer, node: fx.Node) -> Site | None:
    """The site of a linear layer over a float weight, or None."""
    layer = Linear.of(node)
    if layer is None:
        return None
    shape, weight = definer.shape(layer.x), definer.shape(layer.weight)
    if not all(size.is_Integer for size in weight):
        return None
    covers: tuple[fx.Node, ...] = ()
    if is_irc_op(layer.weight.target, "dequantize"):
        parts = dequantized_parts(layer.weight)
        if parts is None or parts[2] is not None or parts[3] is not None:
            return None
        stored, covers = str(layer.weight.kwargs["format"]), (layer.weight,)
    elif layer.weight.op == "get_attr" or constant(layer.weight):
        stored = definer.dtype(layer.weight)
    else:
        return None
    problem = MatmulProblem(
        rows=rows_text(rows_of(shape)), columns=int(weight[0]), depth=int(weight[1]), weight=stored,
        activation=definer.dtype(layer.x),
    )  # fmt: skip
    if template.refuses(problem, "plain") is not None:
        return None
    return Site("float_matmul", node, ((layer.x, "rows"),), problem, covers=covers, finish=layer.finish())


def emit(call: TemplateCall, program: Program, weights: WeightBlock) -> PrintedFunction:
    """The call; the weight is packed."""
    layer = Linear.of(call.site.node)
    assert layer is not None
    assert call.epilogue is not None
    problem = call.site.problem
    parts = dequantized_parts(layer.weight) if is_irc_op(layer.weight.target, "dequantize") else None
    stored = parts[0] if parts is not None else layer.weight
    name = f"{stored.target} as {problem.weight} panels"
    scale = None if parts is None or parts[1] is None else program.weight(parts[1]).detach()
    weight = program.weight(stored).detach()
    weights.add_made(name, template.packed_bytes(problem), lambda _: template.pack(problem, weight, scale))
    epilogue = print_epilogue(call.epilogue, ahead=template.ROWS_AHEAD)
    args = {"worker": "worker", "x": "x", "stride": str(problem.depth), "packed": "packed", "scratch": "scratch"}
    memory = call.reads[0]
    a_row = -(-template.scratch_bytes(problem, _ROUND, 1) // _ROUND)
    share = f"({problem.rows} == 1 ? workers : 1)"
    return function(
        call,
        (f"const {C_TYPES[problem.activation]}* x", "const uint8_t* packed", "uint8_t* scratch"),
        (memory, f"arguments.weights + {weights.offsets[name]}", "arguments.arena + scratch" if a_row else "nullptr"),
        matmul_body(epilogue, template.call(problem, args, "epilogue")),
        sizes=set(rows_of(memory.shape).free_symbols), includes=(*template.INCLUDES, "irc/columns.h"),
        epilogue=epilogue,
        scratch=f"{share} * ({problem.rows} * {a_row} + {_ROUND})" if a_row else "",
    )  # fmt: skip


register_site(SiteKind("float_matmul", match, emit, order=2))
