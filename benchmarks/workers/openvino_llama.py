"""A Llama of given sizes and weights under OpenVINO, timed on request: `cpu_decode.py` starts it.

    python openvino_llama.py WEIGHTS.safetensors SIZES.json q4_0|q8_0|bf16|f32 THREADS [GROUP]

The model is made of OpenVINO's own operations in the form that its plugin for processors fuses: stateful caches that
`ScaledDotProductAttention` reads and writes (the plugin keeps them in 8 bits), rotary embedding, RMS norm, and
constants that are dequantized in front of a product, as its tool for weight compression writes them. Weights: int4 in
groups of GROUP (32 by default), int8 a row (what that tool does by default), bf16 or f32. Activations are what the
plugin chooses.

Prints one JSON line when the model is compiled. Then it answers each line, a JSON list:
`["prefill", N]` seconds of a prompt of N tokens; `["decode", N]` seconds of each of N tokens behind an empty cache;
`["logits", ids]` logits behind the last of these, all but the last of which are one prompt, and the last is one step.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
from openvino import opset13 as ops
from safetensors.numpy import load_file

EPSILON, BASE = 1e-6, 10000.0


def stored(bits: np.ndarray, shape: Sequence[int], kind: ov.Type) -> ov.Node:
    """A constant of a type that NumPy has not, of its own memory."""
    tensor = ov.Tensor(kind, list(shape))
    tensor.data.view(bits.dtype).reshape(-1)[:] = bits.reshape(-1)
    return ops.constant(tensor)


def packed_int4(integers: np.ndarray) -> np.ndarray:
    """Integers of 4 bits, two a byte, the first in the lower half."""
    halves = integers.reshape(-1, 2).astype(np.uint8) & 15
    return halves[:, 0] | halves[:, 1] << 4


class Llama:
    """The model as a graph of OpenVINO."""

    def __init__(self, weights: dict[str, np.ndarray], sizes: dict[str, int], kind: str, group: int) -> None:
        self.weights, self.kind, self.group = weights, kind, group
        self.heads, self.kv_heads = sizes["heads"], sizes["kv_heads"]
        self.head_width = sizes["width"] // sizes["heads"]
        self.sinks: list[ov.Node] = []
        self.ids = ops.parameter([-1, -1], np.int64, name="input_ids")
        self.positions = ops.parameter([-1, -1], np.int64, name="position_ids")
        self.beams = ops.parameter([-1], np.int32, name="beam_idx")
        for parameter, name in ((self.ids, "input_ids"), (self.positions, "position_ids"), (self.beams, "beam_idx")):
            parameter.output(0).set_names({name})
        self.cosines, self.sines = self._rotation()
        table = ops.convert(ops.constant(self.weights.pop("model.embed_tokens.weight")), np.float32)
        x = ops.gather(table, self.ids, ops.constant(0))
        for layer in range(sizes["layers"]):
            x = self._layer(x, f"model.layers.{layer}.")
        # Logits of the last token only, as its runtime for language models asks for.
        last = ops.gather(self._norm(x, "model.norm."), ops.constant(np.array([-1])), ops.constant(1))
        result = ops.result(self._linear(last, "lm_head."))
        self.model = ov.Model([result], self.sinks, [self.ids, self.positions, self.beams])

    def _rotation(self) -> tuple[ov.Node, ov.Node]:
        """cos and sin of every position and channel, [B, 1, S, D]."""
        steps = np.arange(0, self.head_width, 2, dtype=np.float32) / self.head_width
        frequencies = ops.constant((1.0 / BASE**steps).reshape(1, 1, -1).astype(np.float32))
        angles = ops.unsqueeze(ops.convert(self.positions, np.float32), ops.constant(2))
        half = ops.multiply(angles, frequencies)
        whole = ops.unsqueeze(ops.concat([half, half], axis=-1), ops.constant(1))
        return ops.cos(whole), ops.sin(whole)

    def _weight(self, name: str) -> ov.Node:
        """A weight, [N, K], as floats that a product reads."""
        weight = self.weights.pop(f"{name}weight").astype(np.float32)
        rows, depth = weight.shape
        if self.kind == "f32":
            return ops.constant(weight)
        if self.kind == "bf16":
            upper = ((weight.view(np.uint32) + 0x7FFF + ((weight.view(np.uint32) >> 16) & 1)) >> 16).astype(np.uint16)
            return ops.convert(stored(upper, weight.shape, ov.Type.bf16), np.float32)
        most, group = (7, self.group) if self.kind == "q4_0" else (127, depth)
        groups = weight.reshape(rows, depth // group, group)
        scales = (np.abs(groups).max(axis=2, keepdims=True) / most).astype(np.float16)
        integers = np.rint(groups / scales.astype(np.float32)).clip(-most - 1, most).astype(np.int8)
        integers = integers if group < depth else integers[:, 0]
        scales = scales if group < depth else scales[:, 0]
        if self.kind == "q4_0":
            narrow = stored(packed_int4(integers), integers.shape, ov.Type.i4)
        else:
            narrow = ops.constant(integers)
        wide = ops.multiply(ops.convert(narrow, np.float16), ops.constant(scales))
        if group < depth:
            wide = ops.reshape(wide, ops.constant(np.array([rows, depth])), special_zero=False)
        return ops.convert(wide, np.float32)

    def _linear(self, x: ov.Node, name: str) -> ov.Node:
        return ops.matmul(x, self._weight(name), False, True)

    def _norm(self, x: ov.Node, name: str) -> ov.Node:
        square = ops.power(x, ops.constant(np.float32(2)))
        mean = ops.add(ops.reduce_mean(square, ops.constant(np.array([-1])), True), ops.constant(np.float32(EPSILON)))
        scaled = ops.multiply(x, ops.divide(ops.constant(np.float32(1)), ops.sqrt(mean)))
        return ops.multiply(ops.constant(self.weights.pop(f"{name}weight").astype(np.float32)), scaled)

    def _split_heads(self, x: ov.Node, heads: int) -> ov.Node:
        """[B, S, H·D] → [B, H, S, D]."""
        shape = ops.constant(np.array([0, 0, heads, self.head_width]))
        return ops.transpose(ops.reshape(x, shape, special_zero=True), ops.constant(np.array([0, 2, 1, 3])))

    def _rotated(self, x: ov.Node) -> ov.Node:
        half, end, axis = self.head_width // 2, np.iinfo(np.int64).max, ops.constant(np.array([3]))
        step = ops.constant(np.array([1]))
        first = ops.slice(x, ops.constant(np.array([0])), ops.constant(np.array([half])), step, axis)
        second = ops.slice(x, ops.constant(np.array([half])), ops.constant(np.array([end])), step, axis)
        turned = ops.concat([ops.multiply(second, ops.constant(np.float32(-1))), first], axis=-1)
        return ops.add(ops.multiply(x, self.cosines), ops.multiply(turned, self.sines))

    def _cached(self, new: ov.Node, name: str) -> ov.Node:
        """All keys or values so far, one for each query head: [B, H, T, D]."""
        shape = ov.PartialShape([-1, self.kv_heads, -1, self.head_width])
        batch = ops.gather(ops.shape_of(self.ids), ops.constant(np.array([0])), ops.constant(0))
        sizes = [ops.constant(np.array([size])) for size in (self.kv_heads, 0, self.head_width)]
        empty = ops.broadcast(ops.constant(np.float32(0)), ops.concat([batch, *sizes], axis=0))
        past = ops.read_value(empty, name, ov.Type.f32, shape)
        whole = ops.concat([ops.gather(past, self.beams, ops.constant(0)), new], axis=2)
        self.sinks.append(ops.assign(whole, name))
        repeats = self.heads // self.kv_heads
        if repeats == 1:
            return whole
        length = ops.gather(ops.shape_of(whole), ops.constant(np.array([2])), ops.constant(0))
        counts = [ops.constant(np.array([size])) for size in (self.kv_heads, repeats, self.head_width)]
        target = ops.concat([batch, counts[0], counts[1], length, counts[2]], axis=0)
        repeated = ops.broadcast(ops.unsqueeze(whole, ops.constant(2)), target, broadcast_spec="BIDIRECTIONAL")
        return ops.reshape(repeated, ops.constant(np.array([0, self.heads, -1, self.head_width])), special_zero=True)

    def _layer(self, x: ov.Node, name: str) -> ov.Node:
        normed = self._norm(x, f"{name}input_layernorm.")
        query = self._rotated(self._split_heads(self._linear(normed, f"{name}self_attn.q_proj."), self.heads))
        key = self._rotated(self._split_heads(self._linear(normed, f"{name}self_attn.k_proj."), self.kv_heads))
        value = self._split_heads(self._linear(normed, f"{name}self_attn.v_proj."), self.kv_heads)
        keys, values = self._cached(key, f"{name}key"), self._cached(value, f"{name}value")
        seen = ops.scaled_dot_product_attention(query, keys, values, causal=True)
        merged = ops.reshape(
            ops.transpose(seen, ops.constant(np.array([0, 2, 1, 3]))),
            ops.constant(np.array([0, 0, self.heads * self.head_width])),
            special_zero=True,
        )
        x = ops.add(x, self._linear(merged, f"{name}self_attn.o_proj."))
        normed = self._norm(x, f"{name}post_attention_layernorm.")
        gate = ops.swish(self._linear(normed, f"{name}mlp.gate_proj."))
        product = ops.multiply(gate, self._linear(normed, f"{name}mlp.up_proj."))
        return ops.add(x, self._linear(product, f"{name}mlp.down_proj."))


class Session:
    """One sequence."""

    def __init__(self, compiled: ov.CompiledModel) -> None:
        self.request = compiled.create_infer_request()

    def step(self, ids: list[int], first: int) -> float:
        """Seconds of a step of these tokens from position `first` on."""
        inputs = {
            "input_ids": np.array([ids]),
            "position_ids": np.arange(first, first + len(ids))[None],
            "beam_idx": np.zeros(1, dtype=np.int32),
        }
        started = time.perf_counter()
        self.request.infer(inputs)
        return time.perf_counter() - started

    def answer(self, what: str, given: Any) -> list[float]:
        self.request.reset_state()
        if what == "prefill":
            return [self.step([i * 7 % 1000 for i in range(given)], 0)]
        if what == "decode":
            return [self.step([i * 7 % 1000], i) for i in range(given)]
        self.step(given[:-1], 0)
        self.step(given[-1:], len(given) - 1)
        return [float(value) for value in self.request.get_output_tensor(0).data.reshape(-1)]


def main() -> None:
    path, sizes, kind, threads = sys.argv[1:5]
    group = int(sys.argv[5]) if len(sys.argv) > 5 else 32
    started = time.perf_counter()
    made = Llama(load_file(path), json.loads(Path(sizes).read_text()), kind, group)
    options = {"INFERENCE_NUM_THREADS": int(threads), "NUM_STREAMS": 1, "PERFORMANCE_HINT": "LATENCY"}
    session = Session(ov.Core().compile_model(made.model, "CPU", options))
    del made
    session.answer("prefill", 8)
    spent = time.perf_counter() - started
    print(json.dumps({"version": ov.__version__, "compile_s": round(spent, 1)}), flush=True)
    for line in sys.stdin:
        print(json.dumps(session.answer(*json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
