"""Commands on programs: capture, opt, dump, diff, check, bisect, passes."""

from __future__ import annotations

import re
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from irc.cli.models import MODEL_HELP, load_calibration, load_model

if TYPE_CHECKING:
    from irc.core.program import Program

Model = Annotated[str, typer.Argument(help=MODEL_HELP, metavar="MODEL")]
Passes = Annotated[
    str,
    typer.Option("--passes", "-p", help="Pipeline text, e.g. 'merge-qkv,quantize-weights{bits=4}', or a YAML file."),
]


class Verify(StrEnum):
    """When the numbers are checked."""

    EACH = "each"
    END = "end"
    OFF = "off"


CalibrationOption = Annotated[
    Path | None,
    typer.Option(
        "--calibration",
        help="What passes calibrate on: a text file or folder (needs the model's tokenizer), a folder of .npy or"
        " .safetensors samples, or 'demo': the demo model's training files.",
    ),
]
ResumeOption = Annotated[
    Path | None, typer.Option("--resume", help="Folder for finished layers: a killed run goes on from there.")
]
VerifyOption = Annotated[
    Verify, typer.Option("--verify", help="Check the numbers after each pass, at the end, or never.")
]


def register(app: typer.Typer) -> None:
    """Add this module's commands to the application."""
    for command in (capture, opt, dump, diff, check, bisect, passes):
        app.command()(command)


def capture(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the program.")],
    raw: Annotated[
        bool, typer.Option("--raw", help="Leave out canonicalization: ATen operations as captured.")
    ] = False,
) -> None:
    """Capture a model into a program folder (graph.irc, weights.safetensors, manifest.json).

    Examples:

        irc capture demo -o tinypy.program

        irc capture my_model.py:build -o my.program
    """
    from irc.core.folder import prepare
    from irc.core.program import Program
    from irc.frontend import capture as capture_model

    prepare(output)
    loaded = load_model(model)
    program = loaded.model
    if not isinstance(program, Program):
        program = capture_model(
            loaded.model, loaded.example_inputs, dynamic=loaded.dynamic, name=loaded.name, canonicalize=not raw
        )
    program.save(output)
    typer.echo(f"{program!r} → {output}")


def opt(
    model: Model,
    passes: Passes,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder for the result.")] = None,
    verify: VerifyOption = Verify.EACH,
    print_after_change: Annotated[
        bool, typer.Option(help="Print the program after every pass that changed it.")
    ] = False,
    dump_dir: Annotated[
        Path | None, typer.Option(help="Write the program after each pass to numbered files here.")
    ] = None,
    repro_dir: Annotated[Path | None, typer.Option(help="Where to leave a reproducer if a pass fails.")] = None,
    calibration: CalibrationOption = None,
    resume: ResumeOption = None,
) -> None:
    """Run passes over a program, check each, and print what they did.

    Examples:

        irc opt demo --passes 'merge-qkv,quantize-weights{bits=4,group-size=32}' -o small.program

        irc opt demo --passes 'quantize-gptq{bits=3}' --calibration demo --resume layers -o small.program

        irc opt my.program --passes 'fold-conv-batch-norm' --print-after-change --verify each
    """
    from rich.console import Console

    from irc.core.calibration import CALIBRATION_KEY
    from irc.core.contract import PassContext
    from irc.core.folder import prepare
    from irc.core.instruments import PrintAfterChange
    from irc.core.manager import PassManager
    from irc.core.pipeline import parse_pipeline
    from irc.view.progress import shown_progress

    if output is not None:
        prepare(output)
    loaded = load_model(model)
    pipeline = parse_pipeline(passes)  # now: the model's file may register passes of its own
    options = {CALIBRATION_KEY: load_calibration(calibration, loaded), "resume": resume}
    program = loaded.program()
    instruments = [PrintAfterChange()] if print_after_change else []
    with shown_progress() as progress:
        ctx = PassContext(options=options, progress=progress)
        manager = PassManager(
            pipeline, verify=verify.value, instruments=instruments, dump_dir=dump_dir, repro_dir=repro_dir, ctx=ctx
        )
        result = manager.run(program)
    Console().print(result.report)
    if output is not None:
        result.program.save(output)
        typer.echo(f"{result.program!r} → {output}")


def dump(
    model: Model,
    picture: Annotated[
        Path | None, typer.Option(help="Draw to this .svg, .png or .pdf file instead of printing.")
    ] = None,
    layer: Annotated[
        str | None, typer.Option(help="Only operations under this module path, e.g. layers.0.attn.")
    ] = None,
    raw: Annotated[bool, typer.Option("--raw", help="The graph as captured, before canonicalization.")] = False,
) -> None:
    """Print a program as text, or draw it.

    Examples:

        irc dump demo --layer layers.0

        irc dump demo --layer layers.0 --picture layer.svg
    """
    program = _program(model, raw=raw)
    if picture is not None:
        from irc.view.picture import draw

        count = draw(program, picture, layer=layer)
        typer.echo(f"{count} operations → {picture}")
        return
    text = str(program)
    typer.echo(text if layer is None else _lines_of_layer(program, text, layer))


def diff(
    before: Annotated[str, typer.Argument(help="Program folder or model.", metavar="BEFORE")],
    after: Annotated[str, typer.Argument(help="Program folder or model.", metavar="AFTER")],
) -> None:
    """Show what changed between two programs, by meaning: which operations became which, and where.

    Exit code 1 when they differ.

    Examples:

        irc diff tinypy.program small.program
    """
    from rich.console import Console

    from irc.view.difference import diff as compare

    difference = compare(_program(before), _program(after), names=(Path(before).name, Path(after).name))
    Console().print(difference)
    if not difference.is_empty:
        raise typer.Exit(1)


def check(
    model: Model,
    against: Annotated[str | None, typer.Option(help="Another program that must compute the same.")] = None,
    rtol: Annotated[float, typer.Option(min=0, help="Largest relative difference allowed with --against.")] = 1e-5,
) -> None:
    """Verify a program: structure, types, weights, provenance, and that it runs and gives finite numbers.

    Exit code 1 when a rule is broken.

    Examples:

        irc check tinypy.program

        irc check small.program --against tinypy.program --rtol 0.2
    """
    import torch

    from irc.core.numeric import compare_outputs
    from irc.core.verifier import find_problems

    program = _program(model)
    problems = [f"{finding.node}: {finding.problem}" for finding in find_problems(program)]
    if not problems and program.example_inputs is not None:
        outputs = program.run(*program.example_inputs)
        for index, value in enumerate(outputs):
            if isinstance(value, torch.Tensor) and value.is_floating_point() and not value.isfinite().all():
                problems.append(f"output {index} is not finite on the example inputs")
        if against is not None:
            comparison = compare_outputs(_outputs_of(against, program), outputs)
            problems += [f"output {d.output} {d.problem}" for d in comparison.differences if d.problem]
            typer.echo(f"relative error against {against}: {comparison.relative:.2e}")
            if not comparison.relative <= rtol:
                problems.append(f"relative error {comparison.relative:.2e} is above {rtol:g}")
    for problem in problems:
        typer.echo(problem)
    if problems:
        raise typer.Exit(1)
    ran = "ran on its example inputs" if program.example_inputs is not None else "has no example inputs to run on"
    typer.echo(f"{program!r}: no problems; {ran}")


def _outputs_of(against: str, program: Program) -> list[Any]:
    """What another program gives for the example inputs of this one."""
    from irc.core.errors import OptionError
    from irc.core.misfits import misfits

    other = _program(against)
    given = program.example_inputs or ()
    problems = misfits(other, given)
    if len(given) != len(other.placeholders):
        problems.insert(0, f"{against} takes {len(other.placeholders)} inputs, not {len(given)}")
    if problems:
        raise OptionError(f"{against} takes other inputs than {program.name}:\n  - " + "\n  - ".join(problems))
    return other.run(*given)


def bisect(model: Model, passes: Passes) -> None:
    """Find the first pass that changes the numbers beyond its promise, and its first bad application.

    Exit code 1 when one was found.

    Examples:

        irc bisect demo --passes 'merge-qkv,merge-gate-up,quantize-weights{bits=4}'
    """
    from irc.core.bisect import bisect as find
    from irc.core.pipeline import parse_pipeline

    loaded = load_model(model)
    pipeline = parse_pipeline(passes)  # now: the model's file may register passes of its own
    result = find(loaded.program(), pipeline)
    typer.echo(str(result))
    if result.bad_pass is not None:
        raise typer.Exit(1)


def passes() -> None:
    """List the passes with their options."""
    import dataclasses
    import importlib

    from rich.console import Console
    from rich.table import Table

    from irc.core.contract import registered_passes

    importlib.import_module("irc.passes")  # registers them
    table = Table("pass", "what it does", "options")
    for name, cls in registered_passes().items():
        options = [
            f"{f.name.replace('_', '-')}={f.default}"
            for f in dataclasses.fields(cls)
            if f.name != "expect_matches" and f.default is not dataclasses.MISSING
        ]
        summary = re.sub(r"\s+", " ", (cls.__doc__ or "").strip().split("\n\n")[0])
        table.add_row(name, summary, "\n".join(options))
    Console().print(table)


def _program(spec: str, *, raw: bool = False) -> Program:
    from irc.core.program import Program
    from irc.frontend import capture as capture_model

    loaded = load_model(spec)
    if raw and not isinstance(loaded.model, Program):
        return capture_model(
            loaded.model, loaded.example_inputs, dynamic=loaded.dynamic, name=loaded.name, canonicalize=False
        )
    return loaded.program()


def _lines_of_layer(program: Program, text: str, layer: str) -> str:
    from irc.core import provenance
    from irc.core.errors import OptionError, nearest

    paths = {n.name: provenance.module_path(n) for n in program.operations()}
    wanted = {name for name, path in paths.items() if f"{path}.".startswith(f"{layer}.")}
    if not wanted:
        known = {path for path in paths.values() if path}
        raise OptionError(f"no operation under {layer!r} in {program.name}{nearest(layer, known)}")
    return "\n".join(line for line in text.splitlines() if line.strip().partition(":")[0].lstrip("%") in wanted)
