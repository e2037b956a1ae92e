"""Law: residual VQ (SPEC 20): the search for the nearest entries, sixteen entries of four vectors at a time, and the decoder.

The search does the float32 operations of ``codings.residual`` in the same order, and so finds the same entries.
"""

from __future__ import annotations

import numpy as np
from numba import carray

from pqcodec.codings.vectors import LANES as ENTRIES
from pqcodec.codings.vectors import Book
from pqcodec.constants import CHECKSUM_BYTES, RESIDUAL_SCALE_BITS
from pqcodec.kernels.cpu.affine_fields import halves_at
from pqcodec.kernels.cpu.bits import bytes_to_rows, checksum, get_field
from pqcodec.kernels.cpu.lane_memory import fence, load, pointer, spread, store, word_at
from pqcodec.kernels.cpu.lanes import LANES, floats, ints, select
from pqcodec.kernels.cpu.numbers import narrow_tile
from pqcodec.kernels.cpu.offsets import add_offset, keep_phases
from pqcodec.kernels.cpu.records import F32, I32, I64, U64, Kind, Output, ResidualBooks, RopeTable, inlined, jit, leaf
from pqcodec.stream.header import Header

_AT_ONCE = 4  # vectors
_FAR = np.float32(np.inf)


# -- encoding ------------------------------------------------------------------------------------------------------
def entries_by_lanes(x: np.ndarray, book: Book) -> np.ndarray:
    """The entry nearest to each of x float32 [n, channels of a group]: int64 [n], as ``codings.residual.nearest_entries``."""
    missing = -len(x) % _AT_ONCE
    padded = np.concatenate([x, np.zeros((missing, x.shape[1]), np.float32)]) if missing else np.ascontiguousarray(x)
    found = np.empty(len(padded), np.int64)
    find_nearest(padded.reshape(-1), x.shape[1], book.by_lanes, book.halves, found)
    return found[: len(x)]


@jit
def find_nearest(x, width, by_lanes, halves, found):
    """Indices of the entries nearest to vectors x [found.size * width], of which there are a multiple of four."""
    scores, places = np.zeros(_AT_ONCE * LANES, np.float32), np.zeros(_AT_ONCE * LANES, np.int32)
    for first in range(0, found.size, _AT_ONCE):
        find_four(x[first * width :], width, by_lanes, halves, scores, places)
        for i in range(_AT_ONCE):
            least, place = _FAR, I32(0)
            for lane in range(LANES):
                score, at = scores[i * LANES + lane], places[i * LANES + lane] + I32(lane)
                if score < least or (score == least and at < place):
                    least, place = score, at
            found[first + i] = place


@leaf
def find_four(x, width, by_lanes, halves, scores, places):
    """Of four vectors the least score in each lane, and the entry that lane 0 was at where it first came."""
    least_a, least_b, least_c, least_d = floats(_FAR), floats(_FAR), floats(_FAR), floats(_FAR)
    at_a, at_b, at_c, at_d = ints(I32(0)), ints(I32(0)), ints(I32(0)), ints(I32(0))
    for entry in range(0, halves.size, ENTRIES):
        low_a, high_a = load(halves, entry), load(halves, entry + LANES)
        low_b, low_c, low_d, high_b, high_c, high_d = low_a, low_a, low_a, high_a, high_a, high_a
        for i in range(width):
            low, high = load(by_lanes, entry * width + i * ENTRIES), load(by_lanes, entry * width + i * ENTRIES + LANES)
            a, b = spread(x, i), spread(x, width + i)
            c, d = spread(x, 2 * width + i), spread(x, 3 * width + i)
            low_a, high_a = low_a - a * low, high_a - a * high
            low_b, high_b = low_b - b * low, high_b - b * high
            low_c, high_c = low_c - c * low, high_c - c * high
            low_d, high_d = low_d - d * low, high_d - d * high
        least_a, at_a = lesser(low_a, high_a, entry, least_a, at_a)
        least_b, at_b = lesser(low_b, high_b, entry, least_b, at_b)
        least_c, at_c = lesser(low_c, high_c, entry, least_c, at_c)
        least_d, at_d = lesser(low_d, high_d, entry, least_d, at_d)
    store(scores, 0, least_a)
    store(scores, LANES, least_b)
    store(scores, 2 * LANES, least_c)
    store(scores, 3 * LANES, least_d)
    store(places, 0, at_a)
    store(places, LANES, at_b)
    store(places, 2 * LANES, at_c)
    store(places, 3 * LANES, at_d)


@inlined
def lesser(low, high, entry, least, at):
    """The least scores with those of sixteen entries more, from ``entry`` on."""
    at = select(low < least, ints(I32(entry)), at)
    least = min(low, least)
    at = select(high < least, ints(I32(entry + LANES)), at)
    return min(high, least), at


# -- decoding ------------------------------------------------------------------------------------------------------
def books_of(h: Header, look_up: bool) -> tuple:
    """A ResidualBooks of a stream; ``look_up``: whether numbers are wanted, and not only checksums. Raises MissingTable."""
    vectors = h.vectors if look_up else None
    scale = np.float32(2.0**h.radius_exponent)
    if vectors is None:
        return tuple(ResidualBooks(1, 1, 1, scale, np.zeros(0, np.int64), np.zeros(0, np.float32)))
    sizes = h.radius_bits, vectors.index_bits, vectors.entries.shape[2]
    return tuple(ResidualBooks(*sizes, scale, vectors.channels.astype(np.int64), vectors.flat))


@jit
def decode_residual_blocks(items, kind, books, output, rope, keys, damaged):
    """Check the blocks of int64 items [n, ITEM], which lie anywhere in memory, and decode their rows where ``output.write``.

    Records come as plain tuples (``records.plain``).
    """
    kind, books, output, rope = Kind(*kind), ResidualBooks(*books), Output(*output), RopeTable(*rope)
    order, row_bytes, pairs = kind.order, kind.row_bytes, rope.frequencies.size
    stride = (row_bytes >> 3) + 2
    tile, short, words = np.zeros(LANES * order, np.float32), np.zeros(LANES, np.uint16), np.zeros(LANES * stride, np.uint64)
    halves, scales = np.zeros(LANES, np.uint16), np.zeros(LANES, np.float32)
    total, places = np.zeros(books.width, np.float32), np.zeros(books.stages, np.int64)
    cos, sin = np.zeros(kind.chunk_tokens * pairs, np.float32), np.zeros(kind.chunk_tokens * pairs, np.float32)
    filled = np.full(2, -1, np.int64)  # of cos and sin, see ``keep_phases``
    like, past = output.like, output.past
    for i in range(items.shape[0]):
        tokens, low, high, source, target, offset_at, token_stride, position, _ = items[i]
        size = tokens * row_bytes
        payload = carray(pointer(source), (size + CHECKSUM_BYTES,), np.uint8)
        damaged[i] = word_at(payload, size) != checksum(payload, 0, size, keys)
        if not output.write or low >= high:
            continue
        keep_phases(position, tokens, 1, rope, cos, sin, filled)
        out = carray(pointer(target + low * token_stride * like.itemsize), ((high - low) * token_stride,), like.dtype)
        for row in range(low, high, LANES):
            rows = min(LANES, high - row)
            bytes_to_rows(payload, row * row_bytes, rows, row_bytes, words, stride)
            for r in range(rows):
                halves[r] = np.uint16(words[r * stride] & U64(0xFFFF))
            store(scales, 0, halves_at(halves, 0))
            decode_rows_of_books(rows, order, books, words, stride, scales, places, total, tile)
            if offset_at:
                offset = carray(pointer(offset_at), (order,), np.float32)
                add_offset(tile, rows, order, offset, rope, cos, sin, row)
            at = (row - low) * token_stride
            narrow_tile(tile, rows, kind.head_dim, order, kind.dtype, output.limit, short, past, out, at, token_stride)
    if past:
        fence()


@leaf
def decode_rows_of_books(rows, order, books, words, stride, scales, places, total, tile):
    """Coordinates of rows of words, times their ``scales``, into a tile, row by row; ``places`` and ``total`` are scratch."""
    width, bits = books.width, U64(books.index_bits)
    for r in range(rows):
        place = U64(RESIDUAL_SCALE_BITS)
        for first in range(0, order, width):
            for stage in range(books.stages):
                index = I64(get_field(words, U64(r * stride), place, bits))
                places[stage] = ((stage << books.index_bits) + index) * width
                place += bits
            for k in range(0, width, LANES):
                number = load(books.entries, places[0] + k)
                for stage in range(1, books.stages):
                    number = number + load(books.entries, places[stage] + k)
                number = number * floats(scales[r]) * floats(books.scale) + floats(F32(0))
                store(total, k, number)
            for k in range(width):
                tile[r * order + books.channels[first + k]] = total[k]
