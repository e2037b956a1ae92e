"""Law: the rotation (SPEC 5): both rounds' Hadamard stages over a tile of eight vectors, [coordinate, lane].

A stage replaces two coordinates by their sum and their difference. Stages are done two or three at a time, to read and write a
tile less often.
"""

from __future__ import annotations

from pqcodec.kernels.cpu.lane_memory import load, load_wide, side_by_side, store
from pqcodec.kernels.cpu.lane_rows import (
    narrow_three,
    narrow_two,
    transpose_back_three,
    transpose_back_two,
    transpose_three,
    transpose_two,
)
from pqcodec.kernels.cpu.lane_signs import signed
from pqcodec.kernels.cpu.lanes import LANES, any_lane, floats, select, to_float
from pqcodec.kernels.cpu.records import F32, SUMS, inlined, leaf


@leaf
def rotate(tile, x, other, sums, order, row_scale, rotation):
    """Scale the rows of a row-major tile and rotate them, into x or ``other`` (``lies_in_other``), coordinate-major."""
    inner = order // max(rotation.base.shape[0], 1)
    for k in range(0, order, LANES):
        if inner == 4:
            transpose_two(tile, k, order, load(rotation.signs, k), row_scale, x, k * LANES)
        else:
            transpose_three(tile, k, order, load(rotation.signs, k), row_scale, x, k * LANES)
    rounds_but_first_stages(x, other, sums, order, inner, 8, rotation)
    if rotation.places.size > 0:
        first_stages(x if rotation.base.size > 0 else other, order, inner)


@leaf
def rotate_back(x, other, sums, order, rotation):
    """Rotate coordinate-major x back, but for what ``transpose_back`` or ``narrow_back`` does."""
    inner = order // max(rotation.base.shape[0], 1)
    if rotation.places.size > 0:
        first_stages(x, order, inner)
    rounds_but_first_stages(x, other, sums, order, inner, 8, rotation)


@leaf
def rotate_begun_back(x, pairs, other, whole, sums, order, rotation):
    """``rotate_back`` where the first stages are done: two of them in x, or the second to fourth in int16 ``pairs``.

    Where int16 hold the sums of the first round, a lane of ``pairs`` [order / 2, LANES, 2] is a coordinate and the next one,
    whose sum and difference the second round begins with. Then the result is integers, in int32 ``whole``: ``other``'s memory.
    """
    inner = order // max(rotation.base.shape[0], 1)
    if rotation.pair_places.size > 0:
        later_stages(pairs, order // 2, order // 2, 8, 2 * LANES)
        second_round(pairs, whole, order, rotation.pair_places, rotation.pair_signs)
    else:
        rounds_but_first_stages(x, other, sums, order, inner, 4, rotation)


@leaf
def transpose_back(x, other, whole, as_pairs, order, first, second, rotation, tile):
    """The last round's first stages, into a row-major tile of sum * first * second + 0, with each coordinate's sign.

    The sums are exact in whatever order they are added up: whole numbers below 2^24. Adding 0 turns -0 into 0. ``first`` and
    ``second`` are each row's factors. ``as_pairs``: whether the sums are integers, in ``whole`` (``rotate_begun_back``).
    """
    inner = order // max(rotation.base.shape[0], 1)
    v = other if lies_in_other(rotation) else x
    if as_pairs:
        for k in range(0, order * LANES, LANES):
            store(other, k, to_float(load(whole, k)))
    for k in range(0, order, LANES):
        if inner == 4:
            transpose_back_two(v, k * LANES, load(rotation.signs, k), first, second, tile, k, order)
        else:
            transpose_back_three(v, k * LANES, load(rotation.signs, k), first, second, tile, k, order)


@leaf
def narrow_back(x, other, whole, as_pairs, order, first, rotation, turning, tile, shorts, brain):
    """``transpose_back`` of rows whose numbers ``are_small``, with their offsets, as 16-bit numbers: shorts [lanes, order].

    ``turning`` and ``tile`` are as in ``narrow_three``; ``brain``: as bfloat16.
    """
    inner = order // max(rotation.base.shape[0], 1)
    v = other if lies_in_other(rotation) else x
    for k in range(0, order, LANES):
        if as_pairs:
            narrow_three(whole, k, rotation.flips, first, turning, tile, shorts, order, brain)
        elif inner == 4:
            narrow_two(v, k, rotation.flips, first, turning, tile, shorts, order, brain)
        else:
            narrow_three(v, k, rotation.flips, first, turning, tile, shorts, order, brain)


@inlined
def are_small(first, second, limit):
    """Whether no number of these rows can reach the limit, for no sum reaches 2^22, and all second factors are 1."""
    within = load(first, 0) <= floats(limit * F32(2.0**-22))
    return not any_lane(select(within, load(second, 0), floats(F32(0))) < floats(F32(1)))


@inlined
def lies_in_other(rotation):
    """Whether the stages leave their result in ``other``, not in x."""
    return (rotation.base.size > 0) != (rotation.places.size > 0)


@leaf
def rounds_but_first_stages(x, other, sums, order, inner, half, rotation):
    """All stages but the first round's up to the one that adds coordinates ``half`` apart, and the last round's first three."""
    base, places, signs = rotation.base, rotation.places, rotation.between
    later_stages(x, order, inner, half, LANES)
    if base.size > 0:
        base_stage(x, other, sums, inner, base, places[:0], signs)
        if places.size > 0:
            base_stage(other, x, sums, inner, base, places, signs)
            later_stages(x, order, inner, 8, LANES)
    elif places.size > 0:
        second_round(x, other, order, places, signs)


@leaf
def second_round(x, out, order, places, signs):
    """The second round's stages from the fourth on, into ``out``, of x permuted and with signs; ``order`` is a power of 2."""
    if order < 64:
        for k in range(order):
            store(out, k * LANES, signed(x, places, signs, k))
        later_stages(out, order, order, 8, LANES)
    elif order == 64:
        three_stages_between(x, out, places, signs)
    else:
        four_stages_between(x, out, order, places, signs)
        later_stages(out, order, order, 128, LANES)


@leaf
def first_stages(x, order, inner):
    """The first three stages of a round in one pass over the tile; two where ``inner`` is 4."""
    if inner == 4:
        for i in range(0, order * LANES, 4 * LANES):
            a, c = neighbours(x, i), neighbours(x, i + 2 * LANES)
            store(x, i, a + c)
            store(x, i + 2 * LANES, a - c)
        return
    for i in range(0, order * LANES, 8 * LANES):
        a, c = neighbours(x, i), neighbours(x, i + 2 * LANES)
        d, e = neighbours(x, i + 4 * LANES), neighbours(x, i + 6 * LANES)
        p, q, r, s = sums_of_four(a, c, d, e)
        store(x, i, p)
        store(x, i + 2 * LANES, q)
        store(x, i + 4 * LANES, r)
        store(x, i + 6 * LANES, s)


@leaf
def three_stages_between(x, out, places, signs):
    """The fourth to sixth stage of the second round of order 64, into ``out``, of x permuted and with signs."""
    j = 8 * LANES
    for k in range(8):
        a, c, d, e = four_signed(x, places, signs, k)
        p, q, r, s = four_signed(x, places, signs, k + 32)
        i = k * LANES
        store(out, i, a + p)
        store(out, i + j, c + q)
        store(out, i + 2 * j, d + r)
        store(out, i + 3 * j, e + s)
        store(out, i + 4 * j, a - p)
        store(out, i + 5 * j, c - q)
        store(out, i + 6 * j, d - r)
        store(out, i + 7 * j, e - s)


@leaf
def four_stages_between(x, out, order, places, signs):
    """The fourth to seventh stage of the second round, into ``out``, of x permuted and with signs."""
    for first in range(0, order, 128):
        for k in range(first, first + 8):
            a, c, d, e = four_signed(x, places, signs, k)
            f, g, h, l = four_signed(x, places, signs, k + 32)
            p, q, r, s = four_signed(x, places, signs, k + 64)
            t, u, v, w = four_signed(x, places, signs, k + 96)
            store_sums(out, k * LANES, a, f, p, t)
            store_sums(out, (k + 8) * LANES, c, g, q, u)
            store_sums(out, (k + 16) * LANES, d, h, r, v)
            store_sums(out, (k + 24) * LANES, e, l, s, w)


@leaf
def later_stages(x, order, inner, half, each):
    """The stages that add coordinates ``half``, 2 * ``half`` ... apart, up to those ``inner`` / 2 apart.

    ``each``: numbers of x a coordinate; of ``pairs``, which are coordinates here, twice as many.
    """
    while half < inner:
        j = half * each
        if 4 * half < inner:
            for first in range(0, order, 8 * half):
                for i in range(first * each, (first + half) * each, 2 * each):
                    a, c, d, e = four_wide(x, i, j)
                    k = i + 4 * j
                    p, q, r, s = four_wide(x, k, j)
                    store(x, i, a + p)
                    store(x, i + j, c + q)
                    store(x, i + 2 * j, d + r)
                    store(x, i + 3 * j, e + s)
                    store(x, k, a - p)
                    store(x, k + j, c - q)
                    store(x, k + 2 * j, d - r)
                    store(x, k + 3 * j, e - s)
            half *= 8
        elif 2 * half < inner:
            for first in range(0, order, 4 * half):
                for i in range(first * each, (first + half) * each, 2 * each):
                    p, q, r, s = four_wide(x, i, j)
                    store(x, i, p)
                    store(x, i + j, q)
                    store(x, i + 2 * j, r)
                    store(x, i + 3 * j, s)
            half *= 4
        else:
            for first in range(0, order, 2 * half):
                for i in range(first * each, (first + half) * each, 2 * each):
                    p, q = load_wide(x, i), load_wide(x, i + j)
                    store(x, i, p + q)
                    store(x, i + j, p - q)
            half *= 2


@leaf
def base_stage(x, out, sums, inner, base, places, signs):
    """Multiply by H's base, into ``out``.

    Of each four coordinates all sums of either sign are made, as SUMS lists them; ``base`` [b, b / 4] lists where in ``sums``
    those stand that make up a coordinate. ``places`` and ``signs`` say how x is permuted first, unless they are empty.
    """
    b, groups = base.shape
    block = inner * LANES
    nothing = side_by_side(floats(F32(0)), floats(F32(0)))
    for l in range(0, block, 2 * LANES):
        for g in range(groups):
            first = 4 * g * block + l
            if places.size > 0:
                k = first // LANES
                p, q = signed_pair(x, places, signs, k), signed_pair(x, places, signs, k + inner)
                r, s = signed_pair(x, places, signs, k + 2 * inner), signed_pair(x, places, signs, k + 3 * inner)
            else:
                p, q = load_wide(x, first), load_wide(x, first + block)
                r, s = load_wide(x, first + 2 * block), load_wide(x, first + 3 * block)
            a, c, d, e = p + q, p - q, r + s, r - s
            at = len(SUMS) * g * 2 * LANES
            keep_sums(sums, at, nothing, a + d, a + e, a - e, a - d)
            keep_sums(sums, at + 8 * 2 * LANES, nothing, c + d, c + e, c - e, c - d)
        for i in range(b):
            total = load_wide(sums, base[i, 0])
            for g in range(1, groups):
                total = total + load_wide(sums, base[i, g])
            store(out, i * block + l, total)


@inlined
def keep_sums(sums, at, nothing, p, q, r, s):
    """Store four sums, then their negatives."""
    store(sums, at, p)
    store(sums, at + 2 * LANES, q)
    store(sums, at + 4 * LANES, r)
    store(sums, at + 6 * LANES, s)
    store(sums, at + 8 * LANES, nothing - p)
    store(sums, at + 10 * LANES, nothing - q)
    store(sums, at + 12 * LANES, nothing - r)
    store(sums, at + 14 * LANES, nothing - s)


@inlined
def sums_of_four(p, q, r, s):
    """Two stages over four operands: p with q and r with s, then the first results and the second ones."""
    a, c, d, e = p + q, p - q, r + s, r - s
    return a + d, c + e, a - d, c - e


@inlined
def four_wide(x, i, j):
    """Those two stages over four pairs of coordinates, ``j`` numbers apart."""
    return sums_of_four(load_wide(x, i), load_wide(x, i + j), load_wide(x, i + 2 * j), load_wide(x, i + 3 * j))


@inlined
def neighbours(x, i):
    """The first stage: a coordinate and the next one become their sum and difference."""
    p, q = load(x, i), load(x, i + LANES)
    return side_by_side(p + q, p - q)


@inlined
def four_signed(x, places, signs, k):
    """The fourth and the fifth stage over coordinates k, k + 8, k + 16 and k + 24 of x permuted and with signs."""
    p, q = signed(x, places, signs, k), signed(x, places, signs, k + 8)
    r, s = signed(x, places, signs, k + 16), signed(x, places, signs, k + 24)
    return sums_of_four(p, q, r, s)


@inlined
def store_sums(x, i, p, q, r, s):
    """Two stages over four coordinates that are 32 apart, stored there."""
    a, c, d, e = sums_of_four(p, q, r, s)
    j = 32 * LANES
    store(x, i, a)
    store(x, i + j, c)
    store(x, i + 2 * j, d)
    store(x, i + 3 * j, e)


@inlined
def signed_pair(x, places, signs, k):
    """Coordinates k and k + 1 of x permuted and with signs, wide lanes."""
    return side_by_side(signed(x, places, signs, k), signed(x, places, signs, k + 1))
