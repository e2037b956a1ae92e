"""Law: ``pqcodec decode``: encoded files are decoded into files of plain tensors."""

from __future__ import annotations

import math
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pqcodec.errors import InvalidArgument
from pqcodec.tools.encode import Backend, Jobs, tensor_bytes
from pqcodec.tools.files import ENCODED, STANDARD, Task, input_file, output_file, tasks, written_like
from pqcodec.tools.forecast import DryRun, Forecast
from pqcodec.tools.jobs import KeepGoing, Show, report, run
from pqcodec.tools.memory import Limit, Memory
from pqcodec.tools.outcome import bytes_text
from pqcodec.tools.progress import load_kernels
from pqcodec.tools.shared_tables import headers_with_tables, open_with_tables, tables_at

if TYPE_CHECKING:
    from pqcodec.formats.containers.reader import TensorFile
    from pqcodec.stream.header import Header

_WAYS = "decode fewer tokens (--tokens A:B), other tensors (--only) or fewer files at once (--jobs)"
_Range = tuple[int, int | None]  # tokens: first, last + 1 (None: to the end)
Sources = Annotated[
    list[str],
    typer.Argument(
        metavar="INPUT...", help="Encoded files (.pqkv, .safetensors, .zarr) or streams, folders, patterns or URLs, or -."
    ),
]
Given = Annotated[
    list[str] | None,
    typer.Option(
        metavar="PATH",
        help="A shared table that streams name, or a folder of tables; may be repeated. Files carry theirs.",
    ),
]


def decode(
    sources: Sources,
    target: Annotated[
        str, typer.Argument(metavar="OUTPUT", help="The file to write (.safetensors, .npz, .npy), a folder for many, or -.")
    ],
    to: Annotated[
        str | None,
        typer.Option("--to", help="What a folder's files, or -, become: safetensors (default), npz or npy."),
    ] = None,
    tokens: Annotated[
        str | None,
        typer.Option(metavar="A:B", help="Tokens A up to B - 1 of coded tensors, keys and values; an end may be left out."),
    ] = None,
    only: Annotated[list[str] | None, typer.Option(metavar="NAME", help="Decode this tensor only; may be repeated.")] = None,
    fill: Annotated[
        float | None,
        typer.Option(metavar="NUMBER", help="Of tensors with only some tokens the whole shape, with this for all the others."),
    ] = None,
    kept: Annotated[
        bool,
        typer.Option("--kept", help="Of tensors with only some tokens these, and where they stood, as int64 NAME.positions."),
    ] = False,
    estimate: Annotated[
        str | None,
        typer.Option(help="What sketches (qjl presets), which keep inner products only, become: unbiased or shrunk vectors."),
    ] = None,
    table: Given = None,
    backend: Backend = "auto",
    jobs: Jobs = 1,
    keep_going: KeepGoing = False,
    dry_run: DryRun = False,
    memory: Memory = None,
    force: Annotated[bool, typer.Option("--force", help="Replace what exists.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the outcome as one JSON object.")] = False,
) -> None:
    """Decode into files of tensors."""
    if as_json and target == STANDARD:
        raise InvalidArgument("--json and OUTPUT '-' would both write to stdout; choose one")
    if kept and (fill is not None or tokens is not None):
        raise InvalidArgument("--kept gives all tokens that are there, as they are; leave out --fill and --tokens")
    wanted, extension = _token_range(tokens), f".{to or 'safetensors'}".lower()
    asked = _Asked(wanted, fill, kept, estimate, backend)
    listed = tasks(sources, target, ENCODED, extension, force, keep_going)
    limit = Limit.of(memory, min(jobs, len(listed.items)))
    from pqcodec.formats.plain.files import checked_extension, write_tensors

    tables = tables_at(table or [])
    for task in listed.todo:
        found = checked_extension(f"stdout{extension}" if task.target == STANDARD else task.target)
        if to is not None and found != extension:
            raise InvalidArgument(f"--to {to} and OUTPUT {task.target} contradict each other; leave one of them out")
    listed = listed.checked(lambda source: open_with_tables(source, tables).close(), keep_going)
    if listed.todo and not dry_run:
        load_kernels(backend)

    def work(task: Task, show: Show) -> _Outcome | Forecast:
        outcome = _Outcome(task.target)
        with input_file(task.source) as path, open_with_tables(path, tables) as file:
            tensors = _DecodedTensors(file, _chosen(file, only), asked, show, outcome)
            for name in tensors.names:
                limit.check(path, name, tensors.held_bytes(name), _WAYS)
            if dry_run:
                return tensors.forecast(task.target)
            with written_like(task.source, task.target, folder=listed.many), output_file(task.target, extension) as written:
                write_tensors(written, tensors, file.metadata.get("safetensors") or {})
        outcome.seconds = time.perf_counter() - outcome.start
        return outcome

    done = run(listed.items, work, lambda task: task.source, jobs, "decode", keep_going=keep_going)
    if not listed.many and not as_json:
        print(done[0].outcome.line(), file=sys.stderr if target == STANDARD else sys.stdout)
    report(done, (Forecast if dry_run else _Outcome).COLUMNS, listed.many, as_json)


class _Outcome:
    """The outcome of ``decode`` for a file."""

    COLUMNS = ("tensors", "bytes", "GB/s")
    exit_code = 0

    def __init__(self, output: str) -> None:
        self.output, self.tensors, self.bytes, self.decode_seconds, self.seconds = output, 0, 0, 0.0, 0.0
        self.start = time.perf_counter()

    @property
    def rate(self) -> float:
        """GB/s of decoded tensors, without writing."""
        return self.bytes / self.decode_seconds / 1e9 if self.decode_seconds else 0.0

    def as_dict(self) -> dict[str, Any]:
        fields = {key: getattr(self, key) for key in ("output", "tensors", "bytes", "decode_seconds", "seconds")}
        return fields | {"decode_gb_per_s": self.rate}

    def cells(self) -> list[str]:
        return [str(self.tensors), bytes_text(self.bytes), f"{self.rate:.3g}"]

    def line(self) -> str:
        output = "stdout" if self.output == STANDARD else self.output
        return f"{output}: {self.tensors} tensors, {bytes_text(self.bytes)}, {self.rate:.3g} GB/s"


def _token_range(text: str | None) -> _Range | None:
    """The range of ``--tokens A:B``; raises InvalidArgument."""
    if text is None:
        return None
    first, colon, last = text.partition(":")
    if not colon or not all(end == "" or (end.isascii() and end.isdigit() and len(end) < 19) for end in (first, last)):
        raise InvalidArgument(f"--tokens {text!r}: A:B with numbers from 0 is expected, such as 0:128 or 64:")
    return int(first or 0), int(last) if last else None


def _chosen(file: TensorFile, only: list[str] | None) -> list[str]:
    """The names to decode, in file order; raises InvalidArgument for one that the file lacks."""
    for name in only or ():
        file.entry(name)
    return [name for name in file.names if not only or name in only]


@dataclass(frozen=True)
class _Asked:
    """What is asked of each tensor: tokens, a fill value or the kept rows, and a backend."""

    tokens: _Range | None
    fill: float | None
    kept: bool
    estimate: str | None
    backend: str


def _cut_headers(file: TensorFile, names: list[str], asked: _Asked) -> dict[str, Header]:
    """The headers of tensors that hold only some of their tokens.

    Raises InvalidArgument for a sketch without an estimate, and MissingTable for a tensor whose shared table is not here.
    """
    headers = {name: headers_with_tables(file, name)[0] for name in names if file.entry(name).coded}
    sketches = [name for name, header in headers.items() if header.sketch]
    if sketches and asked.estimate is None:
        raise InvalidArgument(
            f"{file.label}: tensor {sketches[0]!r} is a sketch, which keeps inner products, not vectors: ask by --estimate "
            "unbiased or shrunk for vectors that are far from what was encoded, or leave it out (--only)"
        )
    return {name: header for name, header in headers.items() if header.keep}


class _DecodedTensors:
    """The wanted tensors of an encoded file as ``Tensors``, each decoded when it is read.

    Of one with only some tokens the whole shape (``fill``), or its rows and a second tensor of their positions (``kept``).
    """

    def __init__(self, file: TensorFile, names: list[str], asked: _Asked, show: Show, outcome: _Outcome) -> None:
        from pqcodec.formats.containers.reader import named
        from pqcodec.formats.plain.layouts import layouts_of

        self._file, self._asked, self._show, self._outcome = file, asked, show, outcome
        self._cut_of = _cut_headers(file, names, asked)
        if self._cut_of and asked.fill is None and not asked.kept:
            some = f"{file.label}: tensor {next(iter(self._cut_of))!r} holds only some of its tokens"
            raise InvalidArgument(
                f"{some}: decode it with --fill NUMBER to the whole shape, or with --kept to these tokens and their positions"
            )
        self._positions_of = {f"{name}.positions": name for name in self._cut_of if asked.kept}
        if twice := [name for name in self._positions_of if name in names]:
            raise InvalidArgument(f"{file.label}: {twice[0]!r} is a tensor already; decode others with --only")
        self._read_positions: dict[str, Any] = {}
        self.names = (*names, *self._positions_of)
        with named(file.label):
            self._layouts = layouts_of(file.metadata, {name: file.entry(name).shape for name in names})
        self._shapes = {name: self._shape(name) for name in names}
        self._tokens = {name: self._cut(name) for name in names}
        self._all_bytes = max(sum(file.entry(name).tensor_bytes for name in names), 1)
        self._read_bytes = 0

    def _cut(self, name: str) -> tuple[int, int] | None:
        """The wanted tokens of a tensor, (first, last + 1); None for all, or a tensor without. Raises InvalidArgument."""
        entry, shape = self._file.entry(name), self._shapes[name]
        if self._asked.tokens is None or len(shape) < 2 or not (entry.coded or entry.role != "other"):
            return None
        from pqcodec.formats.containers.reader import named
        from pqcodec.stream.index import checked_range

        first, last = self._asked.tokens
        with named(f"{self._file.label}: tensor {name!r}"):
            return checked_range("tokens", (first, shape[-2] if last is None else last), shape[-2])

    def _shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor without a cut: the whole one where it is filled."""
        header = self._cut_of.get(name)
        return self._file.entry(name).shape if header is None or self._asked.kept else header.whole_shape

    def describe(self, name: str) -> tuple[tuple[int, ...], str]:
        """Shape, after the cut and in the layout that was given, and dtype of a tensor."""
        if name in self._positions_of:
            header = self._cut_of[self._positions_of[name]]
            each = header.keep is not None and header.keep.each
            return (header.shape[:-1] if each else (header.tokens,)), "int64"
        shape, cut = self._shapes[name], self._tokens[name]
        shape = shape if cut is None else (*shape[:-2], cut[1] - cut[0], shape[-1])
        return self._layouts[name].given(shape) if name in self._layouts else shape, self._file.entry(name).dtype

    def held_bytes(self, name: str) -> int:
        """The most bytes of memory for a tensor until it is written."""
        size = tensor_bytes(*self.describe(name))
        if name in self._positions_of:
            return size
        entry, cut = self._file.entry(name), self._tokens[name]
        turned = size if name in self._layouts else 0  # a copy, made when it is written
        if not entry.coded:
            return entry.tensor_bytes + (0 if cut is None else size) + turned
        from pqcodec.formats.places import remote

        streams = entry.body_bytes if cut is None and remote.is_url(self._file.label) else 0  # an object is read at once
        starts = 16 * math.prod(entry.shape[:-2]) if size else 0  # offset of each leading index
        rows = entry.tensor_bytes if name in self._cut_of and not self._asked.kept else 0  # before they are among the filled
        return size + streams + starts + turned + rows

    def read(self, name: str) -> Any:
        """The decoded tensor; updates the outcome and the progress."""
        if name in self._positions_of:
            rows_of = self._positions_of[name]
            found = self._read_positions.pop(rows_of, None)
            return self._file.decode_kept(rows_of, backend=self._asked.backend)[1] if found is None else found
        entry, before = self._file.entry(name), self._read_bytes

        def advance(done: int, total: int) -> None:
            self._show((before + entry.tensor_bytes * done / max(total, 1)) / self._all_bytes)

        start = time.perf_counter()
        options: dict[str, Any] = {"backend": self._asked.backend, "estimate": self._asked.estimate}
        if name in self._cut_of and self._asked.kept:
            tensor, self._read_positions[name] = self._file.decode_kept(name, **options)
        else:
            options |= {"tokens": self._tokens[name], "fill": self._asked.fill}
            tensor = self._file.decode(name, progress=advance, **options)
        self._file.forget(name)
        self._outcome.decode_seconds += time.perf_counter() - start
        self._outcome.tensors += 1
        self._outcome.bytes += tensor_bytes(*self.describe(name))
        self._read_bytes += entry.tensor_bytes
        return self._layouts[name].turn_back(tensor) if name in self._layouts else tensor

    def forecast(self, target: str) -> Forecast:
        """What would be written."""
        size = sum(tensor_bytes(*self.describe(name)) for name in self.names)
        exact = sum(name in self._positions_of or not self._file.entry(name).coded for name in self.names)
        return Forecast(target, len(self.names), exact, size, size)
