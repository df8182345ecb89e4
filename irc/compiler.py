"""`compile`: model → capture → passes → lowering → something that runs, with a report of all of it."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from torch import Tensor

from irc.compile_cache.entry import Kept
from irc.compile_cache.lookup import look_up
from irc.core.calibration import CALIBRATION_KEY
from irc.core.collection import walking_once
from irc.core.contract import PassContext, Progress
from irc.core.errors import IrcError, OptionError, StorageError
from irc.core.instruments import Instrument
from irc.core.kv_cache import KVCache
from irc.core.manager import FIRST_STAGE, PassManager, Verify
from irc.core.paged import PagedModel
from irc.core.pipeline import Source, parse_pipeline
from irc.core.program import VAL, Program, dtype_name
from irc.core.report import Report, Row
from irc.core.stages import Stages
from irc.core.storage import load as load_program
from irc.core.target import Artifact, Target, get_target
from irc.core.text import parse
from irc.runtime.engine import EngineOptions
from irc.runtime.generation import Prompts, StreamCallback, TokenEvent, generate, stream_tokens
from irc.runtime.models import paged_model
from irc.runtime.results import GenerationResult
from irc.runtime.sampling import Sampling
from irc.runtime.speculation.draft_model import DraftModelProposer
from irc.runtime.speculation.ngram import NgramProposer
from irc.runtime.speculation.speculation import Speculation
from irc.view.progress import shown_progress

_INFO_FILE, _TOKENIZER_FILE = "compiled.json", "tokenizer.json"


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
    """Compile a model for a target.

    Args:
        model: whatever `irc.capture` takes, or a `Program`.
        passes: a list, text or YAML file; None: the target's default pipeline (for causal language models that
            inserts a key-value cache where possible).
        target: its name, or a target.
        example_inputs, dynamic, name: as for `irc.capture`.
        verify: compare numbers after `each` pass, at the `end`, or not at all (`off`). Unless off, the artifact
            is compared with its program too.
        options: of the target.
        tokenizer: for text in `generate`: of `tokenizers` or of transformers.
        instruments, dump_dir, repro_dir: as for `irc.PassManager`.
        calibration: representative inputs for passes that need them: `CalibrationData`, or what
            `CalibrationData.of` takes.
        pass_options: other values that passes may ask for.
        progress: show what long passes are doing; None: if the error output is a terminal. Or a function of
            (what, done, total).
        tune: seconds for measuring what the target otherwise chooses by rules. What was measured before on this
            hardware is taken over at once; 0: only that. None: rules only.
        cache: folder in which compilations are kept: one of the same model, weights, code, inputs, passes and
            options is taken from there, and the report says so. What it cannot see: docs/codegen.md.

    Raises:
        CaptureError: the model cannot be captured.
        PassError, VerificationError: a pass failed, or broke its promise.
        TargetError: the target cannot take the program, or cannot be used here.
        OptionError: unknown names or options.
        NumericError: the artifact computes something else than its program.
    """
    chosen = get_target(target) if isinstance(target, str) else target
    chosen.require_available()
    pipeline = parse_pipeline(passes) if passes is not None else None  # a typing error shows before the long work
    lookup = None
    if cache is not None:
        lookup = look_up(
            Path(cache), model, pipeline, chosen, _with_tokenizer(chosen, options, tokenizer),
            {"observing passes": tuple(instruments), "a dump": dump_dir, "calibration": calibration,
             "tuning": tune, "a value for passes": dict(pass_options or {})},
            example_inputs=example_inputs, dynamic=dynamic, verify=verify, name=name,
        )  # fmt: skip
        if lookup.kept is not None:
            try:
                return _from_cache(lookup.kept, options, tokenizer, _end_tokens(model))
            except StorageError as error:
                lookup.reason = str(error)
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
    settings = _with_tokenizer(chosen, options, tokenizer)
    with shown_progress(progress) as report_progress:
        artifact, row = _lower(
            chosen, result.program, settings, check=verify != "off", tune=tune, progress=report_progress
        )
    row.flops = result.report.rows[-1].flops
    result.report.rows.append(row)
    compiled = Compiled(
        artifact=artifact, stages=result.stages, report=result.report, target=chosen,
        tokenizer=tokenizer, eos=_end_tokens(model),
    )  # fmt: skip
    if lookup is not None:
        if not _holds_program(artifact):
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
    loaded.stages = Stages({**stages, last: lambda: _program_of(loaded.artifact)})
    loaded.report, loaded.from_cache, loaded.eos = kept.report, True, eos
    kept.report.rows[0].notes.append(f"everything here was compiled before and is taken from {kept.model.parent}")
    return loaded


def load(path: str | Path, *, options: Mapping[str, Any] | None = None) -> Any:
    """What was saved: a `Program` from a program folder, an artifact from one that a target wrote (`model.irca`).

    Raises:
        StorageError: it is missing or damaged.
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
        from irc.frontend import capture

        return capture(model, example_inputs, dynamic=dynamic, name=name)
    if dynamic is not None:
        raise OptionError("dynamic is settled when a model is captured; this is a program already")
    if example_inputs is None:
        return model
    own = model.copy()
    args, kwargs = _split(example_inputs)
    own.example_inputs = tuple(own.flatten_inputs(args, kwargs))
    return own


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


@dataclass(kw_only=True)
class Compiled:
    """A compiled model.

    Attributes:
        artifact: what the target made.
        stages: the program after each pass by name, first `capture`; what was saved has only some of them.
        report: a row a pass, and one for the lowering.
        target, tokenizer, eos: as compiled.
        from_cache: it was compiled before, and kept.
    """

    artifact: Artifact
    stages: Mapping[str, Program] = field(repr=False)
    report: Report = field(repr=False)
    target: Target = field(repr=False)
    tokenizer: Any = field(default=None, repr=False)
    eos: frozenset[int] | None = None
    from_cache: bool = False

    @property
    def program(self) -> Program:
        """The program that was lowered."""
        return self.stages[list(self.stages)[-1]]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Same arguments and results as the model, also when a key-value cache was inserted."""
        first = next(iter(self.stages.values()))
        flat = first.flatten_inputs(args, kwargs)
        try:
            if self.artifact.kv_cache is None or KVCache.of(first) is not None:
                return first.unflatten(self.artifact.run(*flat))
            tokens = flat[first.input_names.index(self.program.input_names[0])]
            return first.unflatten([self.artifact.whole_rows(tokens)])
        except Exception as error:  # of any kind, by what the target ran: said again where an input explains it
            problems = _misfits(first, flat)
            if not problems:
                raise
            raise IrcError(f"program {first.name} cannot take these inputs:\n  - " + "\n  - ".join(problems)) from error

    # ---------------------------------------------------------------- generation

    def generate(
        self,
        prompts: Prompts,
        *,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        seed: int = 0,
        stop: str | int | Iterable[str | int] = (),
        eos: int | Iterable[int] | None = None,
        stream: StreamCallback | None = None,
        tokenizer: Any = None,
        sampling: Sampling | None = None,
        draft: Draft | None = None,
        options: EngineOptions | None = None,
    ) -> GenerationResult:
        """Continue a prompt or several: text gives `.text`, token ids give `.token_ids`.

        Args:
            prompts: a text, a list of ids, a list of either, or a tensor of ids.
            temperature: 0: always the likeliest token.
            top_k, top_p, min_p, seed: see `irc.runtime.sampling.Sampling`.
            stop: texts or token ids that end a sequence and are not part of the result's text.
            eos: end-of-sequence tokens; None: what the model or the tokenizer says; `()`: none.
            stream: called with (index of the prompt, token id, new text) for each token.
            sampling: everything about how tokens are chosen, instead of the single arguments.
            draft: speculative decoding, which changes speed but not what is said: `"ngram"` looks up what the text has
                repeated, a smaller compiled model (`irc.make_draft`) is asked; or a `Speculation`.
            options: of the engine: memory, batch size.
        """
        return generate(
            self.paged_model(), prompts, tokenizer=tokenizer or self.tokenizer, max_new_tokens=max_new_tokens,
            sampling=sampling
            or Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed),
            stop=stop, eos=self.eos if eos is None else eos, stream=stream,
            options=options, speculation=self.speculation(draft),
        )  # fmt: skip

    def stream(
        self,
        prompts: Prompts,
        *,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        seed: int = 0,
        stop: str | int | Iterable[str | int] = (),
        eos: int | Iterable[int] | None = None,
        tokenizer: Any = None,
        sampling: Sampling | None = None,
        draft: Draft | None = None,
        options: EngineOptions | None = None,
    ) -> Generator[TokenEvent, None, GenerationResult]:
        """As `generate`, as an iterator over tokens as they are made."""
        return stream_tokens(
            self.paged_model(), prompts, tokenizer=tokenizer or self.tokenizer, max_new_tokens=max_new_tokens,
            sampling=sampling
            or Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed),
            stop=stop, eos=self.eos if eos is None else eos,
            options=options, speculation=self.speculation(draft),
        )  # fmt: skip

    def speculation(self, draft: Draft | None) -> Speculation | None:
        """Speculative decoding with what `generate(draft=…)` takes.

        Raises:
            OptionError: it is nothing of that kind.
        """
        if draft is None or isinstance(draft, Speculation):
            return draft
        if draft == "ngram":
            return Speculation(NgramProposer())
        if isinstance(draft, Compiled):
            return Speculation(DraftModelProposer(draft.paged_model(), self.paged_model()))
        raise OptionError(f"draft is 'ngram', a compiled model or a Speculation, not {draft!r}")

    def paged_model(self) -> PagedModel:
        """What an `irc.runtime.engine.Engine` drives: a step over flat tokens with positions and block tables."""
        return paged_model(self.artifact, self.program)

    # ---------------------------------------------------------------- storage

    def save(self, path: str | Path) -> Path:
        """Write the artifact, and beside it what `generate` needs. Read it back with `Compiled.load`.

        The reference target writes a program folder, which `irc.load` reads too.
        """
        written = self.artifact.save(path)
        if written.is_dir():
            info = {
                "target": self.target.name,
                "name": self.program.name,
                "eos": sorted(self.eos) if self.eos is not None else None,
            }
            (written / _INFO_FILE).write_text(json.dumps(info) + "\n")
            text = _tokenizer_json(self.tokenizer)
            if text is not None:
                (written / _TOKENIZER_FILE).write_text(text)
        return written

    @staticmethod
    def load(path: str | Path, *, options: Mapping[str, Any] | None = None, tokenizer: Any = None) -> Compiled:
        """Read a compiled folder.

        Raises:
            StorageError: it is missing or damaged.
        """
        folder = Path(path)
        info = _read_info(folder / _INFO_FILE)
        target = get_target(info["target"])
        target.require_available()
        artifact = target.load(folder, options)
        if not _holds_program(artifact):
            raise StorageError(f"{folder}: artifacts of target {target.name!r} do not hold their program")
        if tokenizer is None and (folder / _TOKENIZER_FILE).is_file():
            from tokenizers import Tokenizer

            tokenizer = Tokenizer.from_file(str(folder / _TOKENIZER_FILE))
        eos = frozenset(info["eos"]) if info["eos"] is not None else None
        return Compiled(
            artifact=artifact, stages=Stages({FIRST_STAGE: lambda: _program_of(artifact)}), report=Report(info["name"]),
            target=target, tokenizer=tokenizer, eos=eos,
        )  # fmt: skip


def _holds_program(artifact: Artifact) -> bool:
    return hasattr(type(artifact), "program") or "program" in vars(artifact)


def _program_of(artifact: Artifact) -> Program:
    """The program that an artifact holds; it may have to be read."""
    program: Program = getattr(artifact, "program")  # noqa: B009 (not every artifact has one)
    return program


def _read_info(path: Path) -> dict[str, Any]:
    try:
        info = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise StorageError(f"{path.parent} is no compiled model: {error}") from None
    eos = info.get("eos") if isinstance(info, dict) else 0
    if not isinstance(info, dict) or not isinstance(info.get("target"), str) or not isinstance(eos, list | None):
        raise StorageError(f"{path} is damaged")
    if any(not isinstance(token, int) for token in eos or ()):
        raise StorageError(f"{path} is damaged: end tokens are integers, not {eos!r}")
    return {"target": info["target"], "eos": eos, "name": str(info.get("name", path.parent.name))}


def _tokenizer_json(tokenizer: Any) -> str | None:
    """The tokenizer as the JSON of the `tokenizers` library, where it has that form."""
    inner = getattr(tokenizer, "backend_tokenizer", tokenizer)
    to_str = getattr(inner, "to_str", None)
    return to_str() if callable(to_str) else None


Draft: TypeAlias = str | Compiled | Speculation
"""How tokens are guessed: see `Compiled.generate`."""


def _misfits(program: Program, flat: Sequence[Any]) -> list[str]:
    """Inputs whose number of dimensions or element type is not that of the program's."""
    found = []
    for node, value in zip(program.placeholders, flat, strict=False):
        wanted = node.meta[VAL]
        if not isinstance(wanted, Tensor):
            continue
        if not isinstance(value, Tensor):
            found.append(f"{node.target} is {type(value).__name__}, not {program.type_text(node)}")
        elif (value.dim(), value.dtype) != (wanted.dim(), wanted.dtype):
            sizes = ", ".join(map(str, value.shape))
            found.append(f"{node.target} is {dtype_name(value.dtype)}[{sizes}], not {program.type_text(node)}")
    return found
