"""Law: what a user sees of work that takes time: on stderr, only where it is a terminal; rich is loaded only then."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress_bar(title: str, total_bytes: int) -> Iterator[Callable[[int], None]]:
    """A function that is told how many bytes are done, with a bar of size, rate and remaining time while the block runs."""
    if not sys.stderr.isatty():
        yield lambda done: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(title, total=total_bytes)
        yield lambda done: progress.update(task, completed=done)


def load_kernels(backend: str) -> None:
    """Load the backend's kernels, so that figures of speed leave it out; the first time ever they are compiled."""
    import numpy as np

    from pqcodec import codec

    with _spinner("load kernels (compiled once, about 20 s)"):
        codec.decode(codec.encode(np.zeros((1, 1), np.float16), center="mean", backend=backend), backend=backend)


@contextmanager
def _spinner(title: str) -> Iterator[None]:
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status(title):
        yield
