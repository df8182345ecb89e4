"""`compile`: model → capture → passes → lowering → something that runs, with a report of all of it."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from irc.compile_cache.entry import Kept
from irc.compile_cache.lookup import look_up
from irc.compiled import Compiled, holds_program, program_of
from irc.core.calibration import CALIBRATION_KEY
from irc.core.collection import not_collecting, walking_once
from irc.core.contract import Pass, PassContext, Progress
from irc.core.errors import OptionError, StorageError
from irc.core.folder import require_place
from irc.core.instruments import Instrument
from irc.core.manager import FIRST_STAGE, PassManager, Verify
from irc.core.memory import ahead
from irc.core.pipeline import Source, parse_pipeline
from irc.core.program import Program
from irc.core.report import Row
from irc.core.stages import Stages
from irc.core.storage import load as load_program
from irc.core.target import Artifact, Target, get_target, read_options
from irc.core.text import parse
from irc.view.progress import shown_progress

# Bytes of weights from which on passes prepare themselves while the model is captured.
_LARGE = 1 << 28


@walking_once()
def compile(
    model: Any,
    passes: Source | None = None,
    *,
    target: str | Target = "reference",
    example_inputs: Any = None,
    dynamic: Any = None,
    verify: Verify = "each",
    options: Mapping[str, Any] | None = None,
    tokenizer: Any = None,
    instruments: Sequence[Instrument] = (),
    dump_dir: str | Path | None = None,
    repro_dir: str | Path | None = None,
    calibration: Any = None,
    pass_options: Mapping[str, Any] | None = None,
    progress: Progress | bool | None = None,
    name: str | None = None,
    tune: float | None = None,
    cache: str | Path | None = None,
) -> Compiled:
    """Compile a model for a target: capture it, run the passes, lower the result, and check the numbers of all of it.

        compiled = irc.compile(model, "quantize-weights{bits=8},insert-kv-cache", example_inputs=ids,
                               dynamic=({0: "B", 1: "S"},), target="cpu")

    Args:
        model: whatever `irc.capture` takes, or a `Program`.
        passes: a list of passes, rewrite rules or text; pipeline text; or a YAML file. None: the target's default
            pipeline (for causal language models it inserts a key-value cache where possible). `irc passes` lists them.
        target: `reference`, `cpu`, `onnx`, `onnx-genai`, `gguf`, or a `Target`.
        example_inputs, dynamic, name: as for `irc.capture`.
        verify: compare numbers after `each` pass, at the `end`, or not at all (`off`). Unless off, the artifact
            is compared with its program too.
        options: of the target, `{"threads": 2}` say: the attributes of its `options_type`.
        tokenizer: for text in `generate`: of `tokenizers` or of transformers.
        instruments, dump_dir, repro_dir: as for `irc.PassManager`.
        calibration: representative inputs for passes that need them: `CalibrationData`, or what
            `CalibrationData.of` takes.
        pass_options: other values that passes may ask for: `{"resume": folder}` keeps the layers that a quantizer has
            finished, so that a killed run goes on there.
        progress: show what long passes are doing; None: if the error output is a terminal. Or a function of
            (what, done, total).
        tune: seconds for measuring what the target otherwise chooses by rules. What was measured before on this
            hardware is taken over at once; 0: only that. None: rules only.
        cache: folder in which compilations are kept: one of the same model, weights, code, inputs, passes and
            options is taken from there, and the report says so. What it cannot see: docs/cpu.md.

    Raises:
        CaptureError: the model cannot be captured.
        PassError, VerificationError: a pass failed, or broke its promise.
        TargetError: the target cannot take the program, or cannot be used here.
        OptionError: unknown names or options.
        NumericError: the artifact computes something else than its program.
    """
    chosen = get_target(target) if isinstance(target, str) else target
    if not isinstance(chosen, Target):
        raise OptionError(f"target is a name or a Target, not {target!r}")
    chosen.require_available()
    settings = _with_tokenizer(chosen, options, tokenizer)
    read_options(chosen.options_type, settings, what=f"target {chosen.name}")
    pipeline = parse_pipeline(passes) if passes is not None else None  # a typing error shows before the long work
    lookup = None
    if cache is not None:
        require_place(Path(cache) / "entry")
        with not_collecting():
            lookup = look_up(
                Path(cache), model, pipeline, chosen, settings,
                {"observing passes": tuple(instruments), "a dump": dump_dir, "calibration": calibration,
                 "tuning": tune, "a value for passes": dict(pass_options or {})},
                example_inputs=example_inputs, dynamic=dynamic, verify=verify, name=name,
            )  # fmt: skip
            if lookup.kept is not None:
                try:
                    return _from_cache(lookup.kept, options, tokenizer, _end_tokens(model))
                except StorageError as error:
                    lookup.reason = str(error)
    with ahead() as reserve:
        _get_ready(model, pipeline or [], chosen, settings)
        reserve.start()
        started = time.perf_counter()
        program = _program(model, example_inputs, dynamic, name)
        capture_ms = (time.perf_counter() - started) * 1e3
        given = dict(pass_options or {}) | ({CALIBRATION_KEY: calibration} if calibration is not None else {})
        with shown_progress(progress) as report_progress:
            manager = PassManager(
                pipeline if pipeline is not None else chosen.default_passes(program),
                verify=verify, instruments=instruments, dump_dir=dump_dir, repro_dir=repro_dir,
                ctx=PassContext(options=given, progress=report_progress),
            )  # fmt: skip
            result = manager.run(program)
        result.report.rows[0].ms = capture_ms
        with shown_progress(progress) as report_progress:
            artifact, row = _lower(
                chosen, result.program, settings, check=verify != "off", tune=tune, progress=report_progress
            )
    row.flops = result.report.rows[-1].flops
    result.report.rows.append(row)
    compiled = Compiled(
        artifact=artifact, stages=Stages(result.stages), report=result.report, target=chosen,
        tokenizer=tokenizer, eos=_end_tokens(model),
    )  # fmt: skip
    if lookup is not None:
        if not holds_program(artifact):
            lookup.key, lookup.reason = None, f"artifacts of target {chosen.name!r} do not hold their program"
        row.notes.append(lookup.keep(lambda: str(program), result.report, compiled.save))
    return compiled


def _from_cache(
    kept: Kept, options: Mapping[str, Any] | None, tokenizer: Any, eos: frozenset[int] | None
) -> Compiled:  # fmt: skip
    """What an earlier compilation made; its programs are read when they are asked for, without numbers in weights."""
    loaded = Compiled.load(kept.model, options=options, tokenizer=tokenizer)
    last = kept.report.rows[-2].name if len(kept.report.rows) > 1 else FIRST_STAGE
    stages: dict[str, Program | Callable[[], Program]] = {FIRST_STAGE: lambda: parse(kept.captured)}
    loaded.stages = Stages({**stages, last: lambda: program_of(loaded.artifact)})
    loaded.report, loaded.from_cache, loaded.eos = kept.report, True, eos
    kept.report.rows[0].notes.append(f"everything here was compiled before and is taken from {kept.model.parent}")
    return loaded


def load(path: str | Path, *, options: Mapping[str, Any] | None = None) -> Any:
    """What was saved: a `Program` from a program folder, an artifact from one that a target wrote (`model.irca`).

    An artifact runs on flat lists of tensors (`artifact.run`). For what `irc.compile` gave, with `generate` and the
    tokenizer, use `irc.Compiled.load`.

    Args:
        options: of the artifact's target, `{"threads": 2}` say.

    Raises:
        StorageError: it is missing or damaged.
        OptionError: unknown options, or any for a program.
    """
    manifest = Path(path) / "manifest.json"
    try:
        entry = json.loads(manifest.read_text()) if manifest.is_file() else None
    except (OSError, ValueError) as error:
        raise StorageError(f"{manifest} is damaged: {error}") from None
    if isinstance(entry, dict) and isinstance(entry.get("target"), str):
        target = get_target(entry["target"])
        return target.load(path, options)
    if options is not None:
        raise OptionError(f"{path} holds a program, which takes no options")
    return load_program(path)


def _program(model: Any, example_inputs: Any, dynamic: Any, name: str | None) -> Program:
    if not isinstance(model, Program):
        from irc.frontend import capture  # imports torch.export, which `load` does without

        return capture(model, example_inputs, dynamic=dynamic, name=name)
    if dynamic is not None:
        raise OptionError("dynamic is settled when a model is captured; this is a program already")
    if example_inputs is None:
        return model
    own = model.copy()
    args, kwargs = _split(example_inputs)
    own.example_inputs = tuple(own.flatten_inputs(args, kwargs))
    return own


def _get_ready(model: Any, pipeline: Sequence[Pass], target: Target, options: Mapping[str, Any] | None) -> None:
    """Where the model is large, so that capturing it takes long: passes and the target start what they will need."""
    weights: Iterable[torch.Tensor] = ()
    if isinstance(model, Program):
        weights = model.weights.values()
    elif isinstance(model, torch.nn.Module):
        weights = list(model.parameters())
    num_bytes = sum(weight.nbytes for weight in weights)
    if num_bytes < _LARGE:
        return
    num_weights = sum(weight.numel() for weight in weights)
    for one in pipeline:
        num_bytes = one.get_ready(num_weights, num_bytes)
    target.get_ready(num_bytes, options)


def _with_tokenizer(target: Target, options: Mapping[str, Any] | None, tokenizer: Any) -> Mapping[str, Any] | None:
    """Options for a target whose artifact holds a tokenizer: the compilation's own, unless they name one."""
    takes = any(field.name == "tokenizer" for field in dataclasses.fields(target.options_type))
    if tokenizer is None or not takes or not isinstance(options, Mapping | None):
        return options
    return {"tokenizer": tokenizer, **(options or {})}


def _split(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)), {}


def _lower(
    target: Target, program: Program, options: Mapping[str, Any] | None, *, check: bool, tune: float | None,
    progress: Progress | None,
) -> tuple[Artifact, Row]:  # fmt: skip
    """Lower, compare with the program, and describe both in a row of the report."""
    coverage = target.check_with(program, options)
    coverage.require(program)
    started = time.perf_counter()
    if tune is None:
        artifact = target.lower(program, options)
    else:
        artifact = target.lower_tuned(program, options, tune, progress)
    row = Row(
        name=f"lower to {target.name}", matches=program.num_nodes, modified=True,
        nodes=program.num_nodes, weight_bytes=program.weight_bytes, ms=(time.perf_counter() - started) * 1e3,
    )  # fmt: skip
    row.notes.extend(f"falls back: {concern}" for concern in coverage.fallbacks)
    row.notes.extend(artifact.notes)
    if check and program.example_inputs is not None:
        started = time.perf_counter()
        figures = artifact.verify(program)
        figures.require()
        row.absolute_error, row.relative_error, row.top1 = figures.absolute, figures.relative, figures.top1
        row.notes.extend(figures.skipped)
        row.verify_ms = (time.perf_counter() - started) * 1e3
    return artifact, row


def _end_tokens(model: Any) -> frozenset[int] | None:
    """End-of-sequence tokens that a model's own configuration names."""
    for holder in ("generation_config", "config"):
        known = getattr(getattr(model, holder, None), "eos_token_id", None)
        if known is not None:
            return frozenset([known] if isinstance(known, int) else known)
    return None
