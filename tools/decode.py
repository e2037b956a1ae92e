"""Law: ``pqcodec decode``: encoded files become files of plain tensors."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pqcodec.errors import InvalidArgument
from pqcodec.tools.encode import Jobs
from pqcodec.tools.files import ENCODED, Task, input_file, tasks, written_like
from pqcodec.tools.jobs import Show, report, run
from pqcodec.tools.outcome import bytes_text
from pqcodec.tools.progress import load_kernels

if TYPE_CHECKING:
    from pqcodec.formats.tensor_file import TensorFile

Sources = Annotated[
    list[str],
    typer.Argument(
        metavar="INPUT...", help="Encoded files (.pqkv, .safetensors, .zarr) or streams, folders, patterns or URLs, or -."
    ),
]


def decode(
    sources: Sources,
    target: Annotated[
        str, typer.Argument(metavar="OUTPUT", help="The file to write (.safetensors, .npz, .npy), or a folder for many.")
    ],
    to: Annotated[str, typer.Option("--to", help="What a folder's files become: safetensors, npz or npy.")] = "safetensors",
    tokens: Annotated[
        str | None,
        typer.Option(metavar="A:B", help="Tokens A up to B - 1 of coded tensors, keys and values; an end may be left out."),
    ] = None,
    only: Annotated[list[str] | None, typer.Option(metavar="NAME", help="Decode this tensor only; may be repeated.")] = None,
    backend: Annotated[str, typer.Option(help="auto, or the name of a backend.")] = "auto",
    jobs: Jobs = 1,
    force: Annotated[bool, typer.Option("--force", help="Replace what exists.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the outcome as one JSON object.")] = False,
) -> None:
    """Decode into files of tensors."""
    wanted = _token_range(tokens)
    todo, many = tasks(sources, target, ENCODED, f".{to}", force)
    from pqcodec.formats.containers import open_encoded
    from pqcodec.formats.tensors import checked_extension, write_tensors

    for task in todo:
        checked_extension(task.target)
    load_kernels(backend)

    def work(task: Task, show: Show) -> _Outcome:
        outcome = _Outcome(task.target)
        with input_file(task.source) as path, open_encoded(path) as file:
            names = _chosen(file, only)
            found = _tensors(file, names, wanted, backend, show, outcome)
            with written_like(task.source, task.target, folder=many):
                write_tensors(task.target, found, file.metadata.get("safetensors") or {})
        outcome.seconds = time.perf_counter() - outcome.start
        return outcome

    found = run(todo, work, lambda task: task.source, jobs, "decode")
    if not many and not as_json:
        print(found[0].outcome.line())
    report(found, _Outcome.COLUMNS, many, as_json)


class _Outcome:
    """What ``decode`` tells of a file."""

    COLUMNS = ("tensors", "bytes", "GB/s")
    exit_code = 0

    def __init__(self, output: str) -> None:
        self.output, self.tensors, self.bytes, self.decode_seconds, self.seconds = output, 0, 0, 0.0, 0.0
        self.start = time.perf_counter()

    @property
    def rate(self) -> float:
        """GB/s of tensors out of the decoder, writing not counted."""
        return self.bytes / self.decode_seconds / 1e9 if self.decode_seconds else 0.0

    def as_dict(self) -> dict[str, Any]:
        told = {key: getattr(self, key) for key in ("output", "tensors", "bytes", "decode_seconds", "seconds")}
        return told | {"decode_gb_per_s": self.rate}

    def cells(self) -> list[str]:
        return [str(self.tensors), bytes_text(self.bytes), f"{self.rate:.3g}"]

    def line(self) -> str:
        return f"{self.output}: {self.tensors} tensors, {bytes_text(self.bytes)}, {self.rate:.3g} GB/s"


def _token_range(text: str | None) -> tuple[int, int | None] | None:
    """The range that ``--tokens A:B`` asks for; an open end is None."""
    if text is None:
        return None
    first, colon, last = text.partition(":")
    if not colon or not all(end == "" or (end.isascii() and end.isdigit() and len(end) < 19) for end in (first, last)):
        raise InvalidArgument(f"--tokens {text!r}: A:B with numbers from 0 is expected, such as 0:128 or 64:")
    return int(first or 0), int(last) if last else None


def _chosen(file: TensorFile, only: list[str] | None) -> list[str]:
    """The names to decode, in the file's order; one that is not there raises InvalidArgument."""
    for name in only or ():
        file.entry(name)
    return [name for name in file.names if not only or name in only]


def _tensors(
    file: TensorFile,
    names: list[str],
    wanted: tuple[int, int | None] | None,
    backend: str,
    show: Show,
    outcome: _Outcome,
) -> Iterator[tuple[str, Any]]:
    from pqcodec.formats import exact

    all_bytes = max(sum(file.entry(name).tensor_bytes for name in names), 1)
    read = 0
    for name in names:
        entry = file.entry(name)
        tokens = None
        if wanted is not None and len(entry.shape) > 1 and (entry.coded or entry.role != "other"):
            tokens = wanted[0], entry.shape[-2] if wanted[1] is None else wanted[1]

        def advance(done: int, total: int, before: int = read, size: int = entry.tensor_bytes) -> None:
            show((before + size * done / max(total, 1)) / all_bytes)

        start = time.perf_counter()
        tensor = file.decode(name, tokens=tokens, backend=backend, progress=advance)
        outcome.decode_seconds += time.perf_counter() - start
        outcome.tensors += 1
        outcome.bytes += exact.nbytes(tensor)
        read += entry.tensor_bytes
        yield name, tensor
