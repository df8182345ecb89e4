"""Commands that serve: a server, and batch files."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from irc.cli.ready import DraftOption, DraftTargetOption, RunnableModel, TargetOption, draft_of, make_ready

Memory = Annotated[str | None, typer.Option("--memory", help="Most memory of the cache, such as 512M or 2G.")]
Passes = Annotated[
    str | None, typer.Option("--passes", "-p", help="Pipeline of passes.", show_default="a paged key-value cache")
]
MaxSequences = Annotated[int, typer.Option("--max-sequences", min=1, help="Most sequences that run at once.")]


def register(app: typer.Typer) -> None:
    """Add this module's commands to the application."""
    for command in (serve, batch):
        app.command()(command)


def serve(
    model: RunnableModel,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0: any that is free.")] = 8000,
    name: Annotated[str | None, typer.Option(help="What clients call the model; default: as here.")] = None,
    passes: Passes = None,
    target: TargetOption = None,
    draft: DraftOption = None,
    draft_target: DraftTargetOption = None,
    memory: Memory = None,
    max_sequences: MaxSequences = 64,
    max_batch_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of a step.")] = 512,
    max_requests: Annotated[int, typer.Option(min=1, help="Most requests that may be open.")] = 1024,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Most new tokens of a request.")] = None,
    timeout: Annotated[float, typer.Option(min=0.001, help="Seconds after which a request is ended.")] = 600.0,
    api_key: Annotated[
        str | None, typer.Option(envvar="IRC_API_KEY", help="Clients must send it as a bearer token.")
    ] = None,
) -> None:
    """Serve a model over HTTP, with OpenAI's interface, a chat page at / and metrics at /metrics.

    Examples:

        irc serve demo

        irc serve demo -p 'quantize-weights{bits=8},insert-kv-cache{layout=paged}' --draft ngram --port 8080

        irc serve demo.irca
    """
    from irc.serving import Serving, require_free, serve_forever

    require_free(host, port)
    compiled, own_name = make_ready(model, passes, target, paged=True)
    serve_forever(
        Serving(
            compiled, name=name or own_name, draft=draft_of(draft, draft_target or compiled.target.name),
            memory_bytes=read_bytes(memory), max_sequences=max_sequences, max_batch_tokens=max_batch_tokens,
            max_requests=max_requests, max_new_tokens=max_tokens, timeout_s=timeout, api_key=api_key,
            folder=_folder(model),
        ),
        host=host, port=port,
    )  # fmt: skip


def batch(
    model: RunnableModel,
    source: Annotated[Path, typer.Argument(help="JSON lines, each with a prompt.", exists=True, dir_okay=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="Where answers are added, as JSON lines.")],
    passes: Passes = None,
    target: TargetOption = None,
    draft: DraftOption = None,
    draft_target: DraftTargetOption = None,
    memory: Memory = None,
    max_sequences: MaxSequences = 64,
) -> None:
    """Answer a file of requests; run it again to go on where it was cut off.

    Examples:

        irc batch demo prompts.jsonl -o answers.jsonl
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from irc.runtime.batch_files import run_batch
    from irc.runtime.engine import Engine, EngineOptions

    compiled, _ = make_ready(model, passes, target, paged=True)
    options = EngineOptions(memory_bytes=read_bytes(memory), max_sequences=max_sequences)
    guessing = draft_of(draft, draft_target or compiled.target.name)
    engine = Engine(compiled.paged_model(), options, compiled.speculation(guessing))
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, transient=True) as bar:
        task = bar.add_task("answering", total=None)

        def progress(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        result = run_batch(
            engine, source, output, tokenizer=compiled.tokenizer, end_tokens=compiled.eos, progress=progress
        )
    typer.echo(f"{result.answered} answered, {result.failed} failed, {result.skipped} were answered before → {output}")
    if result.failed:
        raise typer.Exit(1)


def _folder(model: str) -> Path | None:
    """Where a chat template may be."""
    return Path(model) if Path(model).is_dir() else None


def read_bytes(text: str | None) -> int | None:
    """`512M`, `2G`, `1048576` as a number of bytes.

    Raises:
        OptionError: it is something else.
    """
    from irc.core.errors import OptionError

    if text is None:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)i?B?", text.strip(), re.IGNORECASE)
    if found is None:
        raise OptionError(f"{text!r} is no amount of memory: write 512M or 2G")
    return int(float(found[1]) * 1024 ** " KMGT".index(found[2].upper() or " "))
