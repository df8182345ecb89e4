"""`irc demo`: the main job, end to end, on the model that ships with irc."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

_PROMPT = '''def read_config(path):
    """Read a configuration file."""
    with open(path'''


def register(app: typer.Typer) -> None:
    """Add this module's command to the application."""
    app.command()(demo)


def demo(
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for dumps, pictures and the ONNX file.")
    ] = Path("irc-demo"),
    prompt: Annotated[str, typer.Option(help="Text that the model goes on from.")] = _PROMPT,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", "-n", min=1, help="Length of the sample text.")
    ] = 96,
    windows: Annotated[int, typer.Option(min=1, help="Held-out windows of 256 tokens to measure perplexity on.")] = 48,
) -> None:
    """Capture, optimise, quantize, check, generate and export the shipped model; everything is computed now.

    Examples:

        irc demo

        irc demo --prompt 'class Stack:' -o /tmp/irc-demo
    """
    from rich.console import Console
    from rich.rule import Rule

    from irc.cli.models import load_shipped
    from irc.demo.evaluation import held_out_windows
    from irc.demo.story import Story

    console = Console()

    def section(title: str) -> None:
        console.print(Rule(f"[bold]{title}[/bold]", align="left"))

    output.mkdir(parents=True, exist_ok=True)
    loaded = load_shipped("tinypy")
    with console.status("capturing the model"):
        started = time.perf_counter()
        program = loaded.program()
        capture_s = time.perf_counter() - started
        held_out = held_out_windows(loaded.tokenizer, length=256, count=windows)
    story = Story(loaded.model, loaded.tokenizer, program, held_out, prompt, max_new_tokens)

    console.print(f"captured in {capture_s:.1f} s: {program!r}", highlight=False, markup=False)
    section("1 · compile: every pass is run and checked against the program before it")
    labels = {"f32, KV cache": None, "int8 g32, KV cache": 8, "int4 g32, KV cache": 4}
    for label, bits in labels.items():
        with console.status(f"compiling {label}"):
            compiled = story.compile(label, bits, dump_dir=output / "dumps" if bits == 4 else None)
    console.print(compiled.report)
    section("2 · what the passes changed")
    console.print(story.difference(label))
    section("3 · perplexity (ppl) and speed before and after, on held-out files")
    with console.status("measuring"):
        comparison = story.comparison()
    console.print(comparison)
    section("4 · text from the 4-bit program")
    console.print(story.sample, highlight=False, markup=False)
    section("5 · ONNX, checked against ONNX Runtime")
    with console.status("exporting"):
        outcome = story.export_onnx(label, output / "tinypy.onnx")
    console.print(outcome, highlight=False)
    section("6 · left behind")
    story.draw(label, output)
    for path in sorted(p for p in output.rglob("*") if p.is_file()):
        console.print(f"{path}  [dim]{path.stat().st_size / 1e3:,.0f} kB[/dim]", highlight=False)
