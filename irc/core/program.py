"""`Program`: the IR. An FX graph of `aten` and `irc` ops over shared, immutable weights.

A program is always runnable, typed at every node (`node.meta["val"]` is a fake tensor whose sizes
may be symbolic), and cheap to copy: a copy has its own graph and shares every weight.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.fx as fx
import torch.utils._pytree as pytree
from torch import Tensor, nn

from irc.core.carrier import build_graph_module
from irc.core.dtypes import describe as describe
from irc.core.dtypes import dtype_from_name as dtype_from_name
from irc.core.dtypes import dtype_name as dtype_name
from irc.core.errors import IrcError
from irc.core.evaluate import evaluate
from irc.core.folder import save
from irc.core.listing.printer import print_program
from irc.core.misfits import misfit_error, misfits
from irc.core.typed_graph import VAL as VAL
from irc.core.typed_graph import TypedGraph
from irc.core.typed_graph import is_size as is_size


class Program(TypedGraph):
    """A captured model: a typed graph that runs, copies itself, and is written and printed.

        program = irc.capture(model, (x,), dynamic=({0: "B"},))
        program(x)          # as the model; program.run(*flat) takes and gives flat lists
        print(program)      # every operation with its type and source line; irc.parse reads it back
        program.weights     # name → tensor, shared between stages and never written to

    Get one from `irc.capture`, `irc.from_onnx`, `irc.from_gguf`, `irc.load` or `irc.parse`, not from the constructor.

    Attributes:
        graph_module: the FX graph and its weights. Passes edit `program.graph_module.graph` with ordinary FX calls.
        name: for people and file names.
        dims: dynamic dimensions by name.
        example_inputs: flat example inputs, one for each placeholder, or None.
        aliases: output index → input index, where an output is the next state of an input (caches).
        metadata: JSON values that describe the program (for example `{"kv_cache": {...}}`).
        tied: other names of weights, as the model's state dict had them: alias → name in the graph.

    `TypedGraph` describes the others.
    """

    # ---------------------------------------------------------------- running

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the program with PyTorch: same arguments and results as the captured model, no gradients."""
        flat = self.flatten_inputs(args, kwargs)
        try:
            return self.unflatten(self.run(*flat))
        except Exception as error:  # of any kind, by what PyTorch ran: said again where an input explains it
            problems = misfits(self, flat)
            if not problems:
                raise
            raise misfit_error(self, problems) from error

    def run(self, *inputs: Any) -> list[Any]:
        """Run on flat inputs (one a placeholder), giving flat outputs."""
        if len(inputs) != len(self.placeholders):
            raise IrcError(
                f"program {self.name} takes {len(self.placeholders)} inputs"
                f" ({', '.join(self.input_names)}), got {len(inputs)}"
            )
        with torch.no_grad():
            return evaluate(self.graph, self.weight, inputs)

    def flatten_inputs(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
        """Flat inputs from a call in the model's own signature.

        Entries that were no tensors at capture (None, numbers) are no inputs: they must be as they were.
        """
        order = self.in_spec.child(1).context if self.in_spec.num_children == 2 else None
        if isinstance(order, list) and set(order) == set(kwargs):
            kwargs = {key: kwargs[key] for key in order}
        given = pytree.tree_flatten((tuple(args), dict(kwargs)))
        if given[1] == self.in_spec:
            return self._without_constants(given[0])
        leaves = pytree.tree_leaves((tuple(args), dict(kwargs)))
        if not kwargs and len(leaves) == len(self.placeholders):
            return leaves
        by_name = dict(zip(self.input_names, args, strict=False)) | dict(kwargs)
        if len(args) <= len(self.input_names) and set(by_name) == set(self.input_names):
            return [by_name[name] for name in self.input_names]
        raise IrcError(
            f"program {self.name} takes ({', '.join(self.input_names)}); got {len(args)} positional arguments"
            + (f" and {', '.join(kwargs)}" if kwargs else "")
        )

    def _without_constants(self, leaves: Sequence[Any]) -> list[Any]:
        constants = {int(index): value for index, value in self.metadata.get("constant_inputs", {}).items()}
        for index, value in constants.items():
            if leaves[index] is not value and leaves[index] != value:
                raise IrcError(
                    f"input {index} of program {self.name} was captured as the constant {value!r};"
                    f" it is {leaves[index]!r} now: capture the model again with that value"
                )
        return [leaf for index, leaf in enumerate(leaves) if index not in constants]

    def unflatten(self, flat: Sequence[Any]) -> Any:
        """Flat outputs in the model's own structure."""
        return pytree.tree_unflatten(list(flat), self.out_spec)

    def module(self) -> nn.Module:
        """An ordinary `nn.Module` over this program's weights: same call, gradients included.

        Parameters are the program's own tensors; train it, then `program.with_weights(module)`.
        """
        return ProgramModule(self)

    def with_weights(self, weights: Mapping[str, Tensor] | nn.Module) -> Program:
        """A copy that uses the given tensors for the weights of the same names (a trained `module()`, say)."""
        given = weights.weights() if isinstance(weights, ProgramModule) else weights
        if isinstance(given, nn.Module):
            given = dict(given.state_dict(keep_vars=True))
        return self.copy(replace_weights=given)

    # ---------------------------------------------------------------- copies

    def save(self, folder: str | Path) -> None:
        """Write the program as a folder that `irc.load` reads; see `irc.core.folder`."""
        save(self, folder)

    def copy(self, *, replace_weights: Mapping[str, Tensor] | None = None) -> Program:
        """A program with its own graph that shares every weight (but for the replaced ones)."""
        graph = fx.Graph()
        # Names are kept: provenance, dumps and error messages refer to them across stages.
        mapping: dict[fx.Node, fx.Node] = {}
        for node in self.graph.nodes:
            # Arguments are set afterwards: given to the constructor, FX would search them for symbolic sizes.
            copied = mapping[node] = graph.create_node(node.op, node.target, name=node.name, type_expr=node.type)
            if node.args:
                copied.args = fx.map_arg(node.args, mapping.__getitem__)
            if node.kwargs:
                copied.kwargs = fx.map_arg(node.kwargs, mapping.__getitem__)
            copied.meta = dict(node.meta)
        weights = self.weights | {k: v for k, v in (replace_weights or {}).items() if k in self.weights}
        return Program(
            graph_module=build_graph_module(graph, weights, self.name),
            name=self.name,
            dims=dict(self.dims),
            fake_mode=self.fake_mode,
            in_spec=self.in_spec,
            out_spec=self.out_spec,
            example_inputs=self.example_inputs,
            aliases=dict(self.aliases),
            metadata=dict(self.metadata),
            tied=dict(self.tied),
        )

    def erase_dead(self) -> int:
        """Remove operations and weights that nothing uses (inputs stay); returns how many."""
        before = len(self.graph.nodes)
        for node in reversed(list(self.graph.nodes)):
            if node.op in ("call_function", "get_attr") and not node.users:
                self.graph.erase_node(node)
        return before - len(self.graph.nodes)

    def __str__(self) -> str:
        return print_program(self)

    def __repr__(self) -> str:
        inputs = ", ".join(f"{n.target}: {self.type_text(n)}" for n in self.placeholders)
        return f"<irc.Program {self.name}({inputs}), {self.num_nodes} ops, {self.weight_bytes / 1e6:.1f} MB>"


class ProgramModule(nn.Module):
    """`Program.module()`: runs the graph with gradients; its parameters are the program's weights."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        self._program = [program]  # in a list: not a submodule, not part of the state dict
        self._names: dict[str, str] = {}
        for name, tensor in program.weights.items():
            safe = name.replace(".", "__")
            self._names[name] = safe
            if tensor.is_floating_point():
                self.register_parameter(
                    safe, tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, requires_grad=False)
                )
            else:
                self.register_buffer(safe, tensor)

    def weights(self) -> dict[str, Tensor]:
        """Weights by the program's names."""
        return {name: getattr(self, safe) for name, safe in self._names.items()}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        program, weights = self._program[0], self.weights()
        inputs = program.flatten_inputs(args, kwargs)
        return program.unflatten(evaluate(program.graph, lambda node: weights[str(node.target)], inputs))
