"""Entry point of the `irc` command: collects the commands and turns errors into plain messages.

Exit codes: 0 done; 1 a check found something; 2 bad input or an operation that could not be done.
"""

from __future__ import annotations

import sys

import typer

from irc.cli import demo, evaluation, programs, running, serving

app = typer.Typer(
    name="irc",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="irc: an inference compiler for PyTorch models. Start with [bold]irc demo[/bold].",
)
for _module in (demo, programs, running, serving, evaluation):
    _module.register(app)


def main() -> None:
    """Run the command line; an `IrcError` becomes its message and exit code 2."""
    from irc.core.errors import IrcError

    try:
        app()
    except IrcError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except OSError as error:
        print(f"error: {error.strerror}: {error.filename}" if error.filename else f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
