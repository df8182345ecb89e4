"""A progress bar for passes that take long."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

from irc.core.contract import Progress


@contextlib.contextmanager
def shown_progress(wanted: Progress | bool | None = None) -> Iterator[Progress | None]:
    """What to give to `PassContext.progress`: a bar on the error output, the caller's own function, or nothing.

    None: a bar if the error output is a terminal. The bar appears with the first report and goes when all is done.
    """
    if callable(wanted):
        yield wanted
        return
    if wanted is False or (wanted is None and not sys.stderr.isatty()):
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        tasks = {}

        def report(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total)
            bar.update(tasks[what], completed=done, total=total)

        yield report
