"""Commands that measure quality: eval and sensitivity."""

from __future__ import annotations

import re
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from irc.cli.models import MODEL_HELP, LoadedModel, load_calibration, load_model

if TYPE_CHECKING:
    from irc.core.contract import Pass
    from irc.core.program import Program
    from irc.evaluation import EvaluationData

DATA_HELP = (
    "'demo' (held-out files of the demo corpus), a text file or folder: through the model's tokenizer;"
    " 'digits' (scikit-learn); 'sentences' (for the model 'minilm'); or a .safetensors file with 'inputs' and"
    " 'classes'."
)
_LABEL = re.compile(r"\s*(?P<label>[^={}\[\],]+)=(?P<text>.*)", re.DOTALL)


class SensitivityMetric(StrEnum):
    """How damage is measured."""

    SQNR = "sqnr"
    KL = "kl"
    SECOND_ORDER = "second-order"


def register(app: typer.Typer) -> None:
    """Add this module's commands to the application."""
    app.command("eval")(evaluate)
    app.command()(sensitivity)


def evaluate(
    models: Annotated[
        list[str],
        typer.Argument(help=MODEL_HELP + " 'minilm' is a sentence encoder. The first is the reference.",
                       metavar="MODEL…"),
    ],
    data: Annotated[str, typer.Option("--data", "-d", help=DATA_HELP)] = "demo",
    passes: Annotated[
        list[str] | None,
        typer.Option(
            "--passes", "-p",
            help="A variant of every model: a pipeline, or NAME=pipeline. May be given several times.",
        ),
    ] = None,
    metrics: Annotated[
        str | None, typer.Option(help="Comma-separated: perplexity, kl, top1, accuracy, spearman, rank, drift.")
    ] = None,
    length: Annotated[int, typer.Option(min=2, help="Tokens a window.")] = 512,
    windows: Annotated[int | None, typer.Option(min=1, help="Windows of text, taken evenly; default: all.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples at a time.")] = 4,
    calibration: Annotated[
        Path | None, typer.Option(help="What passes calibrate on: 'demo' (its training files), a file or folder.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw size against the first metric: .svg, .png or .pdf.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:  # fmt: skip
    """Measure models and their variants side by side: size, perplexity, divergence from the first, agreement.

    Examples:

        irc eval demo --windows 64 -p 'int8=quantize-weights{bits=8}' -p 'int4=quantize-weights' --plot sizes.svg

        irc eval demo small.program --data my-texts/ --metrics perplexity,kl --json

        irc eval minilm --data sentences -p 'int4=quantize-weights{group-size=32}'
    """
    import json as json_module

    from rich.console import Console

    from irc.core.pipeline import parse_pipeline
    from irc.evaluation import compare
    from irc.evaluation.plot import check_plot_path
    from irc.evaluation.plot import plot as draw
    from irc.view.progress import shown_progress

    if plot is not None:
        check_plot_path(plot)
    names = metrics.split(",") if metrics is not None else None
    loaded = {spec: _load(spec) for spec in dict.fromkeys(models)}
    variants = [(label, parse_pipeline(text)) for label, text in map(_labelled, passes or [])]
    samples = _evaluation_data(data, next(iter(loaded.values())), models[0], length, windows)
    with shown_progress() as progress:
        subjects: dict[str, Any] = {}
        for spec, one in loaded.items():
            program = one.program()
            _add(subjects, _short(spec), program)
            for label, pipeline in variants:
                name = label if len(loaded) == 1 else f"{_short(spec)}, {label}"
                _add(subjects, name, _run_passes(program, pipeline, calibration, one, progress))
        reference = next(iter(subjects))
        needs_reference = len(subjects) > 1
        found = compare(
            subjects, samples, reference=reference if needs_reference else None, metrics=names, batch_size=batch_size,
            progress=progress if progress is not None else False,
        )  # fmt: skip
    if json:
        typer.echo(json_module.dumps(found.to_json(), indent=1))
    else:
        Console().print(found)
    if plot is not None:
        draw(found, plot, reference=reference if needs_reference else None)
        typer.echo(f"picture → {plot}", err=json)


def sensitivity(
    model: Annotated[str, typer.Argument(help=MODEL_HELP, metavar="MODEL")],
    data: Annotated[
        Path, typer.Option("--data", "-d", help="What is measured on: 'demo' (its training files), a file or folder.")
    ] = Path("demo"),
    bits: Annotated[str, typer.Option(help="Comma-separated bit widths to try.")] = "2,3,4,5,6,8",
    group_size: Annotated[int, typer.Option(min=0, help="Neighbours that share a scale; 0: a scale a row.")] = 32,
    metric: Annotated[
        SensitivityMetric,
        typer.Option(help="sqnr: of each layer's outputs. second-order: estimated KL. kl: measured, and slow."),
    ] = SensitivityMetric.SQNR,
    length: Annotated[int, typer.Option(min=2, help="Tokens a window.")] = 512,
    windows: Annotated[int, typer.Option(min=1, help="Windows of text.")] = 16,
    batch_size: Annotated[int, typer.Option(min=1, help="Windows at a time.")] = 2,
    average_bits: Annotated[
        float | None, typer.Option(help="Also choose a format for each layer, for this many bits a weight on average.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="JSON file for the results; a killed run goes on from it.")
    ] = None,
    embeddings: Annotated[bool, typer.Option("--embeddings", help="Also embedding tables.")] = False,
    convolutions: Annotated[bool, typer.Option("--convolutions", help="Also convolutions.")] = False,
) -> None:
    """Measure what each bit width does to each layer, and choose formats for a size budget.

    Examples:

        irc sensitivity demo --metric second-order --average-bits 4.5 -o demo.sensitivity.json

        irc sensitivity my.program --data my-texts/ --bits 3,4,8 --group-size 0
    """
    from rich.console import Console

    from irc.core.errors import OptionError
    from irc.evaluation import assign_bits
    from irc.evaluation import sensitivity as measure

    try:
        widths = [int(text) for text in bits.split(",")]
    except ValueError:
        raise OptionError(f"--bits takes numbers with commas between them, not {bits!r}") from None
    if average_bits is not None and not average_bits >= min(widths):
        raise OptionError(f"--average-bits {average_bits:g} is below the smallest of --bits {bits}")
    loaded = _load(model)
    samples = load_calibration(data, loaded, length=length, count=windows, batch_size=batch_size)
    found = measure(
        loaded.program(), samples, bits=widths, group_size=group_size or None, metric=metric.value, resume=output,
        include_embeddings=embeddings, include_convolutions=convolutions,
    )  # fmt: skip
    console = Console()
    console.print(found)
    for reason in found.skips:
        console.print(f"not measured: {reason}", highlight=False, markup=False)
    if average_bits is not None:
        chosen = assign_bits(found, average_bits=average_bits)
        console.print(chosen)
        typer.echo(chosen.pipeline)


def _labelled(text: str) -> tuple[str, str]:
    """`NAME=pipeline` → (name, pipeline); a pipeline alone is its own name."""
    found = _LABEL.fullmatch(text)
    return (found["label"].strip(), found["text"]) if found else (text, text)


def _load(spec: str) -> LoadedModel:
    if spec != "minilm":
        return load_model(spec)
    from irc.evaluation.sentences import load_minilm, minilm_example

    model, tokenizer = load_minilm()
    dims = {0: "B", 1: "S"}
    return LoadedModel(model, "minilm", minilm_example(), (dims, dims), tokenizer)


def _short(spec: str) -> str:
    return Path(spec).name or spec


def _add(subjects: dict[str, Any], name: str, program: Program) -> None:
    from irc.core.errors import OptionError

    if name in subjects:
        raise OptionError(f"two variants are called {name!r}: name them apart, for example -p 'NAME=pipeline'")
    subjects[name] = program


def _run_passes(
    program: Program, pipeline: list[Pass], calibration: Path | None, loaded: LoadedModel, progress: Any
) -> Program:
    from irc.core.calibration import CALIBRATION_KEY
    from irc.core.contract import PassContext
    from irc.core.manager import PassManager

    data = load_calibration(calibration, loaded)
    options = {} if data is None else {CALIBRATION_KEY: data}
    ctx = PassContext(options=options, progress=progress)
    return PassManager(pipeline, verify="off", ctx=ctx).run(program).program


def _evaluation_data(spec: str, loaded: LoadedModel, model: str, length: int, count: int | None) -> EvaluationData:
    from irc.evaluation import datasets

    if spec == "digits":
        return datasets.digits()
    if spec.endswith(".safetensors"):
        return _labelled_tensors(Path(spec))
    tokenizer = _tokenizer(loaded, model, spec)
    if spec == "sentences":
        return datasets.sentence_pairs(tokenizer)
    if spec == "demo":
        return datasets.held_out_text(tokenizer, length=length, count=count)
    return datasets.folder_text(spec, tokenizer, length=length, count=count)


def _tokenizer(loaded: LoadedModel, model: str, spec: str) -> Any:
    from irc.core.errors import OptionError

    if loaded.tokenizer is None:
        raise OptionError(f"{spec} is text, and {model} comes without a tokenizer")
    return loaded.tokenizer


def _labelled_tensors(path: Path) -> EvaluationData:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from irc.core.errors import OptionError
    from irc.evaluation.data import EvaluationData, Kind

    if not path.is_file():
        raise OptionError(f"{path} does not exist")
    try:
        found = load_file(path)
    except SafetensorError as error:
        raise OptionError(f"{path} cannot be read: {error}") from None
    if set(found) != {"inputs", "classes"}:
        raise OptionError(f"{path} must hold 'inputs' and 'classes'; it holds {', '.join(sorted(found)) or 'nothing'}")
    return EvaluationData(Kind.CLASSES, (found["inputs"],), found["classes"], str(path))
