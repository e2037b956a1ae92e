"""Law: attention straight from codes on any GPU: a program attends to a share of one head's tokens, and another one merges.

A program takes the tokens of its share in tiles, whose codes it reads once (``shares``). It rotates its rows of queries once,
and its sum of weighted values back once; keys and values are never rotated. Weights are sums of two float16 numbers, as queries
are, so that a result is as good as one in float32. Partial results are merged by their largest scores (flash decoding).

Rows are the queries of all heads that share a head of keys, query by query within a head.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pqcodec.kernels.on_triton.affine_units import (
    factor_of,
    group_place,
    side_product,
    side_units,
    terms_of,
    unit_scores,
    units_of,
)
from pqcodec.kernels.on_triton.numbers import GROUP, LARGEST, power_of_two
from pqcodec.kernels.on_triton.shares import (
    CODED,
    CODED_FIELDS,
    EXACT,
    EXACT_FIELDS,
    OF_SIDE,
    OF_TABLE,
    exact_positions,
    fine_product,
    half_floats,
    load_exact,
    load_queries,
    mean_products,
    normal_halves,
    pair_channels,
    product,
    rotated_queries,
    side_offset,
    skipped_tokens,
    tile_turns,
)


# -- scores and weights ----------------------------------------------------------------------------------------------
@triton.jit
def capped(x, cap):
    """cap tanh(x / cap)."""
    x = x / cap
    y = x * x
    small = x * (1 + y * (-1 / 3 + y * (2 / 15 - y * (17 / 315))))
    return cap * tl.where(tl.abs(x) < 0.1, small, 1 - 2 / (tl.exp(2 * x) + 1))


@triton.jit
def tile_scores(
    side,
    tables,
    lead,
    leads,
    token,
    inside,
    coarse,
    fine,
    exponent,
    still,
    m_coarse,
    m_fine,
    m_exponent,
    cap,
    SIDE: tl.constexpr,
    CAPPED: tl.constexpr,
    TILE: tl.constexpr,
):
    """Scores of some coded tokens with rows of queries: float32 [R, TILE]."""
    high, low, factor = side_units(side, tables, lead, leads, token, inside, SIDE, TILE)
    scores = unit_scores(coarse, fine, exponent, high, low, factor, SIDE)
    return finished_scores(scores, side, tables, token, still, m_coarse, m_fine, m_exponent, cap, SIDE, CAPPED)


@triton.jit
def finished_scores(
    scores, side, tables, token, still, m_coarse, m_fine, m_exponent, cap, SIDE: tl.constexpr, CAPPED: tl.constexpr
):
    """Scores of coded tokens with what the means add, and capped: float32 [R, TILE]."""
    if SIDE.value.offsets:
        scores += still[:, None]
        if SIDE.value.pairs > 0:
            angles = tl.trans(tile_turns(side, tables, token, SIDE))
            scores += fine_product(m_coarse, m_fine, m_exponent, angles)
    if CAPPED:
        scores = capped(scores, cap)
    return scores


@triton.jit
def scores_of_exact(
    share,
    lead,
    token,
    inside,
    q,
    cap,
    HEAD_DIM: tl.constexpr,
    COLUMNS: tl.constexpr,
    DTYPE: tl.constexpr,
    CAPPED: tl.constexpr,
):
    """Scores of some exact tokens with rows of queries q [R, COLUMNS]: float32 [R, TILE]."""
    k = load_exact(share + EXACT.value.keys, lead, token, inside, HEAD_DIM, COLUMNS, DTYPE)
    scores = tl.dot(q, tl.trans(k), input_precision="ieee")
    if CAPPED:
        scores = capped(scores, cap)
    return scores


@triton.jit
def bounds_of_rows(total, row, queries, window, CAUSAL: tl.constexpr):
    """First and last position that each row sees, int64 [R]: queries stand at the end of ``total`` tokens."""
    own = total - queries + row % queries
    low = tl.where(window > 0, own - window + 1, own * 0)
    if CAUSAL:
        return low, own
    else:
        return low, own * 0 + total - 1


@triton.jit
def weigh(scores, most, total):
    """Weights exp(score - maximum) [R, TILE], the new maximum and sum of weights [R], what sums before are multiplied with [R].

    ``scores``: -inf where a row does not see a token.
    """
    larger = tl.maximum(most, tl.max(scores, 1))
    finite = tl.where(larger == float("-inf"), 0.0, larger)  # of rows that have seen nothing yet
    weights, shrunk = tl.exp(scores - finite[:, None]), tl.exp(most - finite)
    return weights, larger, total * shrunk + tl.sum(weights, 1), shrunk


@triton.jit
def ones_where(x):
    """float16 of booleans. Triton 3.2 dies (SIGFPE) where it compiles ``tl.dot`` of booleans that ``to`` converts."""
    return tl.where(x, 1.0, 0.0).to(tl.float16)


@triton.jit
def wild_sums(seen, v):
    """What NaN and Inf in values [TILE, n] add to the rows that see them, seen [R, TILE]: 0 where there are none.

    For other rows, too, their product with a weight of 0 would be NaN.
    """
    rows = ones_where(seen)
    up = tl.dot(rows, ones_where((v == float("inf")) | (v != v)))
    down = tl.dot(rows, ones_where((v == float("-inf")) | (v != v)))
    return tl.where(up > 0, float("inf"), 0.0) - tl.where(down > 0, float("inf"), 0.0)  # NaN where there are both


# -- kernels ---------------------------------------------------------------------------------------------------------
@triton.jit
def program_rows(leads, rows, sequence, ROWS: tl.constexpr):
    """The head of a program, its rows, which of these there are, and each row's place among those of all sequences."""
    lead = tl.program_id(1).to(tl.int64)
    row = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    return lead, row, row < rows, (sequence * leads + lead) * rows + row


@triton.jit
def attend_to_codes(
    shares,
    key_tables,
    value_tables,
    query,
    sums,
    about,
    leads,
    rows,
    queries,
    scale,
    cap,
    window,
    KEYS: tl.constexpr,
    VALUES: tl.constexpr,
    CAUSAL: tl.constexpr,
    CAPPED: tl.constexpr,
    SKIPS: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Attention of ROWS rows of a head to a share of coded tokens: a partial result, float32.

    ``sums`` [slots, leads, rows, head_dim of the values]: of weights times values; ``about`` [slots, leads, rows, 2]: largest
    score and sum of weights. ``window``: 0 for none.
    """
    share = shares + tl.program_id(0) * CODED_FIELDS
    lead, row, mask, place = program_rows(leads, rows, tl.load(share + CODED.value.sequence), ROWS)
    keys, values = share + CODED.value.keys, share + CODED.value.values
    low, high = bounds_of_rows(tl.load(share + CODED.value.total), row, queries, window, CAUSAL)
    coarse, fine, exponent = rotated_queries(query, place, mask, scale, key_tables, KEYS, ROWS)
    still, m_coarse, m_fine, m_exponent = mean_products(query, place, mask, scale, keys, lead, KEYS, ROWS)
    most = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, VALUES.value.columns], tl.float32)
    turned = tl.zeros([ROWS, 2 * VALUES.value.pair_columns], tl.float32)  # sum of weights times ``tile_turns``
    last = tl.load(share + CODED.value.last)
    for first in range(tl.load(share + CODED.value.first), last, TILE):
        token = first + tl.arange(0, TILE)
        inside = token < last
        position = token + tl.load(share + CODED.value.position)
        scores = tile_scores(
            keys, key_tables, lead, leads, token, inside, coarse, fine, exponent, still,
            m_coarse, m_fine, m_exponent, cap, KEYS, CAPPED, TILE,
        )  # fmt: skip
        seen = inside
        if SKIPS:
            seen = seen & (skipped_tokens(share, lead, token, inside) == 0)
        seen = seen[None, :] & (position[None, :] >= low[:, None]) & (position[None, :] <= high[:, None])
        weights, most, total, shrunk = weigh(tl.where(seen, scores, float("-inf")), most, total)
        high_units, low_units, factor = side_units(values, value_tables, lead, leads, token, inside, VALUES, TILE)
        heavy, light, power = normal_halves(weights * factor[None, :])
        acc = acc * shrunk[:, None] + side_product(heavy, light, power, high_units, low_units, VALUES)
        if VALUES.value.pairs > 0:
            heavy, light, power = normal_halves(weights)
            angles = tile_turns(values, value_tables, token, VALUES)
            turned = turned * shrunk[:, None] + fine_product(heavy, light, power, angles)
    slot = (tl.load(share + CODED.value.slot) * leads + lead) * rows + row
    tl.store(about + 2 * slot, most, mask=mask)
    tl.store(about + 2 * slot + 1, total, mask=mask)
    heavy, light, power = normal_halves(acc)
    order = tl.arange(0, VALUES.value.columns)[:, None]
    rotation = half_floats(value_tables, OF_TABLE.value.rotation)
    for first_column in range(0, VALUES.value.head_dim, GROUP):
        channel = first_column + tl.arange(0, GROUP)
        used = channel < VALUES.value.head_dim
        at = rotation + order * VALUES.value.columns + channel[None, :]
        r = tl.load(at, mask=(order < VALUES.value.order) & used[None, :], other=0.0)
        found = product(heavy, light, power, r)
        if VALUES.value.offsets:
            m = side_offset(values, lead, channel, used & (channel >= 2 * VALUES.value.pairs), VALUES)
            found += total[:, None] * m[None, :]
            if VALUES.value.pairs > 0:  # a pair (p, q) of means becomes (p cos - q sin, p sin + q cos)
                angle = tl.arange(0, 2 * VALUES.value.pair_columns)[:, None]
                p, q = pair_channels(angle // 2, VALUES)
                own = (angle // 2 < VALUES.value.pairs) & ((channel[None, :] == p) | (channel[None, :] == q))
                of_sin = angle % 2 == 1
                source = tl.where(of_sin, p + q - channel[None, :], channel[None, :])
                sign = tl.where(of_sin & (channel[None, :] == p), -1.0, 1.0)
                m = side_offset(values, lead, source, own, VALUES)
                found = tl.dot(turned, sign * m, found, input_precision="ieee")
        at = sums + slot[:, None] * VALUES.value.head_dim + channel[None, :]
        tl.store(at, found, mask=mask[:, None] & used[None, :])


@triton.jit
def attend_to_exact(
    shares,
    query,
    sums,
    about,
    leads,
    rows,
    queries,
    scale,
    cap,
    window,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    KEY_COLUMNS: tl.constexpr,
    VALUE_COLUMNS: tl.constexpr,
    KEY_TYPE: tl.constexpr,
    VALUE_TYPE: tl.constexpr,
    CAUSAL: tl.constexpr,
    CAPPED: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Attention of ROWS rows of a head to a share of exact tokens: a partial result, as ``attend_to_codes`` leaves it."""
    share = shares + tl.program_id(0) * EXACT_FIELDS
    lead, row, mask, place = program_rows(leads, rows, tl.load(share + EXACT.value.sequence), ROWS)
    low, high = bounds_of_rows(tl.load(share + EXACT.value.total), row, queries, window, CAUSAL)
    q = load_queries(query, place, mask, tl.arange(0, KEY_COLUMNS), scale, KEY_DIM)
    most = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, VALUE_COLUMNS], tl.float32)
    wild = tl.zeros([ROWS, VALUE_COLUMNS], tl.float32)
    last = tl.load(share + EXACT.value.last)
    for first in range(tl.load(share + EXACT.value.first), last, TILE):
        token = first + tl.arange(0, TILE)
        inside = token < last
        position = exact_positions(share, lead, token, inside)
        scores = scores_of_exact(share, lead, token, inside, q, cap, KEY_DIM, KEY_COLUMNS, KEY_TYPE, CAPPED)
        seen = (position >= 0)[None, :] & (position[None, :] >= low[:, None]) & (position[None, :] <= high[:, None])
        weights, most, total, shrunk = weigh(tl.where(seen, scores, float("-inf")), most, total)
        v = load_exact(share + EXACT.value.values, lead, token, inside, VALUE_DIM, VALUE_COLUMNS, VALUE_TYPE)
        finite = tl.abs(v) <= LARGEST
        large, small, size = normal_halves(tl.where(finite, v, 0.0))
        heavy, light, power = normal_halves(weights * power_of_two(size)[None, :])
        sums_of_tile = tl.dot(heavy, small, tl.dot(light, large, tl.dot(heavy, large)))
        acc = acc * shrunk[:, None] + sums_of_tile * power_of_two(power)[:, None]
        if tl.min(finite.to(tl.int32)) == 0:
            wild += wild_sums(seen, v)
    slot = (tl.load(share + EXACT.value.slot) * leads + lead) * rows + row
    tl.store(about + 2 * slot, most, mask=mask)
    tl.store(about + 2 * slot + 1, total, mask=mask)
    channel = tl.arange(0, VALUE_COLUMNS)
    at = sums + slot[:, None] * VALUE_DIM + channel[None, :]
    tl.store(at, acc + wild, mask=mask[:, None] & (channel < VALUE_DIM)[None, :])


@triton.jit
def merge_shares(
    firsts,
    sums,
    about,
    out,
    leads,
    rows,
    HEAD_DIM: tl.constexpr,
    COLUMNS: tl.constexpr,
    OF_BFLOAT16: tl.constexpr,
    ROWS: tl.constexpr,
):
    """ROWS rows' results from the partial ones of all shares of their sequence: their slots are firsts[s] .. firsts[s + 1]."""
    sequence = tl.program_id(0).to(tl.int64)
    lead = tl.program_id(1)
    row = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    mask = row < rows
    first, last = tl.load(firsts + sequence), tl.load(firsts + sequence + 1)
    channel = tl.arange(0, COLUMNS)[None, :]
    used = mask[:, None] & (channel < HEAD_DIM)
    most = tl.full([ROWS], float("-inf"), tl.float32)
    for slot in range(first, last):
        most = tl.maximum(most, tl.load(about + 2 * ((slot * leads + lead) * rows + row), mask=mask, other=0.0))
    most = tl.where(most == float("-inf"), 0.0, most)  # all scores are
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    for slot in range(first, last):
        place = (slot * leads + lead) * rows + row
        weight = tl.exp(tl.load(about + 2 * place, mask=mask, other=0.0) - most)
        total += weight * tl.load(about + 2 * place + 1, mask=mask, other=0.0)
        part = tl.load(sums + place[:, None] * HEAD_DIM + channel, mask=used, other=0.0)
        acc += tl.where(weight[:, None] == 0, 0.0, weight[:, None] * part)  # of weight 0, NaN and Inf add nothing
    found = acc / tl.where(mask, total, 1.0)[:, None]
    if OF_BFLOAT16:  # round to nearest here: Triton's interpreter cuts digits off
        bits = found.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        found = tl.where(found == found, bits.to(tl.float32, bitcast=True), found)
    at = out + ((sequence * leads + lead) * rows + row)[:, None] * HEAD_DIM + channel
    tl.store(at, found.to(out.dtype.element_ty), mask=used)


@triton.jit
def score_codes(
    shares,
    key_tables,
    query,
    out,
    leads,
    rows,
    scale,
    cap,
    KEYS: tl.constexpr,
    CAPPED: tl.constexpr,
    SKIPS: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Scores of ROWS rows of a head with a share of coded tokens, into out float32 [sequences, leads, rows, total]."""
    share = shares + tl.program_id(0) * CODED_FIELDS
    lead, _row, mask, place = program_rows(leads, rows, tl.load(share + CODED.value.sequence), ROWS)
    keys = share + CODED.value.keys
    coarse, fine, exponent = rotated_queries(query, place, mask, scale, key_tables, KEYS, ROWS)
    still, m_coarse, m_fine, m_exponent = mean_products(query, place, mask, scale, keys, lead, KEYS, ROWS)
    last = tl.load(share + CODED.value.last)
    for first in range(tl.load(share + CODED.value.first), last, TILE):
        token = first + tl.arange(0, TILE)
        inside = token < last
        scores = tile_scores(
            keys, key_tables, lead, leads, token, inside, coarse, fine, exponent, still,
            m_coarse, m_fine, m_exponent, cap, KEYS, CAPPED, TILE,
        )  # fmt: skip
        wanted = inside
        if SKIPS:
            wanted = wanted & (skipped_tokens(share, lead, token, inside) == 0)
        position = token + tl.load(share + CODED.value.position)
        at = out + place[:, None] * tl.load(share + CODED.value.total) + position[None, :]
        tl.store(at, scores, mask=mask[:, None] & wanted[None, :])


@triton.jit
def score_groups(
    shares,
    key_tables,
    query,
    out,
    leads,
    rows,
    scale,
    cap,
    KEYS: tl.constexpr,
    CAPPED: tl.constexpr,
    SKIPS: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Scores as ``score_codes`` leaves them, of keys that share fields in groups of whole tiles: a group's are read once."""
    share = shares + tl.program_id(0) * CODED_FIELDS
    lead, _row, mask, place = program_rows(leads, rows, tl.load(share + CODED.value.sequence), ROWS)
    keys = share + CODED.value.keys
    coarse, fine, exponent = rotated_queries(query, place, mask, scale, key_tables, KEYS, ROWS)
    still, m_coarse, m_fine, m_exponent = mean_products(query, place, mask, scale, keys, lead, KEYS, ROWS)
    begin, last = tl.load(share + CODED.value.first), tl.load(share + CODED.value.last)
    whole = begin - (begin - tl.load(keys + OF_SIDE.value.exact)) % KEYS.value.group_tokens
    at = out + place[:, None] * tl.load(share + CODED.value.total) + tl.load(share + CODED.value.position)
    for first in range(whole, last, KEYS.value.group_tokens):
        words, bit, size, tokens, group_row, fields = group_place(keys, lead, leads, first, KEYS)
        scale_terms, start, wide, turn, power = terms_of(words, fields, key_tables, KEYS)
        factor = tl.reshape(tl.broadcast_to(factor_of(words, bit, size, power), [TILE, 1]), [TILE])
        for part in range(0, KEYS.value.group_tokens, TILE):
            local = part + tl.arange(0, TILE)
            row = tl.minimum(group_row + local, tokens - 1)[:, None]
            high, low = units_of(words, bit, row, scale_terms, start, wide, turn, key_tables, KEYS)
            token = first + local
            scores = unit_scores(coarse, fine, exponent, high, low, factor, KEYS)
            scores = finished_scores(scores, keys, key_tables, token, still, m_coarse, m_fine, m_exponent, cap, KEYS, CAPPED)
            wanted = (token >= begin) & (token < last)
            if SKIPS:
                wanted = wanted & (skipped_tokens(share, lead, token, wanted) == 0)
            tl.store(at + token[None, :], scores, mask=mask[:, None] & wanted[None, :])


@triton.jit
def score_exact(
    shares,
    query,
    out,
    leads,
    rows,
    scale,
    cap,
    HEAD_DIM: tl.constexpr,
    COLUMNS: tl.constexpr,
    DTYPE: tl.constexpr,
    CAPPED: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Scores of ROWS rows of a head with a share of exact tokens, as ``score_codes`` leaves them."""
    share = shares + tl.program_id(0) * EXACT_FIELDS
    lead, _row, mask, place = program_rows(leads, rows, tl.load(share + EXACT.value.sequence), ROWS)
    q = load_queries(query, place, mask, tl.arange(0, COLUMNS), scale, HEAD_DIM)
    last = tl.load(share + EXACT.value.last)
    for first in range(tl.load(share + EXACT.value.first), last, TILE):
        token = first + tl.arange(0, TILE)
        inside = token < last
        position = exact_positions(share, lead, token, inside)
        scores = scores_of_exact(share, lead, token, inside, q, cap, HEAD_DIM, COLUMNS, DTYPE, CAPPED)
        at = out + place[:, None] * tl.load(share + EXACT.value.total) + position[None, :]
        tl.store(at, scores, mask=mask[:, None] & (position >= 0)[None, :])
