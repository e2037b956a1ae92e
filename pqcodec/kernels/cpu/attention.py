"""Law: attention to blocks of codes: scores and weighted values, of four rows of queries for each look-up.

A tile is eight tokens, held as in ``blocks``: a lane is a token. Coordinates of quads go from the table into sums, without a
vector ever being put together; those of other codings are made for one tile and are not rotated back. A run is the tiles that
are unpacked before they are used. ``kernels.attention`` tells the formulas.
"""

from __future__ import annotations

import math

import numpy as np
from numba import carray

from pqcodec.constants import (
    CHECKSUM_BYTES,
    CODING_PAPER,
    CODING_QUADS,
    CODING_SPLIT,
    QUAD,
    QUADS_BASE_BYTES,
    QUADS_GROUP,
    QUADS_RADII,
    QUADS_RADIUS_STEPS,
)
from pqcodec.kernels.cpu.bits import bytes_to_rows, checksum
from pqcodec.kernels.cpu.lane_look_ups import gather_bytes_at
from pqcodec.kernels.cpu.lane_memory import load, pointer, spread, store, word_at
from pqcodec.kernels.cpu.lane_rows import sums_of_rows
from pqcodec.kernels.cpu.lane_signs import signed_floats
from pqcodec.kernels.cpu.lanes import LANES, as_bits, as_float, floats, fused, ints, magnitude, nearest, select, truncate
from pqcodec.kernels.cpu.offsets import fill_phases_across
from pqcodec.kernels.cpu.paper import decode_paper
from pqcodec.kernels.cpu.quads import quad_factors, unpack
from pqcodec.kernels.cpu.records import (
    F32,
    I32,
    I64,
    U64,
    AttentionScratch,
    DecoderQuads,
    DecoderTree,
    ExactParts,
    PaperDecoder,
    PartSums,
    QuadsDecoder,
    RopeTable,
    RowDecoders,
    RowQueries,
    SplitDecoder,
    SplitDecoderWork,
    inlined,
    jit,
    leaf,
)
from pqcodec.kernels.cpu.split import decode_split, radius_factors

ROWS = 4  # of queries that share a look-up
RUN_TILES = 8
RUN = RUN_TILES * LANES  # tokens
_NOTHING = F32(-np.inf)
_MOST = 120  # of an exponent of values: sums of 2^7 times as much, and their inverse, are in float32's range
_LEAST_EXPONENT = F32(-87.0)  # e to it is just above the least number of full precision; what is less counts as 0
_NEAR = F32(0.25)  # of 0: there the series of tanh is exact to float32
_LOG2_E = F32(1 / math.log(2))
_LN2_HIGH = F32(355 / 512)  # so few bits that a product with a whole number below 2^15 is exact
_LN2_LOW = F32(math.log(2) - 355 / 512)


# -- what tasks do -------------------------------------------------------------------------------------------------
@jit
def score_parts(parts, items, leading, of_keys, rope, queries, keys, check, damaged, most, start, found):
    """Scores of parts of at most ``most`` tokens, before softcap: float32 found [leading, rows, tokens from ``start`` on].

    ``items``: chunks of keys. ``keys``: of the checksum. Records come as plain tuples (``records.plain``).
    """
    of_keys, rope, queries = decoders_of(of_keys), RopeTable(*rope), RowQueries(*queries)
    scratch = scratch_of(of_keys.order, of_keys.row_bytes, rope)
    padded, stride = queries.factors.size // leading, most + LANES
    scores = np.zeros(widest_of(parts) * padded * stride, F32)
    for n in range(parts.shape[0]):
        tokens, first_key, last_key, _, _, _, _, _, _, first_lead, last_lead, _, first_token = parts[n]
        leads = first_lead, last_lead
        score_items(
            items[first_key:last_key], leads, leading, of_keys, rope, queries, keys, check, damaged, scores, stride, scratch
        )
        for lead in range(first_lead, last_lead):
            for row in range(queries.rows):
                at, place = ((lead - first_lead) * padded + row) * stride, first_token - start
                found[lead, row, place : place + tokens] = scores[at : at + tokens]


@jit
def attend_parts(
    parts, key_items, value_items, leading, of_keys, of_values, rope, queries, exact, keys, check, key_damaged, value_damaged,
    sums, most,
):  # fmt: skip
    """Attention to some parts of at most ``most`` tokens, into ``sums``; records come as plain tuples (``records.plain``)."""
    of_keys, of_values, rope = decoders_of(of_keys), decoders_of(of_values), RopeTable(*rope)
    queries, exact, sums = RowQueries(*queries), ExactParts(*exact), PartSums(*sums)
    rows, padded = queries.rows, queries.factors.size // leading
    scratch = scratch_of(max(of_keys.order, of_values.order), max(of_keys.row_bytes, of_values.row_bytes), rope)
    stride = most + LANES
    weights, scaled = np.zeros(widest_of(parts) * padded * stride, F32), np.zeros(ROWS * RUN, F32)
    lanes = np.zeros(padded * of_values.order * LANES, F32)
    for n in range(parts.shape[0]):
        (
            tokens, first_key, last_key, first_value, last_value, first_exact_key, last_exact_key, first_exact_value,
            last_exact_value, first_lead, last_lead, part, first_token,
        ) = parts[n]  # fmt: skip
        leads = first_lead, last_lead
        items = key_items[first_key:last_key]
        score_items(items, leads, leading, of_keys, rope, queries, keys, check, key_damaged, weights, stride, scratch)
        for j in range(first_exact_key, last_exact_key):
            lead = exact.keys[j, 0]
            if first_lead <= lead < last_lead:
                for row in range(rows):
                    weights[((lead - first_lead) * padded + row) * stride + exact.keys[j, 1]] = exact.scores[j, row]
        for lead in range(first_lead, last_lead):
            for row in range(padded):
                at = ((lead - first_lead) * padded + row) * stride
                if row >= rows:
                    weights[at : at + stride] = F32(0)
                    continue
                cap(weights, at, tokens, queries.softcap)
                low = min(max(queries.bounds[row, 0] - first_token, 0), tokens)
                high = min(max(queries.bounds[row, 1] - first_token, low), tokens)
                weights[at : at + low] = _NOTHING
                weights[at + high : at + stride] = _NOTHING
                largest, total = weigh(weights, at, tokens, scratch.dots)
                weights[at + tokens : at + stride] = F32(0)  # tiles of values may end behind them
                sums.maximum[part, lead, row] = largest
                sums.total[part, lead, row] = total
        for j in range(first_exact_value, last_exact_value):
            lead = exact.values[j, 0]
            if first_lead <= lead < last_lead:
                for row in range(rows):
                    at = ((lead - first_lead) * padded + row) * stride + exact.values[j, 1]
                    exact.weights[j, row] = weights[at]
                    weights[at] = F32(0)
        items = value_items[first_value:last_value]
        for lead in range(first_lead, last_lead):
            lanes[:] = F32(0)
            exponent = largest_exponent(items, lead, of_values)
            start = (lead - first_lead) * padded * stride
            add_items(
                items, lead, leading, of_values, exponent, keys, check, value_damaged, weights, start, stride, padded // ROWS,
                scaled, lanes, scratch,
            )  # fmt: skip
            sums.exponents[part, lead] = exponent
            for row in range(rows):
                for k in range(0, of_values.order, LANES):
                    store(scratch.dots, 0, sums_of_rows(lanes, (row * of_values.order + k) * LANES))
                    for l in range(LANES):
                        sums.out[part, lead, row, k + l] = scratch.dots[l]


@jit
def decoders_of(record):
    """A plain tuple as RowDecoders."""
    coding, order, row_bytes, quads, split, paper = record
    tree = SplitDecoder(*split[:-2], DecoderTree(*split[-2]), DecoderQuads(*split[-1]))
    return RowDecoders(coding, order, row_bytes, QuadsDecoder(*quads), tree, PaperDecoder(*paper))


@jit
def widest_of(parts):
    """Leading indices of a part, at the most."""
    widest = 0
    for n in range(parts.shape[0]):
        widest = max(widest, parts[n, 10] - parts[n, 9])
    return widest


@jit
def scratch_of(order, row_bytes, rope):
    """An AttentionScratch."""
    quads, halves = order // QUAD * LANES, order // 2 * LANES
    phases = rope.frequencies.size * RUN
    return AttentionScratch(
        np.zeros(RUN_TILES * quads, np.int32),
        np.zeros(RUN_TILES * (quads // QUADS_GROUP + LANES), np.int32),
        np.zeros(2 * LANES, np.int32),
        np.zeros(phases, F32),
        np.zeros(phases, F32),
        np.zeros(RUN, F32),
        np.zeros(RUN, F32),
        np.zeros(2 * ROWS * LANES, F32),
        np.zeros(order * LANES, F32),
        np.zeros(LANES * ((row_bytes >> 3) + 2), np.uint64),
        SplitDecoderWork(
            np.zeros(halves, np.int32),
            np.zeros(halves, np.int32),
            np.zeros(halves, F32),
            np.zeros(quads, np.int32),
            np.zeros(halves, np.int32),
            np.zeros(order // 4 + 1, np.int32),
        ),
    )


@jit
def is_damaged(payload, keys):
    """Whether a block's checksum does not hold."""
    size = payload.size - CHECKSUM_BYTES
    return word_at(payload, size) != checksum(payload, 0, size, keys)


@jit
def score_items(items, leads, leading, of_keys, rope, queries, keys, check, damaged, found, stride, scratch):
    """Scores of chunks of keys: found [lead - leads[0], row, stride], flat; up to 7 numbers more than tokens are written.

    Phases are computed once for all leading indices.
    """
    pairs, padded = rope.frequencies.size, queries.factors.size // leading
    order, quads = of_keys.order, of_keys.quads
    count = order // QUAD
    entries_each, signs_each = count * LANES, (count + QUADS_GROUP - 1) // QUADS_GROUP * LANES  # of a tile
    for i in range(items.shape[0]):
        tokens, low, high, source, size, at, position, chunk = items[i]
        for row in range(low, high, RUN):
            rows = min(RUN, high - row)
            if pairs:
                fill_phases_across(position + row, rows, rope, RUN, LANES, scratch.cos, scratch.sin, scratch.steps)
            for lead in range(leads[0], leads[1]):
                payload = carray(pointer(source + lead * size), (size,), np.uint8)
                if check and row == low:
                    damaged[chunk * leading + lead] |= is_damaged(payload, keys)
                start = (lead - leads[0]) * padded * stride + at + row - low
                if of_keys.coding == CODING_QUADS:
                    unpack(quads, order, payload, row, rows, tokens, scratch.steps, scratch.entries, scratch.signs)
                    fill_factors(quads, payload, row, rows, tokens, scratch.first, scratch.second)
                    for tile in range(0, (rows + LANES - 1) // LANES, 2):
                        for group in range(padded // ROWS):
                            of_group = lead * padded // ROWS + group
                            add_up_dots(
                                quads.points, scratch.entries, tile * entries_each, scratch.signs, tile * signs_each, count,
                                queries.turned, of_group * order * ROWS, scratch.dots,
                            )  # fmt: skip
                            for t in range(min(2, (rows + LANES - 1) // LANES - tile)):
                                finish_scores(
                                    scratch, t * ROWS * LANES, queries, of_group, (tile + t) * LANES, (tile + t) * LANES, pairs,
                                    found, start + group * ROWS * stride + (tile + t) * LANES, stride,
                                )  # fmt: skip
                    continue
                for token in range(0, rows, LANES):
                    decode_tile(of_keys, payload, row + token, min(LANES, rows - token), scratch)
                    for group in range(padded // ROWS):
                        of_group = lead * padded // ROWS + group
                        add_up_tile(scratch.x, order, queries.turned, of_group * order * ROWS, scratch.dots)
                        place = start + group * ROWS * stride + token
                        finish_scores(scratch, 0, queries, of_group, 0, token, pairs, found, place, stride)


@jit
def add_items(
    items, lead, leading, of_values, exponent, keys, check, damaged, weights, start, stride, groups, scaled, lanes, scratch
):  # fmt: skip
    """Add the values of a lead's chunks, times their weights and 2^-exponent, to lanes [row, coordinate, lane], flat.

    A row's weights begin at weights[start + row * stride].
    """
    order, quads = of_values.order, of_values.quads
    for i in range(items.shape[0]):
        tokens, low, high, source, size, at, _, chunk = items[i]
        payload = carray(pointer(source + lead * size), (size,), np.uint8)
        if check:
            damaged[chunk * leading + lead] |= is_damaged(payload, keys)
        for row in range(low, high, RUN):
            rows, place = min(RUN, high - row), start + at + row - low
            tiles = (rows + LANES - 1) // LANES
            if of_values.coding == CODING_QUADS:
                unpack(quads, order, payload, row, rows, tokens, scratch.steps, scratch.entries, scratch.signs)
                fill_factors(quads, payload, row, rows, tokens, scratch.first, scratch.second)
                for group in range(groups):
                    for tile in range(0, tiles * LANES, LANES):
                        scale_weights(
                            weights, place + group * ROWS * stride + tile, stride, exponent, scratch, tile, scaled, tile
                        )
                    at_lanes = group * ROWS * order * LANES
                    add_points(quads.points, scratch.entries, scratch.signs, order, tiles, scaled, lanes, at_lanes)
                continue
            for tile in range(tiles):
                decode_tile(of_values, payload, row + tile * LANES, min(LANES, rows - tile * LANES), scratch)
                for group in range(groups):
                    of_tile = place + group * ROWS * stride + tile * LANES
                    scale_weights(weights, of_tile, stride, exponent, scratch, 0, scaled, 0)
                    add_tile(scratch.x, order, scaled, lanes, group * ROWS * order * LANES)


# -- other codings than quads ----------------------------------------------------------------------------------------
@jit
def decode_tile(of, payload, row, rows, scratch):
    """Coordinates and factors of ``rows`` rows of split or paper coding; lanes behind them are zero vectors."""
    words, first, second = scratch.words, scratch.first, scratch.second
    stride = (of.row_bytes >> 3) + 2
    bytes_to_rows(payload, row * of.row_bytes, rows, of.row_bytes, words, stride)
    if of.coding == CODING_SPLIT:
        radius_factors(rows, of.split, words, stride, first, second)
        decode_split(of.split, of.order, scratch.work, words, stride, scratch.x)
    elif of.coding == CODING_PAPER:
        decode_paper(rows, of.order, of.paper, words, stride, scratch.x, first, second)
    for l in range(rows, LANES):
        first[l] = F32(0)


@leaf
def add_up_tile(x, order, turned, turned_at, dots):
    """Products of a tile's coordinates with four rows of queries, into dots [4 lanes]."""
    zero = floats(F32(0))
    p, q, r, s = zero, zero, zero, zero
    t, u, v, w = zero, zero, zero, zero
    for k in range(0, order, 2):
        a, b, at = load(x, k * LANES), load(x, (k + 1) * LANES), turned_at + k * ROWS
        p, q = fused(a, spread(turned, at), p), fused(a, spread(turned, at + 1), q)
        r, s = fused(a, spread(turned, at + 2), r), fused(a, spread(turned, at + 3), s)
        t, u = fused(b, spread(turned, at + 4), t), fused(b, spread(turned, at + 5), u)
        v, w = fused(b, spread(turned, at + 6), v), fused(b, spread(turned, at + 7), w)
    store(dots, 0, p + t)
    store(dots, LANES, q + u)
    store(dots, 2 * LANES, r + v)
    store(dots, 3 * LANES, s + w)


@leaf
def add_tile(x, order, scaled, lanes, start):
    """Add a tile's coordinates times the weights of four rows of queries to lanes [start ...], [row, coordinate, lane]."""
    p, q, r, s = load(scaled, 0), load(scaled, RUN), load(scaled, 2 * RUN), load(scaled, 3 * RUN)
    row = order * LANES
    for k in range(0, row, LANES):
        a, at = load(x, k), start + k
        store(lanes, at, fused(a, p, load(lanes, at)))
        store(lanes, at + row, fused(a, q, load(lanes, at + row)))
        store(lanes, at + 2 * row, fused(a, r, load(lanes, at + 2 * row)))
        store(lanes, at + 3 * row, fused(a, s, load(lanes, at + 3 * row)))


# -- planes of quads ----------------------------------------------------------------------------------------------------------
@jit
def fill_factors(quads, payload, row, rows, tokens, first, second):
    """Factors A and B of ``rows`` rows from ``row`` on; of lanes behind them A is 0."""
    for token in range(0, rows, LANES):
        some = min(LANES, rows - token)
        quad_factors(quads, payload, row + token, some, tokens, first[token : token + LANES], second[token : token + LANES])


@inlined
def coordinates(points, entries, at, sign, quad):
    """The four coordinates of a tile's quad, float lanes; ``sign``: the word of its group."""
    shifted = sign << ints(I32((QUADS_GROUP - 1) & ~quad))
    a, c, b, d = signed_floats(gather_bytes_at(points, entries, at), shifted)  # in the order of QUADS_SIGN_PLACES
    return a, b, c, d


# -- scores ------------------------------------------------------------------------------------------------------------
@leaf
def add_up_dots(points, entries, at, signs, signs_at, count, turned, turned_at, dots):
    """Products of two tiles' points with four rows of queries, into dots [2, 4, lanes]: a number of a query is loaded once."""
    zero = floats(F32(0))
    p, q, r, s = zero, zero, zero, zero
    t, u, v, w = zero, zero, zero, zero
    signs_each, each = (count + QUADS_GROUP - 1) // QUADS_GROUP * LANES, count * LANES
    for quad in range(count):
        signs_of = signs_at + quad // QUADS_GROUP * LANES
        a, b, c, d = coordinates(points, entries, at + quad * LANES, load(signs, signs_of), quad)
        e, f, g, h = coordinates(points, entries, at + each + quad * LANES, load(signs, signs_of + signs_each), quad)
        k = turned_at + quad * QUAD * ROWS
        p, q, t, u = products(turned, k, a, e, p, q, t, u)
        r, s, v, w = products(turned, k + 2, a, e, r, s, v, w)
        p, q, t, u = products(turned, k + 4, b, f, p, q, t, u)
        r, s, v, w = products(turned, k + 6, b, f, r, s, v, w)
        p, q, t, u = products(turned, k + 8, c, g, p, q, t, u)
        r, s, v, w = products(turned, k + 10, c, g, r, s, v, w)
        p, q, t, u = products(turned, k + 12, d, h, p, q, t, u)
        r, s, v, w = products(turned, k + 14, d, h, r, s, v, w)
    store_four(dots, 0, p, q, r, s)
    store_four(dots, ROWS * LANES, t, u, v, w)


@inlined
def products(turned, k, a, e, p, q, t, u):
    """Two rows' sums of two tiles after one more coordinate of each."""
    x, y = spread(turned, k), spread(turned, k + 1)
    return fused(a, x, p), fused(a, y, q), fused(e, x, t), fused(e, y, u)


@leaf
def finish_scores(scratch, dots_at, queries, group, factors_at, token, pairs, found, place, stride):
    """Scores of a tile and four rows of queries: their dots times all factors, and what the offsets add."""
    zero = floats(F32(0))
    p, q, r, s = zero, zero, zero, zero
    for i in range(pairs):
        x, y = load(scratch.cos, i * RUN + token), load(scratch.sin, i * RUN + token)
        k = (group * pairs + i) * 2 * ROWS
        p, q = fused(x, spread(queries.phases, k), p), fused(x, spread(queries.phases, k + 1), q)
        r, s = fused(x, spread(queries.phases, k + 2), r), fused(x, spread(queries.phases, k + 3), s)
        p, q = fused(y, spread(queries.phases, k + 4), p), fused(y, spread(queries.phases, k + 5), q)
        r, s = fused(y, spread(queries.phases, k + 6), r), fused(y, spread(queries.phases, k + 7), s)
    first, second, row = load(scratch.first, factors_at), load(scratch.second, factors_at), group * ROWS
    a, b, c, d = four_lanes(scratch.dots, dots_at)
    p = p + a * first * spread(queries.factors, row) * second
    q = q + b * first * spread(queries.factors, row + 1) * second
    r = r + c * first * spread(queries.factors, row + 2) * second
    s = s + d * first * spread(queries.factors, row + 3) * second
    store(found, place, p + spread(queries.constants, row))
    store(found, place + stride, q + spread(queries.constants, row + 1))
    store(found, place + 2 * stride, r + spread(queries.constants, row + 2))
    store(found, place + 3 * stride, s + spread(queries.constants, row + 3))


# -- softmax -------------------------------------------------------------------------------------------------------------
@leaf
def cap(weights, at, tokens, softcap):
    """Turn scores at weights [at ...] into softcap tanh(score / softcap), also up to 7 behind them; 0 for no softcap."""
    if softcap > F32(0):
        for t in range(0, tokens, LANES):
            score = load(weights, at + t)
            store(weights, at + t, select(score == score, softcapped_lanes(score, softcap), score))


@leaf
def weigh(weights, at, tokens, lanes):
    """Turn scores at weights [at ...], padded with -inf, into exp(score - maximum); returns their maximum and their sum.

    Where a score is NaN or inf, all of these are NaN but for what is not seen, whose score is -inf and weight 0.
    """
    zero, one, nothing = floats(F32(0)), floats(F32(1)), floats(_NOTHING)
    most, bad = nothing, zero
    for t in range(0, tokens, LANES):
        score = load(weights, at + t)
        most = max(score, most)
        bad = select(score == score, bad, one)
    store(lanes, 0, most)
    store(lanes, LANES, bad)
    largest, wrong = _NOTHING, F32(0)
    for l in range(LANES):
        largest, wrong = max(largest, lanes[l]), wrong + lanes[LANES + l]
    if wrong > F32(0) or largest == F32(np.inf):
        largest = F32(np.nan)
    if largest == _NOTHING:
        for t in range(0, tokens, LANES):
            store(weights, at + t, zero)
        return largest, F32(0)
    total = zero
    for t in range(0, tokens, LANES):
        score = load(weights, at + t)
        weight = exponential(score - floats(largest))
        if largest != largest:
            weight = select(score == nothing, zero, floats(largest))
        total = total + weight
        store(weights, at + t, weight)
    store(lanes, 0, total)
    sum_of_lanes = F32(0)
    for l in range(LANES):
        sum_of_lanes += lanes[l]
    return largest, sum_of_lanes


@inlined
def exponential(x):
    """e to float lanes that are not above 0, within two units in the last place; 0 below -87.

    e^x = 2^k e^r with k the nearest whole number to x / ln 2; e^r is its series up to r^7 / 7!.
    """
    least = floats(_LEAST_EXPONENT)
    bounded = max(x, least)
    k = nearest(bounded * floats(_LOG2_E))
    r = fused(k, floats(-_LN2_HIGH), bounded)
    r = fused(k, floats(-_LN2_LOW), r)
    p = fused(r, floats(F32(1 / 5040)), floats(F32(1 / 720)))
    p = fused(p, r, floats(F32(1 / 120)))
    p = fused(p, r, floats(F32(1 / 24)))
    p = fused(p, r, floats(F32(1 / 6)))
    p = fused(p, r, floats(F32(1 / 2)))
    p = fused(p, r, floats(F32(1)))
    p = fused(p, r, floats(F32(1)))
    power = as_float((truncate(k) + ints(I32(127))) << ints(I32(23)))
    return select(x < least, floats(F32(0)), p * power)


@inlined
def softcapped_lanes(score, softcap):
    """softcap tanh(score / softcap) of float lanes: tanh |x| = (1 - e) / (1 + e) with e = exp(-2 |x|).

    Near 0, where 1 - e would lose digits, it is its series up to x^9.
    """
    one, x = floats(F32(1)), score / floats(softcap)
    size = magnitude(x)
    e = exponential(floats(F32(0)) - size - size)
    square = size * size
    p = fused(square, floats(F32(62 / 2835)), floats(F32(-17 / 315)))
    p = fused(p, square, floats(F32(2 / 15)))
    p = fused(p, square, floats(F32(-1 / 3)))
    near = fused(p * square, size, size)
    found = select(size < floats(_NEAR), near, (one - e) / (one + e)) * floats(softcap)
    return as_float(as_bits(found) | (as_bits(x) & ints(I32(-0x80000000))))


# -- weighted values -------------------------------------------------------------------------------------------------------
@jit
def largest_exponent(items, lead, of):
    """The exponent of the largest radius of a lead's blocks, which their rows are divided by before they are added up."""
    if of.coding == CODING_PAPER:
        return min(max(I64(of.paper.radius_exponent), -_MOST), _MOST)
    most = I64(QUADS_RADII[0])
    for i in range(items.shape[0]):
        tokens, low, high, source, size, _, _, _ = items[i]
        payload = carray(pointer(source + lead * size), (size,), np.uint8)
        code = I64(0)
        if of.coding == CODING_SPLIT:
            for t in range(low, high):
                code = max(code, I64(word_at(payload, t * of.row_bytes) & U64((1 << of.split.radius_bits) - 1)))
            if code > 0:
                largest = np.float64(of.split.radii[0, code]) * np.float64(of.split.radii[1, code])
                most = max(most, I64(np.floor(np.log2(largest))))
            continue
        radii = tokens * (of.quads.sign_bytes + of.quads.index_bytes)
        for t in range(tokens):
            code = max(code, I64(payload[radii + t]))
        base = I64(payload[radii + tokens]) | I64(payload[radii + tokens + QUADS_BASE_BYTES - 1]) << 8
        if code > 0:
            most = max(most, (base - ((base & 0x8000) << 1) + code - 1) // QUADS_RADIUS_STEPS)
    return min(max(most, -_MOST), _MOST)


@leaf
def scale_weights(weights, at, stride, exponent, scratch, factors_at, scaled, place):
    """Weights of a tile and four rows of queries, times the factors of the values and 2^-exponent, into scaled [4, RUN]."""
    down = as_float(ints(I32(127 - exponent)) << ints(I32(23)))
    first, second = load(scratch.first, factors_at), load(scratch.second, factors_at)
    for r in range(ROWS):
        store(scaled, r * RUN + place, load(weights, at + r * stride) * first * down * second)


@leaf
def add_points(points, entries, signs, order, tiles, scaled, lanes, start):
    """Add a run's points times the weights of four rows of queries to lanes [start ...], [row, coordinate, lane].

    Quad by quad, so that the sixteen sums of a quad stay in registers over all tiles.
    """
    count = order // QUAD
    groups = (count + QUADS_GROUP - 1) // QUADS_GROUP
    row = order * LANES
    for quad in range(count):
        k = start + quad * QUAD * LANES
        a0, b0, c0, d0 = four_lanes(lanes, k)
        a1, b1, c1, d1 = four_lanes(lanes, k + row)
        a2, b2, c2, d2 = four_lanes(lanes, k + 2 * row)
        a3, b3, c3, d3 = four_lanes(lanes, k + 3 * row)
        for tile in range(tiles):
            sign = load(signs, (tile * groups + quad // QUADS_GROUP) * LANES)
            a, b, c, d = coordinates(points, entries, (tile * count + quad) * LANES, sign, quad)
            weight = load(scaled, tile * LANES)
            a0, b0, c0, d0 = fused(a, weight, a0), fused(b, weight, b0), fused(c, weight, c0), fused(d, weight, d0)
            weight = load(scaled, RUN + tile * LANES)
            a1, b1, c1, d1 = fused(a, weight, a1), fused(b, weight, b1), fused(c, weight, c1), fused(d, weight, d1)
            weight = load(scaled, 2 * RUN + tile * LANES)
            a2, b2, c2, d2 = fused(a, weight, a2), fused(b, weight, b2), fused(c, weight, c2), fused(d, weight, d2)
            weight = load(scaled, 3 * RUN + tile * LANES)
            a3, b3, c3, d3 = fused(a, weight, a3), fused(b, weight, b3), fused(c, weight, c3), fused(d, weight, d3)
        store_four(lanes, k, a0, b0, c0, d0)
        store_four(lanes, k + row, a1, b1, c1, d1)
        store_four(lanes, k + 2 * row, a2, b2, c2, d2)
        store_four(lanes, k + 3 * row, a3, b3, c3, d3)


@inlined
def four_lanes(lanes, k):
    """Four coordinates' sums."""
    return load(lanes, k), load(lanes, k + LANES), load(lanes, k + 2 * LANES), load(lanes, k + 3 * LANES)


@inlined
def store_four(lanes, k, a, b, c, d):
    """Store four coordinates' sums."""
    store(lanes, k, a)
    store(lanes, k + LANES, b)
    store(lanes, k + 2 * LANES, c)
    store(lanes, k + 3 * LANES, d)
