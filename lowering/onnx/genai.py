"""The model and the settings that `onnxruntime-genai` generates from.

Its models take an attention mask instead of positions, give logits for every token, and call their caches
`past_key_values.N.key` and `present.N.key`, of a length that the runtime chooses. So a step in the flavour `ort` gets
those inputs: positions are counted back from the sum of the mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir
import torch.fx as fx

from irc.core.errors import TargetError
from irc.core.kv_cache import KVCache
from irc.core.program import VAL, Program

PAST = ("past_key_values.%d.key", "past_key_values.%d.value")
PRESENT = ("present.%d.key", "present.%d.value")
MASK = "attention_mask"
_GQA = "GroupQueryAttention"
_LENGTHS = ("past_sequence_length", "total_sequence_length")


def to_genai(model: ir.Model, cache: KVCache) -> None:
    """Edits a step of the flavour `ort` into a model for onnxruntime-genai.

    Raises:
        TargetError: a layer keeps its cache in another way than `GroupQueryAttention`.
    """
    graph = model.graph
    layers = [node for node in graph if node.op_type == _GQA]
    caches = {str(value.name) for value in graph.inputs[3:]}
    kept = [str(value.name) for node in layers for value in node.inputs[3:5] if value is not None]
    if sorted(kept) != sorted(c.name for c in cache.caches):
        others = sorted(caches - set(kept))
        raise TargetError(
            f"onnxruntime-genai takes caches of {_GQA} only; {', '.join(others)} are read by other operators"
            " (target onnx with flavour='ort' says why in its report)"
        )
    ids, positions, wanted = graph.inputs[:3]
    mask = ir.Value(
        name=MASK, shape=ir.Shape([ids.shape[0], _LENGTHS[1]]), type=ir.TensorType(ir.DataType.INT64)  # type: ignore[index]
    )  # fmt: skip
    nodes, new_positions, new_wanted = _positions(graph, ids, mask)
    for old, new in ((positions, new_positions), (wanted, new_wanted)):
        old.replace_all_uses_with(new)
    graph.insert_before(graph[0], nodes)
    ordered = []
    for index, node in enumerate(layers):
        for side in range(2):
            past, present = node.inputs[3 + side], node.outputs[1 + side]
            assert past is not None
            past.name, present.name = PAST[side] % index, PRESENT[side] % index
            for value, length in ((past, _LENGTHS[0]), (present, _LENGTHS[1])):
                batch, heads, _, width = value.shape  # type: ignore[misc]
                value.shape = ir.Shape([batch, heads, length, width])
            ordered.append((past, present))
    _replace(graph.inputs, [ids, mask, *(past for past, _ in ordered)])
    _replace(graph.outputs, [graph.outputs[0], *(present for _, present in ordered)])
    logits = graph.outputs[0]
    logits.shape = ir.Shape([ids.shape[0], ids.shape[1], logits.shape[2]])  # type: ignore[index]
    ids.name, logits.name = "input_ids", "logits"


def _replace(values: Any, new: Sequence[ir.Value]) -> None:
    for value in list(values):
        values.remove(value)
    values.extend(new)


def _positions(graph: ir.Graph, ids: ir.Value, mask: ir.Value) -> tuple[list[ir.Node], ir.Value, ir.Value]:
    """Nodes that count: (positions [B, S], every token's index [B, S])."""
    nodes: list[ir.Node] = []

    def add(op: str, *inputs: ir.Value | None, **attributes: Any) -> ir.Value:
        node = ir.node(op, inputs, attributes)
        node.outputs[0].name = f"irc_genai_{len(nodes)}"
        nodes.append(node)
        return node.outputs[0]

    def number(name: str, values: list[int], shape: list[int]) -> ir.Value:
        import numpy as np

        tensor = ir.Tensor(np.array(values, np.int64).reshape(shape), name=f"irc_genai_{name}")
        value = ir.Value(
            name=tensor.name, shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.INT64), const_value=tensor
        )
        graph.initializers[tensor.name] = value  # type: ignore[index]
        return value

    one, zero = number("one", [1], [1]), number("zero", [0], [])
    length = add("ReduceSum", mask, one, keepdims=1)
    sizes = add("Shape", ids)
    tokens = add("Gather", sizes, one, axis=0)
    step = add("Squeeze", one)
    every = add("Range", zero, add("Squeeze", tokens), step)
    positions = add("Add", add("Sub", length, tokens), every)
    return nodes, positions, add("Expand", every, sizes)


def config(
    program: Program, cache: KVCache, filename: str, tokens: dict[str, Any], threads: int | None
) -> dict[str, Any]:
    """What `genai_config.json` says.

    Args:
        tokens: bos, eos and pad token ids, under the names of the file.
    """
    keys, values = cache.caches[0], cache.caches[1]
    options: dict[str, Any] = {"log_id": "onnxruntime-genai", "provider_options": []}
    if threads is not None:
        options["intra_op_num_threads"] = threads
    return {
        "model": {
            **tokens,
            "context_length": cache.max_length,
            "decoder": {
                "session_options": options,
                "filename": filename,
                "head_size": keys.head_dim,
                "hidden_size": _width(program),
                "inputs": {
                    "input_ids": "input_ids", MASK: MASK, "past_key_names": PAST[0], "past_value_names": PAST[1],
                },
                "outputs": {"logits": "logits", "present_key_names": PRESENT[0], "present_value_names": PRESENT[1]},
                "num_attention_heads": _heads(program),
                "num_hidden_layers": len(cache.caches) // 2,
                "num_key_value_heads": values.heads,
            },
            # Its own name for decoders of this interface; nothing else of that architecture is assumed.
            "type": "llama",
            "vocab_size": int(program.outputs[0].meta[VAL].shape[-1]),
        },
        "search": {
            "do_sample": False, "max_length": cache.max_length, "min_length": 0, "num_beams": 1,
            "num_return_sequences": 1, "past_present_share_buffer": True, "repetition_penalty": 1.0,
            "temperature": 1.0, "top_k": 1, "top_p": 1.0,
        },
    }  # fmt: skip


def _attentions(program: Program) -> list[fx.Node]:
    return [node for node in program.operations() if str(node.target) == "irc.attention.default"]


def _heads(program: Program) -> int:
    return max((int(node.args[0].meta[VAL].shape[1]) for node in _attentions(program)), default=1)  # type: ignore[union-attr]


def _width(program: Program) -> int:
    """Width of the embedding that the tokens are looked up in."""
    for user in program.placeholders[0].users:
        if str(user.target) == "aten.embedding.default":
            return int(user.meta[VAL].shape[-1])
    return 0
