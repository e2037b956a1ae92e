"""Law: a verb's work on many files: several at once, what becomes of the others when one fails, a table at the end."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

import typer

from pqcodec.errors import InvalidArgument, PQError
from pqcodec.tools.outcome import code_of, message_of, print_json, say
from pqcodec.tools.tables import console, print_table

T = TypeVar("T")
Show = Callable[[float], None]  # called with the share of a file that is done, 0 to 1
EXPECTED = (PQError, OSError, MemoryError)
KeepGoing = Annotated[
    bool, typer.Option("--keep-going", help="Go on after an input that fails; else the first failure ends the work.")
]


@dataclass(frozen=True)
class Done:
    """The result for a file: a verb's outcome, or the error that ended it, or neither: the work was not begun."""

    path: str
    outcome: Any = None
    error: BaseException | None = None

    def as_dict(self) -> dict[str, Any]:
        """The result for --json."""
        if self.outcome is not None:
            fields: dict[str, Any] = self.outcome.as_dict()
            return fields
        if self.error is None:
            return {"file": self.path, "begun": False}
        kind = {"kind": type(self.error).__name__, "message": message_of(self.error), "exit_code": code_of(self.error)}
        return {"file": self.path, "error": kind}


def attempted(path: str, work: Callable[[], T], keep_going: bool) -> T | Done:
    """What ``work`` returns; with ``keep_going``, an error in ``EXPECTED`` becomes the result for ``path`` instead."""
    try:
        return work()
    except EXPECTED as error:
        if not keep_going:
            raise
        return Done(path, error=error)


def run(
    items: Sequence[T | Done],
    work: Callable[[T, Show], Any],
    path: Callable[[T], str],
    jobs: int,
    title: str,
    *,
    keep_going: bool = True,
) -> list[Done]:
    """Call ``work`` for every item, ``jobs`` at once, and return a ``Done`` for each; an item that is one already stays.

    Errors in ``EXPECTED`` become results; that of a single item is raised. ``path``: the name of an item. With
    ``keep_going=False`` no work is begun after an error. Raises InvalidArgument for ``jobs`` below 1.
    """
    from pqcodec.tools.progress import progress_bar

    if jobs < 1:
        raise InvalidArgument(f"--jobs {jobs}: a number from 1 is expected")
    stopped, ended = threading.Event(), threading.Event()
    with progress_bar(title, len(items)) as bar:
        shares = dict.fromkeys(range(len(items)), 0.0)

        def one(number: int) -> Done:
            def show(share: float) -> None:
                if stopped.is_set():
                    raise KeyboardInterrupt
                shares[number] = share
                bar(sum(shares.values()))

            item = items[number]
            if isinstance(item, Done):
                return item
            if ended.is_set():
                return Done(path(item))
            done = attempted(path(item), lambda: Done(path(item), work(item, show)), len(items) > 1)
            if done.error is not None and not keep_going:
                ended.set()
            show(1.0)
            return done

        if jobs == 1 or len(items) == 1:
            return [one(number) for number in range(len(items))]
        with ThreadPoolExecutor(jobs) as pool:
            try:
                return list(pool.map(one, range(len(items))))
            except BaseException:
                stopped.set()
                pool.shutdown(cancel_futures=True)
                raise


def report(found: list[Done], columns: Sequence[str], many: bool, as_json: bool) -> None:
    """Print the results: as JSON, or for many files as a table, with errors on stderr.

    Raises typer.Exit with the code of the first failure, or of the first outcome that has one.
    """
    failed = [done for done in found if done.error is not None]
    if as_json:
        results = [done.as_dict() for done in found]
        print_json({"files": results, "failed": len(failed)} if many else results[0])
    elif many:
        rows = [[done.path, *(done.outcome.cells() if done.outcome else _failure(done, columns))] for done in found]
        print_table(console(), ("file", *columns), rows, ("file",))
        for done in failed:
            assert done.error is not None
            say(f"pqcodec: {message_of(done.error)}")
    code = next((code_of(done.error) for done in failed if done.error), 0)
    code = code or next((done.outcome.exit_code for done in found if done.outcome and done.outcome.exit_code), 0)
    if code:
        raise typer.Exit(code)


def _failure(done: Done, columns: Sequence[str]) -> list[str]:
    return ["failed" if done.error else "not begun", *[""] * (len(columns) - 1)]
