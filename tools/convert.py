"""Law: ``pqcodec convert``: encoded files are moved into another container without decoding."""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pqcodec.errors import InvalidArgument, MissingTable
from pqcodec.tools.completion import containers
from pqcodec.tools.decode import Given, Sources
from pqcodec.tools.encode import Jobs, Target, container
from pqcodec.tools.files import ENCODED, STANDARD, Task, input_file, tasks, written_like
from pqcodec.tools.forecast import DryRun, Forecast
from pqcodec.tools.jobs import KeepGoing, Show, report, run
from pqcodec.tools.memory import Limit, Memory
from pqcodec.tools.outcome import bytes_text
from pqcodec.tools.shared_tables import open_with_tables, tables_at

if TYPE_CHECKING:
    from pqcodec.formats.containers.reader import Entry, TensorFile


def convert(
    sources: Sources,
    target: Target,
    to: Annotated[
        str | None,
        typer.Option("--to", help="pqkv, safetensors or zarr (default: by OUTPUT's extension).", autocompletion=containers),
    ] = None,
    table: Given = None,
    jobs: Jobs = 1,
    keep_going: KeepGoing = False,
    dry_run: DryRun = False,
    memory: Memory = None,
    no_check: Annotated[
        bool, typer.Option("--no-check", help="Copy damaged streams as they are; else the first one ends the work.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace what exists.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the outcome as one JSON object.")] = False,
) -> None:
    """Move encoded files into another container, without decoding.

    Streams stay as they are, byte for byte; names, layers, roles, metadata and shared tables go along. Every checksum is
    checked on the way.
    """
    if as_json and target == STANDARD:
        raise InvalidArgument("--json and OUTPUT '-' would both write to stdout; choose one")
    listed = tasks(sources, target, ENCODED, f".{to or 'pqkv'}", force, keep_going)
    if listed.many and to is None:
        raise InvalidArgument("--to is needed where many files are written; choose pqkv, safetensors or zarr")
    limit = Limit.of(memory, min(jobs, len(listed.items)))
    kinds = {task.target: container(task.target, to) for task in listed.todo}
    from pqcodec.formats import containers
    from pqcodec.formats.containers.writer import pieces_of

    tables = tables_at(table or [])

    def work(task: Task, show: Show) -> _Outcome | Forecast:
        start = time.perf_counter()
        with input_file(task.source) as path, open_with_tables(path, tables) as file:
            before = os.path.getsize(path) if os.path.isfile(path) else None
            entries = [file.entry(name) for name in file.names]
            fetched = not no_check and not _mapped(file, entries)
            for entry in entries:
                needed = _held_bytes(entry, kinds[task.target], fetched)
                limit.check(path, entry.name, needed, "or convert fewer files at once (--jobs)")
            if dry_run:
                return _forecast(task.target, entries)
            out: Any = sys.stdout.buffer if task.target == STANDARD else task.target
            progress = lambda done, total: show(done / max(total, 1))  # noqa: E731 (too short for a name)
            with written_like(task.source, task.target, folder=listed.many):
                pieces = pieces_of(file, not no_check)
                try:
                    size = containers.write(out, pieces, file.metadata or None, to=kinds[task.target], progress=progress)
                except MissingTable as error:
                    raise error.at(file.label) from error
        return _Outcome(task.target, before, size, time.perf_counter() - start)

    listed = listed.checked(lambda source: open_with_tables(source, tables).close(), keep_going)
    found = run(listed.items, work, lambda task: task.source, jobs, "convert", keep_going=keep_going)
    if not listed.many and not as_json:
        print(found[0].outcome.line(), file=sys.stderr if target == STANDARD else sys.stdout)
    report(found, (Forecast if dry_run else _Outcome).COLUMNS, listed.many, as_json)


def _forecast(target: str, entries: list[Entry]) -> Forecast:
    """What would be written: bodies as they are."""
    exact = sum(not entry.coded for entry in entries)
    sizes = (sum(entry.tensor_bytes for entry in entries), sum(entry.body_bytes for entry in entries))
    return Forecast(target, len(entries), exact, *sizes)


def _mapped(file: TensorFile, entries: list[Entry]) -> bool:
    """Whether streams of a file are read without a copy in memory."""
    first = next((entry.name for entry in entries if entry.coded), None)
    return first is None or bool(getattr(file.stream(first), "views", False))


def _held_bytes(entry: Entry, kind: str, fetched: bool) -> int:
    """The most bytes of memory for a tensor: of a coded one its streams, where checking fetches them, and zarr's copies."""
    if entry.coded:
        return (fetched + 2 * (kind == "zarr")) * entry.body_bytes
    return entry.tensor_bytes * (4 if kind == "zarr" else 1)  # zarr makes copies to append a checksum


@dataclass(frozen=True)
class _Outcome:
    """The outcome of ``convert`` for a file."""

    output: str
    read_bytes: int | None  # None where the input is no local file
    file_bytes: int
    seconds: float

    COLUMNS = ("read", "written", "seconds")
    exit_code = 0

    def as_dict(self) -> dict[str, Any]:
        return vars(self)

    def cells(self) -> list[str]:
        read = "-" if self.read_bytes is None else bytes_text(self.read_bytes)
        return [read, bytes_text(self.file_bytes), f"{self.seconds:.2f}"]

    def line(self) -> str:
        read = "" if self.read_bytes is None else f" from {bytes_text(self.read_bytes)}"
        return f"{'stdout' if self.output == STANDARD else self.output}: {bytes_text(self.file_bytes)}{read}, nothing decoded"
