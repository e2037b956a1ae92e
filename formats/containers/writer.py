"""Law: a tensor to be written, the same for every container: described beforehand, made when it is written.

Containers know only pieces, so that a cache that is being encoded and one that is being converted look alike to them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pqcodec import codec
from pqcodec.errors import CorruptStream, InvalidArgument, MissingTable
from pqcodec.formats.containers.reader import Entry, TensorFile
from pqcodec.formats.plain import numbers as exact
from pqcodec.formats.plain.documents import tensor_problem
from pqcodec.stream.header import read_header
from pqcodec.stream.source import MemorySource, Source, source_of
from pqcodec.stream.tables import SharedTable, tables_by_name, tables_in, with_tables

COPY_BYTES = 16 << 20  # of a stream that are copied at once


@dataclass(frozen=True)
class Coded:
    """The body of a coded tensor: its streams, which follow each other along the tokens. Raises InvalidArgument."""

    streams: Sequence[Source]
    rel_mse: float | None = None  # squared error over squared norm; None: not measured

    def __post_init__(self) -> None:
        if self.rel_mse is not None and not _is_error(self.rel_mse):
            raise InvalidArgument(f"rel_mse is {self.rel_mse!r:.60}; None or a finite number from 0 is expected")

    @classmethod
    def of(cls, stream: Any, rel_mse: float | None = None) -> Coded:
        """The body of a tensor of one stream: its bytes, or what ``pqcodec.given_tables`` made of them."""
        return cls([source_of(stream)], rel_mse)


@dataclass(frozen=True)
class Piece:
    """A tensor to write. ``body`` is called once, when the tensor is written, and returns a ``Coded`` or the exact tensor."""

    name: str
    coded: bool
    layer: int | None
    role: str
    shape: tuple[int, ...]
    dtype: str
    layout: str
    body: Callable[[], Any]
    parts: int = 1  # streams of a coded tensor
    tables: tuple[SharedTable, ...] = ()  # that its streams may name

    def plain(self) -> Any:
        """The body of an exact tensor; raises InvalidArgument where its shape or dtype is not the piece's."""
        x = self.body()
        if (tuple(x.shape), exact.dtype_name(x)) != (self.shape, self.dtype):
            raise InvalidArgument(f"is {exact.dtype_name(x)} {tuple(x.shape)}, not {self.dtype} {self.shape}")
        return x


def check_pieces(pieces: Sequence[Piece]) -> None:
    """Raises InvalidArgument for a name that occurs twice, or a name, layer or role that no file may hold."""
    seen: set[str] = set()
    for piece in pieces:
        twice = "is given twice; names are unique" if piece.name in seen else ""
        if problem := twice or tensor_problem(piece.name, piece.layer, piece.role):
            raise InvalidArgument(f"tensor {piece.name!r}: {problem}")
        seen.add(piece.name)


def pieces_of(file: TensorFile, check: bool = False) -> list[Piece]:
    """The tensors of an open file as pieces that copy them: streams byte for byte, exact tensors bit for bit.

    ``check``: the body of a coded tensor raises CorruptStream where its streams are damaged, as that of an exact one always
    does; the streams of one tensor are then in memory at once, unless the file is mapped.
    """
    return [_moved(file, file.entry(name), check) for name in file.names]


def _moved(file: TensorFile, entry: Entry, check: bool) -> Piece:
    def streams() -> Coded:
        return Coded([file.stream(entry.name, part, check=check) for part in range(entry.parts)], entry.rel_mse)

    body: Callable[[], Any] = streams if entry.coded else lambda: file.decode(entry.name)
    about = (entry.layer, entry.role, entry.shape, entry.dtype, entry.layout)
    return Piece(entry.name, entry.coded, *about, body, entry.parts, _tables_of(file, entry))


def _tables_of(file: TensorFile, entry: Entry) -> tuple[SharedTable, ...]:
    """The shared tables that the streams of a tensor may name: those of the file, and of given ones those that they name."""
    if not entry.coded:
        return ()
    named = [tables_in(read_header(file.stream(entry.name, part))) for part in range(entry.parts)] if file.given else []
    return tuple({**file.tables, **tables_by_name(table for tables in named for table in tables)}.values())


def encoded_source(tensor: Any, options: Mapping[str, Any]) -> Source:
    """The stream of a tensor by the options of ``pqcodec.encode``, with the shared table that these name; raises as it does."""
    return with_tables(MemorySource(codec.encode(tensor, **options)), tables_by_name(tables_in_options(options)))


def tables_in_options(options: Mapping[str, Any]) -> tuple[SharedTable, ...]:
    """The shared tables among options of ``pqcodec.encode``."""
    return tuple(table for table in options.values() if isinstance(table, SharedTable))


def carried(streams: Sequence[Source], there: Container[str]) -> list[SharedTable]:
    """The shared tables that streams have with them, which the container that holds them has to carry.

    ``there``: names of those that it has. Raises MissingTable where a stream names another one, which is not with it: nobody
    could decode what is in the container.
    """
    headers = [read_header(stream) for stream in streams]
    for name in (part.name.hex() for h in headers for part in h.named.values() if not part.here):
        if name not in there:
            raise MissingTable(
                f"its stream names the shared table {name}, without which nobody could decode the file: give the table, by "
                "--table PATH or tables=[...] to convert, or by given_tables(stream, [table]) with a stream"
            )
    return [table for h in headers for table in tables_in(h)]


def read_in_pieces(source: Source) -> Iterator[memoryview]:
    """All bytes of a source, ``COPY_BYTES`` at a time."""
    for start in range(0, source.size, COPY_BYTES):
        yield source.read(start, min(COPY_BYTES, source.size - start)).data


def rel_mse_of(fields: Mapping[str, Any]) -> float | None:
    """A file's ``rel_mse`` of a tensor, if there is one; raises CorruptStream for anything but a finite number from 0."""
    if "rel_mse" not in fields:
        return None
    value = fields["rel_mse"]
    if not _is_error(value):
        raise CorruptStream(f"rel_mse is {value!r:.60}; a finite number from 0 is expected")
    return float(value)


def _is_error(value: object) -> bool:
    """Whether a value is a relative squared error: a finite number from 0."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= sys.float_info.max
