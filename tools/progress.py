"""Law: progress on stderr, only where that is a terminal (rich is loaded only then)."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress_bar(title: str, files: int) -> Iterator[Callable[[float], None]]:
    """A context with a bar and a function to call with the number of files done, fractions included."""
    if not sys.stderr.isatty():
        yield lambda done: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    count = [] if files == 1 else [TextColumn("{task.completed:.0f}/{task.total:.0f} files")]
    columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), *count, TimeElapsedColumn()
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(title, total=files)
        yield lambda done: progress.update(task, completed=done)


def load_kernels(backend: str) -> None:
    """Load the backend's kernels, so that reported speeds exclude it; they are compiled once and cached."""
    import numpy as np

    from pqcodec import codec

    with _spinner("load kernels"):
        codec.decode(codec.encode(np.zeros((1, 1), np.float16), center="mean", backend=backend), backend=backend)


@contextmanager
def _spinner(title: str) -> Iterator[None]:
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status(title):
        yield
