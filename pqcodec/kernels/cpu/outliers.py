"""Law: single numbers that a block keeps apart (SPEC 16.4): found as a group is encoded, put over its rows as they are decoded.

Encoders choose the numbers of ``codings.outliers``, in the same order.
"""

from __future__ import annotations

import numpy as np

from pqcodec.constants import OUTLIER_BYTES, OUTLIER_COUNT_BYTES, OUTLIER_SEGMENT
from pqcodec.kernels.cpu.affine_fields import as_halves, halves_at, put_shorts
from pqcodec.kernels.cpu.lane_memory import load, store
from pqcodec.kernels.cpu.lanes import LANES, any_lane, floats, ints, select
from pqcodec.kernels.cpu.records import F32, I32, I64, Outliers, inlined, jit, leaf

_NONE = np.float32(3e38)  # beyond every number
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
    deep, none = groups.outliers + 1, groups.outliers == 0
    size, order = 0 if none else room(kind.chunk_tokens, groups), 0 if none else kind.order
    return Outliers(
        low=np.zeros(order, np.float32),
        high=np.zeros(order, np.float32),
        least=np.zeros((order + 1) * deep, np.float32),
        most=np.zeros((order + 1) * deep, np.float32),
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
def insert(value, at, deep, numbers, sign):
    """A number into the ``deep`` largest ones (sign -1: smallest) at [at ...], the nearest ones first, if it is beyond."""
    if value * sign <= numbers[at] * sign:
        return
    k = at
    while k + 1 < at + deep and numbers[k + 1] * sign < value * sign:
        numbers[k] = numbers[k + 1]
        k += 1
    numbers[k] = value


@leaf
def insert_lanes(number, there, at, deep, work):
    """Numbers into the lists of eight lanes of a group, which begin at [at ...], the farthest ones first."""
    most, least = select(there, number, floats(-_NONE)), select(there, number, floats(_NONE))
    for k in range(at, at + deep * LANES, LANES):
        one, other = load(work.most, k), load(work.least, k)
        store(work.most, k, max(one, most))
        store(work.least, k, min(other, least))
        most, least = min(one, most), max(other, least)


@leaf
def merge_lanes(source, at, deep, work):
    """The lists of a group's eight lanes as one at [at ...], the nearest ones first."""
    for k in range(at, at + deep):
        work.least[k], work.most[k] = _NONE, -_NONE
    for k in range(source, source + deep * LANES):
        insert(work.most[k], at, deep, work.most, F32(1))
        insert(work.least[k], at, deep, work.least, F32(-1))


@leaf
def set_range(first, last, low, high, work):
    """The range of the channels first .. last - 1."""
    whole = first + (last - first) // LANES * LANES
    for k in range(first, whole, LANES):
        store(work.low, k, floats(low))
        store(work.high, k, floats(high))
    for k in range(whole, last):
        work.low[k], work.high[k] = low, high


@leaf
def find_ends(x, rows, kind, groups, scale, bad, places, work):
    """``work.low`` and ``work.high`` of every channel: the range of its group of ``rows`` rows without its outliers."""
    order, head_dim, channels = kind.order, kind.head_dim, groups.channels
    deep = rows * groups.outliers // groups.tokens + 1
    finite = 0
    for first in range(0, head_dim, channels):
        for k in range(first * deep, first * deep + deep * (1 if channels % LANES else LANES)):
            work.least[k], work.most[k] = _NONE, -_NONE
    if channels % LANES:
        set_range(0, head_dim, _NONE, -_NONE, work)
    set_range(head_dim, order, -_NONE, _NONE, work)
    for row in range(rows):
        if bad[row]:
            continue
        finite += 1
        for k in range(0, head_dim, LANES):
            number, last = load(x, row * order + k) * floats(scale), min(k + LANES, head_dim)
            if channels % LANES == 0:  # all eight are of one group
                there = load(places, k) < ints(I32(head_dim))
                insert_lanes(number, there, k // channels * channels * deep, deep, work)
            elif channels > 1 or any_lane(number < load(work.low, k)) or any_lane(number > load(work.high, k)):
                for channel in range(k, last):
                    at = channel // channels * channels * deep if channels > 1 else channel * deep
                    insert(x[row * order + channel] * scale, at, deep, work.most, F32(1))
                    insert(x[row * order + channel] * scale, at, deep, work.least, F32(-1))
                    work.low[channel], work.high[channel] = work.least[at], work.most[at]
    for first in range(0, head_dim, channels):
        last = min(first + channels, head_dim)
        few = finite * (last - first) <= 2 * (deep - 1)
        at = first * deep
        if channels % LANES == 0:
            at = order * deep
            merge_lanes(first * deep, at, deep, work)
        at += deep - 1 if few else 0
        set_range(first, last, work.least[at], work.most[at], work)


@leaf
def gather_outliers(x, rows, first_row, kind, scale, bad, count, work):
    """Append a group's numbers beyond ``work.low`` .. ``work.high`` to its block's ``count`` outliers; returns their number."""
    order = kind.order
    for row in range(rows):
        if bad[row]:
            continue
        for k in range(0, order, LANES):
            number = load(x, row * order + k) * floats(scale)
            if not (any_lane(number < load(work.low, k)) or any_lane(number > load(work.high, k))):
                continue
            store(work.one, 0, as_halves(number, work.shorts, 0))
            for channel in range(k, min(k + LANES, kind.head_dim)):
                value = x[row * order + channel] * scale
                if value < work.low[channel] or value > work.high[channel]:
                    place = (first_row + row) * kind.head_dim + channel
                    work.counts[place // OUTLIER_SEGMENT] += 1
                    work.places[count] = np.uint16(place % OUTLIER_SEGMENT)
                    work.values[count] = work.shorts[channel - k]
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
