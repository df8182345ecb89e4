"""Which layers a coarser format hurts, and how much: the damage of each format to each layer's weights.

Three measures, by rounding to nearest; Ŵ is the weight after rounding, X the layer's inputs on the calibration data:

- `sqnr`: ‖layer(X, W)‖² over ‖layer(X, W) - layer(X, Ŵ)‖²; as damage, its inverse. One run over the data.
- `second-order`: half of Σᵢ gᵢ (W - Ŵ)ᵢ H (W - Ŵ)ᵢᵀ per prediction, with H = XᵀX and gᵢ the mean squared gradient
  of the log-likelihood at output channel i, for labels drawn from the model's own predictions: the diagonal of the
  Fisher information, so that the number estimates a KL divergence in nats. One run forwards and backwards.
  It takes errors at different tokens for independent and small: a layer whose rounding shifts all tokens alike (values
  under attention) is worth up to twice that, and 2 bits on the queries and keys of a layer can be worth far more.
- `kl`: the KL divergence of the outputs when only that layer is rounded, in nats a prediction. Exact, and costs most
  of a run for every layer and format.

Source of the second: Dong et al. 2020 (HAWQ-V2), https://arxiv.org/abs/1911.03852, with the Fisher information in
place of the Hessian.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from irc.core.calibration import CalibrationData
from irc.core.contract import Progress, Skip
from irc.core.errors import OptionError, ParseError, PassError
from irc.core.formats import QuantFormat
from irc.core.formats import parse as parse_format
from irc.core.hashing import structural_hash
from irc.core.program import Program
from irc.evaluation._damage import METERS, Candidate, bits_per_weight
from irc.evaluation._damage_store import DamageStore
from irc.evaluation.sensitivity_result import LayerSensitivity, Sensitivity
from irc.passes.quantize._rules import why_not_integers
from irc.passes.quantize._weight_layers import WeightLayer, find_weight_layers
from irc.view.progress import shown_progress

BITS = (2, 3, 4, 5, 6, 8)


def sensitivity(
    program: Program,
    data: Any,
    *,
    bits: Sequence[int] = BITS,
    group_size: int | None = 32,
    formats: Sequence[str] | None = None,
    metric: Literal["sqnr", "kl", "second-order"] = "sqnr",
    scale_dtype: Literal["f32", "f16"] = "f16",
    include_embeddings: bool = False,
    include_convolutions: bool = False,
    resume: str | Path | None = None,
    seed: int = 0,
    progress: Progress | bool | None = None,
) -> Sensitivity:
    """Damage of each format to each layer, one layer quantized at a time: what `irc.assign_bits` chooses formats by.

    Args:
        program: with its weights in full precision, before a key-value cache is inserted.
        data: calibration data, or what `CalibrationData.of` takes. Memory grows with a batch, not with the data.
        bits, group_size: candidate formats `int<bits>.g<group_size>` (None: a scale a row). A row that the group size
            does not divide gets one scale.
        formats: candidate formats as text instead, for example `["int4.row", "uint4.g32.asym"]`.
        metric: `sqnr`: noise over signal of each layer's outputs, by one run over the data. `second-order`: estimated
            KL divergence in nats, by one run forwards and backwards. `kl`: measured, by nearly a run for each layer and
            format. The module's docstring has the formulas.
        scale_dtype: what scales are stored in, `f32` or `f16`: counts for sizes.
        resume: JSON file that results are kept in as they come; a killed run goes on from there.
        seed: of the labels that `second-order` draws.
        progress: as for `irc.compile`.

    Raises:
        OptionError: unknown metric or formats, all named; or `resume` holds results of something else.
        PassError: the data does not fit the program, or no layer can be measured.
    """
    if not isinstance(program, Program):
        raise OptionError(f"sensitivity looks at a program (irc.capture(…)), not at a {type(program).__name__}")
    wanted = _candidate_formats(bits, group_size, formats, metric, scale_dtype)
    samples = CalibrationData.of(data)
    batches = samples.inputs_for(program)
    candidates: list[Candidate] = []
    skips: list[str] = []
    for layer in find_weight_layers(program, embeddings=include_embeddings, convolutions=include_convolutions):
        fitting = {} if isinstance(layer, Skip) else _fitting(layer, wanted)
        if isinstance(layer, Skip):
            skips.append(layer.reason)
        elif not fitting:
            skips.append(f"weight {layer.name} fits none of the formats")
        else:
            candidates.append(Candidate(layer, fitting))
    if not candidates:
        raise PassError(f"program {program.name} has no layer to measure" + "".join(f"\n  - {s}" for s in skips))
    key = {
        "program": structural_hash(program), "data": samples.fingerprint(), "metric": metric, "seed": seed,
        "formats": {c.layer.name: list(c.formats) for c in candidates},
    }  # fmt: skip
    store = DamageStore(key, None if resume is None else Path(resume))
    meter = METERS[metric](program, candidates, seed)
    with shown_progress(progress) as report:
        for index, batch in enumerate(batches):
            meter.run(index, batch, store, lambda what, done, total: report(what, done, total) if report else None)
    layers = tuple(
        LayerSensitivity(
            one.layer.name, one.num_weights, meter.damage(one, store),
            {str(f): bits_per_weight(f, one, scale_dtype) for f in one.formats.values()},
        )
        for one in candidates
    )  # fmt: skip
    result = Sensitivity(
        program=program.name, metric=metric, data=samples.description, num_samples=samples.num_samples,
        scale_dtype=scale_dtype, layers=layers, skips=tuple(skips),
        include_embeddings=include_embeddings, include_convolutions=include_convolutions,
    )  # fmt: skip
    if resume is not None:
        store.finish(result.to_json())
    return result


def _candidate_formats(
    bits: Sequence[int], group_size: int | None, texts: Sequence[str] | None, metric: str, scale_dtype: str
) -> list[QuantFormat]:
    problems: list[str] = []
    found: list[QuantFormat] = []
    if metric not in METERS:
        problems.append(f"metric must be one of {', '.join(METERS)}, not {metric!r}")
    if scale_dtype not in ("f32", "f16"):
        problems.append(f"scale_dtype must be f32 or f16, not {scale_dtype!r}")
    for one in bits if texts is None else texts:
        try:
            chosen = parse_format(one) if isinstance(one, str) else QuantFormat(one, group_size)
            reason = why_not_integers(chosen)
        except (OptionError, ParseError) as error:
            chosen, reason = None, str(error)
        if reason is not None:
            problems.append(reason if isinstance(one, int) else f"format {one!r}: {reason}")
        elif isinstance(chosen, QuantFormat) and chosen not in found:
            found.append(chosen)
    if not found and not problems:
        problems.append("no formats to try")
    if problems:
        raise OptionError("sensitivity: " + "; ".join(problems))
    return found


def _fitting(layer: WeightLayer, wanted: Sequence[QuantFormat]) -> dict[str, QuantFormat]:
    """The formats that the layer's rows can have, by text; a group size that does not divide becomes the row."""
    found = {}
    for one in wanted:
        chosen = one if one.why_not_rows_of(layer.width) is None else replace(one, group_size=None)
        if chosen.why_not_rows_of(layer.width) is None:
            found[str(chosen)] = chosen
    return found


__all__ = ["BITS", "LayerSensitivity", "Sensitivity", "sensitivity"]
