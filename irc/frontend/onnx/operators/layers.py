"""Layers: products, convolutions, pooling, norms, attention; and moving data about."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from irc.core.errors import CaptureError
from irc.frontend.onnx.calls import Call, operator

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_MAX_POOL = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
_AVERAGE_POOL: dict[int, Any] = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}


@operator("MatMul")
def matmul(call: Call) -> Tensor:
    """NumPy's matmul; with a transposed matrix, a linear layer."""
    turned = call.attribute("irc_turned")
    if isinstance(turned, Tensor) and turned.dim() == 2:
        return F.linear(call.tensor(0), turned)
    return torch.matmul(call.tensor(0), call.tensor(1))


@operator("Gemm")
def gemm(call: Call) -> Tensor:
    """α A B + β C, transposed as asked."""
    a, b = call.tensor(0), call.tensor(1)
    a = a.t() if call.attribute("transA", 0) else a
    alpha, beta = call.attribute("alpha", 1.0), call.attribute("beta", 1.0)
    bias = call.maybe(2)
    plain = alpha == 1.0 and (bias is None or (beta == 1.0 and bias.dim() == 1))
    if plain and call.attribute("transB", 0):
        return F.linear(a, b, bias)
    product = torch.matmul(a, b.t() if call.attribute("transB", 0) else b)
    product = product if alpha == 1.0 else product * alpha
    return product if bias is None else product + (bias if beta == 1.0 else bias * beta)


@operator("Conv")
def conv(call: Call) -> Tensor:
    """One to three dimensions; padding that differs on both sides is done first."""
    x, weight = call.tensor(0), call.tensor(1)
    rank = weight.dim() - 2
    if rank not in _CONV:
        raise CaptureError(f"Conv {call.name!r} has {rank} spatial dimensions")
    x, padding = _padded(call, x, rank, 0.0)
    return _CONV[rank](
        x, weight, call.maybe(2), call.attribute("strides", [1] * rank), padding,
        call.attribute("dilations", [1] * rank), call.attribute("group", 1),
    )  # fmt: skip


def _padded(call: Call, x: Tensor, rank: int, value: float) -> tuple[Tensor, list[int]]:
    """The input and the padding that is left to the operator."""
    how = call.attribute("auto_pad", "NOTSET")
    if how not in ("NOTSET", "VALID", ""):
        raise CaptureError(f"{call.op} {call.name!r}: auto_pad={how} is not read; export with explicit padding")
    pads = [0] * 2 * rank if how == "VALID" else [int(p) for p in call.attribute("pads", [0] * 2 * rank)]
    before, after = pads[:rank], pads[rank:]
    if before == after:
        return x, before
    flat = [p for pair in zip(reversed(before), reversed(after), strict=True) for p in pair]
    return F.pad(x, flat, value=value), [0] * rank


@operator("MaxPool")
def max_pool(call: Call) -> Tensor:
    """Largest of each window."""
    kernel = [int(k) for k in call.attribute("kernel_shape")]
    rank = len(kernel)
    x, padding = _padded(call, call.tensor(0), rank, float("-inf"))
    return _MAX_POOL[rank](
        x, kernel, call.attribute("strides", [1] * rank), padding, call.attribute("dilations", [1] * rank),
        ceil_mode=bool(call.attribute("ceil_mode", 0)),
    )  # fmt: skip


@operator("AveragePool")
def average_pool(call: Call) -> Tensor:
    """Mean of each window."""
    kernel = [int(k) for k in call.attribute("kernel_shape")]
    rank, counts = len(kernel), bool(call.attribute("count_include_pad", 0))
    x, padding = _padded(call, call.tensor(0), rank, 0.0)
    if padding == [0] * rank and any(call.attribute("pads", [0])) and not counts:
        raise CaptureError(f"AveragePool {call.name!r}: padding of one side that does not count is not read")
    return _AVERAGE_POOL[rank](
        x, kernel, call.attribute("strides", [1] * rank), padding, bool(call.attribute("ceil_mode", 0)), counts
    )


@operator("GlobalAveragePool")
def global_average_pool(call: Call) -> Tensor:
    """Mean over all places."""
    x = call.tensor(0)
    return x.mean(list(range(2, x.dim())), keepdim=True)


@operator("BatchNormalization")
def batch_normalization(call: Call) -> Tensor:
    """By stored statistics."""
    if call.attribute("training_mode", 0):
        raise CaptureError(f"BatchNormalization {call.name!r} is in training mode: export the model for inference")
    x, scale, bias, mean, variance = (call.tensor(i) for i in range(5))
    return F.batch_norm(x, mean, variance, scale, bias, False, 0.0, call.attribute("epsilon", 1e-5))


@operator("LayerNormalization")
def layer_normalization(call: Call) -> Tensor:
    """From an axis on."""
    x = call.tensor(0)
    axis = call.attribute("axis", -1) % x.dim()
    return F.layer_norm(
        x, [int(s) for s in x.shape[axis:]], call.tensor(1), call.maybe(2), call.attribute("epsilon", 1e-5)
    )


@operator("RMSNormalization", "SimplifiedLayerNormalization")
def rms_normalization(call: Call) -> Tensor:
    """Over the last axis."""
    x = call.tensor(0)
    if call.attribute("axis", -1) % x.dim() != x.dim() - 1:
        raise CaptureError(f"{call.op} {call.name!r}: only the last axis is read")
    return torch.ops.irc.rms_norm(x, call.tensor(1), call.attribute("epsilon", 1e-5))


@operator("InstanceNormalization")
def instance_normalization(call: Call) -> Tensor:
    """Each channel of each image by its own statistics."""
    return F.instance_norm(
        call.tensor(0), weight=call.tensor(1), bias=call.tensor(2), eps=call.attribute("epsilon", 1e-5)
    )


@operator("RotaryEmbedding")
def rotary_embedding(call: Call) -> Tensor:
    """Tables by position, or a row of angles a token; [B, H, S, D], or [B, S, H·D] with `num_heads`."""
    x, cos, sin = call.tensor(0), call.tensor(1), call.tensor(2)
    if call.has(3):
        positions = call.tensor(3)
        cos, sin = F.embedding(positions, cos), F.embedding(positions, sin)
    heads = call.attribute("num_heads", 0)
    flat = x.dim() == 3
    if flat:
        x = x.unflatten(2, (heads, -1)).transpose(1, 2)
    turned = torch.ops.irc.rope(
        x, cos.unsqueeze(1), sin.unsqueeze(1), interleaved=bool(call.attribute("interleaved", 0))
    )
    return turned.transpose(1, 2).flatten(2) if flat else turned


@operator("Attention")
def attention(call: Call) -> tuple[Any, ...]:
    """The standard's attention of opset 23 on; with past keys, these are joined in front."""
    query, key, value, bias = (*(call.tensor(i) for i in range(3)), call.maybe(3))
    if call.has(6):
        raise CaptureError(f"Attention {call.name!r}: nonpad_kv_seqlen is not read")
    flat = query.dim() == 3
    if flat:
        heads, kv_heads = call.attribute("q_num_heads"), call.attribute("kv_num_heads")
        query, key, value = (
            t.unflatten(2, (n, -1)).transpose(1, 2)
            for t, n in zip((query, key, value), (heads, kv_heads, kv_heads), strict=True)
        )
    if call.has(4):
        key, value = torch.cat((call.tensor(4), key), 2), torch.cat((call.tensor(5), value), 2)
    if bias is not None:
        while bias.dim() < 4:
            bias = bias.unsqueeze(0)
    causal = bool(call.attribute("is_causal", 0))
    softcap = call.attribute("softcap", 0.0)
    out = torch.ops.irc.attention(
        query, key, value, bias=bias, mask="causal" if causal else "full",
        scale=call.attribute("scale", query.shape[-1] ** -0.5), softcap=softcap or None,
    )  # fmt: skip
    return (out.transpose(1, 2).flatten(2) if flat else out), key, value


@operator("TensorScatter")
def tensor_scatter(call: Call) -> Tensor:
    """Rows written from their own start on."""
    cache, update = call.tensor(0), call.tensor(1)
    if cache.dim() != 4 or call.attribute("axis", -2) % 4 != 2 or call.attribute("mode", "linear") != "linear":
        raise CaptureError(f"TensorScatter {call.name!r}: only caches [B, H, L, D] written in line are read")
    offsets = torch.arange(update.shape[2])
    positions = offsets.expand(cache.shape[0], -1) if not call.has(2) else call.tensor(2).unsqueeze(1) + offsets
    return torch.ops.irc.cache_write(cache, update, positions)


@operator("Transpose")
def transpose(call: Call) -> Tensor:
    """Axes in another order."""
    x = call.tensor(0)
    order = [int(a) for a in call.attribute("perm", list(reversed(range(x.dim()))))]
    moved = [i for i, axis in enumerate(order) if i != axis]
    return x.transpose(*moved) if len(moved) == 2 else x.permute(order)


@operator("Flatten")
def flatten(call: Call) -> Tensor:
    """Two dimensions."""
    x = call.tensor(0)
    axis = call.attribute("axis", 1) % x.dim() if call.attribute("axis", 1) != x.dim() else x.dim()
    if axis == 1:
        return x.flatten(1)
    rows: Any = 1
    for size in x.shape[:axis]:
        rows = rows * size
    return x.reshape(rows, -1)


@operator("Split")
def split(call: Call) -> tuple[Tensor, ...]:
    """Parts along an axis."""
    x, axis = call.tensor(0), call.attribute("axis", 0)
    sizes = call.axes("split", 1)
    if sizes is not None:
        return tuple(x.split(sizes, dim=axis))
    parts = call.attribute("num_outputs") or call.attribute("irc_outputs")
    return tuple(x.chunk(int(parts), dim=axis))


@operator("Pad")
def pad(call: Call) -> Tensor:
    """Constant padding, of given axes or all."""
    mode = call.attribute("mode", "constant")
    if mode != "constant" or call.opset < 11:
        raise CaptureError(f"Pad {call.name!r} of mode {mode!r}, opset {call.opset}, is not read")
    x, pads = call.tensor(0), call.ints(1)
    axes = [int(a) % x.dim() for a in call.ints(3)] if call.has(3) else list(range(x.dim()))
    both = {axis: (pads[i], pads[i + len(axes)]) for i, axis in enumerate(axes)}
    flat = [p for axis in reversed(range(x.dim())) for p in both.get(axis, (0, 0))]
    while len(flat) > 2 and flat[-2:] == [0, 0]:
        flat = flat[:-2]
    value = call.tensor(2).item() if call.has(2) and call.tensor(2).numel() else 0
    return F.pad(x, flat, value=value)


@operator("GatherElements")
def gather_elements(call: Call) -> Tensor:
    """One element a place of the index."""
    return call.tensor(0).gather(call.attribute("axis", 0), call.tensor(1).long())


@operator("GatherND")
def gather_nd(call: Call) -> Tensor:
    """The place, or slice, that each row of the index names."""
    x, index = call.tensor(0), call.tensor(1).long()
    if call.attribute("batch_dims", 0):
        raise CaptureError(f"GatherND {call.name!r}: batch_dims is not read")
    return x[tuple(index.unbind(-1))]


@operator("ScatterElements")
def scatter_elements(call: Call) -> Tensor:
    """Elements written where the index says."""
    if call.attribute("reduction", "none") != "none":
        raise CaptureError(f"ScatterElements {call.name!r}: reductions are not read")
    return call.tensor(0).scatter(call.attribute("axis", 0), call.tensor(1).long(), call.tensor(2))


@operator("Trilu")
def trilu(call: Call) -> Tensor:
    """A triangle of the last two axes."""
    diagonal = int(call.ints(1)[0]) if call.has(1) else 0
    return (torch.triu if call.attribute("upper", 1) else torch.tril)(call.tensor(0), diagonal)


@operator("TopK")
def top_k(call: Call) -> tuple[Tensor, Tensor]:
    """The k largest or smallest, in order."""
    result = torch.topk(call.tensor(0), call.ints(1)[0], call.attribute("axis", -1), bool(call.attribute("largest", 1)))
    return result[0], result[1]


@operator("Einsum")
def einsum(call: Call) -> Tensor:
    """By its equation."""
    return torch.einsum(call.attribute("equation"), *call.tensors())
