"""Law: pair polar coding (SPEC 14): eight pairs of a row at a time; each group of tokens makes a table of its pairs' angles.

Encoders do the float32 operations of ``codings.pairs`` in the same order, and so write the same bytes.
"""

from __future__ import annotations

import numpy as np

from pqcodec.constants import TURN
from pqcodec.kernels.cpu.affine_fields import as_halves, cell_of, code_shifts, codes_at, halves_at, put_codes, shorts_of
from pqcodec.kernels.cpu.lane_look_ups import gather, gather_pair
from pqcodec.kernels.cpu.lane_memory import load, load_short, store, store_short
from pqcodec.kernels.cpu.lanes import LANES, floats, ints, root, select, to_float, truncate
from pqcodec.kernels.cpu.records import F32, I32, inlined, jit, leaf
from pqcodec.kernels.cpu.split import turns_of

_NONE = np.float32(1e9)  # beyond every radius and every angle


# -- decoding ------------------------------------------------------------------------------------------------------
@leaf
def fill_pairs(payload, at, order, groups, phases, work):
    """Take a group's fields from payload [at ...]: radii as numbers, and the cosine and sine of every angle of every pair."""
    pairs, shorts = order // 2, work.shorts
    shorts_of(payload, at, 4 * pairs, shorts)
    for p in range(0, pairs, LANES):
        store(work.start, p, halves_at(shorts, p))
        store(work.step, p, halves_at(shorts, pairs + p))
        first, wide = load_short(shorts, 2 * pairs + p), load_short(shorts, 3 * pairs + p)
        for k in range(1 << groups.angle_bits):
            phase = (first + (wide * ints(I32(2 * k + 1)) >> ints(I32(1)))) & ints(I32(TURN - 1))
            cos_h, sin_h = gather_pair(phases, (phase >> ints(I32(8))) << ints(I32(1)))
            cos_l, sin_l = gather_pair(phases, ((phase & ints(I32(255))) << ints(I32(1))) | ints(I32(512)))
            store(work.cos, k * pairs + p, cos_h * cos_l - sin_h * sin_l)
            store(work.sin, k * pairs + p, sin_h * cos_l + cos_h * sin_l)


@leaf
def decode_pairs_row(payload, at, order, groups, scale, work, tile, base):
    """Coordinates of the row at payload [at ...], times ``scale``, into tile [base ...]."""
    pairs, half, width = order // 2, groups.half, groups.bits + groups.angle_bits
    of_radius, of_angle = ints(I32((1 << groups.bits) - 1)), ints(I32((1 << groups.angle_bits) - 1))
    for p in range(pairs - LANES, -1, -LANES):  # backwards: what is written behind a ragged half is written again
        word = codes_at(payload, at + (p >> 3) * width, work.steps, work.shifts)
        place = (word & of_angle) * ints(I32(pairs)) + load(work.places, p)
        code = to_float((word >> ints(I32(groups.angle_bits))) & of_radius)
        radius = (code + floats(F32(0.5))) * load(work.step, p) + load(work.start, p)
        x = radius * gather(work.cos, place) * floats(scale) + floats(F32(0))
        y = radius * gather(work.sin, place) * floats(scale) + floats(F32(0))
        if groups.interleaved:
            store(work.one, 0, x)
            store(work.other, 0, y)
            for l in range(LANES):
                tile[base + 2 * (p + l)] = work.one[l]
                tile[base + 2 * (p + l) + 1] = work.other[l]
        else:
            store(tile, base + p, x)
            store(tile, base + half + p, y)


# -- encoding ------------------------------------------------------------------------------------------------------
@jit
def encode_pairs(x, rows, order, groups, scale, bad, polar, work, payload, at, row_bytes, fields):
    """Code one group: ``rows`` rows of float32 x [order each], to payload [at ...] and uint16 ``fields``.

    ``polar`` float32 [2, rows * pairs] is scratch: radii, and angles in units. Bad rows have zeros, and widen no range.
    """
    pairs, radii, angles = order // 2, polar[0], polar[1]
    for p in range(0, pairs, LANES):
        most, least = floats(F32(-1)), floats(_NONE)
        far, near = floats(F32(-1)), floats(_NONE)
        for row in range(rows):
            radius, angle = polar_of(x, row * order, p, groups, scale, work)
            store(radii, row * pairs + p, radius)
            store(angles, row * pairs + p, angle)
            if not bad[row]:
                there = radius > floats(F32(0))
                least, most = min(least, radius), max(most, radius)
                near = min(near, select(there, angle, floats(_NONE)))
                far = max(far, select(there, angle, floats(F32(-1))))
        start = as_halves(select(most < floats(F32(0)), floats(F32(0)), least), fields, p)
        span = max(max(most, floats(F32(0))) - start, floats(F32(0))) * floats(F32(1) / F32(1 << groups.bits))
        store(work.start, p, start)
        store(work.step, p, as_halves(span, fields, pairs + p))
        first = select(far < floats(F32(0)), floats(F32(0)), to_float(truncate(near)))
        store(work.first, p, first)
        store(work.span, p, far - first)
    if groups.shortest:
        shortest_arcs(radii, angles, rows, pairs, bad, work)
    for p in range(0, pairs, LANES):
        span = load(work.span, p)
        wide = (truncate(max(span, floats(F32(0)))) + ints(I32(1 << groups.angle_bits))) >> ints(I32(groups.angle_bits))
        wide = select(span < floats(F32(0)), ints(I32(0)), wide)
        store_short(fields, 2 * pairs + p, truncate(load(work.first, p)))
        store_short(fields, 3 * pairs + p, wide)
        store(work.span, p, to_float(wide))
    width = groups.bits + groups.angle_bits
    shifts = code_shifts(width, work.places)
    for row in range(rows):
        for p in range(0, pairs, LANES):
            code = ints(I32(0))
            if not bad[row]:
                radius, ahead = load(radii, row * pairs + p), load(angles, row * pairs + p) - load(work.first, p)
                ahead = select(ahead < floats(F32(0)), ahead + floats(F32(TURN)), ahead)
                code = cell_of(radius - load(work.start, p), load(work.step, p), 1 << groups.bits)
                code = code << ints(I32(groups.angle_bits)) | cell_of(ahead, load(work.span, p), 1 << groups.angle_bits)
            store(work.codes, p, code)
        put_codes(work.codes, pairs, width, shifts, work.places, payload, at + row * row_bytes)


@inlined
def polar_of(x, base, p, groups, scale, work):
    """Radius, and angle in units, of pairs p .. p + 7 of the row x [base ...] times ``scale``, float lanes."""
    if groups.interleaved:
        place = (load(work.places, p) << ints(I32(1))) + ints(I32(base))
        a, b = gather(x, place) * floats(scale), gather(x, place + ints(I32(1))) * floats(scale)
    else:
        there = load(work.places, p) < ints(I32(groups.half))
        a = select(there, load(x, base + p) * floats(scale), floats(F32(0)))
        b = select(there, load(x, base + groups.half + p) * floats(scale), floats(F32(0)))
    angle = turns_of(a, b) * floats(F32(TURN))
    return root(a * a + b * b), select(angle < floats(F32(TURN)), angle, floats(F32(0)))


@jit
def shortest_arcs(radii, angles, rows, pairs, bad, work):
    """Put into ``work.first`` where each pair's shortest arc begins, and into ``work.span`` how long it is.

    The circle has as many bins as there are angles, or more, so the largest gap is between the bins, of which the least and
    the largest angle are enough. Eight pairs have bins of their own, and one more for what has no angle.
    """
    bins = 1
    while bins < rows:
        bins *= 2
    lows, highs = np.zeros((bins + 1) * LANES, np.float32), np.zeros((bins + 1) * LANES, np.float32)
    places = np.zeros(LANES, np.int32)
    for p in range(0, pairs, LANES):
        for k in range(0, lows.size, LANES):
            store(lows, k, floats(_NONE))
            store(highs, k, floats(F32(-1)))
        last = floats(F32(-1))
        for row in range(rows):
            if bad[row]:
                continue
            angle, there = load(angles, row * pairs + p), load(radii, row * pairs + p) > floats(F32(0))
            last = max(last, select(there, angle, floats(F32(-1))))
            place = select(there, truncate(angle * floats(F32(bins) / F32(TURN))), ints(I32(bins)))
            store(places, 0, place * ints(I32(LANES)) + load(work.places, 0))
            for l in range(LANES):
                at, one = places[l], angles[row * pairs + p + l]
                lows[at], highs[at] = min(lows[at], one), max(highs[at], one)
        gap, before, begin, end = floats(F32(-1)), floats(F32(-1)), floats(F32(0)), floats(F32(0))
        for k in range(0, bins * LANES, LANES):
            low, high, opens = load(lows, k), load(highs, k), before < floats(F32(0))
            there = high >= floats(F32(0))
            behind = select(opens, low + floats(F32(TURN)) - last, low - before)
            wider = there & (behind > gap)
            gap, begin = select(wider, behind, gap), select(wider, low, begin)
            end = select(wider, select(opens, last, before), end)
            before = select(there, high, before)
        there, first = last >= floats(F32(0)), to_float(truncate(begin))
        span = end - first
        span = select(span < floats(F32(0)), span + floats(F32(TURN)), span)
        store(work.first, p, select(there, first, load(work.first, p)))
        store(work.span, p, select(there, span, load(work.span, p)))
