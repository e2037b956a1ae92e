"""Law: tables that many streams share (SPEC 16.3): their bytes, the names that these have, and streams that are given them."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from operator import index
from typing import Any, ClassVar

import numpy as np

from pqcodec import constants as c
from pqcodec.codings.declared import Codebook, half_bits, half_numbers
from pqcodec.codings.ranges import Ranges, SharedRanges
from pqcodec.codings.vectors import VectorCodebook, Vectors
from pqcodec.errors import CorruptStream, InvalidArgument, UnsupportedStream
from pqcodec.stream.header import Header, read_header
from pqcodec.stream.linear import SharedBasis, half_matrix
from pqcodec.stream.source import Extent, Source

Tables = Mapping[bytes, "SharedTable"]  # by their names


class SharedTable:
    """A table that many streams share, named by the SHA-256 of its bytes. Its kinds are subclasses, such as ``LevelTable``."""

    kind: ClassVar[int]  # its byte in the table
    option: ClassVar[str]  # of ``encode``, which takes it
    field: ClassVar[str]  # of a header, which has what it holds
    most_bytes: ClassVar[int]

    def _body(self) -> tuple[int, bytes]:
        """How many float16 numbers it has, and its bytes behind the fixed part."""
        raise NotImplementedError

    @classmethod
    def _from_body(cls, count: int, body: bytes) -> SharedTable:
        """The table of such bytes; raises InvalidArgument or struct.error."""
        raise NotImplementedError

    @classmethod
    def of_part(cls, part: Any) -> SharedTable | None:
        """The table that a header has a part of, if it is of this kind and here."""
        raise NotImplementedError

    @property
    def part(self) -> Any:
        """What the header of a stream that uses it has in its ``field``."""
        raise NotImplementedError

    @property
    def content(self) -> str:
        """What it holds, in words."""
        raise NotImplementedError

    @cached_property
    def _bytes(self) -> bytes:
        count, body = self._body()
        return c.TABLE_STRUCT.pack(c.TABLE_MAGIC, c.TABLE_VERSION, self.kind, bytes(2), count) + body

    def to_bytes(self) -> bytes:
        """The table as it is carried, and as its name is taken of it."""
        return self._bytes

    @staticmethod
    def from_bytes(data: bytes) -> SharedTable:
        """The table that these bytes are, of any kind; raises CorruptStream or UnsupportedStream."""
        if data[: len(c.TABLE_MAGIC)] != c.TABLE_MAGIC or not c.TABLE_STRUCT.size <= len(data) <= c.MAX_TABLE_BYTES:
            raise CorruptStream(f"{len(data)} bytes that begin with {data[:4]!r} are no shared table")
        _, version, kind, reserved, count = c.TABLE_STRUCT.unpack_from(data)
        if version != c.TABLE_VERSION or kind not in KINDS or any(reserved):
            raise UnsupportedStream(f"shared table of version {version}, kind {kind}: install a newer pqcodec")
        if len(data) > KINDS[kind].most_bytes:
            raise CorruptStream(f"shared table of kind {kind}: {len(data)} bytes; {KINDS[kind].most_bytes} are the most")
        try:
            return KINDS[kind]._from_body(count, data[c.TABLE_STRUCT.size :])
        except (InvalidArgument, struct.error) as error:
            raise CorruptStream(f"shared table: {error}") from None

    @cached_property
    def digest(self) -> bytes:
        """The SHA-256 of its bytes: its name, as streams have it."""
        return hashlib.sha256(self.to_bytes()).digest()

    @property
    def name(self) -> str:
        """The same as 64 hexadecimal digits."""
        return self.digest.hex()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SharedTable) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)


@dataclass(frozen=True, eq=False)
class LevelTable(SharedTable):
    """The levels of scalar coding (SPEC 16) that many streams share: 2, 4, 8 ... or 256 numbers of float16, ascending.

    ``levels``: numbers, rounded to float16. Raises InvalidArgument.

    >>> table = LevelTable((-1, -0.3, 0.3, 1))
    >>> table.name[:16], len(table.to_bytes()), SharedTable.from_bytes(table.to_bytes()) == table
    ('15499e80bf331af6', 20, True)
    """

    levels: tuple[float, ...]

    kind = c.TABLE_LEVELS
    option = "levels"
    field = "codebook"
    most_bytes = c.TABLE_STRUCT.size + (c.LEVEL_BYTES << c.SCALAR_BITS[-1])

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

    def _body(self) -> tuple[int, bytes]:
        return len(self.levels), struct.pack(f"<{len(self.levels)}e", *self.levels)

    @classmethod
    def _from_body(cls, count: int, body: bytes) -> LevelTable:
        return cls(struct.unpack(f"<{count}e", body))

    @classmethod
    def of_part(cls, part: Any) -> LevelTable | None:
        """The table whose levels a header's codebook has."""
        there = isinstance(part, Codebook) and part.name and part.levels
        return cls(half_numbers(part.levels)) if there else None

    @property
    def part(self) -> Codebook:
        """What the header of a stream that uses it has as its codebook."""
        return Codebook(half_bits(list(self.levels)), self.digest)

    @property
    def content(self) -> str:
        """What it holds, in words."""
        return f"{len(self.levels)} levels"


@dataclass(frozen=True, eq=False)
class VectorTable(SharedTable):
    """The codebooks of residual VQ (SPEC 20) that many streams share; ``pqcodec.train_vq`` makes them. Raises InvalidArgument.

    ``entries``: [stages, 2^bits, channels of a group], rounded to float16: 1 .. 8 stages, 16 .. 4096 entries, groups of 8, 16,
    32 or 64 channels. ``channels``: [head_dim], the channels of group 0, then those of group 1, and so on. Up to 4 MiB.

    >>> table = VectorTable(np.zeros((2, 16, 8)), np.arange(24).reshape(8, 3).T.ravel())
    >>> table.content, table.vectors.channels[:8].tolist()
    ('2 codebooks of 16 entries, 3 groups of 8 channels', [0, 3, 6, 9, 12, 15, 18, 21])
    >>> len(table.to_bytes()), SharedTable.from_bytes(table.to_bytes()) == table
    (580, True)
    """

    entries: Any
    channels: Any

    kind = c.TABLE_VECTORS
    option = "codebooks"
    field = "codebook"
    most_bytes = c.MAX_TABLE_BYTES

    def __post_init__(self) -> None:
        try:
            with np.errstate(over="ignore"):
                entries = np.asarray(self.entries).astype(np.float16)
            channels = np.asarray(self.channels)
            if channels.dtype.kind not in "iu" or not channels.size or channels.min() < 0 or channels.max() >= c.MAX_HEAD_DIM:
                raise ValueError(f"channels of {channels.dtype} {channels.shape}")
        except (TypeError, ValueError) as error:
            raise InvalidArgument(f"codebooks: arrays of numbers, and channels 0 .. 1023, are expected ({error})") from None
        vectors = Vectors(entries, channels.astype(np.uint16))
        for name in ("entries", "channels"):
            object.__setattr__(self, name, getattr(vectors, name))
        object.__setattr__(self, "_vectors", vectors)

    @property
    def vectors(self) -> Vectors:
        """The codebooks as kernels take them."""
        return self._vectors  # type: ignore[attr-defined,no-any-return]

    def _body(self) -> tuple[int, bytes]:
        vectors = self.vectors
        stages, _, width = vectors.entries.shape
        fixed = c.VECTORS_STRUCT.pack(stages, vectors.index_bits, width, vectors.head_dim, 0)
        return vectors.entries.size, fixed + vectors.channels.astype("<u2").tobytes() + vectors.entries.astype("<f2").tobytes()

    @classmethod
    def _from_body(cls, count: int, body: bytes) -> VectorTable:
        stages, bits, width, head_dim, reserved = c.VECTORS_STRUCT.unpack_from(body)
        if reserved:
            raise UnsupportedStream("shared table: reserved bytes of its codebooks are not 0: install a newer pqcodec")
        at = c.VECTORS_STRUCT.size + 2 * head_dim
        if bits not in c.RESIDUAL_INDEX_BITS or count != stages * width << bits or len(body) != at + 2 * count:
            announced = f"{count} numbers, {stages} stages, {bits} bits, {width} channels, head_dim {head_dim}"
            raise InvalidArgument(f"{len(body)} bytes do not go with what is announced: {announced}")
        channels = np.frombuffer(body, "<u2", head_dim, c.VECTORS_STRUCT.size)
        return cls(np.frombuffer(body, "<f2", count, at).reshape(stages, 1 << bits, width), channels)

    @classmethod
    def of_part(cls, part: Any) -> VectorTable | None:
        """The table whose entries a header's codebook has."""
        there = isinstance(part, VectorCodebook) and part.vectors
        return cls(there.entries, there.channels) if there else None

    @property
    def part(self) -> VectorCodebook:
        """What the header of a stream that uses it has as its codebook."""
        return VectorCodebook(self.digest, self.vectors)

    @property
    def content(self) -> str:
        """What it holds, in words."""
        stages, count, width = self.entries.shape
        return f"{stages} codebooks of {count} entries, {self.vectors.groups} groups of {width} channels"


@dataclass(frozen=True, eq=False)
class BasisTable(SharedTable):
    """A basis of the linear stage (SPEC 18.3) that many streams share, as LoRC's of a layer's keys. Raises InvalidArgument.

    ``basis``: [rank, numbers], rounded to float16, one direction a row, as functions of ``pqcodec.bases`` find them: 1 .. 1024
    directions among at most 4096 numbers of a vector, heads joined or not; 4 MiB at the most.

    >>> table = BasisTable([[0.5, 0.5, 0.5, 0.5], [0.5, 0.5, -0.5, -0.5]])
    >>> table.content, len(table.to_bytes()), SharedTable.from_bytes(table.to_bytes()) == table
    ('a basis of 2 directions among 4 numbers', 36, True)
    """

    basis: Any

    kind = c.TABLE_BASIS
    option = "basis"
    field = "basis"
    most_bytes = c.TABLE_STRUCT.size + c.BASIS_STRUCT.size + 2 * c.MAX_BASIS_NUMBERS

    def __post_init__(self) -> None:
        matrix = half_matrix("basis", self.basis)
        rank, numbers = matrix.shape
        if not 1 <= rank <= min(numbers, c.MAX_HEAD_DIM) or numbers > c.MAX_JOINED_DIM or matrix.size > c.MAX_BASIS_NUMBERS:
            raise InvalidArgument(
                f"basis {matrix.shape}: 1 .. 1024 directions among no fewer and at most 4096 numbers, {c.MAX_BASIS_NUMBERS} "
                "numbers in all, are possible"
            )
        matrix.flags.writeable = False
        object.__setattr__(self, "basis", matrix)

    def _body(self) -> tuple[int, bytes]:
        return self.basis.size, c.BASIS_STRUCT.pack(*self.basis.shape, 0) + self.basis.astype("<f2").tobytes()

    @classmethod
    def _from_body(cls, count: int, body: bytes) -> BasisTable:
        rank, numbers, reserved = c.BASIS_STRUCT.unpack_from(body)
        if reserved:
            raise UnsupportedStream("shared table: reserved bytes of its basis are not 0: install a newer pqcodec")
        if count != rank * numbers or len(body) != c.BASIS_STRUCT.size + 2 * count:
            raise InvalidArgument(f"{len(body)} bytes are no basis of {rank} directions among {numbers} numbers, {count} told")
        return cls(np.frombuffer(body, "<f2", count, c.BASIS_STRUCT.size).reshape(rank, numbers))

    @classmethod
    def of_part(cls, part: Any) -> BasisTable | None:
        """The table whose basis a header has."""
        return cls(part.matrix) if isinstance(part, SharedBasis) and part.here else None

    @property
    def part(self) -> SharedBasis:
        """What the header of a stream that uses it has as its basis."""
        return SharedBasis(self.digest, self.basis)

    @property
    def content(self) -> str:
        """What it holds, in words."""
        return "a basis of {} directions among {} numbers".format(*self.basis.shape)


@dataclass(frozen=True, eq=False)
class RangeTable(SharedTable):
    """Scales and zeros of scalar coding (SPEC 13.4) that many streams share; ``calibrate.shared_ranges`` makes them.

    ``fields``: [heads, 1 or 2, groups], rounded to float16: of each of 1 .. 1024 heads the scales of all groups of ``channels``
    neighbouring channels of a row of ``width`` numbers, then any zeros. A row has as many groups as cover ``width`` rounded up
    to a multiple of 16. Raises InvalidArgument.

    >>> table = RangeTable(np.ones((2, 2, 32)), width=20, channels=1)
    >>> table.content, len(table.to_bytes()), SharedTable.from_bytes(table.to_bytes()) == table
    ('ranges of 2 heads, rows of 20 numbers, groups of 1 channels', 276, True)
    """

    fields: Any
    width: int
    channels: int

    kind = c.TABLE_RANGES
    option = "ranges"
    field = "shared_ranges"
    most_bytes = c.MAX_TABLE_BYTES

    def __post_init__(self) -> None:
        try:
            with np.errstate(over="ignore"):
                halves = np.asarray(self.fields).astype(np.float16)
            width, channels = index(self.width), index(self.channels)
        except (TypeError, ValueError) as error:
            raise InvalidArgument(f"ranges: numbers [heads, 1 or 2, groups] are expected ({error})") from None
        ranges = Ranges(halves, width, channels)
        object.__setattr__(self, "fields", ranges.halves)
        object.__setattr__(self, "_ranges", ranges)

    @property
    def ranges(self) -> Ranges:
        """The fields as kernels take them."""
        return self._ranges  # type: ignore[attr-defined,no-any-return]

    def _body(self) -> tuple[int, bytes]:
        ranges = self.ranges
        fixed = c.RANGES_STRUCT.pack(ranges.heads, ranges.width, ranges.channels, ranges.fields, 0)
        return ranges.halves.size, fixed + ranges.halves.tobytes()

    @classmethod
    def _from_body(cls, count: int, body: bytes) -> RangeTable:
        heads, width, channels, fields, reserved = c.RANGES_STRUCT.unpack_from(body)
        if reserved or fields not in (c.AFFINE_SCALE, c.AFFINE_SCALE_ZERO):
            raise UnsupportedStream(f"shared table: ranges of fields {fields}, or reserved bytes: install a newer pqcodec")
        groups, rest = divmod(count, heads * fields or 1)
        if rest or not heads or len(body) != c.RANGES_STRUCT.size + 2 * count:
            raise InvalidArgument(f"{len(body)} bytes are no {count} numbers of {fields} fields of {heads} heads")
        halves = np.frombuffer(body, "<f2", count, c.RANGES_STRUCT.size).reshape(heads, fields, groups)
        return cls(halves, width, channels)

    @classmethod
    def of_part(cls, part: Any) -> RangeTable | None:
        """The table whose ranges a header has."""
        there = isinstance(part, SharedRanges) and part.ranges
        return cls(there.halves, there.width, there.channels) if there else None

    @property
    def part(self) -> SharedRanges:
        """What the header of a stream that uses it has as its shared ranges."""
        return SharedRanges(self.digest, self.ranges)

    @property
    def content(self) -> str:
        """What it holds, in words."""
        ranges = self.ranges
        return f"ranges of {ranges.heads} heads, rows of {ranges.width} numbers, groups of {ranges.channels} channels"


KINDS: dict[int, type[SharedTable]] = {table.kind: table for table in (LevelTable, VectorTable, BasisTable, RangeTable)}
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
    """The header with the content of the tables that it names, as far as they are among ``tables``.

    Raises CorruptStream where a table is not such as the header asks for: of another kind, or another shape.
    """
    for field, part in h.named.items():
        table = None if part.here else tables.get(part.name)
        if table is None:
            continue
        try:
            if table.field != field:
                raise InvalidArgument(f"it holds {table.content}, which is no {field}")
            h = replace(h, **{field: table.part})
        except InvalidArgument as error:
            raise CorruptStream(f"shared table {part.name.hex()}: {error}") from None
    return h


def tables_in(h: Header) -> list[SharedTable]:
    """The shared tables whose content a header has; those that it names and that are not here are left out."""
    found = (kind.of_part(part) for part in h.named.values() for kind in KINDS.values())
    return [table for table in found if table is not None]


def with_tables(source: Source, tables: Tables) -> Source:
    """A stream that has the tables which it names, as far as they are among ``tables``; raises as ``read_header`` does."""
    header = read_header(source)
    found = resolved(header, tables)
    if found is header:
        return source
    given = Extent(source, 0, source.size, getattr(source, "seal", None))
    given.header = found
    return given
