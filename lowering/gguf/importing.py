"""`from_gguf`: a GGUF file as a program, its quantized blocks untouched behind `irc.dequantize`.

The tensors of the architecture are looked up by name and held against the shapes that the metadata demands; then one
plain module over them is captured. A file that irc wrote says how its rotary pairs lay before, so the program that
comes back computes exactly what the one that went out did.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from irc.core.errors import StorageError
from irc.core.program import Program
from irc.lowering.gguf.architectures import ALWAYS
from irc.lowering.gguf.layout import FREQUENCIES_KEY, ROPE_KEY
from irc.lowering.gguf.metadata import Metadata
from irc.lowering.gguf.mixes import FLOATS
from irc.lowering.gguf.module import GgufModel, LayerSettings, Leaf, Part, Parts, Settings
from irc.lowering.gguf.reading import GgufFile, StoredTensor, read_file

_DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
_EXAMPLE = (2, 8)


def from_gguf(path: str | Path, *, name: str | None = None) -> Program:
    """Read a GGUF file as a program: token ids → logits (hidden states for an encoder).

    Floats keep their type when all matrices have the same, else all become f32; blocks stay as they are.

    Raises:
        StorageError: the file is missing, damaged, of an architecture that irc does not read, or contradicts itself.
    """
    from irc.frontend import capture

    file = read_file(path)
    model = build_module(file)
    length = min(_EXAMPLE[1], int(file.metadata.get(f"{model.architecture.name}.context_length", _EXAMPLE[1])))
    vocabulary = file.tensors["token_embd.weight"].shape[0]
    example = (torch.arange(_EXAMPLE[0] * length) % vocabulary).view(_EXAMPLE[0], length)
    title = name or str(file.metadata.get("general.name") or Path(path).stem)
    program = capture(model.eval(), (example,), dynamic=({0: "B", 1: "S"},), name=title)
    program.metadata["gguf"] = {"architecture": model.architecture.name, "file": Path(path).name}
    return program


def build_module(file: GgufFile) -> GgufModel:
    """The module of a file.

    Raises:
        StorageError: as `from_gguf`.
    """
    metadata = Metadata(file)
    settings = _settings(metadata, _compute_dtype(file))
    loader = _Loader(file, metadata, settings)
    parts = loader.load()
    tables = _frequencies(metadata, settings)
    unused = set(file.tensors) - loader.used - {"rope_freqs.weight"}
    if unused:
        raise StorageError(
            f"{file.path}: irc's {metadata.architecture.name} has no place for {len(unused)} tensors, among them"
            f" {', '.join(sorted(unused)[:3])}"
        )
    return GgufModel(metadata.architecture, settings, parts, tables)


def _compute_dtype(file: GgufFile) -> torch.dtype:
    kinds = {tensor.kind for tensor in file.tensors.values() if len(tensor.shape) > 1 and "gate_inp" not in tensor.name}
    kinds |= {"f32"} if not kinds else set()
    found = _DTYPES.get(next(iter(kinds)), torch.float32) if len(kinds) == 1 else torch.float32
    vectors = [
        tensor.data for tensor in file.tensors.values() if tensor.kind == "f32" and tensor.name != "rope_freqs.weight"
    ]
    exact = all(torch.equal(data.to(found).float(), data) for data in vectors)
    return found if exact else torch.float32


def _settings(metadata: Metadata, dtype: torch.dtype) -> Settings:
    entry = metadata.architecture
    heads = metadata.per_layer("attention.head_count")
    kv_heads = metadata.per_layer("attention.head_count_kv", metadata.get("attention.head_count"))
    width = metadata.integer("embedding_length")
    head_dim = metadata.integer("attention.key_length", max(1, width // heads[0]))
    if metadata.integer("attention.value_length", head_dim) != head_dim:
        raise StorageError(f"{metadata.file.path}: keys and values of different widths are not read yet")
    windows = metadata.windows()
    local = metadata.get("rope.freq_base_swa") is not None
    for index, (many, few) in enumerate(zip(heads, kv_heads, strict=True)):
        if many % few:
            raise StorageError(f"{metadata.file.path}: layer {index} has {many} heads for {few} of keys and values")
    layers = [
        LayerSettings(many, few, head_dim, window, None if entry.rope is None else int(local and window is not None))
        for many, few, window in zip(heads, kv_heads, windows, strict=True)
    ]
    logit = metadata.number("logit_scale", 1.0) if entry.logit_scale is not None else 1.0
    if entry.logit_scale == "divide":
        if logit == 0:
            raise metadata.wrong("logit_scale", logit, "no zero")
        logit = 1 / logit
    return Settings(
        layers,
        metadata.number("attention.layer_norm_" + ("rms_epsilon" if entry.norm == "rms" else "epsilon")),
        entry.rope == "interleaved" and metadata.file.metadata.get(ROPE_KEY) != "half",
        metadata.number("rope.scaling.attn_factor", 1.0),
        _is_parallel(metadata),
        _embedding_scale(metadata, width),
        metadata.number("residual_scale", 1.0) if entry.residual_scale else 1.0,
        metadata.optional("attention.scale") if entry.attention_scale else None,
        logit,
        metadata.optional("attn_logit_softcapping") or (50.0 if entry.name == "gemma2" else None),
        metadata.optional("final_logit_softcapping") or (30.0 if entry.name == "gemma2" else None),
        metadata.integer("expert_used_count", low=1, high=4096) if metadata.get("expert_count") else 0,
        dtype,
    )


def _embedding_scale(metadata: Metadata, width: int) -> float:
    entry = metadata.architecture
    if entry.embedding_scale == "sqrt":
        return math.sqrt(width)
    return metadata.number("embedding_scale", 1.0) if entry.embedding_scale == "key" else 1.0


def _is_parallel(metadata: Metadata) -> bool:
    blocks = metadata.architecture.block
    if "sequential" not in blocks:
        return True
    if "parallel-2" in blocks:
        return metadata.flag("use_parallel_residual", True)
    # StableLM: parallel where the MLP has no norm of its own.
    return "parallel" in blocks and "blk.0.ffn_norm.weight" not in metadata.file.tensors


def _frequencies(metadata: Metadata, settings: Settings) -> list[Tensor]:
    if metadata.architecture.rope is None:
        return []
    width = metadata.integer("rope.dimension_count", settings.layers[0].head_dim)
    if width % 2 or width > settings.layers[0].head_dim:
        raise metadata.wrong("rope.dimension_count", width, f"an even number up to {settings.layers[0].head_dim}")
    if not metadata.architecture.partial_rope and width != settings.layers[0].head_dim:
        raise metadata.wrong("rope.dimension_count", width, f"{settings.layers[0].head_dim}")
    return [
        _frequencies_of(metadata, width, "rope.freq_base", FREQUENCIES_KEY),
        *(
            [_frequencies_of(metadata, width, "rope.freq_base_swa", FREQUENCIES_KEY + "_swa")]
            if metadata.get("rope.freq_base_swa") is not None
            else []
        ),
    ]


def _frequencies_of(metadata: Metadata, width: int, key: str, exact_key: str) -> Tensor:
    exact = metadata.file.metadata.get(exact_key)
    if isinstance(exact, list) and len(exact) == width // 2 and all(isinstance(one, float) for one in exact):
        return torch.tensor(exact)
    base = metadata.number(key, 10000.0)
    if base <= 0:
        raise metadata.wrong(key, base, "positive")
    table = base ** -(torch.arange(width // 2, dtype=torch.float64) * 2 / width)
    if key != "rope.freq_base":
        return table
    scaling = str(metadata.get("rope.scaling.type", "linear"))
    factor = metadata.number("rope.scaling.factor", 1.0)
    if scaling not in ("linear", "none") and factor != 1:
        raise metadata.wrong("rope.scaling.type", scaling, "linear: irc reads no other yet")
    table = table / (factor or 1.0)
    factors = metadata.file.tensors.get("rope_freqs.weight")
    if factors is not None and metadata.architecture.rope_factors:
        if factors.shape != (width // 2,) or factors.kind != "f32" or not bool((factors.data > 0).all()):
            raise StorageError(f"{metadata.file.path}: rope_freqs.weight is no list of {width // 2} positive factors")
        table = table / factors.data.double()
    return table


class _Loader:
    """Takes the tensors of an architecture out of a file, each with its shape checked."""

    def __init__(self, file: GgufFile, metadata: Metadata, settings: Settings) -> None:
        self.file, self.metadata, self.settings = file, metadata, settings
        self.entry = metadata.architecture
        self.width = metadata.integer("embedding_length")
        self.used: set[str] = set()
        self.parts: Parts = {}

    def load(self) -> Parts:
        embedding = self.take("token_embd.weight", None)
        assert embedding is not None
        self.vocabulary = embedding.shape[0]
        self.matrix("token_embd", (self.vocabulary, self.width))
        if self.entry.rope is None:
            table = self.take("position_embd.weight", None)
            assert table is not None
            self.matrix("position_embd", (table.shape[0], self.width))
        types = self.file.tensors.get("token_types.weight")
        if types is not None and not self.entry.causal:
            self.matrix("token_types", (types.shape[0], self.width))
        if self.entry.causal:
            self.norm("output_norm")
            if "output.weight" in self.file.tensors or self.entry.head == ALWAYS:
                self.matrix("output", (self.vocabulary, self.width), bias=True)
        else:
            self.norm("token_embd_norm")
        ffn = self.metadata.per_layer("feed_forward_length")
        for index, layer in enumerate(self.settings.layers):
            self.layer(index, layer, ffn[index])
        return self.parts

    # ---------------------------------------------------------------- tensors

    def take(self, name: str, shape: tuple[int, ...] | None) -> StoredTensor:
        found = self.file.tensors.get(name)
        if found is None:
            raise StorageError(f"{self.file.path} has no tensor {name!r}, which {self.entry.name} needs")
        if shape is not None and found.shape != shape:
            raise StorageError(
                f"{self.file.path}: {name} is {list(found.shape)}, and by the metadata it should be {list(shape)}"
            )
        self.used.add(name)
        return found

    def vector(self, name: str, size: int) -> Tensor | None:
        if name not in self.file.tensors:
            return None
        found = self.take(name, (size,))
        if found.kind not in FLOATS:
            raise StorageError(f"{self.file.path}: {name} is {found.kind}, and irc reads vectors of floats only")
        return found.data

    def leaf(self, found: StoredTensor, rows: Tensor | slice | None = None) -> Leaf:
        data = found.data if rows is None else found.data[rows]
        dtype = self.settings.dtype
        return Leaf(data, None if found.kind in FLOATS else found.kind, dtype)

    def matrix(self, name: str, shape: tuple[int, ...], *, bias: bool = False, rows: Tensor | None = None) -> None:
        found = self.take(f"{name}.weight", shape)
        vector = self.vector(f"{name}.bias", shape[-2]) if bias else None
        if vector is not None and rows is not None:
            vector = vector[rows]
        self.parts[name] = Part(self.leaf(found, rows), vector, self.settings.dtype)

    def norm(self, name: str, shape: tuple[int, ...] | None = None) -> None:
        found = self.take(f"{name}.weight", shape or (self.width,))
        if found.kind not in FLOATS:
            raise StorageError(f"{self.file.path}: {name} is {found.kind}, and norms are floats")
        bias = self.vector(f"{name}.bias", self.width) if self.entry.norm_bias else None
        self.parts[name] = Part(self.leaf(found), bias, self.settings.dtype)

    # ---------------------------------------------------------------- layers

    def layer(self, index: int, layer: LayerSettings, ffn: int) -> None:
        name = f"blk.{index}"
        for key in self.norm_names(name):
            self.norm(f"{name}.{key}")
        self.projections(name, layer)
        attended = layer.num_heads * layer.head_dim
        self.matrix(f"{name}.attn_output", (self.width, attended), bias=True)
        self.head_norms(name, layer)
        if self.settings.num_used_experts and f"{name}.ffn_gate_inp.weight" in self.file.tensors:
            self.experts(name, self.metadata.integer("expert_feed_forward_length", ffn))
        else:
            self.mlp(name, ffn)

    def norm_names(self, name: str) -> list[str]:
        entry = self.entry
        names = {
            "attn": "attn_norm", "ffn": "ffn_norm", "attn_post": "post_attention_norm", "ffn_post": "post_ffw_norm",
            "attn_out": "attn_output_norm", "ffn_out": "layer_output_norm",
        }  # fmt: skip
        found = [names[key] for key in entry.norms]
        one_norm = self.settings.parallel and "parallel" in entry.block
        if one_norm and "ffn_norm" in found:
            found.remove("ffn_norm")
        if f"{name}.attn_norm_2.weight" in self.file.tensors and entry.name == "falcon":
            found.append("attn_norm_2")
        return found

    def projections(self, name: str, layer: LayerSettings) -> None:
        counts = {"attn_q": layer.num_heads, "attn_k": layer.num_kv_heads, "attn_v": layer.num_kv_heads}
        fused = f"{name}.attn_qkv.weight" in self.file.tensors
        total, start = sum(counts.values()) * layer.head_dim, 0
        for key, heads in counts.items():
            size = heads * layer.head_dim
            rows = self.rows(heads, layer.head_dim, start if fused else 0, turned=key != "attn_v")
            if fused:
                whole = self.take(f"{name}.attn_qkv.weight", (total, self.width))
                bias = self.vector(f"{name}.attn_qkv.bias", total)
                part = torch.arange(start, start + size) if rows is None else rows
                vector = None if bias is None else bias[part]
                self.parts[f"{name}.{key}"] = Part(self.leaf(whole, part), vector, self.settings.dtype)
            else:
                self.matrix(f"{name}.{key}", (size, self.width), bias=True, rows=rows)
            start += size

    def rows(self, heads: int, head_dim: int, start: int, *, turned: bool) -> Tensor | None:
        """Rows in the order that the program had before it was written; None: as they are."""
        if not turned or self.entry.rope != "interleaved" or self.settings.interleaved:
            return None
        width = self.metadata.integer("rope.dimension_count", head_dim)
        order = torch.cat((torch.arange(width).view(-1, 2).T.reshape(-1), torch.arange(width, head_dim)))
        return (start + torch.arange(heads * head_dim).view(heads, head_dim))[:, order].reshape(-1)

    def head_norms(self, name: str, layer: LayerSettings) -> None:
        if self.entry.head_norm is None:
            return
        span = self.entry.head_norm[1]
        for key, heads in (("attn_q_norm", layer.num_heads), ("attn_k_norm", layer.num_kv_heads)):
            if self.entry.head_norm_use != ALWAYS and f"{name}.{key}.weight" not in self.file.tensors:
                continue
            shape = {"head": (layer.head_dim,), "all": (heads * layer.head_dim,), "heads": (heads, layer.head_dim)}[
                span
            ]
            self.norm_vector(f"{name}.{key}", shape)

    def norm_vector(self, name: str, shape: tuple[int, ...]) -> None:
        found = self.take(f"{name}.weight", shape)
        if found.kind not in FLOATS:
            raise StorageError(f"{self.file.path}: {name} is {found.kind}, and norms are floats")
        self.parts[name] = Part(self.leaf(found), None, self.settings.dtype)

    def mlp(self, name: str, ffn: int) -> None:
        if self.entry.fused_gate_up:
            whole = self.take(f"{name}.ffn_up.weight", (2 * ffn, self.width))
            for key, rows in (("ffn_gate", slice(0, ffn)), ("ffn_up", slice(ffn, 2 * ffn))):
                self.parts[f"{name}.{key}"] = Part(self.leaf(whole, rows), None, self.settings.dtype)
        else:
            for key in ("ffn_gate", "ffn_up") if self.entry.gated else ("ffn_up",):
                self.matrix(f"{name}.{key}", (ffn, self.width), bias=True)
        self.matrix(f"{name}.ffn_down", (self.width, ffn), bias=True)

    def experts(self, name: str, ffn: int) -> None:
        count = self.metadata.integer("expert_count", high=4096)
        if self.settings.num_used_experts > count:
            raise self.metadata.wrong("expert_used_count", self.settings.num_used_experts, f"at most {count}")
        self.matrix(f"{name}.ffn_gate_inp", (count, self.width))
        for key in ("ffn_gate", "ffn_up"):
            self.matrix(f"{name}.{key}_exps", (count, ffn, self.width))
        self.matrix(f"{name}.ffn_down_exps", (count, self.width, ffn))
