"""What a lowered program takes and gives: types and symbolic shapes, as manifests hold them and callers check them."""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import sympy
from torch import Tensor

from irc.core.errors import OptionError, StorageError, TargetError
from irc.core.program import VAL, Program, describe, dtype_from_name, dtype_name
from irc.lowering.kernels.buffers import Buffer
from irc.lowering.kernels.fusion import Schedule

SizeFunction = Callable[[Sequence[int]], Any]


def signature_of(program: Program, schedule: Schedule) -> dict[str, Any]:
    """The part of a manifest that a `Signature` is read from, with the program's name and metadata."""
    outputs: list[dict[str, Any]] = []
    for i, buffer in enumerate(schedule.outputs):
        if isinstance(buffer, Buffer):
            outputs.append({"dtype": buffer.dtype, "shape": [python_size(s) for s in buffer.shape],
                            "in_place": schedule.in_place.get(i)})  # fmt: skip
        else:
            outputs.append({"value": python_size(buffer)})
    inputs = [
        {"name": str(node.target), "dtype": dtype_name(node.meta[VAL].dtype),
         "shape": [python_size(s) for s in program.shape_expr(node)]}
        for node in program.placeholders
    ]  # fmt: skip
    dims = [{"name": d.name, "minimum": d.minimum, "maximum": d.maximum} for d in program.dims.values()]
    return {
        "name": program.name, "dims": dims, "inputs": inputs, "outputs": outputs, "metadata": program.metadata,
    }  # fmt: skip


def python_size(expr: Any) -> str:
    """A size as a Python expression over dimension names."""
    expr = sympy.sympify(expr)
    kind = type(expr).__name__
    if expr.is_Symbol or expr.is_Integer or expr.is_Float:
        return str(expr)
    args = [python_size(a) for a in expr.args]
    if kind in ("Add", "Mul"):
        return "(" + {"Add": " + ", "Mul": " * "}[kind].join(args) + ")"
    if kind in ("FloorDiv", "CleanDiv", "Mod", "PythonMod"):
        return f"({args[0]} {'%' if 'Mod' in kind else '//'} {args[1]})"
    if kind in ("Max", "Min"):
        return f"{kind.lower()}({', '.join(args)})"
    if kind in ("Pow", "PowByNatural"):
        return f"({args[0]} ** {args[1]})"
    raise TargetError(f"a size {expr} cannot be written down")


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

    def shapes(self, sizes: Sequence[int]) -> list[tuple[int, ...]]:
        """Shapes of the inputs."""
        found: list[tuple[int, ...]] = self._shapes(sizes)
        return found

    def results(self, sizes: Sequence[int]) -> list[Any]:
        """Shapes of the outputs, or the value itself for an output that is a size."""
        return self._results(sizes)


def size_function(text: str, dims: Sequence[str]) -> SizeFunction:
    """A function of sizes from an arithmetic expression over dimension names.

    Raises:
        StorageError: the text is anything else than arithmetic.
    """
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
