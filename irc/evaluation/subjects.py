"""What can be evaluated: anything that turns inputs into logits, and how large its weights are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor, nn

from irc.compiled import Compiled
from irc.core import formats
from irc.core.errors import IrcError, OptionError
from irc.core.kv_cache import KVCache
from irc.core.program import VAL, Program

Outputs = Callable[..., Any]


@dataclass(frozen=True)
class Subject:
    """A model in whatever form, as something to call.

    Attributes:
        call: inputs → its first output that is a tensor.
        weight_bytes: in memory; None where that is not known.
        weight_bits: what the formats need, scales included, without padding of the storage.
        num_weights: numbers that the weights stand for.
        ready: entered while it is being run.
    """

    call: Callable[..., Tensor]
    weight_bytes: int | None = None
    weight_bits: int | None = None
    num_weights: int | None = None
    ready: Callable[[], AbstractContextManager[None]] = nullcontext

    @property
    def bits_per_weight(self) -> float | None:
        return self.weight_bits / self.num_weights if self.weight_bits and self.num_weights else None


def subject(model: Any) -> Subject:
    """A program, compiled model, module or function as a subject.

    Raises:
        OptionError: it is none of these.
    """
    if isinstance(model, Compiled):
        return _of_compiled(model)
    if isinstance(model, Program):
        return _of_program(model)
    if isinstance(model, nn.Module):
        tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}.values()
        num_bytes = sum(t.numel() * t.element_size() for t in tensors)
        return Subject(
            lambda *inputs: main_output(model(*inputs)), num_bytes, 8 * num_bytes, sum(t.numel() for t in tensors),
            ready=lambda: _evaluating(model),
        )  # fmt: skip
    if callable(model):
        return Subject(lambda *inputs: main_output(model(*inputs)))
    raise OptionError(f"a {type(model).__name__} cannot be evaluated: give a program, compiled model, module, function")


def main_output(result: Any) -> Tensor:
    """The logits or embeddings among a model's results: `.logits`, or the first tensor.

    Raises:
        IrcError: there is no tensor.
    """
    if isinstance(result, Tensor):
        return result
    named = result.get("logits") if isinstance(result, Mapping) else getattr(result, "logits", None)
    if isinstance(named, Tensor):
        return named
    items: Iterable[Any] = result.values() if isinstance(result, Mapping) else result
    if isinstance(items, Iterable):
        for item in items:
            if isinstance(item, Tensor):
                return item
    raise IrcError(f"the model gave a {type(result).__name__} without a tensor to evaluate")


def weight_size(program: Program) -> tuple[int, int]:
    """(bits that the formats need, numbers that the weights stand for).

    A quantized weight counts its format's bits a number plus scales and zero points; storage that pads numbers to
    whole bytes is not counted.
    """
    total_bits = total_numbers = 0
    parts: set[str] = set()
    for node in program.graph.find_nodes(op="call_function", target=torch.ops.irc.dequantize.default):
        names = [str(part.target) for part in node.args if isinstance(part, fx.Node) and part.op == "get_attr"]
        if not names or names[0] in parts:
            continue
        numbers = int(node.meta[VAL].numel())
        bits = getattr(formats.parse(str(node.kwargs["format"])), "bits", None)
        stored, *others = (program.weight(name) for name in names)
        total_bits += _bits(stored) if bits is None else numbers * bits
        total_bits += sum(_bits(other) for other in others)
        total_numbers += numbers
        parts.update(names)
    plain = {id(w): w for name, w in program.weights.items() if name not in parts}.values()
    return total_bits + sum(map(_bits, plain)), total_numbers + sum(w.numel() for w in plain)


def _bits(tensor: Tensor) -> int:
    return 8 * tensor.numel() * tensor.element_size()


def _of_program(program: Program) -> Subject:
    cache = KVCache.of(program)
    call: Outputs = program

    if cache is not None:

        def run_step(tokens: Tensor) -> Tensor:
            given, count = cache.whole_rows(tokens)
            logits = program.run(*given, *cache.empty(count, device=tokens.device))[0]
            return logits if cache.block_size is None else logits.unflatten(0, tuple(tokens.shape))

        call = run_step
    bits, numbers = weight_size(program)
    return Subject(lambda *inputs: main_output(call(*inputs)), program.weight_bytes, bits, numbers)


def _of_compiled(compiled: Compiled) -> Subject:
    call: Outputs = compiled if compiled.artifact.kv_cache is None else compiled.artifact.whole_rows
    bits, numbers = weight_size(compiled.program)
    return Subject(lambda *inputs: main_output(call(*inputs)), compiled.program.weight_bytes, bits, numbers)


@contextmanager
def _evaluating(model: nn.Module) -> Any:
    """In evaluation mode inside; as it was, module by module, afterwards."""
    was = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in was.items():
            module.training = training


def vocabulary_rows(width: int, limit: int = 1 << 22) -> int:
    """Rows of logits to widen to f32 at once, so that temporaries stay small."""
    return max(1, limit // max(1, width))


def flat_rows(logits: Tensor) -> Sequence[Tensor]:
    """[…, V] as chunks [n, V] of bounded size."""
    rows = logits.reshape(-1, logits.shape[-1])
    return rows.split(vocabulary_rows(rows.shape[-1]))
