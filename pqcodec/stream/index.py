"""Law: the places of a stream's blocks, asked of one object, and the ranges of tokens and leading indices that are wanted.

A block is the coded rows of one chunk of tokens of one leading index, what their coding keeps beside them, and a checksum of
all that. Rows of a fixed rate have their places by arithmetic alone; a coding whose rows vary in size will read its places from
the stream, in ``blocks_of``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from operator import index
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pqcodec import constants as c
from pqcodec.codings.declared import DECLARED
from pqcodec.errors import InvalidArgument
from pqcodec.stream.source import Range, Source, read_many

if TYPE_CHECKING:
    from pqcodec.stream.header import Header

Bounds = tuple[int, int]  # of tokens, leading indices or chunks: first, last + 1
_RUN_BYTES = 16 << 20  # of blocks that are read at once


class Blocks(NamedTuple):
    """The blocks of a stream whose rows all have the same size; bytes, from the stream's first one on."""

    start: int  # of the payload
    chunks: int
    leading: int
    coded_tokens: int
    chunk_tokens: int
    row_bytes: int
    beside: int  # bytes of a block that are no rows, its checksum among them
    align: int  # a block's size is a multiple
    group_tokens: int = 1  # tokens of a group that shares fields, or a list of channels
    group_bytes: int = 0  # of the fields of the groups of the same tokens, or of the list; 0: there are none
    outliers: int = 0  # for which there is room at each end of a whole group's range
    ends: int = 0  # of the groups of the same tokens
    head_dim: int = 0  # numbers of a row among which outliers are

    def tokens(self, chunk: int) -> int:
        """Coded tokens of each block of a chunk: the last one's may be fewer."""
        return min(self.chunk_tokens, self.coded_tokens - chunk * self.chunk_tokens)

    def size(self, chunk: int) -> int:
        """Bytes of a block, its checksum included."""
        return int(self.size_of(self.tokens(chunk)))

    def size_of(self, tokens: Any) -> Any:
        """Bytes of a block of so many tokens (a number, or numbers of numpy), its checksum included."""
        fields = -(-tokens // self.group_tokens) * self.group_bytes
        if self.outliers:
            fields += c.OUTLIER_BYTES * self.ends * (tokens * self.outliers // self.group_tokens)
            fields += c.OUTLIER_COUNT_BYTES * -(-tokens * self.head_dim // c.OUTLIER_SEGMENT)
        return -(-(tokens * self.row_bytes + fields + self.beside) // self.align) * self.align

    @property
    def chunk_bytes(self) -> int:
        """Bytes of a whole chunk of one leading index."""
        return int(self.size_of(self.chunk_tokens))

    @property
    def end(self) -> int:
        """One behind the last byte of the stream."""
        return self.place(self.chunks - 1, self.leading) if self.chunks else self.start

    def place(self, chunk: int, lead: int) -> int:
        """The first byte of a block."""
        return self.start + chunk * self.leading * self.chunk_bytes + lead * self.size(chunk)

    def span(self, first: tuple[int, int], last: tuple[int, int]) -> Range:
        """(first byte, number of bytes) from one block (chunk, leading index) to another, both included."""
        start = self.place(*first)
        return start, self.place(*last) + self.size(last[0]) - start

    def first_token(self, chunk: int) -> int:
        """The coded token that a chunk begins with."""
        return chunk * self.chunk_tokens

    def of_tokens(self, first: int, last: int) -> tuple[int, int]:
        """Chunks that hold the coded tokens first .. last - 1, where there are such: first chunk, last + 1."""
        first, last = (min(max(token, 0), self.coded_tokens) for token in (first, last))
        low = first // self.chunk_tokens
        return low, -(-last // self.chunk_tokens) if first < last else low

    def groups(self, chunks: tuple[int, int], leads: int) -> Iterator[tuple[int, int]]:
        """Ranges of chunks whose blocks of so many leading indices are read at once."""
        step = max(1, _RUN_BYTES // max(leads * self.chunk_bytes, 1))
        return ((low, min(low + step, chunks[1])) for low in range(chunks[0], chunks[1] if leads else chunks[0], step))

    def runs(self, chunks: tuple[int, int], leads: tuple[int, int]) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
        """Runs of blocks that lie side by side: (chunks, leads), each first and last + 1."""
        whole = leads == (0, self.leading)
        for low, high in self.groups(chunks, leads[1] - leads[0]):
            yield from [((low, high), leads)] if whole else (((chunk, chunk + 1), leads) for chunk in range(low, high))

    def read(self, source: Source, chunks: tuple[int, int], leads: tuple[int, int]) -> np.ndarray:
        """Blocks of some chunks and leading indices, one behind the other, chunk by chunk: uint8 [n]."""
        if leads == (0, self.leading):
            ranges = [self.span((chunks[0], 0), (chunks[1] - 1, leads[1] - 1))]
        else:
            ranges = [self.span((chunk, leads[0]), (chunk, leads[1] - 1)) for chunk in range(*chunks)]
        found = read_many(source, ranges)
        return found[0] if len(found) == 1 else np.concatenate(found)


def blocks_of(h: Header) -> Blocks:
    """The blocks of a stream."""
    coding, leading = DECLARED[h.coding], h.leading // h.heads
    groups: tuple[int, ...] = ()
    if h.affine:
        ends, outliers = h.affine.room(h.order)
        groups = (h.affine.tokens, h.affine.bytes_of(h.order), outliers, ends, h.width)
    elif h.sketch and h.sketch.channels:
        groups = (h.sketch.tokens, h.sketch.list_bytes(h.head_dim))
    sizes = (h.chunk_tokens, h.row_bytes, coding.beside, coding.align)
    return Blocks(h.payload_start, h.chunks, leading, h.coded_tokens, *sizes, *groups)


def stream_parts(counts: Sequence[int], wanted: Bounds) -> Iterator[tuple[int, Bounds, int]]:
    """Streams of so many tokens follow each other: which of them hold wanted ones, their own tokens, and those before them.

    >>> list(stream_parts([5, 3, 4], (4, 9)))
    [(0, (4, 5), 0), (1, (0, 3), 5), (2, (0, 1), 8)]
    """
    before = 0
    for number, count in enumerate(counts):
        low, high = max(wanted[0] - before, 0), min(wanted[1] - before, count)
        if low < high:
            yield number, (low, high), before
        before += count


def checked_range(name: str, wanted: tuple[int, int] | None, count: int) -> tuple[int, int]:
    """``wanted`` or everything; raises InvalidArgument outside 0 .. count."""
    if wanted is None:
        return 0, count
    try:
        first, last = map(index, wanted)
    except (TypeError, ValueError):
        raise InvalidArgument(f"{name} {wanted!r}: two whole numbers are expected, the first and the last + 1") from None
    if not 0 <= first <= last <= count:
        raise InvalidArgument(f"{name} {first} .. {last} is outside 0 .. {count} of the tensor")
    return first, last


def result_shape(h: Header, tokens: tuple[int, int] | None, leading: tuple[int, int] | None) -> tuple[int, ...]:
    """Shape of what ``decode`` gives for these ranges; raises InvalidArgument."""
    first, last = checked_range("tokens", tokens, h.tokens)
    low, high = checked_range("leading", leading, h.leading)
    if leading is not None:
        return (high - low, last - first, h.head_dim)
    return (*h.shape[:-2], last - first, h.head_dim) if len(h.shape) > 1 else h.shape
