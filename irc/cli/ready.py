"""Models that are ready to run: compiled now, or by `irc compile` before."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from irc.cli.models import MODEL_HELP, compiled_for, load_model, served_name

if TYPE_CHECKING:
    from irc.compiled import Compiled

RunnableModel = Annotated[
    str,
    typer.Argument(
        help=MODEL_HELP + " Or a folder that 'irc compile' wrote: it is run as it is.",
        metavar="MODEL",
    ),
]
TargetOption = Annotated[
    str | None,
    typer.Option("--target", "-t", help="What to lower to; see 'irc targets'.", show_default="reference"),
]
DraftOption = Annotated[
    str | None,
    typer.Option(
        "--draft",
        help="Speculative decoding: 'ngram' (repeats what followed before), or a smaller model with the same tokens.",
    ),
]
DraftTargetOption = Annotated[
    str | None, typer.Option("--draft-target", help="What the draft model is lowered to.", show_default="as the model")
]
PAGED = "insert-kv-cache{layout=paged}"


def make_ready(
    spec: str, passes: str | None, target: str | None, *, paged: bool = False, verify: Any = "off"
) -> tuple[Compiled, str]:
    """What `spec` names, ready to generate or embed, and its name for clients.

    Args:
        passes: None: the target's own; with `paged` a paged key-value cache, where the model has one at all.

    Raises:
        OptionError: it has no tokenizer, or is compiled already and passes or a target are given.
    """
    from irc.core.errors import OptionError

    before = compiled_for(spec)
    if before is None:
        loaded = load_model(spec)
        tokenizer, name = loaded.tokenizer, served_name(spec, loaded)
    else:
        given = [option for option, value in (("--passes", passes), ("--target", target)) if value is not None]
        if given:
            raise OptionError(f"{spec} is compiled already, for target {before!r}: leave out {' and '.join(given)}")
        ready = _saved(spec)
        tokenizer, name = ready.tokenizer, Path(spec).resolve().name
    if tokenizer is None:
        raise OptionError(f"{spec} comes without a tokenizer: text cannot be turned into tokens")
    if before is None:
        ready = _compiled(loaded, passes, target, paged=paged, verify=verify)
    return ready, name


def draft_of(draft: str | None, target: str) -> Any:
    """What `--draft` names, as `Compiled.speculation` takes it: None, `ngram`, or a model, compiled for the target."""
    if draft is None or draft == "ngram":
        return draft
    if compiled_for(draft) is not None:
        return _saved(draft)
    return _compiled(load_model(draft), PAGED, target, paged=True, verify="off")


def _saved(spec: str) -> Compiled:
    from irc.compiled import Compiled

    return Compiled.load(spec)


def _compiled(loaded: Any, passes: str | None, target: str | None, *, paged: bool, verify: Any) -> Compiled:
    from irc.compiler import compile as compile_model
    from irc.passes.attention.insert_kv_cache import InsertKVCache

    pipeline: Any = passes
    if paged and passes is None:
        # Encoders have no cache: they serve embeddings as they are.
        pipeline = [] if InsertKVCache().requires(loaded.program()) else PAGED
    return compile_model(
        loaded.model, passes=pipeline, target=target or "reference", example_inputs=loaded.example_inputs,
        dynamic=loaded.dynamic, verify=verify, tokenizer=loaded.tokenizer, name=loaded.name,
    )  # fmt: skip
