"""The three ways to measure what rounding a layer's weight does; each adds up sums batch by batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.fx as fx
from torch import Tensor

from irc.core.errors import IrcError, PassError
from irc.core.evaluate import evaluate
from irc.core.formats import QuantFormat
from irc.core.lockstep import Lockstep, Values
from irc.core.numeric import logits_metrics
from irc.core.program import Program
from irc.core.provenance import module_path
from irc.evaluation._damage_store import DamageStore
from irc.evaluation.subjects import main_output
from irc.passes.quantize._round_to_nearest import round_to_nearest
from irc.passes.quantize._weight_layers import WeightLayer

aten = torch.ops.aten
Report = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Candidate:
    """A layer and the formats that it may get, by their text."""

    layer: WeightLayer
    formats: Mapping[str, QuantFormat]

    @property
    def name(self) -> str:
        return self.layer.name

    @property
    def num_weights(self) -> int:
        return self.layer.num_rows * self.layer.width


def bits_per_weight(chosen: QuantFormat, one: Candidate, scale_dtype: str) -> float:
    """Bits a number, scales and zero points included."""
    groups = chosen.scale_shape((one.layer.num_rows, one.layer.width))[-1]
    overhead = {"f16": 16, "f32": 32}[scale_dtype] + (0 if chosen.symmetric else 8)
    return chosen.bits + overhead * groups / one.layer.width


def rounded(weight: Tensor, one: Candidate, chosen: QuantFormat) -> Tensor:
    """The weight after rounding to the nearest number of a format."""
    rows = weight.detach().reshape(one.layer.num_rows, one.layer.width)
    stored, scale, zero_point = round_to_nearest(rows, chosen, torch.float32)
    return chosen.dequantize(stored, scale, zero_point, weight.dtype).view(weight.shape)


class Meter:
    """Base: measures one batch after the other, and turns the sums into damage at the end."""

    def __init__(self, program: Program, candidates: Sequence[Candidate], seed: int) -> None:
        self.program, self.candidates, self.seed = program, candidates, seed

    def run(self, index: int, batch: Sequence[Any], store: DamageStore, report: Report) -> None:
        """Add one batch to every layer that does not have it yet."""
        raise NotImplementedError

    def damage(self, one: Candidate, store: DamageStore) -> dict[str, float]:
        """Format → damage, over all batches: the mean over predictions."""
        sums, positions = store.sums(one.name)
        return {text: sums[text] / positions for text in one.formats}

    def _missing(self, index: int, store: DamageStore) -> list[Candidate]:
        return [one for one in self.candidates if not store.has(one.name, index)]


class OutputErrors(Meter):
    """`sqnr`: errors of the layers' own outputs."""

    what: ClassVar[str] = "signal to noise"
    _positions = 1

    def run(self, index: int, batch: Sequence[Any], store: DamageStore, report: Report) -> None:
        missing = self._missing(index, store)
        sums: dict[str, dict[str, float]] = {one.name: {} for one in missing}
        by_user = {user: one for one in missing for user in one.layer.users}
        done = 0

        def visit(node: fx.Node, values: Values) -> None:
            nonlocal done
            report(f"{self.what}, batch {index + 1}", done, len(by_user))
            self._measure(node, by_user[node], values, sums[by_user[node].name])
            done += 1

        Lockstep(self.program, [batch]).run(visit, by_user)
        report(f"{self.what}, batch {index + 1}", len(by_user), len(by_user))
        store.add(index, {name: (found, self._positions) for name, found in sums.items()})

    def damage(self, one: Candidate, store: DamageStore) -> dict[str, float]:
        """Noise over signal; of several operations that share the weight, the worst."""
        sums, _ = store.sums(one.name)
        users = [user.name for user in one.layer.users]
        signal = {user: sums[f"signal @ {user}"] for user in users}
        if not any(signal.values()):
            raise PassError(f"layer {one.name} gives zero on all calibration data", node=users[0])
        return {
            text: max(sums[f"{text} @ {user}"] / signal[user] for user in users if signal[user]) for text in one.formats
        }

    def _measure(self, node: fx.Node, one: Candidate, values: Values, sums: dict[str, float]) -> None:
        """Add squared norms of the output, and of its error in each format, for one operation."""
        exact = _run_node(node, values, {}).float()
        _require_finite(exact, node)
        sums[f"signal @ {node.name}"] = float(exact.double().square().sum())
        for text, weight in self._rounded(one):
            error = _run_node(node, values, {one.layer.weight: weight}).float().sub_(exact)
            sums[f"{text} @ {node.name}"] = float(error.square_().sum(dtype=torch.float64))

    def _rounded(self, one: Candidate) -> Iterator[tuple[str, Tensor]]:
        weight = self.program.weight(one.layer.weight)
        for text, chosen in one.formats.items():
            yield text, rounded(weight, one, chosen)


class SecondOrder(OutputErrors):
    """`second-order`: errors of the layers' outputs, weighted by the Fisher information of each output channel."""

    what: ClassVar[str] = "second order"

    def run(self, index: int, batch: Sequence[Any], store: DamageStore, report: Report) -> None:
        if not self._missing(index, store):
            return
        self._fisher, self._positions = self._fisher_information(index, batch)
        super().run(index, batch, store, report)

    def damage(self, one: Candidate, store: DamageStore) -> dict[str, float]:
        return Meter.damage(self, one, store)

    def _measure(self, node: fx.Node, one: Candidate, values: Values, sums: dict[str, float]) -> None:
        exact = _run_node(node, values, {}).float()
        _require_finite(exact, node)
        fisher = self._fisher[node]
        for text, weight in self._rounded(one):
            error = _run_node(node, values, {one.layer.weight: weight}).float().sub_(exact)
            by_channel = _by_channel(error.square_(), node).sum(0, dtype=torch.float64)
            sums[text] = sums.get(text, 0.0) + 0.5 * float(by_channel @ fisher)

    def _fisher_information(self, index: int, batch: Sequence[Any]) -> tuple[dict[fx.Node, Tensor], int]:
        """Mean squared gradient of the summed log-likelihood by output channel, and the number of predictions."""
        users = {user for one in self.candidates for user in one.layer.users}
        measured = {one.layer.weight for one in self.candidates}
        found: dict[fx.Node, Tensor] = {}
        leaves: dict[str, Tensor] = {}

        def weight(node: fx.Node) -> Tensor:
            # Through its own weight a gradient reaches every layer's output; other weights need none.
            value = self.program.weight(node).detach()
            if node in measured:
                value = leaves[node.name] = value.requires_grad_(True)
            return value

        def watch(node: fx.Node, value: Any) -> None:
            if node in users:

                def keep(gradient: Tensor) -> None:
                    found[node] = _by_channel(gradient.float().square(), node).mean(0, dtype=torch.float64)

                value.register_hook(keep)

        with torch.enable_grad():
            outputs = main_output(evaluate(self.program.graph, weight, batch, watch))
            logits = outputs.reshape(-1, outputs.shape[-1]).float()
            log_p = logits.log_softmax(-1)
            generator = torch.Generator().manual_seed(self.seed + index)
            labels = torch.multinomial(log_p.detach().exp(), 1, generator=generator)
            # For the hooks; the weights' own gradients are thrown away.
            total = log_p.gather(-1, labels).sum()
            torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
        missing = [user for user in users if user not in found]
        for user in missing:  # the output does not depend on it
            channels = user.meta["val"].shape[_channel_axis(user)]
            found[user] = torch.zeros(int(channels), dtype=torch.float64)
        return found, len(labels)


class Divergence(Meter):
    """`kl`: the divergence of the program's outputs with one layer rounded."""

    def run(self, index: int, batch: Sequence[Any], store: DamageStore, report: Report) -> None:
        missing = self._missing(index, store)
        if not missing:
            return
        values: dict[fx.Node, Any] = {}
        with torch.no_grad():
            base = main_output(evaluate(self.program.graph, self.program.weight, batch, values.__setitem__))
            positions = base.numel() // base.shape[-1]
            if not bool(base.isfinite().all()):
                raise PassError(f"program {self.program.name} gives numbers that are not finite on the data")
            for done, one in enumerate(missing):
                report(f"KL divergence, batch {index + 1}", done, len(missing))
                order = _downstream(self.program, one.layer.weight)
                weight = self.program.weight(one.layer.weight)
                sums = {}
                for text, chosen in one.formats.items():
                    changed = {one.layer.weight: rounded(weight, one, chosen)}
                    outputs = main_output(_run_again(self.program, order, values, changed))
                    # A classifier's [B, C] is a text of one token each.
                    sums[text] = logits_metrics(base.unsqueeze(-2), outputs.unsqueeze(-2))[0] * positions
                store.add(index, {one.name: (sums, positions)})
        report(f"KL divergence, batch {index + 1}", len(missing), len(missing))


METERS: dict[str, type[Meter]] = {"sqnr": OutputErrors, "kl": Divergence, "second-order": SecondOrder}


def _run_node(node: fx.Node, values: Values, changed: Mapping[fx.Node, Tensor]) -> Tensor:
    args, kwargs = fx.map_arg(
        (node.args, node.kwargs), lambda used: changed[used] if used in changed else values(used)[0]
    )
    assert callable(node.target)
    result = node.target(*args, **kwargs)
    assert isinstance(result, Tensor)
    return result


def _require_finite(value: Tensor, node: fx.Node) -> None:
    if not bool(value.isfinite().all()):
        raise PassError(
            f"{node.name} ({module_path(node)}) gives numbers that are not finite on the calibration data",
            node=node.name,
        )


def _channel_axis(node: fx.Node) -> int:
    """Output channels are the last axis, but for convolutions, where they follow the batch."""
    return 1 if "conv" in str(node.target) else -1


def _by_channel(value: Tensor, node: fx.Node) -> Tensor:
    """[…, C, …] → [positions, C]."""
    return value.movedim(_channel_axis(node), -1).reshape(-1, value.shape[_channel_axis(node)])


def _downstream(program: Program, weight: fx.Node) -> list[fx.Node]:
    """Nodes whose value changes with a weight, in order."""
    changed = {weight}
    order = []
    for node in program.graph.nodes:
        if node.op == "call_function" and any(used in changed for used in node.all_input_nodes):
            changed.add(node)
            order.append(node)
    return order


def _run_again(
    program: Program, order: Sequence[fx.Node], values: Mapping[fx.Node, Any], changed: Mapping[fx.Node, Any]
) -> list[Any]:
    """The program's outputs when some values are others; what does not depend on them is not computed again."""
    new = dict(changed)
    outputs = set(program.output_node.all_input_nodes)
    last_use = {used: node for node in order for used in node.all_input_nodes}
    for node in order:
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda used: new[used] if used in new else values[used])
        if not callable(node.target):
            raise IrcError(f"{node.name} cannot be run")
        new[node] = node.target(*args, **kwargs)
        for used in node.all_input_nodes:
            if last_use[used] is node and used not in outputs:
                new.pop(used, None)
    return [new.get(out, values.get(out)) if isinstance(out, fx.Node) else out for out in program.outputs]
