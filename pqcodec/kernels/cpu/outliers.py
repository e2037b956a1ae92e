"""Law: single numbers that a block keeps apart (SPEC 16.4): kept as its rows are encoded, put over them as they are decoded.

Encoders choose the numbers of ``codings.outliers``, in the same order.
"""

from __future__ import annotations

import numpy as np

from pqcodec.constants import OUTLIER_BYTES, OUTLIER_COUNT_BYTES, OUTLIER_SEGMENT
from pqcodec.kernels.cpu.affine_fields import as_halves, halves_at, put_shorts
from pqcodec.kernels.cpu.lane_memory import load, store
from pqcodec.kernels.cpu.lanes import LANES, floats, lowest_bit, set_lanes
from pqcodec.kernels.cpu.records import F32, I64, Outliers, inlined, jit, leaf

CURSOR, SEGMENT, END, LAST = range(4)  # of ``Outliers.state``: next record, its segment, where that ends, its largest place


@inlined
def room(tokens, groups):
    """Outliers that a block of so many tokens has room for."""
    return groups.ends * (tokens * groups.outliers // groups.tokens)


@inlined
def segments(tokens, kind):
    """Segments of a block of so many tokens."""
    return (tokens * kind.head_dim + OUTLIER_SEGMENT - 1) // OUTLIER_SEGMENT


@inlined
def outlier_bytes(tokens, kind, groups):
    """Bytes of a block's outliers."""
    return room(tokens, groups) * OUTLIER_BYTES + segments(tokens, kind) * OUTLIER_COUNT_BYTES


@jit
def outliers_of(kind, groups):
    """Scratch of one thread."""
    size = room(kind.chunk_tokens, groups) if groups.outliers else 0
    return Outliers(
        places=np.zeros(size, np.uint16),
        values=np.zeros(size + LANES, np.uint16),
        counts=np.zeros(segments(kind.chunk_tokens, kind), np.int64),
        shorts=np.zeros(LANES, np.uint16),
        one=np.zeros(LANES, np.float32),
        state=np.zeros(4, np.int64),
    )


# -- decoding ------------------------------------------------------------------------------------------------------
@leaf
def place_outliers(payload, at, tokens, first, rows, kind, groups, scale, begin, work, tile):
    """Put a block's outliers, which begin at payload [at], over rows ``first`` .. of a tile; ``begin``: its first ones.

    Of a segment's records one counts whose place is above those of all before it.
    """
    state, count, pieces = work.state, room(tokens, groups), segments(tokens, kind)
    places = at + pieces * OUTLIER_COUNT_BYTES
    values = places + count * 2
    limit, start = (first + rows) * kind.head_dim, first * kind.head_dim
    if begin:
        state[CURSOR], state[SEGMENT], state[LAST] = 0, 0, -1
        state[END] = min(_count_at(payload, at), count)
    while state[SEGMENT] < pieces:
        if state[CURSOR] >= state[END]:
            state[SEGMENT] += 1
            if state[SEGMENT] < pieces:
                state[CURSOR], state[LAST] = state[END], -1
                following = _count_at(payload, at + state[SEGMENT] * OUTLIER_COUNT_BYTES)
                state[END] = min(state[END] + following, count)
            continue
        record = state[CURSOR]
        own = I64(payload[places + 2 * record]) | I64(payload[places + 2 * record + 1]) << 8
        place = state[SEGMENT] * OUTLIER_SEGMENT + own
        if place >= limit:
            return
        if own > state[LAST] and place >= start:
            low, high = np.uint16(payload[values + 2 * record]), np.uint16(payload[values + 2 * record + 1])
            work.shorts[0] = low | high << np.uint16(8)
            store(work.one, 0, halves_at(work.shorts, 0) * floats(scale) + floats(F32(0)))
            row, channel = place // kind.head_dim - first, place % kind.head_dim
            tile[row * kind.order + channel] = work.one[0]
        state[LAST] = max(state[LAST], own)
        state[CURSOR] += 1


@inlined
def _count_at(payload, at):
    """A number of 32 bits at payload [at]."""
    low = I64(payload[at]) | I64(payload[at + 1]) << 8
    return low | I64(payload[at + 2]) << 16 | I64(payload[at + 3]) << 24


# -- encoding ------------------------------------------------------------------------------------------------------
@leaf
def keep_apart(number, low, high, channels, place, count, work):
    """Append to a block's ``count`` outliers those of eight numbers beyond their groups' ranges; returns how many it has then.

    ``channels``: how many of the eight are numbers of a vector; ``place``: the first one's in the block.
    """
    there = set_lanes(number < low) | set_lanes(number > high)
    if not there:
        return count
    there &= (I64(1) << min(channels, I64(LANES))) - 1
    store(work.one, 0, as_halves(number, work.shorts, 0))
    while there:
        lane = lowest_bit(there)
        work.counts[(place + lane) // OUTLIER_SEGMENT] += 1
        work.places[count] = np.uint16((place + lane) % OUTLIER_SEGMENT)
        work.values[count] = work.shorts[lane]
        count += 1
        there &= there - 1
    return count


@jit
def keep_farthest(x, rows, missed, kind, groups, work):
    """Keep those numbers of a block that are ``missed`` [rows * head_dim ...] by the most, of equals the first.

    As many as there is room for, and none that is not missed at all. Returns how many they are.
    """
    numbers = rows * kind.head_dim
    most = min(room(rows, groups), numbers)
    if most == 0:
        return I64(0)
    limit = np.partition(missed[:numbers], numbers - most)[numbers - most]
    equal = most
    for place in range(numbers):
        equal -= missed[place] > limit
    count = I64(0)
    for place in range(numbers):
        if missed[place] < limit or missed[place] == F32(0) or (missed[place] == limit and equal == 0):
            continue
        equal -= missed[place] == limit
        row, channel = place // kind.head_dim, place % kind.head_dim
        as_halves(load(x, row * kind.order + channel // LANES * LANES), work.shorts, 0)
        work.counts[place // OUTLIER_SEGMENT] += 1
        work.places[count] = np.uint16(place % OUTLIER_SEGMENT)
        work.values[count] = work.shorts[channel % LANES]
        count += 1
    return count


@leaf
def put_outliers(tokens, kind, groups, count, work, payload, at):
    """The ``count`` outliers of a block to payload [at ...], and zeros where there is room for more."""
    pieces, most = segments(tokens, kind), room(tokens, groups)
    for segment in range(pieces):
        for byte in range(OUTLIER_COUNT_BYTES):
            payload[at + segment * OUTLIER_COUNT_BYTES + byte] = np.uint8(work.counts[segment] >> 8 * byte & 255)
        work.counts[segment] = 0
    at += pieces * OUTLIER_COUNT_BYTES
    for k in range(count, most):
        work.places[k] = work.values[k] = 0
    put_shorts(work.places, most, payload, at)
    put_shorts(work.values, most, payload, at + 2 * most)
