"""Law: single numbers that a block keeps apart (SPEC 16.4): kept as its rows are encoded, put over them as they are decoded.

Encoders choose the numbers of ``codings.outliers``, in the same order.
"""

from __future__ import annotations

import numpy as np

from pqcodec.constants import OUTLIER_BYTES, OUTLIER_COUNT_BYTES, OUTLIER_SEGMENT
from pqcodec.kernels.cpu.affine_fields import as_halves, halves_at, put_shorts, shorts_of
from pqcodec.kernels.cpu.lane_memory import load, store
from pqcodec.kernels.cpu.lanes import LANES, floats, lowest_bit, set_lanes
from pqcodec.kernels.cpu.records import F32, I64, Outliers, inlined, jit, leaf

CURSOR, COUNT = range(2)  # of ``Outliers.state``: next outlier that is placed, how many there are


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
        targets=np.zeros(size, np.int32),
        numbers=np.zeros(size + LANES, np.float32),
        state=np.zeros(2, np.int64),
    )


# -- decoding ------------------------------------------------------------------------------------------------------
@leaf
def read_outliers(payload, at, tokens, kind, groups, scale, work):
    """Take a block's outliers from payload [at ...]: where they stand among its rows, and numbers, times ``scale``.

    Of a segment's records one counts whose place is above those of all before it.
    """
    count, pieces = room(tokens, groups), segments(tokens, kind)
    places, record, kept = at + pieces * OUTLIER_COUNT_BYTES, I64(0), I64(0)
    shorts_of(payload, places + 2 * count, count, work.values)
    for k in range(0, count, LANES):
        store(work.numbers, k, halves_at(work.values, k) * floats(scale) + floats(F32(0)))
    for segment in range(pieces):
        end, last = min(record + _count_at(payload, at + segment * OUTLIER_COUNT_BYTES), count), I64(-1)
        while record < end:
            own = I64(payload[places + 2 * record]) | I64(payload[places + 2 * record + 1]) << 8
            place = segment * OUTLIER_SEGMENT + own
            if own > last and place < tokens * kind.head_dim:
                if kind.order != kind.head_dim:
                    place += place // kind.head_dim * (kind.order - kind.head_dim)
                work.targets[kept], work.numbers[kept] = place, work.numbers[record]
                kept += 1
            last = max(last, own)
            record += 1
    work.state[CURSOR], work.state[COUNT] = 0, kept


@leaf
def place_outliers(first, rows, order, work, tile):
    """Put the outliers of rows ``first`` .. over these rows in a tile; rows are asked for from the first to the last."""
    k, count, start = work.state[CURSOR], work.state[COUNT], first * order
    while k < count and work.targets[k] < start + rows * order:
        if work.targets[k] >= start:
            tile[work.targets[k] - start] = work.numbers[k]
        k += 1
    work.state[CURSOR] = k


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
