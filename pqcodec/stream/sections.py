"""Law: what a stream says of itself: the header that options ask for, the header that bytes hold, and where damage is."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from pqcodec import constants as c
from pqcodec.codings.presets import preset as preset_of
from pqcodec.errors import CorruptStream, InvalidArgument, TruncatedStream
from pqcodec.stages.centre import Rope
from pqcodec.stages.rotation import order_for
from pqcodec.stream.checksum import checksum
from pqcodec.stream.header import Header, header_size
from pqcodec.stream.source import Part, Range, Source, fetched, read_many

_RUN_BYTES = 16 << 20  # of blocks that are read at once


@dataclass(frozen=True)
class StreamInfo:
    """What ``inspect`` tells of a stream; sizes in bytes."""

    version: int
    preset: str | None
    coding: str
    dtype: str
    shape: tuple[int, ...]
    seed: int
    rounds: int  # of the rotation
    centered: str | None
    exact_tokens: int
    exact_vectors: int
    chunk_tokens: int
    order: int
    stream_bytes: int
    header_bytes: int
    side_bytes: int  # offsets, exact tokens and exact vectors
    payload_bytes: int
    tensor_bytes: int

    @property
    def ratio(self) -> float:
        return self.tensor_bytes / self.stream_bytes

    @property
    def bits_per_coordinate(self) -> float:
        """All bytes of the stream over all coordinates of the tensor."""
        return 8 * self.stream_bytes / max(math.prod(self.shape), 1)


@dataclass(frozen=True)
class Damage:
    """A part of a stream whose checksum does not hold; ``leading`` and ``tokens`` are None where all are concerned."""

    part: str  # "offset", "exact tokens", "exact vectors" or "payload"
    leading: int | None
    tokens: tuple[int, int] | None

    def __str__(self) -> str:
        lead = "" if self.leading is None else f", leading index {self.leading}"
        tokens = "" if self.tokens is None else f", tokens {self.tokens[0]} .. {self.tokens[1] - 1}"
        return f"{self.part}{lead}{tokens}"


def make_header(
    shape: tuple[int, ...],
    dtype: int,
    preset: str,
    seed: int,
    center: str | None,
    rope: Rope | None,
    exact_tokens: int,
    chunk_tokens: int,
    numpy: bool,
) -> Header:
    """The header that options of ``encode`` ask for, without what depends on the numbers; raises InvalidArgument."""
    chosen = preset_of(preset)
    if center not in (None, "mean", "rope"):
        raise InvalidArgument(f"center {center!r} is unknown; choose None, 'mean' or 'rope'")
    if (center == "rope") != (rope is not None):
        raise InvalidArgument("center='rope' and rope=Rope(...) go together; give both or neither")
    return Header(
        coding=chosen.coding,
        dtype=dtype,
        shape=shape,
        row_bits=chosen.row_bits(order_for(shape[-1])),
        radius_bits=chosen.radius_bits,
        seed=seed,
        chunk_tokens=chunk_tokens,
        exact_tokens=exact_tokens,
        offsets=center is not None,
        rope=rope.field(shape[-1]) if rope else None,
        numpy=numpy,
        rounds=chosen.rounds,
    )


def read_header(source: Source) -> Header:
    """The header of a stream whose size is right; allocates nothing that the header asks for."""
    kept = getattr(source, "header", None)
    if kept is not None:
        return kept  # type: ignore[no-any-return]
    fixed = source.read(0, min(source.size, c.HEADER_STRUCT.size)).tobytes()
    size = header_size(fixed)
    header = Header.from_bytes(source.read(0, min(source.size, size)).tobytes())
    told = header.stream_bytes
    if source.size < told:
        raise TruncatedStream(f"{told} bytes announced, {source.size} there; the stream is cut off")
    if source.size > told:
        raise CorruptStream(f"{source.size - told} bytes behind the end of the stream; pass exactly one stream")
    if isinstance(source, Part):
        source.header = header
    return header


def checked_range(name: str, wanted: tuple[int, int] | None, count: int) -> tuple[int, int]:
    """``wanted`` or everything; raises InvalidArgument outside 0 .. count."""
    if wanted is None:
        return 0, count
    first, last = wanted
    if not 0 <= first <= last <= count:
        raise InvalidArgument(f"{name} {first} .. {last} is outside 0 .. {count} of the tensor")
    return first, last


def runs_of_blocks(h: Header, first: int, last: int, leads: tuple[int, int]) -> Iterator[tuple[int, int, tuple[int, int]]]:
    """Runs of blocks that lie side by side: (first chunk, last + 1, leading range)."""
    if leads == (0, h.leading):
        step = max(1, _RUN_BYTES // max(h.leading * (h.chunk_tokens * h.row_bytes + c.CHECKSUM_BYTES), 1))
        for low in range(first, last if h.leading else first, step):
            yield low, min(low + step, last), leads
    elif leads[1] > leads[0]:
        for chunk in range(first, last):
            yield chunk, chunk + 1, leads


def groups_of_chunks(h: Header, first: int, last: int, leads: int) -> Iterator[tuple[int, int]]:
    """Ranges of chunks whose blocks of so many leading indices are read at once."""
    step = max(1, _RUN_BYTES // max(leads * (h.chunk_tokens * h.row_bytes + c.CHECKSUM_BYTES), 1))
    return ((low, min(low + step, last)) for low in range(first, last if leads else first, step))


def read_blocks(source: Source, h: Header, low: int, high: int, leads: tuple[int, int]) -> np.ndarray:
    """Blocks of some chunks and leading indices, one behind the other, chunk by chunk: uint8 [n]."""
    if leads == (0, h.leading):
        ranges: list[Range] = [_span(h, low, high - 1, leads)]
    else:
        ranges = [_span(h, chunk, chunk, leads) for chunk in range(low, high)]
    found = read_many(source, ranges)
    return found[0] if len(found) == 1 else np.concatenate(found)


def _span(h: Header, low: int, high: int, leads: tuple[int, int]) -> Range:
    """Bytes from the first leading index's block of a chunk to the end of the last one's of another."""
    start = h.block_start(low, leads[0])
    return start, h.block_start(high, leads[1] - 1) + h.block_bytes(high) - start


def order_seal(source: Source) -> int:
    """The order seal of a stream (SPEC 4.3): the checksum of all its checksums, in the order in which they stand in it."""
    h = read_header(source)
    last = h.leading * h.block_bytes(h.chunks - 1) if h.chunks else 0  # bytes of the last chunk, whose blocks may be shorter
    runs = (  # first byte, last + 1, bytes of a block
        (0, h.header_bytes, h.header_bytes),
        (h.header_bytes, h.exact_start, h.offset_block_bytes),
        (h.exact_start, h.exceptions_start, h.exact_block_bytes),
        (h.exceptions_start, h.payload_start, h.exceptions_bytes),
        (h.payload_start, h.stream_bytes - last, h.block_bytes(0)),
        (h.stream_bytes - last, h.stream_bytes, h.block_bytes(h.chunks - 1)),
    )
    blocks = [source.read(start, end - start).reshape(-1, size) for start, end, size in runs if start < end]
    return checksum(np.concatenate([rows[:, -c.CHECKSUM_BYTES :] for rows in blocks]))


def with_seal(source: Source) -> tuple[Source, int]:
    """A stream and its order seal: that which its container told, or else that of its bytes, which are read for it."""
    told = getattr(source, "seal", None)
    if told is not None:
        return source, told
    held = fetched(source)
    return held, order_seal(held)


def order_problem(source: Source) -> str:
    """What is wrong with the order of a stream whose container tells its seal, or an empty string."""
    told = getattr(source, "seal", None)
    if told is None or order_seal(source) == told:
        return ""
    return "is not the stream that was written here, or its blocks are in another order (the order seal does not hold)"


def result_shape(h: Header, tokens: tuple[int, int] | None, leading: tuple[int, int] | None) -> tuple[int, ...]:
    """Shape of what ``decode`` gives for these ranges; raises InvalidArgument."""
    first, last = checked_range("tokens", tokens, h.tokens)
    low, high = checked_range("leading", leading, h.leading)
    if leading is not None:
        return (high - low, last - first, h.head_dim)
    return (*h.shape[:-2], last - first, h.head_dim) if len(h.shape) > 1 else h.shape


def damage_error(damage: list[Damage]) -> CorruptStream:
    more = f" and {len(damage) - 1} more places" if damage[1:] else ""
    return CorruptStream(f"checksum does not hold: {damage[0]}{more}")


def coded_rows(h: Header, vectors: Any) -> np.ndarray:
    """The rows of vectors that are kept exact beside the first tokens, given as pairs (leading index, token); ascending."""
    pairs = np.asarray(vectors, np.int64).reshape(-1, 2)
    if ((pairs < 0) | (pairs >= (h.leading, h.tokens))).any():
        raise InvalidArgument(f"exact vectors are outside of {h.leading} leading indices and {h.tokens} tokens")
    pairs = pairs[pairs[:, 1] >= h.first_tokens]
    return np.unique(pairs[:, 0] * h.coded_tokens + pairs[:, 1] - h.first_tokens)


def exceptions_section(rows: np.ndarray, vectors: np.ndarray) -> bytes:
    """Exact vectors (SPEC 3.2): rows [n] ascending (lead times coded tokens plus coded token), vectors [n, head_dim] stored."""
    body = b"".join(int(row).to_bytes(8, "little") + vector.tobytes() for row, vector in zip(rows, vectors, strict=True))
    return body + checksum(body).to_bytes(c.CHECKSUM_BYTES, "little")


def read_exceptions(source: Source, h: Header, damage: list[Damage]) -> tuple[np.ndarray, np.ndarray] | None:
    """Rows int64 [n] and vectors uint8 [n, vector_bytes], or None after noting the damage; raises CorruptStream."""
    raw = source.read(h.exceptions_start, h.exceptions_bytes)
    body = np.ascontiguousarray(raw[: -c.CHECKSUM_BYTES])
    if checksum(body) != int.from_bytes(raw[-c.CHECKSUM_BYTES :].tobytes(), "little"):
        damage.append(Damage("exact vectors", None, None))
        return None
    records = body.reshape(h.exceptions, 8 + h.vector_bytes)
    rows = np.ascontiguousarray(records[:, :8]).view("<u8").ravel()
    if (rows[1:] <= rows[:-1]).any() or int(rows[-1]) >= h.leading * h.coded_tokens:
        raise CorruptStream("exact vectors are not in ascending order inside the tensor")
    return rows.astype(np.int64), np.ascontiguousarray(records[:, 8:])


def paper_exponent(largest: float, order: int) -> int:
    """Power of two that brings the paper coding's radii into float16's range; 0 where they are there already."""
    norm = largest * math.sqrt(order)
    if norm == 0 or 2.0**-4 <= norm < 2.0**15:
        return 0
    low, high = c.RADIUS_EXPONENTS
    return min(max(math.frexp(norm)[1] - 15, low), high)
