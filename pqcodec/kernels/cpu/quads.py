"""Law: the quads coding (SPEC 8): a block's planes, four coordinates by one look-up, the search for the nearest point."""

from __future__ import annotations

import numpy as np

from pqcodec.constants import (
    QUAD,
    QUADS_BASE_BYTES,
    QUADS_GROUP,
    QUADS_RADII,
    QUADS_RADIUS_BITS,
    QUADS_RADIUS_STEPS,
    QUADS_SIGN_PLACES,
)
from pqcodec.kernels.cpu.lane_look_ups import gather, gather_bytes_at, words_of_rows
from pqcodec.kernels.cpu.lane_memory import load, load_wide, set_long_at, set_word_at, side_by_side, spread_wide, store
from pqcodec.kernels.cpu.lane_signs import signed_sums, sums_and_differences
from pqcodec.kernels.cpu.lanes import (
    LANES,
    as_bits,
    as_float,
    floats,
    fused,
    ints,
    larger,
    parts,
    select,
    to_long,
    truncate,
    where_larger,
    wides,
)
from pqcodec.kernels.cpu.records import F32, I32, I64, inlined, leaf
from pqcodec.kernels.cpu.split import radius_codes

LEAST, MOST = QUADS_RADII
NOTHING = LEAST - 1  # the radius of a zero vector, in steps
_OCTAVE = I32(QUADS_RADIUS_STEPS.bit_length() - 1)  # a shift by it divides by the steps of an octave
_CODE_BITS = 12  # of a radius counted from NOTHING on
_PLACE = QUADS_SIGN_PLACES


# -- decoding ------------------------------------------------------------------------------------------------------
@leaf
def quad_factors(quads, payload, row, rows, tokens, first_factor, second_factor):
    """Look up factors A and B of ``rows`` rows from ``row`` on (SPEC 8.3); lanes behind them are zero vectors."""
    radii = tokens * (quads.sign_bytes + quads.index_bytes)
    base = I64(payload[radii + tokens]) | I64(payload[radii + tokens + 1]) << 8
    base -= (base & 0x8000) << 1
    for l in range(LANES):
        code = I64(payload[radii + row + l]) if l < rows else 0
        k = min(max(base + code - 1, LEAST), MOST) - LEAST
        first_factor[l] = quads.radii[0, k] if code > 0 else F32(0)
        second_factor[l] = quads.radii[1, k]


@leaf
def unpack(quads, order, payload, row, rows, tokens, steps, entries, signs):
    """Indices and signs of ``rows`` rows from ``row`` on, tile by tile: entries [tile, quad, lane], signs [tile, group, lane].

    A sign word has the signs of coordinate e of a group's quad k at bit k + 8 QUADS_SIGN_PLACES[e]. ``steps`` is scratch.
    """
    bits, count = quads.bits, order // QUAD
    groups = (count + QUADS_GROUP - 1) // QUADS_GROUP
    each = 4 if bits <= 8 else 2  # fields that lie in 32 bits, wherever the first begins
    mask = ints(I32((1 << bits) - 1))
    for tile in range((rows + LANES - 1) // LANES):
        last = rows - 1 - tile * LANES
        for l in range(LANES):  # missing rows read the last one
            steps[l] = I32(min(l, last) * quads.sign_bytes)
            steps[LANES + l] = I32(min(l, last) * quads.index_bytes)
        first_row = row + tile * LANES
        at = tile * count * LANES
        start = tokens * quads.sign_bytes + first_row * quads.index_bytes
        for quad in range(0, count, each):
            place = quad * bits
            word = words_of_rows(payload, start + (place >> 3), steps, LANES) >> ints(I32(place & 7))
            for i in range(each):
                store(entries, at + (quad + i) * LANES, word & mask)
                word = word >> ints(I32(bits))
        at = tile * groups * LANES
        start = first_row * quads.sign_bytes
        for group in range(groups):
            word = words_of_rows(payload, start + 4 * group, steps, 0)
            if count - group * QUADS_GROUP < QUADS_GROUP:  # four bits of each coordinate, which become a byte
                word = (word & ints(I32(0xFF)) | word << ints(I32(8))) & ints(I32(0x00FF00FF))
                word = (word | word << ints(I32(4))) & ints(I32(0x0F0F0F0F))
            store(signs, at + group * LANES, word)


@leaf
def decode_quad_rows(quads, order, payload, row, rows, tokens, scratch, as_pairs, x, pairs):
    """Points of rows row .. row + rows - 1, rotated back by the first stages, as ``rotate_begun_back`` takes them.

    ``as_pairs``: in ``pairs``, else in x. ``scratch``: int32 [2 * LANES], [order / 4 * LANES], [groups * LANES] for ``unpack``,
    which comes first: a look-up would wait for each index that was stored just before it.
    """
    steps, entries, signs = scratch
    unpack(quads, order, payload, row, rows, tokens, steps, entries, signs)
    for first in range(0, order // QUAD, 4):
        sign = load(signs, first // QUADS_GROUP * LANES)
        if first % QUADS_GROUP:
            sign = sign >> ints(I32(4))
        a, b = signed_quad(quads.points, entries, first, sign, 7)
        c, d = signed_quad(quads.points, entries, first + 1, sign, 6)
        e, f = signed_quad(quads.points, entries, first + 2, sign, 5)
        g, h = signed_quad(quads.points, entries, first + 3, sign, 4)
        at = first * QUAD * LANES
        if as_pairs:
            a, b, c, d = a + c, b + d, a - c, b - d
            e, f, g, h = e + g, f + h, e - g, f - h
            store(pairs, at, a + e)
            store(pairs, at + 2 * LANES, b + f)
            store(pairs, at + 4 * LANES, c + g)
            store(pairs, at + 6 * LANES, d + h)
            store(pairs, at + 8 * LANES, a - e)
            store(pairs, at + 10 * LANES, b - f)
            store(pairs, at + 12 * LANES, c - g)
            store(pairs, at + 14 * LANES, d - h)
        else:
            store_quad(x, at, a, b)
            store_quad(x, at + 4 * LANES, c, d)
            store_quad(x, at + 8 * LANES, e, f)
            store_quad(x, at + 12 * LANES, g, h)


@inlined
def signed_quad(points, entries, quad, sign, shift):
    """A quad with its signs after the stage that adds coordinates 2 apart: two lanes of pairs."""
    return signed_sums(gather_bytes_at(points, entries, quad * LANES), sign << ints(I32(shift)))


@inlined
def store_quad(x, at, p, q):
    """Store the coordinates of two lanes of pairs after the first stage."""
    a, b = sums_and_differences(p)
    c, d = sums_and_differences(q)
    store(x, at, a)
    store(x, at + LANES, b)
    store(x, at + 2 * LANES, c)
    store(x, at + 3 * LANES, d)


# -- encoding ------------------------------------------------------------------------------------------------------
@leaf
def encode_quad_rows(rows, x, order, exponents, quads, work, payload, out, row, tokens):
    """Rotated rows x, times 2^-exponents, into the planes of signs and indices of the block at payload [out ...].

    The radii stay in ``work.radius``, in steps, until ``finish_quads``.
    """
    energy = squared_norms(x, order)
    store(work.energy, 0, energy)
    own = radius_codes(energy, load(exponents, 0), QUADS_RADIUS_STEPS, _CODE_BITS, quads.energy_scale) + ints(I32(NOTHING))
    own = min(own, ints(I32(MOST)))
    store(work.own, row, own)
    least = floats(F32(0))
    for choice in range(quads.choices.size):
        radius = min(max(own + ints(quads.choices[choice]), ints(I32(LEAST))), ints(I32(MOST)))
        scale = scale_of(radius, load(exponents, 0), quads.inverse)
        error = search(x, order, scale, quads, work.trial if choice else work.codes) / (scale * scale)
        if choice:
            better = error < least
            for k in range(0, order // QUAD * LANES, LANES):
                store(work.codes, k, select(better, load(work.trial, k), load(work.codes, k)))
            radius = select(better, radius, load(work.radius, row))
            least = min(error, least)
        else:
            least = error
        store(work.radius, row, radius)
    store(work.radius, row, select(energy > floats(F32(0)), load(work.radius, row), ints(I32(NOTHING))))
    put_signs(rows, x, order, quads, work, payload, out + row * quads.sign_bytes)
    put_indices(rows, order, quads, work, payload, out + tokens * quads.sign_bytes + row * quads.index_bytes)


@inlined
def squared_norms(x, order):
    """Squared norms of rows x, float lanes, as four sums, so that none waits for the last one's addition."""
    p = wides(F32(0))
    q, r, s = p, p, p
    for k in range(0, order * LANES, 8 * LANES):
        a, b = load_wide(x, k), load_wide(x, k + 2 * LANES)
        c, d = load_wide(x, k + 4 * LANES), load_wide(x, k + 6 * LANES)
        p, q, r, s = fused(a, a, p), fused(b, b, q), fused(c, c, r), fused(d, d, s)
    first, last = parts((p + q) + (r + s))
    return first + last


@inlined
def scale_of(radius, exponent, inverse):
    """What rotated rows are multiplied by so that a table's points lie beside them, float lanes."""
    step = radius & ints(I32(QUADS_RADIUS_STEPS - 1))
    whole = (radius - step - ints(I32(LEAST))) >> ints(_OCTAVE)
    power = ints(I32(127 + LEAST // -QUADS_RADIUS_STEPS)) - whole - exponent
    power = min(max(power, ints(I32(1))), ints(I32(254)))
    return gather(inverse, step) * as_float(power << ints(I32(23)))


@leaf
def search(x, order, scale, quads, codes):
    """Numbers of the nearest points of all quads of x times ``scale``, into codes; returns the squared errors, float lanes.

    Equal coordinates of a representative are multiplied with the sum of their magnitudes. Four quads at a time.
    """
    runs, numbers, listed = quads.runs, quads.numbers, quads.representatives
    error, six = floats(F32(0)), ints(I32(6))
    for quad in range(0, order // QUAD, 4):
        at = quad * QUAD * LANES
        a0, b0, c0, d0, places_0 = sorted_quad(x, at, scale)
        a1, b1, c1, d1, places_1 = sorted_quad(x, at + QUAD * LANES, scale)
        a2, b2, c2, d2, places_2 = sorted_quad(x, at + 2 * QUAD * LANES, scale)
        a3, b3, c3, d3, places_3 = sorted_quad(x, at + 3 * QUAD * LANES, scale)
        a, b, c, d = side_by_side(a0, a1), side_by_side(b0, b1), side_by_side(c0, c1), side_by_side(d0, d1)
        e, f, g, h = side_by_side(a2, a3), side_by_side(b2, b3), side_by_side(c2, c3), side_by_side(d2, d3)
        best = wides(F32(-3e38)), wides(F32(0)), wides(F32(-3e38)), wides(F32(0))
        best = best_of_one(best, a + b + c + d, e + f + g + h, listed, runs[0], runs[1])
        best = best_of_two(best, a + b + c, d, e + f + g, h, listed, runs[1], runs[2])
        best = best_of_two(best, a, b + c + d, e, f + g + h, listed, runs[2], runs[3])
        best = best_of_two(best, a + b, c + d, e + f, g + h, listed, runs[3], runs[4])
        best = best_of_three(best, a + b, c, d, e + f, g, h, listed, runs[4], runs[5])
        best = best_of_three(best, a, b + c, d, e, f + g, h, listed, runs[5], runs[6])
        best = best_of_three(best, a, b, c + d, e, f, g + h, listed, runs[6], runs[7])
        best = best_of_four(best, a, b, c, d, e, f, g, h, listed, runs[7], runs[8])
        first, last = parts((square(a, b, c, d) - best[0] - best[0]) + (square(e, f, g, h) - best[2] - best[2]))
        error = error + (first + last)
        which_0, which_1 = parts(best[1])
        which_2, which_3 = parts(best[3])
        at = quad * LANES
        store(codes, at, gather(numbers, (truncate(which_0) << six) + places_0))
        store(codes, at + LANES, gather(numbers, (truncate(which_1) << six) + places_1))
        store(codes, at + 2 * LANES, gather(numbers, (truncate(which_2) << six) + places_2))
        store(codes, at + 3 * LANES, gather(numbers, (truncate(which_3) << six) + places_3))
    return error


@inlined
def square(a, b, c, d):
    """The sum of their squares."""
    return fused(a, a, fused(b, b, fused(c, c, d * d)))


@inlined
def better_of(best, score, other, number):
    """Best scores of two times two quads, and whose they are, after one more representative's."""
    p, which_p, q, which_q = best
    return (
        larger(score, p),
        where_larger(score, p, number, which_p),
        larger(other, q),
        where_larger(other, q, number, which_q),
    )


@inlined
def best_of_one(best, a, b, listed, first, last):
    """``better_of`` over representatives with one magnitude."""
    for i in range(6 * first, 6 * last, 6):
        x, half = spread_wide(listed, i), spread_wide(listed, i + 4)
        best = better_of(best, fused(a, x, half), fused(b, x, half), spread_wide(listed, i + 5))
    return best


@inlined
def best_of_two(best, a, b, c, d, listed, first, last):
    """The same with two magnitudes."""
    for i in range(6 * first, 6 * last, 6):
        x, y, half = spread_wide(listed, i), spread_wide(listed, i + 1), spread_wide(listed, i + 4)
        score, other = fused(a, x, fused(b, y, half)), fused(c, x, fused(d, y, half))
        best = better_of(best, score, other, spread_wide(listed, i + 5))
    return best


@inlined
def best_of_three(best, a, b, c, d, e, f, listed, first, last):
    """The same with three magnitudes."""
    for i in range(6 * first, 6 * last, 6):
        x, y, z = spread_wide(listed, i), spread_wide(listed, i + 1), spread_wide(listed, i + 2)
        half = spread_wide(listed, i + 4)
        score, other = fused(a, x, fused(b, y, fused(c, z, half))), fused(d, x, fused(e, y, fused(f, z, half)))
        best = better_of(best, score, other, spread_wide(listed, i + 5))
    return best


@inlined
def best_of_four(best, a, b, c, d, e, f, g, h, listed, first, last):
    """The same with four magnitudes."""
    for i in range(6 * first, 6 * last, 6):
        x, y, z, w = spread_wide(listed, i), spread_wide(listed, i + 1), spread_wide(listed, i + 2), spread_wide(listed, i + 3)
        half = spread_wide(listed, i + 4)
        score = fused(a, x, fused(b, y, fused(c, z, fused(d, w, half))))
        other = fused(e, x, fused(f, y, fused(g, z, fused(h, w, half))))
        best = better_of(best, score, other, spread_wide(listed, i + 5))
    return best


@inlined
def sorted_quad(x, at, scale):
    """Four magnitudes times ``scale``, largest first; and the places of the three largest as one number, base 4.

    The two lowest bits of each float tell its place while they are sorted as integers.
    """
    keep = ints(I32(0x7FFFFFFC))
    p = as_bits(load(x, at) * scale) & keep
    q = as_bits(load(x, at + LANES) * scale) & keep | ints(I32(1))
    r = as_bits(load(x, at + 2 * LANES) * scale) & keep | ints(I32(2))
    s = as_bits(load(x, at + 3 * LANES) * scale) & keep | ints(I32(3))
    p, q = max(p, q), min(p, q)
    r, s = max(r, s), min(r, s)
    p, r = max(p, r), min(p, r)
    q, s = max(q, s), min(q, s)
    q, r = max(q, r), min(q, r)
    three = ints(I32(3))
    places = (p & three) | (q & three) << ints(I32(2)) | (r & three) << ints(I32(4))
    return as_float(p), as_float(q), as_float(r), as_float(s), places


@leaf
def put_signs(rows, x, order, quads, work, payload, out):
    """The signs of a tile's rows x, from payload [out] on."""
    count = order // QUAD
    for first in range(0, count, QUADS_GROUP):
        group = min(QUADS_GROUP, count - first)
        word = ints(I32(0))
        for quad in range(group):
            at = (first + quad) * QUAD * LANES
            word = word | (as_bits(load(x, at)) >> ints(I32(31))) << ints(I32(quad + _PLACE[0] * group))
            word = word | (as_bits(load(x, at + LANES)) >> ints(I32(31))) << ints(I32(quad + _PLACE[1] * group))
            word = word | (as_bits(load(x, at + 2 * LANES)) >> ints(I32(31))) << ints(I32(quad + _PLACE[2] * group))
            word = word | (as_bits(load(x, at + 3 * LANES)) >> ints(I32(31))) << ints(I32(quad + _PLACE[3] * group))
        store(work.trial, first // QUADS_GROUP * LANES, word)
    for l in range(rows):
        at = out + l * quads.sign_bytes
        for g in range(count // QUADS_GROUP):
            set_word_at(payload, at + 4 * g, work.trial[g * LANES + l])
        if count % QUADS_GROUP:
            word = work.trial[count // QUADS_GROUP * LANES + l]
            payload[at + quads.sign_bytes - 2] = np.uint8(word & 255)
            payload[at + quads.sign_bytes - 1] = np.uint8((word >> 8) & 255)


@leaf
def put_indices(rows, order, quads, work, payload, out):
    """A tile's ``work.codes``, from payload [out] on.

    Eight bytes are written at a time, up to seven too many: what they overwrite is written later.
    """
    codes, packed, bits = work.codes, work.packed, quads.bits
    count = order // QUAD
    groups = (count + QUADS_GROUP - 1) // QUADS_GROUP
    for g in range(groups):
        low = four_together(codes, g * QUADS_GROUP * LANES, bits)
        rest = low ^ low
        if (g + 1) * QUADS_GROUP <= count:
            high = four_together(codes, (g * QUADS_GROUP + 4) * LANES, bits)
            low = low | high << to_long(ints(I32(4 * bits)))
            rest = (high >> to_long(ints(I32(1)))) >> to_long(ints(I32(63 - 4 * bits)))
        store(packed, 2 * g * LANES, low)
        store(packed, (2 * g + 1) * LANES, rest)
    for l in range(rows):
        at = out + l * quads.index_bytes
        for g in range(groups):
            set_long_at(payload, at + g * bits, packed[2 * g * LANES + l])
            if bits > 8 and (g + 1) * QUADS_GROUP <= count:
                set_long_at(payload, at + g * bits + 8, packed[(2 * g + 1) * LANES + l])


@inlined
def four_together(codes, at, bits):
    """Four quads' codes side by side, long lanes."""
    p, q = to_long(load(codes, at)), to_long(load(codes, at + LANES))
    r, s = to_long(load(codes, at + 2 * LANES)), to_long(load(codes, at + 3 * LANES))
    one = to_long(ints(I32(bits)))
    return p | (q | (r | s << one) << one) << one


@leaf
def finish_quads(tokens, quads, work, payload, out, size):
    """The radii of a block, their base, and zeros up to the checksum; ``size``: the block's without it."""
    radius, own, most, tried = work.radius, work.own, I32(NOTHING), I32(0)
    for t in range(tokens):
        most = max(most, own[t])
    for choice in range(quads.choices.size):
        tried = max(tried, quads.choices[choice])
    base = I64(most) + I64(tried) - (1 << QUADS_RADIUS_BITS) + 2 if most > NOTHING else I64(0)
    at = out + tokens * (quads.sign_bytes + quads.index_bytes)
    for t in range(tokens):
        code = max(I64(radius[t]) - base + 1, 0) if radius[t] > NOTHING else 0
        payload[at + t] = np.uint8(code)
    at += tokens
    payload[at] = np.uint8(base & 255)
    payload[at + 1] = np.uint8((base >> 8) & 255)
    for k in range(at + QUADS_BASE_BYTES, out + size):
        payload[k] = np.uint8(0)
