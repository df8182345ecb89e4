"""A built program in this process: the shared object, its thread pool, its arena, and calls by ctypes."""

from __future__ import annotations

import ctypes
import os
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from irc.core.errors import OptionError, StorageError, TargetError
from irc.core.memory import large_memory
from irc.core.program import describe, dtype_from_name, dtype_name

SizeFunction = Callable[[Sequence[int]], Any]


def default_threads() -> int:
    """PyTorch's number of threads, but never more than processors that this process may use."""
    return max(1, min(torch.get_num_threads(), len(os.sched_getaffinity(0))))


class Signature:
    """Types and symbolic shapes of a program's inputs and outputs, from an artifact's manifest.

    Sizes are Python expressions over the dimensions' names (`S`, `B*S`), written by irc itself; they are compiled
    after a look at every name and node in them.
    """

    def __init__(self, dims: Sequence[Mapping[str, Any]], inputs: Sequence[Mapping[str, Any]],
                 outputs: Sequence[Mapping[str, Any]]) -> None:  # fmt: skip
        self.dims = [str(d["name"]) for d in dims]
        self.bounds = [(int(d["minimum"]), None if d["maximum"] is None else int(d["maximum"])) for d in dims]
        self.inputs = [(str(i["name"]), dtype_from_name(i["dtype"])) for i in inputs]
        self.outputs = [None if "value" in o else dtype_from_name(o["dtype"]) for o in outputs]
        self.in_place = [o.get("in_place") for o in outputs]
        self._input_texts = [list(map(str, i["shape"])) for i in inputs]
        self._shapes = self._compiled([i["shape"] for i in inputs])
        self._results = self._compiled([[o["value"]] if "value" in o else o["shape"] for o in outputs])
        self._sources = self._find_sources()

    def _compiled(self, shapes: Sequence[Sequence[Any]]) -> SizeFunction:
        text = "[" + ", ".join("(" + "".join(f"{size}," for size in shape) + ")" for shape in shapes) + "]"
        return size_function(text, self.dims)

    def _find_sources(self) -> list[tuple[int, int]]:
        """For each dimension an input and an axis of exactly that size."""
        found = []
        for name in self.dims:
            place = next(((i, axis) for i, shape in enumerate(self._input_texts)
                          for axis, size in enumerate(shape) if size == name), None)  # fmt: skip
            if place is None:
                raise TargetError(f"no input has dimension {name} as a size: it cannot be known when the program runs")
            found.append(place)
        return found

    def sizes(self, inputs: Sequence[Tensor]) -> list[int]:
        """The dimensions' sizes, from the inputs' shapes.

        Raises:
            OptionError: an input has another type or shape than the program takes.
        """
        try:
            sizes = [inputs[i].shape[axis] for i, axis in self._sources]
        except (IndexError, AttributeError):
            sizes = None
        if sizes is not None:
            expected = self._shapes(sizes)
            if all(isinstance(value, Tensor) and value.shape == shape and value.dtype == kind
                   for value, shape, (_, kind) in zip(inputs, expected, self.inputs, strict=True)) and all(
                low <= size and (high is None or size <= high)
                for size, (low, high) in zip(sizes, self.bounds, strict=True)):  # fmt: skip
                return sizes
        raise OptionError(self._mismatch(inputs, sizes))

    def _mismatch(self, inputs: Sequence[Any], sizes: Sequence[int] | None) -> str:
        expected = self._shapes(sizes) if sizes is not None else [None] * len(inputs)
        for value, shape, texts, (name, kind) in zip(inputs, expected, self._input_texts, self.inputs, strict=True):
            wanted = f"{dtype_name(kind)}[{', '.join(texts)}]"
            if not isinstance(value, Tensor) or value.dtype != kind or (shape is not None and value.shape != shape):
                at = f" = {list(shape)}" if shape is not None else ""
                return f"input {name} is {describe(value)}, the program takes {wanted}{at}"
        pairs = zip(self.dims, sizes or [], self.bounds, strict=False)
        return "; ".join(f"dimension {name} is {size}, the program takes {low} to {high or 'any'}"
                         for name, size, (low, high) in pairs if size < low or (high is not None and size > high)) or (
            "inputs do not fit the program")  # fmt: skip

    def results(self, sizes: Sequence[int]) -> list[Any]:
        """Shapes of the outputs, or the value itself for an output that is a size."""
        return self._results(sizes)


def size_function(text: str, dims: Sequence[str]) -> SizeFunction:
    """A function of sizes from an arithmetic expression over dimension names.

    Raises:
        StorageError: the text is anything else than arithmetic.
    """
    import ast

    allowed = (ast.Expression, ast.Tuple, ast.List, ast.BinOp, ast.UnaryOp, ast.Constant, ast.Name, ast.Load, ast.Add,
               ast.Sub, ast.Mult, ast.FloorDiv, ast.Mod, ast.Pow, ast.USub, ast.Call, ast.Div)  # fmt: skip
    try:
        tree = ast.parse(text, mode="eval")
    except SyntaxError:
        raise StorageError(f"{text!r} is no size") from None
    for node in ast.walk(tree):
        named = not isinstance(node, ast.Name) or node.id in dims or node.id in ("max", "min")
        called = not isinstance(node, ast.Call) or (isinstance(node.func, ast.Name) and node.func.id in ("max", "min"))
        number = not isinstance(node, ast.Constant) or isinstance(node.value, (int, float))
        if not isinstance(node, allowed) or not named or not called or not number:
            raise StorageError(f"{text!r} is no size: {ast.dump(node)}")
    body = ast.unparse(tree)
    arguments = ", ".join(dims)
    unpack = f"lambda sizes: (lambda {arguments}: {body})(*sizes)"
    return eval(compile(unpack, "<sizes>", "eval"), {"__builtins__": {}, "max": max, "min": min})


class Library:
    """A loaded shared object."""

    def __init__(self, path: Path, weights: Tensor, threads: int) -> None:
        try:
            self._object = ctypes.CDLL(str(path))
        except OSError as error:
            raise TargetError(f"{path} cannot be loaded: {error}") from None
        self._object.irc_pool_create.restype = ctypes.c_void_p
        self._object.irc_arena_bytes.restype = ctypes.c_int64
        self._object.irc_run.restype = None
        # Plain addresses: converting each argument would cost more than a small step takes.
        self._object.irc_arena_bytes.argtypes = [ctypes.c_void_p, ctypes.c_int]
        self._object.irc_run.argtypes = [ctypes.c_void_p] * 6
        self._object.irc_pool_destroy.argtypes = [ctypes.c_void_p]
        self.threads = threads
        self._weights = weights
        self._weights_at = weights.data_ptr()
        self._pool = self._object.irc_pool_create(threads)
        self._arena = torch.empty(0, dtype=torch.uint8)
        self._arena_sizes: tuple[int, ...] | None = None
        weakref.finalize(self, self._object.irc_pool_destroy, self._pool)

    def run(self, sizes: Sequence[int], inputs: Sequence[Tensor], outputs: Sequence[Tensor | None]) -> None:
        """One step. Inputs are dense; outputs that continue an input are None."""
        values = (ctypes.c_int64 * max(1, len(sizes)))(*sizes)
        given = (ctypes.c_void_p * max(1, len(inputs)))(*[x.data_ptr() for x in inputs])
        made = (ctypes.c_void_p * max(1, len(outputs)))(*[None if x is None else x.data_ptr() for x in outputs])
        self.call(tuple(sizes), ctypes.addressof(values), ctypes.addressof(given), ctypes.addressof(made))

    def call(self, sizes: tuple[int, ...], values: int, given: int, made: int) -> None:
        """One step from the addresses of three arrays: the sizes, and addresses of the inputs and of the outputs."""
        if self._arena_sizes != sizes:
            self._reserve(values, sizes)
        self._object.irc_run(self._pool, values, given, made, self._weights_at, self._arena_at)

    def _reserve(self, values: int, sizes: tuple[int, ...]) -> None:
        """An arena that is large enough for the sizes, in huge pages: activations of a batch are many small ones."""
        needed = int(self._object.irc_arena_bytes(values, self.threads)) + 64
        if self._arena.numel() < needed:
            self._arena = large_memory(needed)
        self._arena_at = (self._arena.data_ptr() + 63) // 64 * 64
        self._arena_sizes = sizes

    def part_times(self, count: int) -> list[int]:
        """Nanoseconds by part since the last call of this, of a program built with `profile`."""
        self._object.irc_part_times.restype = ctypes.POINTER(ctypes.c_int64)
        totals = self._object.irc_part_times()
        found = totals[:count]
        ctypes.memset(totals, 0, 8 * count)
        return list(found)

    @property
    def arena_bytes(self) -> int:
        """Bytes of the arena as it is now."""
        return self._arena.numel()
