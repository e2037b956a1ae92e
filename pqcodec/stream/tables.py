"""Law: tables that many streams share (SPEC 16.3): their bytes, the names that these have, and streams that are given them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from pqcodec import constants as c
from pqcodec.codings.declared import Codebook, half_bits, half_numbers
from pqcodec.errors import CorruptStream, InvalidArgument, UnsupportedStream
from pqcodec.stream.header import Header, read_header
from pqcodec.stream.source import Extent, Source

Tables = Mapping[bytes, "SharedTable"]  # by their names


@dataclass(frozen=True)
class SharedTable:
    """The levels of scalar coding (SPEC 16) that many streams share: 2, 4, 8 ... or 256 numbers of float16, ascending.

    ``levels``: numbers, rounded to float16. Raises InvalidArgument.

    >>> table = SharedTable((-1, -0.3, 0.3, 1))
    >>> table.name[:16], len(table.to_bytes()), SharedTable.from_bytes(table.to_bytes()) == table
    ('15499e80bf331af6', 20, True)
    """

    levels: tuple[float, ...]

    def __post_init__(self) -> None:
        try:
            bits = half_bits([float(level) for level in self.levels])
        except (TypeError, ValueError, OverflowError) as error:
            raise InvalidArgument(f"levels {self.levels!r:.60}: numbers within float16 are expected ({error})") from None
        if len(bits) not in _COUNTS:
            raise InvalidArgument(f"{len(bits)} levels: {', '.join(map(str, _COUNTS))} are possible")
        if problem := Codebook(bits).problem(len(bits).bit_length() - 1):
            raise InvalidArgument(problem)
        object.__setattr__(self, "levels", half_numbers(bits))

    def to_bytes(self) -> bytes:
        """The table as it is carried, and as its name is taken of it."""
        bits = half_bits(list(self.levels))
        fixed = c.TABLE_STRUCT.pack(c.TABLE_MAGIC, c.TABLE_VERSION, c.TABLE_LEVELS, bytes(2), len(bits))
        return fixed + b"".join(each.to_bytes(c.LEVEL_BYTES, "little") for each in bits)

    @classmethod
    def from_bytes(cls, data: bytes) -> SharedTable:
        """The table that these bytes are; raises CorruptStream or UnsupportedStream."""
        if data[: len(c.TABLE_MAGIC)] != c.TABLE_MAGIC or not c.TABLE_STRUCT.size <= len(data) <= c.MAX_TABLE_BYTES:
            raise CorruptStream(f"{len(data)} bytes that begin with {data[:4]!r} are no shared table")
        _, version, kind, reserved, count = c.TABLE_STRUCT.unpack_from(data)
        if version != c.TABLE_VERSION or kind != c.TABLE_LEVELS or any(reserved):
            raise UnsupportedStream(f"shared table of version {version}, kind {kind}: install a newer pqcodec")
        if len(data) != c.TABLE_STRUCT.size + c.LEVEL_BYTES * count:
            raise CorruptStream(f"shared table: {len(data)} bytes, {count} numbers are announced")
        numbers = data[c.TABLE_STRUCT.size :]
        try:
            return cls(half_numbers(tuple(numbers[at] | numbers[at + 1] << 8 for at in range(0, len(numbers), 2))))
        except InvalidArgument as error:
            raise CorruptStream(f"shared table: {error}") from None

    @property
    def digest(self) -> bytes:
        """The SHA-256 of its bytes: its name, as streams have it."""
        return hashlib.sha256(self.to_bytes()).digest()

    @property
    def name(self) -> str:
        """The same as 64 hexadecimal digits."""
        return self.digest.hex()

    @property
    def codebook(self) -> Codebook:
        """What the header of a stream that uses it has."""
        return Codebook(half_bits(list(self.levels)), self.digest)


_COUNTS = tuple(1 << bits for bits in c.SCALAR_BITS)


def table_called(name: str, data: bytes) -> SharedTable:
    """The table that these bytes are, which is held under a name; raises CorruptStream or UnsupportedStream."""
    if hashlib.sha256(data).hexdigest() != name:
        raise CorruptStream(f"the bytes that are held as shared table {name:.80} are not those of that name")
    return SharedTable.from_bytes(data)


def tables_by_name(given: Any) -> Tables:
    """Tables by their names: of one SharedTable, of many, or of a mapping whose values they are; raises InvalidArgument."""
    if isinstance(given, Mapping):
        given = given.values()
    many = given if isinstance(given, Iterable) else [given]
    found = list(many)
    if not all(isinstance(table, SharedTable) for table in found):
        raise InvalidArgument(f"tables is a {type(given).__name__}; a SharedTable or a list of them is expected")
    return {table.digest: table for table in found}


def resolved(h: Header, tables: Tables) -> Header:
    """The header with the levels of the table that it names, where that is among ``tables``.

    Raises CorruptStream where the table has another number of levels than codes choose among.
    """
    if h.codebook is None or h.codebook.levels is not None or h.codebook.name not in tables:
        return h
    try:
        return replace(h, codebook=tables[h.codebook.name].codebook)
    except InvalidArgument as error:
        raise CorruptStream(f"shared table {h.codebook.name.hex()}: {error}") from None


def table_in(h: Header) -> SharedTable | None:
    """The shared table whose levels a header has; None where it names none, or one that is not here."""
    codebook = h.codebook
    return SharedTable(half_numbers(codebook.levels)) if codebook and codebook.name and codebook.levels else None


def with_tables(source: Source, tables: Tables) -> Source:
    """A stream that has the table which it names, where that is among ``tables``; raises as ``read_header`` does."""
    header = read_header(source)
    found = resolved(header, tables)
    if found is header:
        return source
    given = Extent(source, 0, source.size, getattr(source, "seal", None))
    given.header = found
    return given
