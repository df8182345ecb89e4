"""Windows that slide over an image are said with numbers. Runs after linear layers are raised.

So that every later pass and target meets one spelling of convolution, and no rounding up where nothing is rounded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.fx as fx

from irc.core.contract import Pass, PassContext, PassResult, Skip, register_pass
from irc.core.program import VAL, Program
from irc.passes.fuse._layers import arguments

aten = torch.ops.aten
_NUMBERED: dict[Any, Any] = {
    aten.conv1d.padding: aten.conv1d.default,
    aten.conv2d.padding: aten.conv2d.default,
    aten.conv3d.padding: aten.conv3d.default,
}
_POOLS = frozenset(
    {
        aten.avg_pool1d.default, aten.avg_pool2d.default, aten.avg_pool3d.default,
        aten.max_pool1d.default, aten.max_pool2d.default, aten.max_pool3d.default,
    }
)  # fmt: skip


@register_pass
@dataclass(frozen=True, kw_only=True)
class NormalizeWindows(Pass):
    """conv(x, w, padding="same") → conv(x, w, padding=p); pool(x, ceil_mode=True) → pool(x) where they are the same.

    1. Padding "valid" is 0. Padding "same" adds dilation · (kernel - 1) to a dimension: half of it on each side.
    2. Where that is odd, the right side gets one more, which no convolution's padding says: zeros are put around
       the dimension (`constant_pad_nd`), and the convolution pads nothing there.
    3. A pool that rounds the number of windows up, over sizes that are known and need no rounding, rounds down.

    Does not rewrite: a kernel whose size is not known.
    Preserves: exact.
    Source: the rule of uneven padding is PyTorch's, https://pytorch.org/docs/stable/generated/torch.nn.Conv2d.html
    """

    name: ClassVar[str] = "normalize-windows"

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        matches, skips = 0, []
        for node in list(program.graph.nodes):
            if node.target in _NUMBERED:
                kernel = arguments(node)["weight"].meta[VAL].shape[2:]
                if not _are_known(kernel):
                    skips.append(Skip.at(node, f"the size of its kernel, {list(kernel)}, is not known"))
                elif ctx.allow(node):
                    _number_padding(program, node, kernel)
                    matches += 1
            elif node.target in _POOLS and _rounds_nothing(node) and ctx.allow(node):
                _round_down(program, node)
                matches += 1
        return PassResult(program, matches=matches, skips=skips, modified=matches > 0)


def _are_known(sizes: Sequence[Any]) -> bool:
    return all(isinstance(size, int) for size in sizes)


def _per_dimension(value: int | Sequence[int], rank: int) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return values * rank if len(values) == 1 else values


# ---------------------------------------------------------------- cases 1 and 2


def _number_padding(program: Program, node: fx.Node, kernel: Sequence[int]) -> None:
    args = arguments(node)
    x, rank = args["input"], len(kernel)
    dilation = _per_dimension(args["dilation"], rank)
    total = [d * (k - 1) if args["padding"] == "same" else 0 for d, k in zip(dilation, kernel, strict=True)]
    if any(t % 2 for t in total):
        # Pairs of (before, behind) from the last dimension to the first.
        around = [side for t in reversed(total) for side in ((t // 2, t - t // 2) if t % 2 else (0, 0))]
        x = program.insert(aten.constant_pad_nd.default, x, around, 0.0, before=node)
    padding = [0 if t % 2 else t // 2 for t in total]
    stride = _per_dimension(args["stride"], rank)
    operands = (x, args["weight"], args["bias"], stride, padding, dilation, args["groups"])
    program.replace(node, program.insert(_NUMBERED[node.target], *operands, before=node))


# ---------------------------------------------------------------- case 3


def _rounds_nothing(node: fx.Node) -> bool:
    """True if a pool is asked to round up, and no dimension has a window that only rounding up gives."""
    args = arguments(node)
    if not args["ceil_mode"]:
        return False
    kernel = args["kernel_size"]
    rank = int(str(node.target).split("pool")[1][0])
    sizes = args["self"].meta[VAL].shape[-rank:]
    if not _are_known(sizes):
        return False
    taps = _per_dimension(kernel, rank)
    stride = _per_dimension(args["stride"] or kernel, rank)
    padding, dilation = (
        _per_dimension(args.get(name, default), rank) for name, default in (("padding", 0), ("dilation", 1))
    )
    return all(
        (size + 2 * p - d * (k - 1) - 1) % s == 0
        for size, k, s, p, d in zip(sizes, taps, stride, padding, dilation, strict=True)
    )


def _round_down(program: Program, node: fx.Node) -> None:
    args = arguments(node) | {"ceil_mode": False}
    program.replace(node, program.insert(node.target, *args.values(), before=node))
