"""Commands that lower and run: compile, generate, targets."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from irc.cli.models import load_calibration, load_model
from irc.cli.programs import CalibrationOption, Model, ResumeOption, Verify, VerifyOption
from irc.cli.ready import DraftOption, DraftTargetOption, RunnableModel, TargetOption, draft_of, make_ready

PassesOption = Annotated[
    str | None, typer.Option("--passes", "-p", help="Pipeline of passes.", show_default="the target's own")
]


def register(app: typer.Typer) -> None:
    """Add this module's commands to the application."""
    for command in (compile, generate, targets):
        app.command()(command)


def compile(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="Where to save the artifact.")],
    target: Annotated[str, typer.Option("--target", "-t", help="What to lower to; see 'irc targets'.")] = "reference",
    passes: PassesOption = None,
    verify: VerifyOption = Verify.EACH,
    dump_dir: Annotated[
        Path | None, typer.Option(help="Write the program after each pass to numbered files here.")
    ] = None,
    calibration: CalibrationOption = None,
    resume: ResumeOption = None,
    option: Annotated[
        list[str] | None,
        typer.Option("--option", "-O", help="An option of the target, KEY=VALUE, e.g. type=q4_k_m; several times."),
    ] = None,
    tune: Annotated[
        float | None, typer.Option(help="Seconds for measuring what the target otherwise chooses by rules (cpu).")
    ] = None,
) -> None:
    """Compile a model for a target and save the artifact.

    Examples:

        irc compile demo --target onnx -o tinypy.onnx

        irc compile demo --target gguf -O type=q4_k_m -o tinypy.gguf

        irc compile demo -t reference -p 'quantize-weights{bits=8},insert-kv-cache' -o tinypy.compiled
    """
    from rich.console import Console

    from irc.compiler import compile as compile_model
    from irc.core.target import get_target

    chosen = get_target(target)
    chosen.require_available()
    chosen.check_place(output)
    loaded = load_model(model)
    compiled = compile_model(
        loaded.model, passes=passes, target=target, example_inputs=loaded.example_inputs, dynamic=loaded.dynamic,
        verify=verify.value, tokenizer=loaded.tokenizer, dump_dir=dump_dir,
        calibration=load_calibration(calibration, loaded), pass_options={"resume": resume},
        options=_options(option or []), tune=tune, name=loaded.name,
    )  # fmt: skip
    Console().print(compiled.report)
    compiled.save(output)
    typer.echo(f"{target} artifact → {output}")


def generate(
    model: RunnableModel,
    prompt: Annotated[list[str], typer.Option("--prompt", help="Text to go on from; may be given several times.")],
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", min=1, help="Most tokens to make.")] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: always the likeliest token.")] = 0.0,
    top_k: Annotated[int | None, typer.Option(min=1, help="Choose among so many of the likeliest tokens.")] = None,
    top_p: Annotated[
        float | None, typer.Option(min=0.0, max=1.0, help="Choose among the likeliest tokens of this probability.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    target: TargetOption = None,
    passes: PassesOption = None,
    draft: DraftOption = None,
    draft_target: DraftTargetOption = None,
    verify: VerifyOption = Verify.OFF,
) -> None:
    """Generate text from prompts.

    Examples:

        irc generate demo --prompt 'def main(' -n 80

        irc generate demo --prompt 'import os' --prompt 'class Queue' --temperature 0.8 --top-p 0.95 --seed 1

        irc generate demo --prompt 'import os' --draft draft --draft-target cpu

        irc generate demo.irca --prompt 'import os'
    """
    from irc.runtime.results import FinishReason

    compiled, _ = make_ready(model, passes, target, verify=verify.value)
    guessing = draft_of(draft, draft_target or compiled.target.name)
    streaming = len(prompt) == 1
    if streaming:
        typer.echo(prompt[0], nl=False)

    def show(index: int, token_id: int, text: str) -> None:
        if streaming:
            typer.echo(text, nl=False)

    result = compiled.generate(
        prompt, max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed,
        stream=show, draft=guessing,
    )  # fmt: skip
    if streaming:
        typer.echo("")
    else:
        for given, text in zip(prompt, result.text, strict=True):
            typer.echo(f"── {given!r}\n{given}{text}\n")
    if FinishReason.CACHE_FULL in result.finish_reasons:
        typer.echo("ended early: prompt and text have the length that the cache holds", err=True)
    typer.echo(str(result.stats), err=True)
    if result.speculation is not None:
        typer.echo(str(result.speculation), err=True)


def targets() -> None:
    """List the targets and whether they can be used here."""
    import importlib

    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from irc.core.target import registered_targets

    importlib.import_module("irc.lowering")  # registers them
    table = Table("target", "what it gives", "here")
    for name, target in registered_targets().items():
        table.add_row(name, target.description, escape(target.available() or "ready"))
    Console().print(table)


def _options(given: list[str]) -> dict[str, Any]:
    """`KEY=VALUE` texts as options; numbers, lists and mappings as YAML writes them."""
    import yaml

    from irc.core.errors import OptionError

    found: dict[str, Any] = {}
    for text in given:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise OptionError(f"--option takes KEY=VALUE, not {text!r}")
        try:
            found[key.replace("-", "_")] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise OptionError(f"--option {text}: {error}") from error
    return found
