"""Law: scalar coding (SPEC 15, 16): eight numbers of a row at a time, each group's scale and zero once for every channel.

Encoders do the float32 operations of ``codings.scalar`` in the same order, and so write the same bytes.
"""

from __future__ import annotations

import numpy as np

from pqcodec.kernels.cpu.affine_fields import as_halves, codes_at, halves_at, put_codes, shorts_of
from pqcodec.kernels.cpu.lane_memory import gather, load, spread, store
from pqcodec.kernels.cpu.lanes import LANES, floats, ints, nearest, select, to_float, truncate
from pqcodec.kernels.cpu.records import F32, I32, jit, leaf

_NONE = np.float32(3e38)  # beyond every number


# -- decoding ------------------------------------------------------------------------------------------------------
@leaf
def fill_scalars(payload, at, kind, groups, work):
    """Take a group's fields from payload [at ...]: a scale and a zero for every channel."""
    count = (kind.order + groups.channels - 1) // groups.channels
    shorts_of(payload, at, count, work.shorts)
    for g in range(0, count, LANES):
        store(work.first, g, halves_at(work.shorts, g))
    if groups.zeros:
        shorts_of(payload, at + 2 * count, count, work.shorts)
        for g in range(0, count, LANES):
            store(work.span, g, halves_at(work.shorts, g))
    for g in range(count):
        spread_fields(g, kind.order, groups, work.first[g], work.span[g] if groups.zeros else F32(0), work)


@leaf
def spread_fields(group, order, groups, step, zero, work):
    """A scale and a zero for every channel of a group."""
    first, last = group * groups.channels, min((group + 1) * groups.channels, order)
    if groups.channels % LANES:
        for k in range(first, last):
            work.step[k], work.start[k] = step, zero
    else:
        for k in range(first, last, LANES):
            store(work.step, k, floats(step))
            store(work.start, k, floats(zero))


@leaf
def decode_scalar_row(payload, at, order, groups, scale, work, tile, base):
    """Coordinates of the row at payload [at ...], times ``scale``, into tile [base ...]."""
    mask, shift = ints(I32((1 << groups.bits) - 1)), floats(F32(0 if groups.zeros else 1 << groups.bits >> 1))
    if groups.levels.size:
        for k in range(0, order, LANES):
            code = codes_at(payload, at + (k >> 3) * groups.bits, work.steps, work.shifts) & mask
            x = gather(groups.levels, code) * load(work.step, k) + load(work.start, k)
            store(tile, base + k, x * floats(scale) + floats(F32(0)))
        return
    for k in range(0, order, LANES):
        code = codes_at(payload, at + (k >> 3) * groups.bits, work.steps, work.shifts) & mask
        x = (to_float(code) - shift) * load(work.step, k) + load(work.start, k)
        store(tile, base + k, x * floats(scale) + floats(F32(0)))


# -- encoding ------------------------------------------------------------------------------------------------------
@jit
def encode_scalars(x, rows, kind, groups, scale, bad, work, payload, at, row_bytes, fields):
    """Code one group of tokens: ``rows`` rows of float32 x [order each], to payload [at ...] and uint16 ``fields``.

    Bad rows have zeros, and widen no range.
    """
    order = kind.order
    for k in range(0, order, LANES):
        least, most = floats(_NONE), floats(-_NONE)
        if groups.outliers:
            least, most = load(work.apart.low, k), load(work.apart.high, k)
        for row in range(0 if groups.outliers else rows):
            if not bad[row]:
                number = load(x, row * order + k) * floats(scale)
                least, most = min(least, number), max(most, number)
        store(work.first, k, least)
        store(work.span, k, most)
    count = (order + groups.channels - 1) // groups.channels
    fill_steps_and_zeros(kind, groups, count, work, fields)
    shift, last = floats(F32(0 if groups.zeros else 1 << groups.bits >> 1)), floats(F32((1 << groups.bits) - 1))
    for row in range(rows):
        for k in range(0, order, LANES):
            code = ints(I32(0))
            if not bad[row]:
                step = load(work.step, k)
                none = step == floats(F32(0))
                there = load(work.places, k) < ints(I32(kind.head_dim))
                number = load(x, row * order + k) * floats(scale) - load(work.start, k)
                place = number / select(none, floats(F32(1)), step)
                if groups.levels.size:
                    found = nearest_level(place, groups)
                    code = select(none, code, select(there, found, code))
                else:
                    place = nearest(place) + shift
                    place = select(there, min(max(place, floats(F32(0))), last), floats(F32(0)))
                    code = select(none, code, truncate(place))
            put_codes(code, groups.bits, work.places, payload, at + row * row_bytes + (k >> 3) * groups.bits)


@leaf
def nearest_level(place, groups):
    """The levels nearest to numbers in the range of their group, int lanes: how many bounds are below each."""
    code = ints(I32(0))
    for j in range(groups.bounds.size):
        code = code + select(place > spread(groups.bounds, j), ints(I32(1)), ints(I32(0)))
    return code


@leaf
def gather_ranges(kind, groups, count, work):
    """Ranges of channels, ``work.first`` .. ``work.span``, become those of their ``count`` groups, in the same places."""
    for g in range(count):
        low, high = _NONE, -_NONE
        first, last = g * groups.channels, min((g + 1) * groups.channels, kind.head_dim)
        if (first | last) % LANES == 0 and first < last:
            least, most = floats(_NONE), floats(-_NONE)
            for k in range(first, last, LANES):
                least, most = min(least, load(work.first, k)), max(most, load(work.span, k))
            store(work.one, 0, least)
            store(work.other, 0, most)
            a, b = work.one, work.other
            low = min(min(min(a[0], a[1]), min(a[2], a[3])), min(min(a[4], a[5]), min(a[6], a[7])))
            high = max(max(max(b[0], b[1]), max(b[2], b[3])), max(max(b[4], b[5]), max(b[6], b[7])))
        else:
            for k in range(first, last):
                low, high = min(low, work.first[k]), max(high, work.span[k])
        work.first[g], work.span[g] = low, high


@leaf
def fill_steps_and_zeros(kind, groups, count, work, fields):
    """Scales and zeros of ``count`` groups of channels from the ranges of channels, as ``fields`` and for every channel."""
    gather_ranges(kind, groups, count, work)
    levels, shift = floats(F32((1 << groups.bits) - 1)), floats(F32(-(1 << groups.bits >> 1)))
    for g in range(0, count, LANES):
        low, high = load(work.first, g), load(work.span, g)
        none = low > high
        low, high = select(none, floats(F32(0)), low), select(none, floats(F32(0)), high)
        if groups.levels.size:
            zero = floats(F32(0))
            if groups.zeros:
                zero = as_halves((low + high) * floats(F32(0.5)) + floats(F32(0)), work.shorts, kind.order + g)
            step = max(high - zero, zero - low)
            store(work.span, g, zero)
        elif groups.zeros:
            zero = as_halves(low + floats(F32(0)), work.shorts, kind.order + g)
            step = max(high - zero, floats(F32(0))) / levels
            store(work.span, g, zero)
        else:  # the number of the largest magnitude is the first level
            step = select(high >= floats(F32(0)) - low, high, low) / shift + floats(F32(0))
            store(work.span, g, floats(F32(0)))
        store(work.first, g, as_halves(step, work.shorts, g))
    for g in range(count):
        fields[g] = work.shorts[g]
        if groups.zeros:
            fields[count + g] = work.shorts[kind.order + g]
    for g in range(count):
        spread_fields(g, kind.order, groups, work.first[g], work.span[g], work)
