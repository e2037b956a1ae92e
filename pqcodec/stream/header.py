"""Law: the header of a stream (SPEC 3); a ``Header`` that exists is valid.

The places of what follows it are told by ``places`` (side sections) and ``blocks`` (coded rows), from the header alone: a size
is known before anything is allocated.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

from pqcodec import constants as c
from pqcodec.codings.declared import DECLARED, Affine, Codebook, Sketch, half_numbers
from pqcodec.codings.ranges import Ranges, SharedRanges
from pqcodec.codings.vectors import VectorCodebook, Vectors
from pqcodec.errors import CorruptStream, InvalidArgument, MissingTable, TruncatedStream, UnsupportedStream
from pqcodec.stream import sections
from pqcodec.stream.checksum import checksum
from pqcodec.stream.header_fields import KeepField, possible_codebooks, read_affine, read_codebook, read_keep, read_sketch
from pqcodec.stream.header_ranges import header_problem
from pqcodec.stream.index import Blocks, blocks_of
from pqcodec.stream.linear import LINEAR_NAMES, LinearField, SharedBasis
from pqcodec.stream.magic import FIRST_BYTES, whose
from pqcodec.stream.source import Extent, MemorySource, Source

DTYPE_NAMES = {c.DTYPE_FLOAT16: "float16", c.DTYPE_BFLOAT16: "bfloat16", c.DTYPE_FLOAT32: "float32"}
DTYPE_CODES = {name: code for code, name in DTYPE_NAMES.items()}


def dtype_code(dtype: Any) -> int | None:
    """The code of a dtype, torch's or its name; None of one that streams do not have.

    >>> dtype_code("bfloat16"), dtype_code("int8")
    (2, None)
    """
    return DTYPE_CODES.get(str(dtype).removeprefix("torch."))


@dataclass(frozen=True)
class RopeField:
    """RoPE as the stream carries it (SPEC 9): ``frequencies`` are turns per token times 2^32, one a channel pair."""

    first_position: int
    pairing: int
    frequencies: tuple[int, ...]

    @property
    def channels(self) -> int:
        """Channels of a vector that turn: two a frequency."""
        return 2 * len(self.frequencies)


@dataclass(frozen=True)
class Header:
    """Everything a decoder must know about a tensor [..., tokens, head_dim]."""

    coding: int
    dtype: int
    shape: tuple[int, ...]
    row_bits: int  # bits of one coded vector
    radius_bits: int  # of residual VQ its stages
    seed: int = 0
    chunk_tokens: int = c.DEFAULT_CHUNK_TOKENS
    exact_tokens: int = 0
    exceptions: int = 0
    offsets: bool = False
    offset_exponent: int = 0
    radius_exponent: int = 0
    rope: RopeField | None = None
    numpy: bool = False
    rounds: int = 1  # of the rotation (SPEC 5.3); new streams of split coding have two, those of some codings none
    affine: Affine | None = None  # what groups of numbers share
    exact_last: int = 0
    keep: KeepField | None = None  # with it ``shape`` is that of the kept tokens
    codebook: Codebook | VectorCodebook | None = None  # what codes choose among; None: what the specification has
    before_rope: bool = False  # vectors are coded as they were before ``rope`` turned them
    runs: bool = False  # offsets turn with ``rope`` run by run, in whole numbers
    joined: bool = False  # vectors of all heads, of the dimension before tokens, are coded as one
    linear: LinearField | None = None  # which of their channels, or combinations of these, are coded
    sketch: Sketch | None = None  # how a sign sketch is made
    basis: SharedBasis | None = None  # of a linear stage whose matrix a shared table has
    shared_ranges: SharedRanges | None = None  # of affine fields that a shared table has

    def __post_init__(self) -> None:
        problem = header_problem(self)
        if problem:
            raise InvalidArgument(problem)

    # -- shape ---------------------------------------------------------------------------------------------------
    @property
    def head_dim(self) -> int:
        """Numbers of a vector: the tensor's last dimension."""
        return self.shape[-1]

    @cached_property
    def tokens(self) -> int:
        """The dimension before the last; 1 for a tensor of one dimension."""
        return self.shape[-2] if len(self.shape) > 1 else 1

    @cached_property
    def whole_shape(self) -> tuple[int, ...]:
        """The shape of the tensor that was encoded: ``shape``, or with a keep list that with all tokens."""
        return (*self.shape[:-2], self.keep.tokens, self.head_dim) if self.keep else self.shape

    @cached_property
    def leading(self) -> int:
        """Product of the dimensions before tokens."""
        return math.prod(self.shape[:-2])

    @cached_property
    def heads(self) -> int:
        """Vectors that are coded as one."""
        return self.shape[-3] if self.joined else 1

    @cached_property
    def width(self) -> int:
        """Numbers of a row: of one vector, of those of all heads, or what a linear stage makes of these."""
        return self.linear.width if self.linear else self.heads * self.head_dim

    def leads_of_rows(self, leads: tuple[int, int]) -> tuple[int, int]:
        """The leading indices of the rows that hold vectors of some leading indices: first, last + 1."""
        low = leads[0] // self.heads
        return low, -(-leads[1] // self.heads) if leads[0] < leads[1] else low

    @cached_property
    def order(self) -> int:
        """Coordinates of a row, its width or more (SPEC 5.2, 13.2)."""
        return DECLARED[self.coding].order(self.width)

    @cached_property
    def coded_tokens(self) -> int:
        """Tokens that are coded: all but the exact ones at the beginning and at the end."""
        return self.tokens - self.first_tokens - self.last_tokens

    @cached_property
    def first_tokens(self) -> int:
        """Exact first tokens that the tensor really has."""
        return min(self.exact_tokens, self.tokens)

    @cached_property
    def last_tokens(self) -> int:
        """Exact last tokens that the tensor really has: none that is a first one."""
        return min(self.exact_last, self.tokens - self.first_tokens)

    @cached_property
    def last_start(self) -> int:
        """The token that exact last ones begin with, one behind the last coded one."""
        return self.tokens - self.last_tokens

    @cached_property
    def chunks(self) -> int:
        """Runs of ``chunk_tokens`` coded tokens; the last one may be shorter."""
        return -(-self.coded_tokens // self.chunk_tokens)

    @cached_property
    def inner(self) -> Header | None:
        """The header of the rows that the coding sees where stages make them: float32 [leading, coded tokens, width].

        None where the coding sees the vectors themselves, less their offsets (SPEC 9).
        """
        if not (self.before_rope or self.joined or self.linear):
            return None
        shape = (self.leading // self.heads, self.coded_tokens, self.width)
        return replace(
            self,
            dtype=c.DTYPE_FLOAT32,
            shape=shape,
            exact_tokens=0,
            exact_last=0,
            exceptions=0,
            offsets=False,
            rope=None,
            keep=None,
            before_rope=False,
            runs=False,
            joined=False,
            linear=None,
            basis=None,
        )

    @cached_property
    def kind(self) -> tuple[Any, ...]:
        """Streams of one kind are coded by the same tables, and in one launch."""
        rope = (self.rope.pairing, self.rope.frequencies) if self.rope else None
        rows = (self.row_bits, self.radius_bits, self.radius_exponent, self.rounds, self.affine, self.codebook, self.sketch)
        stages = (self.offsets, rope, self.runs, self.before_rope, self.heads, self.linear, self.basis, self.shared_ranges)
        return (self.coding, self.dtype, self.head_dim, *rows, self.seed, self.chunk_tokens, *stages)

    # -- sizes in bytes ------------------------------------------------------------------------------------------
    @cached_property
    def header_bytes(self) -> int:
        """Size of the header, its checksum included."""
        rope = c.ROPE_STRUCT.size + 4 * len(self.rope.frequencies) if self.rope else 0
        coded = c.AFFINE_STRUCT.size if self.affine else c.SKETCH_STRUCT.size if self.sketch else 0
        keep = (c.KEEP_STRUCT.size if self.keep else 0) + (c.LINEAR_STRUCT.size if self.linear else 0)
        names = sum(len(part.name) for part in (self.basis, self.shared_ranges) if part)
        names += self.codebook.header_bytes if self.codebook else 0
        return c.HEADER_STRUCT.size + 8 * len(self.shape) + coded + keep + rope + names + c.CHECKSUM_BYTES

    @cached_property
    def keep_bitmap(self) -> bool:
        """Whether keep lists are bitmaps of all tokens, which then are smaller than 4 bytes a kept one."""
        return self.keep is not None and -(-self.keep.tokens // 8) < 4 * self.tokens

    @cached_property
    def row_bytes(self) -> int:
        """Size of a coded row."""
        return -(-self.row_bits // 8)

    @cached_property
    def vector_bytes(self) -> int:
        """Size of a vector in the tensor's own dtype."""
        return self.head_dim * c.ITEM_BYTES[self.dtype]

    # -- what shared tables have ---------------------------------------------------------------------------------
    @property
    def named(self) -> dict[str, Codebook | VectorCodebook | SharedBasis | SharedRanges]:
        """What shared tables have of it, whether they are here or not, by the fields that hold it."""
        parts = {"basis": self.basis, "shared_ranges": self.shared_ranges, "codebook": self.codebook}
        return {field: part for field, part in parts.items() if part is not None and part.name}

    @cached_property
    def levels(self) -> tuple[float, ...]:
        """The levels of the codes that a codebook brings; () without one. Raises as ``check_tables`` does."""
        self.check_tables()
        return half_numbers(self.codebook.levels or ()) if isinstance(self.codebook, Codebook) else ()

    @property
    def vectors(self) -> Vectors | None:
        """The codebooks of residual VQ; None of other codings. Raises as ``check_tables`` does."""
        self.check_tables()
        return self.codebook.vectors if isinstance(self.codebook, VectorCodebook) else None

    @property
    def ranges(self) -> Ranges | None:
        """The fields that a shared table has for all tokens; None where blocks have them. Raises as ``check_tables`` does."""
        self.check_tables()
        return self.shared_ranges.ranges if self.shared_ranges else None

    def check_tables(self) -> None:
        """Raises MissingTable where the stream names a shared table that is not here."""
        missing = [part.name.hex() for part in self.named.values() if not part.here]
        if missing:
            raise MissingTable(
                f"the stream needs the shared table {missing[0]}, which is not here; pass it in tables=[...], for a stream in "
                "a file to open_encoded(path, tables=[...])"
            )

    # -- places --------------------------------------------------------------------------------------------------
    @cached_property
    def places(self) -> dict[sections.SideSection, sections.Place]:
        """Where each side section is."""
        return sections.places(self)

    @cached_property
    def payload_start(self) -> int:
        """Where the coded rows begin: behind the last side section."""
        return self.places[sections.SIDE_SECTIONS[-1]].end

    @cached_property
    def checksum_runs(self) -> list[tuple[int, int, int]]:
        """All checksums of the stream, in their order: (where the first of some ends, how many, bytes from one to the next)."""
        short = self.blocks.place(self.chunks - 1, 0) if self.chunks else self.stream_bytes  # the last chunk's may be smaller
        runs = [
            (0, self.header_bytes, self.header_bytes),
            *((place.start, place.end, place.entry_bytes) for place in self.places.values()),
            (self.payload_start, short, self.blocks.size(0)),
            (short, self.stream_bytes, self.blocks.size(self.chunks - 1)),
        ]
        return [(start + size, (end - start) // size, size) for start, end, size in runs if start < end]

    @cached_property
    def blocks(self) -> Blocks:
        """Where the blocks of coded rows are."""
        return blocks_of(self)

    @cached_property
    def stream_bytes(self) -> int:
        """Size of the whole stream, in bytes."""
        return self.blocks.end

    @property
    def bits_per_coordinate(self) -> float:
        """Bits of a coded vector, and of what whole groups share, over its head_dim.

        Headers, offsets and exact tokens are not counted.
        """
        shared = 0.0
        if self.affine:
            ends = 2 * self.affine.groups(self.order) * self.affine.outliers
            shared = (self.affine.bytes_of(self.order) + c.OUTLIER_BYTES * ends) / self.affine.tokens
        elif self.sketch and self.sketch.channels:
            shared = self.sketch.list_bytes(self.head_dim) / self.sketch.tokens
        return 8 * (self.row_bytes + shared) / (self.heads * self.head_dim)

    # -- bytes ---------------------------------------------------------------------------------------------------
    def to_bytes(self) -> bytes:
        """The header as it stands in the stream (SPEC 3.1), with its checksum."""
        flags = c.FLAG_OFFSETS * self.offsets | c.FLAG_NUMPY * self.numpy
        flags |= c.FLAG_JOINED * self.joined | c.FLAG_RUNS * self.runs
        flags |= (c.FLAG_BEFORE_ROPE if self.before_rope else c.FLAG_ROPE) * bool(self.rope)
        flags |= c.FLAG_TWO_ROUNDS * (self.rounds == 2) | c.FLAG_AFFINE * bool(self.affine) | c.FLAG_KEEP * bool(self.keep)
        flags |= c.FLAG_OUTLIERS * bool(self.affine and self.affine.outliers)
        fixed = c.HEADER_STRUCT.pack(
            c.STREAM_MAGIC,
            c.STREAM_VERSION,
            self.coding,
            self.dtype,
            len(self.shape),
            self.header_bytes,
            flags,
            self.radius_bits,
            self.linear.kind if self.linear else c.LINEAR_NONE,
            self.row_bits,
            self.chunk_tokens,
            self.exact_tokens,
            self.exceptions,
            self.seed,
            self.offset_exponent,
            self.radius_exponent,
            (c.CODEBOOK_NAMED if self.codebook.name else c.CODEBOOK_CARRIED) if self.codebook else c.CODEBOOK_CLOSED_FORM,
            c.STATES_NONE,
            self.exact_last,
        )
        body = fixed + struct.pack(f"<{len(self.shape)}Q", *self.shape)
        if self.affine:
            one = self.affine
            place = c.AFFINE_IN_TABLE if one.shared else c.AFFINE_IN_BLOCKS
            numbers = (one.tokens, one.channels, one.fields, place, one.pairing, one.angle_bits)
            body += c.AFFINE_STRUCT.pack(*numbers, one.outliers, bytes(2))
        if self.sketch:
            by = self.sketch
            body += c.SKETCH_STRUCT.pack(by.matrix, by.blocks, by.outlier_blocks, 0, by.channels, 0, by.tokens, 0)
        if self.keep:
            body += c.KEEP_STRUCT.pack(self.keep.tokens, c.KEEP_EACH if self.keep.each else c.KEEP_SHARED, bytes(7))
        if self.linear:
            body += self.linear.to_bytes()
        if self.rope:
            rope = self.rope
            body += c.ROPE_STRUCT.pack(rope.first_position, rope.channels, rope.pairing, bytes(5))
            body += struct.pack(f"<{len(rope.frequencies)}I", *rope.frequencies)
        body += b"".join(part.name for part in (self.basis, self.shared_ranges) if part)
        if self.codebook and self.codebook.name:
            body += self.codebook.name
        elif isinstance(self.codebook, Codebook):
            levels = self.codebook.levels or ()
            body += struct.pack(f"<{len(levels)}H", *levels)
        return body + struct.pack("<I", checksum(body))

    @classmethod
    def from_bytes(cls, data: bytes | memoryview) -> Header:
        """Parse and check the header at the beginning of ``data``; what follows it is not looked at.

        Raises TruncatedStream, CorruptStream or UnsupportedStream.
        """
        size = header_size(data)
        if len(data) < size:
            raise TruncatedStream(f"header: {size} bytes announced, only {len(data)} there; the stream is cut off")
        return _checked(bytes(data[:size]))

    def with_tokens(self, tokens: int) -> Header:
        """The same header for another number of tokens; with a keep list of kept ones."""
        return replace(self, shape=(*self.shape[:-2], tokens, self.shape[-1]))


def header_size(data: bytes | memoryview) -> int:
    """Bytes of the header that begins ``data``, from its fixed part; checks magic and version."""
    magic = bytes(data[: len(c.STREAM_MAGIC)])
    if magic != c.STREAM_MAGIC[: len(magic)]:
        told = whose(bytes(data[:FIRST_BYTES]))
        raise CorruptStream(f"magic is {magic!r}, a pqcodec stream begins with {c.STREAM_MAGIC!r}{told}")
    if len(data) < c.HEADER_STRUCT.size:
        raise TruncatedStream(f"header: {c.HEADER_STRUCT.size} bytes expected, only {len(data)} there; the stream is cut off")
    version, size = data[4], struct.unpack_from("<I", data, 8)[0]
    if version != c.STREAM_VERSION:
        raise UnsupportedStream(f"stream version {version}; this release reads {c.STREAM_VERSION}: install a newer pqcodec")
    smallest = c.HEADER_STRUCT.size + 8 + c.CHECKSUM_BYTES
    if not smallest <= size <= c.MAX_HEADER_BYTES:
        raise CorruptStream(f"header: size {size} is outside {smallest} .. {c.MAX_HEADER_BYTES}")
    return int(size)


def read_header(source: Source) -> Header:
    """The header of a stream whose size is right; allocates nothing that the header asks for.

    A source that can keep the header is not asked for it again.
    Raises TruncatedStream, CorruptStream or UnsupportedStream.
    """
    kept = getattr(source, "header", None)
    if kept is not None:
        return kept  # type: ignore[no-any-return]
    fixed = source.read(0, min(source.size, c.HEADER_STRUCT.size)).tobytes()
    header = Header.from_bytes(source.read(0, min(source.size, header_size(fixed))).tobytes())
    size = header.stream_bytes
    if source.size < size:
        raise TruncatedStream(f"{size} bytes announced, {source.size} there; the stream is cut off")
    if source.size > size:
        raise CorruptStream(f"{source.size - size} bytes behind the end of the stream; pass exactly one stream")
    if isinstance(source, (Extent, MemorySource)):
        source.header = header
    return header


@lru_cache(maxsize=256)  # streams of a file are often of one shape and kind
def _checked(data: bytes) -> Header:
    """Header from its bytes and their checksum."""
    body, stored = data[: -c.CHECKSUM_BYTES], int.from_bytes(data[-c.CHECKSUM_BYTES :], "little")
    if stored != checksum(body):
        raise CorruptStream(f"header: checksum is {checksum(body):#010x}, stored {stored:#010x}; fetch the stream again")
    return _parse(body)


def _parse(body: bytes) -> Header:
    """Header from its checked bytes (without the checksum)."""
    fields = c.HEADER_STRUCT.unpack_from(body)
    _, _, coding, dtype, ndim, size, flags, radius_bits, linear, row_bits, chunk_tokens = fields[:11]
    exact_tokens, exceptions, seed, offset_exponent, radius_exponent, codebook, states, exact_last = fields[11:]
    known = DECLARED.get(coding)
    unknown = {
        "coding": known is None,
        "dtype": dtype not in DTYPE_NAMES,
        "flags": flags & ~c.KNOWN_FLAGS
        or bool(flags & c.FLAG_AFFINE) != bool(known and known.shares_fields)
        or (flags & c.FLAG_OUTLIERS and not (known and known.takes_levels)),
        "linear": linear not in (c.LINEAR_NONE, *LINEAR_NAMES),
        "codebook": known and codebook not in possible_codebooks(known),
        "states": states != c.STATES_NONE,
    }
    if any(unknown.values()):
        names = ", ".join(name for name, bad in unknown.items() if bad)
        raise UnsupportedStream(f"header: {names} hold values that this release does not know: install a newer pqcodec")
    end = c.HEADER_STRUCT.size + 8 * ndim
    rope = affine = keep = levels = stage = sketch = basis = ranges = None
    try:
        shape = struct.unpack_from(f"<{ndim}Q", body, c.HEADER_STRUCT.size)
        turned = c.FLAG_ROPE | c.FLAG_BEFORE_ROPE
        parts = {c.FLAG_AFFINE: c.AFFINE_STRUCT, c.FLAG_KEEP: c.KEEP_STRUCT, turned: c.ROPE_STRUCT}
        behind = (c.LINEAR_STRUCT.size if linear else 0) + (c.SKETCH_STRUCT.size if DECLARED[coding].sketches else 0)
        if len(body) < end + behind + sum(part.size for flag, part in parts.items() if flags & flag):
            raise CorruptStream(f"header: size {size} announced, which is too small for what its flags and coding announce")
        if flags & c.FLAG_AFFINE:
            affine = read_affine(body, end, bool(flags & c.FLAG_OUTLIERS), DECLARED[coding].takes_levels)
            end += c.AFFINE_STRUCT.size
        if DECLARED[coding].sketches:
            sketch = read_sketch(body, end)
            end += c.SKETCH_STRUCT.size
        if flags & c.FLAG_KEEP:
            keep = read_keep(body, end)
            end += c.KEEP_STRUCT.size
        if linear:
            stage = LinearField.from_bytes(linear, body, end)
            end += c.LINEAR_STRUCT.size
        if flags & turned:
            first, channels, pairing, rope_reserved = c.ROPE_STRUCT.unpack_from(body, end)
            if any(rope_reserved):
                raise UnsupportedStream("header: reserved RoPE bytes are not zero: install a newer pqcodec")
            frequencies = struct.unpack_from(f"<{channels // 2}I", body, end + c.ROPE_STRUCT.size)
            rope = RopeField(first, pairing, frequencies)
            end += c.ROPE_STRUCT.size + 4 * len(frequencies)
        if linear == c.LINEAR_SHARED:
            basis = SharedBasis(body[end : end + c.TABLE_NAME_BYTES])
            end += c.TABLE_NAME_BYTES
        if affine and affine.shared:
            ranges = SharedRanges(body[end : end + c.TABLE_NAME_BYTES])
            end += c.TABLE_NAME_BYTES
        if codebook:
            levels = read_codebook(codebook, body[end:], DECLARED[coding].by_vectors)
        if affine and not affine.outliers and flags & c.FLAG_OUTLIERS:
            raise CorruptStream("header: outliers are kept apart, and blocks have room for none")
        if flags & turned == turned:
            raise CorruptStream("header: offsets turn with RoPE, and vectors are coded before RoPE; one of these is possible")
        header = Header(
            coding=coding,
            dtype=dtype,
            shape=shape,
            row_bits=row_bits,
            radius_bits=radius_bits,
            seed=seed,
            chunk_tokens=chunk_tokens,
            exact_tokens=exact_tokens,
            exceptions=exceptions,
            offsets=bool(flags & c.FLAG_OFFSETS),
            offset_exponent=offset_exponent,
            radius_exponent=radius_exponent,
            rope=rope,
            numpy=bool(flags & c.FLAG_NUMPY),
            rounds=2 if flags & c.FLAG_TWO_ROUNDS else min(DECLARED[coding].rounds[0], 1),
            affine=affine,
            exact_last=exact_last,
            keep=keep,
            codebook=levels,
            before_rope=bool(flags & c.FLAG_BEFORE_ROPE),
            runs=bool(flags & c.FLAG_RUNS),
            joined=bool(flags & c.FLAG_JOINED),
            linear=stage,
            sketch=sketch,
            basis=basis,
            shared_ranges=ranges,
        )
    except (struct.error, InvalidArgument) as error:
        raise CorruptStream(f"header: {error}") from None
    if header.header_bytes != size or (rope and rope.channels != channels):
        raise CorruptStream(f"header: size {size} announced, its fields take {header.header_bytes}")
    return header
