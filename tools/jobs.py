"""Law: a verb's work on many files: several at once, a failure does not stop the others, a table at the end."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import typer

from pqcodec.errors import InvalidArgument, PQError
from pqcodec.tools.outcome import code_of, message_of, print_json, say
from pqcodec.tools.tables import console, print_table

T = TypeVar("T")
Show = Callable[[float], None]  # called with the share of a file that is done, 0 to 1
EXPECTED = (PQError, OSError, MemoryError)


@dataclass(frozen=True)
class Done:
    """The result for a file: a verb's outcome, or the error that ended it."""

    path: str
    outcome: Any = None
    error: BaseException | None = None

    def as_dict(self) -> dict[str, Any]:
        """The result for --json."""
        if self.error is None:
            fields: dict[str, Any] = self.outcome.as_dict()
            return fields
        kind = {"kind": type(self.error).__name__, "message": message_of(self.error), "exit_code": code_of(self.error)}
        return {"file": self.path, "error": kind}


def run(items: Sequence[T], work: Callable[[T, Show], Any], path: Callable[[T], str], jobs: int, title: str) -> list[Done]:
    """Call ``work`` for every item, ``jobs`` at once, and return a ``Done`` for each.

    Errors in ``EXPECTED`` become results; that of a single item is raised. ``path``: the name of an item. Raises
    InvalidArgument for ``jobs`` below 1.
    """
    from pqcodec.tools.progress import progress_bar

    if jobs < 1:
        raise InvalidArgument(f"--jobs {jobs}: a number from 1 is expected")
    stopped = threading.Event()
    with progress_bar(title, len(items)) as bar:
        shares = dict.fromkeys(range(len(items)), 0.0)

        def one(number: int) -> Done:
            def show(share: float) -> None:
                if stopped.is_set():
                    raise KeyboardInterrupt
                shares[number] = share
                bar(sum(shares.values()))

            try:
                done = Done(path(items[number]), work(items[number], show))
            except EXPECTED as error:
                if len(items) == 1:
                    raise
                done = Done(path(items[number]), error=error)
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
        failure = ["failed", *[""] * (len(columns) - 1)]
        rows = [[done.path, *(done.outcome.cells() if done.error is None else failure)] for done in found]
        print_table(console(), ("file", *columns), rows, ("file",))
        for done in failed:
            assert done.error is not None
            say(f"pqcodec: {message_of(done.error)}")
    code = next((code_of(done.error) for done in failed if done.error), 0)
    code = code or next((done.outcome.exit_code for done in found if done.outcome and done.outcome.exit_code), 0)
    if code:
        raise typer.Exit(code)
