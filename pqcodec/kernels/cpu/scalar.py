"""Law: scalar coding (SPEC 15, 16): eight numbers of a row at a time, each group's scale and zero once for every channel.

Encoders do the float32 operations of ``codings.scalar`` in the same order, and so write the same bytes.
"""

from __future__ import annotations

from pqcodec.kernels.cpu.affine_fields import as_halves, code_shifts, codes_at, halves_at, put_codes, shorts_of
from pqcodec.kernels.cpu.lane_look_ups import gather, pick
from pqcodec.kernels.cpu.lane_memory import load, spread, store
from pqcodec.kernels.cpu.lanes import LANES, floats, ints, nearest, select, to_float, truncate
from pqcodec.kernels.cpu.outliers import keep_apart
from pqcodec.kernels.cpu.ranges import find_ranges, rows_are_groups
from pqcodec.kernels.cpu.records import F32, I32, I64, inlined, leaf


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


@inlined
def shared_at(groups, lead):
    """Where the fields of a leading index of rows begin in a shared table's."""
    return lead % (groups.shared.size // groups.shared_bytes) * groups.shared_bytes


# -- encoding ------------------------------------------------------------------------------------------------------
@leaf
def encode_by_table(x, rows, lead, kind, groups, bad, work, payload, at, row_bytes, missed):
    """Code all rows of a block, float32 x [order each], by the fields that a shared table has.

    ``missed`` [head_dim each, and lanes], if there are outliers: becomes by how much each number's code misses it.
    """
    order, head_dim = kind.order, kind.head_dim
    shifts, shift = code_shifts(groups.bits, work.places), floats(F32(0 if groups.zeros else 1 << groups.bits >> 1))
    fill_scalars(groups.shared, shared_at(groups, lead), kind, groups, work)
    for row in range(rows):
        for k in range(0, order, LANES):
            number, step, zero = load(x, row * order + k), load(work.step, k), load(work.start, k)
            code = ints(I32(0))
            if not bad[row]:
                code = scalar_codes((number - zero) / divisors(step), lanes_used(step, k, kind, work), groups)
            store(work.codes, k, code)
            if groups.outliers and k < head_dim:
                level = gather(groups.levels, code) if groups.levels.size else to_float(code) - shift
                coded = level * step + zero
                off = max(number - coded, coded - number)
                there = load(work.places, k) < ints(I32(0 if bad[row] else head_dim))
                store(missed, row * head_dim + k, select(there, off, floats(F32(0))))
        put_codes(work.codes, order, groups.bits, shifts, work.places, payload, at + row * row_bytes)


@leaf
def encode_scalars(x, rows, first_row, kind, groups, scale, bad, kept, work, payload, at, row_bytes, fields):
    """Code rows of a block from ``first_row`` on that share groups, or eight rows with groups of their own.

    From float32 x [order each] to payload [at ...] and uint16 ``fields``. Bad rows have zeros, and widen no range. ``kept``:
    how many outliers the block has; returns how many it has then.
    """
    order = kind.order
    count, single = (order + groups.channels - 1) // groups.channels, rows_are_groups(groups)
    shifts = code_shifts(groups.bits, work.places)
    find_ranges(x, rows, kind, groups, scale, bad, work)
    fill_steps_and_zeros(kind, groups, count * LANES if single else count, work)
    put_fields(rows if single else 1, count, order, groups, work, fields)
    if not single:
        for g in range(count - 1, -1, -1):  # downwards, because ranges are spread in their place
            spread_fields(g, order, groups, work.first[g], work.span[g], work)
            spread_range(g, order, groups, work)
        for k in range(0, order, LANES):
            step = load(work.step, k)
            store(work.step, k, divisors(step))
            store(work.used, k, lanes_used(step, k, kind, work))
    for row in range(rows):
        row_at, base, room = at + row * row_bytes, row * order, (first_row + row) * kind.head_dim
        if bad[row]:
            for k in range(0, order, LANES):
                store(work.codes, k, ints(I32(0)))
        elif single:
            for g in range(count):
                own = g * LANES + row
                step, zero = spread(work.first, own), spread(work.span, own)
                low, high = spread(work.low, own), spread(work.high, own)
                divisor = divisors(step)
                for k in range(g * groups.channels, min((g + 1) * groups.channels, order), LANES):
                    number = load(x, base + k) * floats(scale)
                    code = scalar_codes((number - zero) / divisor, lanes_used(step, k, kind, work), groups)
                    store(work.codes, k, code)
                    if groups.outliers and k < kind.head_dim:
                        kept = keep_apart(number, low, high, kind.head_dim - k, room + k, kept, work.apart)
        else:
            for k in range(0, order, LANES):
                number = load(x, base + k) * floats(scale)
                code = scalar_codes((number - load(work.start, k)) / load(work.step, k), load(work.used, k), groups)
                store(work.codes, k, code)
                if groups.outliers and k < kind.head_dim:
                    low, high = load(work.low, k), load(work.high, k)
                    kept = keep_apart(number, low, high, kind.head_dim - k, room + k, kept, work.apart)
        put_codes(work.codes, order, groups.bits, shifts, work.places, payload, row_at)
    return kept


@inlined
def divisors(step):
    """Scales, and 1 where one is 0."""
    return select(step == floats(F32(0)), floats(F32(1)), step)


@inlined
def lanes_used(step, k, kind, work):
    """All bits of int lanes where channel k and the seven behind it have a number and a scale, else none."""
    there = select(load(work.places, k) < ints(I32(kind.head_dim)), ints(I32(-1)), ints(I32(0)))
    return select(step == floats(F32(0)), ints(I32(0)), there)


@inlined
def scalar_codes(place, used, groups):
    """The codes of eight numbers less their zeros and over their scales, int lanes; 0 where they are not ``used``."""
    if groups.levels.size:
        return nearest_level(place, groups) & used
    shift, last = floats(F32(0 if groups.zeros else 1 << groups.bits >> 1)), floats(F32((1 << groups.bits) - 1))
    return truncate(min(max(nearest(place) + shift, floats(F32(0))), last)) & used


@leaf
def nearest_level(place, groups):
    """The levels nearest to numbers in the range of their group, int lanes: how many bounds are below each, by bisection."""
    code = ints(I32(0))
    for first in (1, 2, 4, 8):
        if first >> groups.bits == 0:
            code = _deeper(code, place, pick(groups.bounds, first, code))
    for depth in range(4, groups.bits):
        code = _deeper(code, place, gather(groups.bounds, code + ints(I32(1 << depth))))
    return code


@inlined
def _deeper(code, place, bound):
    """The branch of a bisection that is taken at a node: twice the node's number, and one more beyond its bound."""
    return code + code + select(place > bound, ints(I32(1)), ints(I32(0)))


@leaf
def fill_steps_and_zeros(kind, groups, count, work):
    """Scales and zeros of ``count`` groups from their ranges, as bits of float16 in ``work.shorts`` and as numbers."""
    levels, shift = floats(F32((1 << groups.bits) - 1)), floats(F32(-(1 << groups.bits >> 1)))
    for g in range(0, count, LANES):
        low, high = load(work.low, g), load(work.high, g)
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


@leaf
def put_fields(rows, count, order, groups, work, fields):
    """The fields of ``rows`` rows of groups, of ``count`` groups each; all scales of a row stand before its zeros."""
    apart = LANES if rows_are_groups(groups) else I64(1)
    halves = groups.field_bytes // 2
    for row in range(rows):
        for g in range(count):
            fields[row * halves + g] = work.shorts[g * apart + row]
            if groups.zeros:
                fields[row * halves + count + g] = work.shorts[order + g * apart + row]


@leaf
def spread_range(group, order, groups, work):
    """The range of a group for each of its channels."""
    low, high = work.low[group], work.high[group]
    for k in range(group * groups.channels, min((group + 1) * groups.channels, order)):
        work.low[k], work.high[k] = low, high
