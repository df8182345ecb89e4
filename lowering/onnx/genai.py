"""The model and the settings that `onnxruntime-genai` generates from.

Its models take an attention mask instead of positions, give logits for every token, and call their caches
`past_key_values.N.key` and `present.N.key`, of a length that the runtime chooses. So a step in the flavour `ort` gets
those inputs: positions are counted back from the sum of the mask.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import torch.fx as fx

from irc.core.errors import TargetError
from irc.core.kv_cache import KVCache
from irc.core.operands import input_node
from irc.core.program import VAL, Program
from irc.lowering.onnx.artifact import INTERFACE, METADATA

PAST = ("past_key_values.%d.key", "past_key_values.%d.value")
PRESENT = ("present.%d.key", "present.%d.value")
MASK = "attention_mask"
_GQA = "GroupQueryAttention"
_QUERY_LENGTHS = 16
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
        name=MASK, shape=ir.Shape([_sizes(ids)[0], _LENGTHS[1]]), type=ir.TensorType(ir.DataType.INT64)
    )  # fmt: skip
    prelude = Prelude(graph, ids, mask)
    last, longest = prelude.lengths()
    new_tokens = prelude.new_tokens()
    for node in layers:
        node.replace_input_with(5, last)
        node.replace_input_with(6, longest)
        if len(node.inputs) > _QUERY_LENGTHS:
            node.replace_input_with(_QUERY_LENGTHS, new_tokens)
    _keep_every_token(graph, wanted)
    for old, make in ((positions, prelude.positions), (wanted, prelude.every_token)):
        if list(old.uses()):
            old.replace_all_uses_with(make())
    graph.insert_before(graph[0], prelude.nodes)
    ordered = []
    for index, node in enumerate(layers):
        for side in range(2):
            past, present = node.inputs[3 + side], node.outputs[1 + side]
            assert past is not None
            past.name, present.name = PAST[side] % index, PRESENT[side] % index
            for value, length in ((past, _LENGTHS[0]), (present, _LENGTHS[1])):
                batch, heads, _, width = _sizes(value)
                value.shape = ir.Shape([batch, heads, length, width])
            ordered.append((past, present))
    _replace(graph.inputs, [ids, mask, *(past for past, _ in ordered)])
    _replace(graph.outputs, [graph.outputs[0], *(present for _, present in ordered)])
    logits = graph.outputs[0]
    logits.shape = ir.Shape([*_sizes(ids)[:2], _sizes(logits)[2]])
    ids.name, logits.name = "input_ids", "logits"
    # What is said about the caches is about a step's inputs; who reads the file should know that these are others.
    described = json.loads(model.metadata_props[METADATA])
    model.metadata_props[METADATA] = json.dumps(described | {INTERFACE: "onnxruntime-genai"})


def _replace(values: Any, new: Sequence[ir.Value]) -> None:
    for value in list(values):
        values.remove(value)
    values.extend(new)


def _keep_every_token(graph: ir.Graph, wanted: ir.Value) -> None:
    """Choosing the hidden states of every token, in order, is choosing nothing."""
    for node in [node for node in graph if node.op_type == "GatherElements" and _comes_from(node.inputs[1], wanted)]:
        states = node.inputs[0]
        assert states is not None
        if node.attributes["axis"].as_int() == 1 and states.shape is not None and len(states.shape) == 3:
            node.outputs[0].replace_all_uses_with(states)
    _remove_unused(graph)


def _comes_from(value: ir.Value | None, source: ir.Value) -> bool:
    """Whether a value is that one, spread over further axes."""
    while value is not None and value is not source:
        node = value.producer()
        if node is None or node.op_type not in ("Expand", "Unsqueeze"):
            return False
        value = node.inputs[0]
    return value is source


def _remove_unused(graph: ir.Graph) -> None:
    """Nodes that nothing depends on, last ones first."""
    for node in reversed(list(graph)):
        if not any(out.uses() or out.is_graph_output() for out in node.outputs):
            graph.remove(node, safe=True)
    for name in [name for name, value in graph.initializers.items() if not value.uses()]:
        del graph.initializers[name]


class Prelude:
    """Nodes in front of a model: what a step is told about its tokens, from the ids [B, S] and the mask [B, P + S]."""

    def __init__(self, graph: ir.Graph, ids: ir.Value, mask: ir.Value) -> None:
        self.graph, self.ids, self.mask = graph, ids, mask
        self.nodes: list[ir.Node] = []

    def add(self, op: str, *inputs: ir.Value | None, **attributes: Any) -> ir.Value:
        node = ir.node(op, inputs, attributes)
        node.outputs[0].name = f"irc_genai_{len(self.nodes)}"
        self.nodes.append(node)
        return node.outputs[0]

    def number(self, name: str, values: list[int], shape: list[int]) -> ir.Value:
        name = f"irc_genai_{name}"
        if name not in self.graph.initializers:
            tensor = ir.Tensor(np.array(values, np.int64).reshape(shape), name=name)
            kind = ir.TensorType(ir.DataType.INT64)
            self.graph.initializers[name] = ir.Value(name=name, shape=ir.Shape(shape), type=kind, const_value=tensor)
        return self.graph.initializers[name]

    def lengths(self) -> tuple[ir.Value, ir.Value]:
        """(last position of each row [B], longest sequence [1]), i32."""
        one = self.number("one", [1], [1])
        last = self.add("Sub", self.add("ReduceSum", self.mask, one, keepdims=0), one)
        longest = self.add("Shape", self.mask, start=1, end=2)
        to = ir.DataType.INT32
        return self.add("Cast", last, to=to), self.add("Cast", longest, to=to)

    def new_tokens(self) -> ir.Value:
        """New tokens of each row [B], i32."""
        tokens = self.add("Cast", self.add("Shape", self.ids, start=1, end=2), to=ir.DataType.INT32)
        return self.add("Expand", tokens, self.add("Shape", self.ids, start=0, end=1))

    def positions(self) -> ir.Value:
        """Position of each token [B, S]."""
        one = self.number("one", [1], [1])
        length = self.add("ReduceSum", self.mask, one, keepdims=1)
        tokens = self.add("Shape", self.ids, start=1, end=2)
        return self.add("Add", self.add("Sub", length, tokens), self._count(tokens))

    def every_token(self) -> ir.Value:
        """Index of each token [B, S]."""
        tokens = self.add("Shape", self.ids, start=1, end=2)
        return self.add("Expand", self._count(tokens), self.add("Shape", self.ids))

    def _count(self, tokens: ir.Value) -> ir.Value:
        zero, step = self.number("zero", [0], []), self.number("step", [1], [])
        return self.add("Range", zero, self.add("Squeeze", tokens), step)


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


def _sizes(value: ir.Value) -> tuple[Any, ...]:
    assert value.shape is not None
    return tuple(value.shape)


def _attentions(program: Program) -> list[fx.Node]:
    return [node for node in program.operations() if str(node.target) == "irc.attention.default"]


def _heads(program: Program) -> int:
    return max((int(input_node(node).meta[VAL].shape[1]) for node in _attentions(program)), default=1)


def _width(program: Program) -> int:
    """Width of the embedding that the tokens are looked up in."""
    for user in program.placeholders[0].users:
        if str(user.target) == "aten.embedding.default":
            return int(user.meta[VAL].shape[-1])
    return 0
