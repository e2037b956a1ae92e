"""Law: what the kernels of attention read: shares of tokens as rows of int64, and coded rows as numbers that are not rotated.

A share is the coded or the exact tokens that a program takes, of each head of a sequence; addresses are plain integers, as in
``spans``. Coded rows come as whole numbers v, which are exact in float16, and their factors. Queries, of which float16 holds
but 11 bits, are sums of two float16 numbers. Under RoPE <m_t, q> is a sum over pairs of channels: C cos + S sin of the token's
angle. ``kernels.attention`` tells the formulas.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from pqcodec.kernels.on_triton.numbers import GROUP, OF_QUADS, PAIRS, PAPER_BITS, SPLIT, load_rows, power_of_two, two_factors
from pqcodec.kernels.on_triton.offsets import load_offset, phase_parts
from pqcodec.kernels.on_triton.pairs import channels_of_pair
from pqcodec.kernels.on_triton.paper import paper_coordinates, paper_power, paper_radius
from pqcodec.kernels.on_triton.quads import planes, quad_radius, quad_units
from pqcodec.kernels.on_triton.split import split_radius, split_units


# -- what a launch is told -------------------------------------------------------------------------------------------
class SideShape(NamedTuple):
    """What the kernels are compiled for of keys, or of values: of the header, its ``Tables``, and its ``AffineShape``."""

    coding: int
    head_dim: int
    order: int
    columns: int
    row_bytes: int
    chunk: int
    root_budget: int
    radius_bits: int
    radius_steps: int
    levels: int
    kind_16: int
    quad_bits: int
    offsets: bool
    pairs: int  # of channels that turn; 0: none
    pair_columns: int  # their number, rounded up to a power of two, 8 at the least
    interleaved: bool
    fine: bool  # whether units are sums of two float16 numbers
    native: bool  # whether there are cosines that an NVIDIA GPU computes itself
    interleaved_units: bool  # of pair polar: whether a pair's channels are neighbours
    bits: int  # ... and of the fields of ``AffineShape``; 0 where nothing shares any
    angle_bits: int
    group_tokens: int
    group_channels: int
    groups: int
    group_bytes: int
    zeros: bool
    code_levels: int


class SideTables(NamedTuple):
    """Addresses of a side's tables (``device_tables.Tables``), and the exponent of its radii."""

    path: int
    node_cos: int
    node_sin: int
    node_shift: int
    quad_ints: int
    quad_floats: int
    records: int
    record_floats: int
    circle: int
    mantissas: int
    paper: int
    points: int
    rotation: int
    frequencies: int
    phases: int
    code_levels: int
    radius_exponent: int


class SideShare(NamedTuple):
    """Where a share's keys, or its values, are."""

    stream: int = 0  # address of the stream's first byte
    payload: int = 0  # ... and of its first block
    coded: int = 0  # coded tokens of the stream
    exact: int = 0  # exact tokens before them
    offsets_at: int = 0  # byte of the stream at which the offsets begin
    turn: int = 0  # position of the stream's first token under RoPE, modulo 2^32
    whole_bytes: int = 0  # of a block of a whole chunk
    last_bytes: int = 0  # ... and of the last chunk


class CodedShare(NamedTuple):
    """Coded tokens that a program takes, of each head of a sequence; tokens count from the stream's first one."""

    sequence: int
    total: int  # tokens of the sequence
    first: int  # token of the share
    last: int  # ... plus one
    position: int  # of the stream's first token in the sequence; may be negative where tokens before it are not wanted
    slot: int  # of the share's partial result
    skipped: int  # address of uint8 [leads, tokens]: 1 where a token counts as an exact one; 0: there is none
    tokens: int  # of the stream
    keys: Any  # a SideShare; where it begins, in the kernels
    values: Any


class ExactRowsShare(NamedTuple):
    """Where a share's exact keys, or values, are."""

    start: int = 0  # address of the first head's token 0
    head_bytes: int = 0  # from one head to the next
    token: int = 0  # elements from one token to the next
    channel: int = 0  # ... and from one channel


class ExactShare(NamedTuple):
    """Exact tokens that a program takes, of each head of a sequence; they count from the first of some that are in memory."""

    sequence: int
    total: int  # tokens of the sequence
    first: int  # token of the share
    last: int  # ... plus one
    position: int  # of token 0 in the sequence
    slot: int  # of the share's partial result
    places: int  # address of int64 [leads, ``tokens``], each token's position in the sequence, -1: none; 0: they are in a row
    tokens: int
    keys: Any  # an ExactRowsShare; where it begins, in the kernels
    values: Any


# Where each number stands, in tables of int64
OF_TABLE = tl.constexpr(SideTables(*range(len(SideTables._fields))))
OF_SIDE = tl.constexpr(SideShare(*range(len(SideShare._fields))))
OF_ROWS = tl.constexpr(ExactRowsShare(*range(len(ExactRowsShare._fields))))
CODED = tl.constexpr(CodedShare._make([*range(9), 8 + len(SideShare._fields)]))
EXACT = tl.constexpr(ExactShare._make([*range(9), 8 + len(ExactRowsShare._fields)]))
CODED_FIELDS = tl.constexpr(8 + 2 * len(SideShare._fields))
EXACT_FIELDS = tl.constexpr(8 + 2 * len(ExactRowsShare._fields))


# -- numbers ---------------------------------------------------------------------------------------------------------
@triton.jit
def normal_halves(x):
    """float32 [R, n] as two float16 [R, n], whose sum times 2^exponent it is, and exponents int32 [R]."""
    exponent = (tl.max(tl.abs(x), 1).to(tl.int32, bitcast=True) >> 23) - 127
    exponent = tl.minimum(tl.maximum(exponent, -126), 126)
    x = x * power_of_two(-exponent)[:, None]
    coarse = x.to(tl.float16)
    return coarse, (x - coarse.to(tl.float32)).to(tl.float16), exponent


@triton.jit
def product(coarse, fine, exponent, matrix):
    """Rows as ``normal_halves`` gives them times a matrix of float16: float32."""
    return tl.dot(fine, matrix, tl.dot(coarse, matrix)) * power_of_two(exponent)[:, None]


@triton.jit
def fine_product(coarse, fine, exponent, matrix):
    """The same times a matrix of float32 within -2 .. 2, which is a sum of two float16 numbers as well."""
    high = matrix.to(tl.float16)
    low = (matrix - high.to(tl.float32)).to(tl.float16)
    return tl.dot(coarse, low, tl.dot(fine, high, tl.dot(coarse, high))) * power_of_two(exponent)[:, None]


@triton.jit
def floats(tables, index):
    """A table of float32 by its number in ``SideTables``."""
    return tl.load(tables + index).to(tl.pointer_type(tl.float32))


@triton.jit
def integers(tables, index):
    """A table of int32."""
    return tl.load(tables + index).to(tl.pointer_type(tl.int32))


@triton.jit
def half_floats(tables, index):
    """A table of float16."""
    return tl.load(tables + index).to(tl.pointer_type(tl.float16))


# -- coded rows ------------------------------------------------------------------------------------------------------
@triton.jit
def for_each_group(x, GROUPS: tl.constexpr):
    """[R] -> [R * GROUPS]: each number as often as a row has groups."""
    return tl.reshape(tl.broadcast_to(x[:, None], [x.shape[0], GROUPS]), [x.shape[0] * GROUPS])


@triton.jit
def tile_units(side, tables, lead, leads, token, mask, SIDE: tl.constexpr, TILE: tl.constexpr):
    """Coded rows of some tokens of a stream that rotates, int64 [TILE]: units float16 [TILE, columns], and factors float32."""
    GROUPS: tl.constexpr = SIDE.value.columns // GROUP
    USED: tl.constexpr = SIDE.value.order // GROUP
    ROWS: tl.constexpr = TILE * GROUPS
    payload = tl.load(side + OF_SIDE.value.payload)
    skew = payload & 3
    words = (payload - skew).to(tl.pointer_type(tl.uint32))
    token -= tl.load(side + OF_SIDE.value.exact)
    chunk = token // SIDE.value.chunk
    row = token - chunk * SIDE.value.chunk
    tokens = tl.minimum(tl.load(side + OF_SIDE.value.coded) - chunk * SIDE.value.chunk, SIDE.value.chunk)
    whole = tl.load(side + OF_SIDE.value.whole_bytes)
    size = tl.where(tokens < SIDE.value.chunk, tl.load(side + OF_SIDE.value.last_bytes), whole)
    block = 8 * (skew + chunk * leads * whole + lead * size)
    groups = tl.arange(0, GROUPS)[None, :] + tl.zeros([TILE, 1], tl.int32)
    group = tl.reshape(tl.minimum(groups, USED - 1), [ROWS])
    inside = tl.reshape(mask[:, None] & (groups < USED), [ROWS])
    mantissas = floats(tables, OF_TABLE.value.mantissas)
    if SIDE.value.coding == OF_QUADS:
        signs, indices, radii = planes(block, row, tokens, SIDE.value.order, SIDE.value.quad_bits)
        exponent, mantissa, nothing = quad_radius(words, radii, row, tokens, mask, mantissas)
        quad = tl.arange(0, SIDE.value.columns // 4)[None, :]
        v = quad_units(
            words,
            signs,
            indices,
            tl.minimum(quad, SIDE.value.order // 4 - 1),
            mask,
            half_floats(tables, OF_TABLE.value.points),
            SIDE.value.order,
            SIDE.value.quad_bits,
        )
    elif SIDE.value.coding == SPLIT:
        bit = block + row * (8 * SIDE.value.row_bytes)
        exponent, mantissa, nothing = split_radius(words, bit, mask, mantissas, SIDE.value.radius_bits, SIDE.value.radius_steps)
        v = split_units(
            words,
            for_each_group(bit, GROUPS) + SIDE.value.radius_bits,
            group,
            inside,
            integers(tables, OF_TABLE.value.path),
            floats(tables, OF_TABLE.value.node_cos),
            floats(tables, OF_TABLE.value.node_sin),
            integers(tables, OF_TABLE.value.node_shift),
            integers(tables, OF_TABLE.value.quad_ints),
            floats(tables, OF_TABLE.value.quad_floats),
            integers(tables, OF_TABLE.value.records),
            floats(tables, OF_TABLE.value.record_floats),
            floats(tables, OF_TABLE.value.circle),
            SIDE.value.root_budget,
            SIDE.value.levels,
            SIDE.value.kind_16,
            ROWS,
        )
    else:
        bit = for_each_group(block + row * (8 * SIDE.value.row_bytes), GROUPS) + group * PAPER_BITS
        radius = paper_radius(words, bit, inside)
        power = paper_power(tl.max(tl.reshape(radius, [TILE, GROUPS]), 1))
        radius *= power_of_two(11 - for_each_group(power, GROUPS))
        paper, circle = floats(tables, OF_TABLE.value.paper), floats(tables, OF_TABLE.value.circle)
        v = paper_coordinates(words, bit + 16, radius, inside, paper, circle)
        exponent = power + tl.load(tables + OF_TABLE.value.radius_exponent).to(tl.int32)
        mantissa, nothing = tl.load(mantissas + row * 0), row < 0
    columns = tl.arange(0, SIDE.value.columns)[None, :]
    v = tl.where(columns < SIDE.value.order, tl.reshape(v, [TILE, SIDE.value.columns]), 0.0)
    first, second = two_factors(mantissa, exponent, nothing)
    return v.to(tl.float16), first * second


@triton.jit
def tile_turns(side, tables, token, SIDE: tl.constexpr):
    """cos and sin of the angle of each pair of channels at some tokens, side by side: float32 [TILE, 2 pair_columns]."""
    pair = tl.arange(0, SIDE.value.pair_columns)
    frequencies = tl.load(tables + OF_TABLE.value.frequencies).to(tl.pointer_type(tl.int64))
    frequency = tl.load(frequencies + tl.minimum(pair, SIDE.value.pairs - 1))
    position = token + tl.load(side + OF_SIDE.value.turn)
    cos, sin = phase_parts(position[:, None], frequency[None, :], floats(tables, OF_TABLE.value.phases))
    return tl.reshape(tl.join(cos, sin), [token.shape[0], 2 * SIDE.value.pair_columns])


@triton.jit
def pair_channels(pair, SIDE: tl.constexpr):
    """The two channels of a pair."""
    if SIDE.value.interleaved:
        return 2 * pair, 2 * pair + 1
    else:
        return pair, pair + SIDE.value.pairs


@triton.jit
def side_offset(side, lead, channel, wanted, SIDE: tl.constexpr):
    """The offsets of some channels of a head, float32."""
    stream, at = tl.load(side + OF_SIDE.value.stream), tl.load(side + OF_SIDE.value.offsets_at)
    return load_offset(stream, at, lead, channel, wanted, SIDE.value.head_dim)


@triton.jit
def unit_channels(column, SIDE: tl.constexpr):
    """The channels that units without a rotation stand for: of pair polar the two of a pair side by side."""
    if SIDE.value.coding == PAIRS:
        p, q = channels_of_pair(column // 2, SIDE.value.head_dim, SIDE.value.interleaved_units)
        column = tl.where(column % 2 == 0, p, q)
    return column


# -- queries ---------------------------------------------------------------------------------------------------------
@triton.jit
def load_queries(query, place, mask, channel, scale, HEAD_DIM: tl.constexpr):
    """Some channels of queries times the scale: float32 [R, n]; ``place``: each row's number among all."""
    wanted = mask[:, None] & (channel < HEAD_DIM)[None, :]
    return tl.load(query + place[:, None] * HEAD_DIM + channel[None, :], mask=wanted, other=0.0).to(tl.float32) * scale


@triton.jit
def rotated_queries(query, place, mask, scale, tables, SIDE: tl.constexpr, ROWS: tl.constexpr):
    """R q, as ``normal_halves`` gives it; of a coding without a rotation q, in the order of its units."""
    if SIDE.value.bits > 0:
        units = unit_channels(tl.arange(0, SIDE.value.columns), SIDE)
        found = load_queries(query, place, mask, units, scale, SIDE.value.head_dim)
    else:
        order = tl.arange(0, SIDE.value.columns)[None, :]
        rotation = half_floats(tables, OF_TABLE.value.rotation)
        found = tl.zeros([ROWS, SIDE.value.columns], tl.float32)
        for first in range(0, SIDE.value.head_dim, GROUP):
            channel = first + tl.arange(0, GROUP)
            q = load_queries(query, place, mask, channel, scale, SIDE.value.head_dim)
            at = rotation + order * SIDE.value.columns + channel[:, None]
            r = tl.load(at, mask=(order < SIDE.value.order) & (channel[:, None] >= 0), other=0.0)
            found = tl.dot(q, r.to(tl.float32), found, input_precision="ieee")
    return normal_halves(found)


@triton.jit
def mean_products(query, place, mask, scale, side, lead, SIDE: tl.constexpr, ROWS: tl.constexpr):
    """<m, q> of the channels that do not turn, float32 [R]; the factors of ``tile_turns``, as ``normal_halves`` gives them."""
    still = tl.zeros([ROWS], tl.float32)
    turning = tl.zeros([ROWS, 2 * SIDE.value.pair_columns], tl.float32)
    if SIDE.value.offsets:
        channel = tl.arange(0, SIDE.value.columns)
        wanted = (channel >= 2 * SIDE.value.pairs) & (channel < SIDE.value.head_dim)
        m = side_offset(side, lead, channel, wanted, SIDE)
        still = tl.sum(load_queries(query, place, mask, channel, scale, SIDE.value.head_dim) * m[None, :], 1)
        if SIDE.value.pairs > 0:
            pair = tl.arange(0, SIDE.value.pair_columns)
            p, q = pair_channels(pair, SIDE)
            m_p = side_offset(side, lead, p, pair < SIDE.value.pairs, SIDE)[None, :]
            m_q = side_offset(side, lead, q, pair < SIDE.value.pairs, SIDE)[None, :]
            q_p = load_queries(query, place, mask, p, scale, SIDE.value.head_dim)
            q_q = load_queries(query, place, mask, q, scale, SIDE.value.head_dim)
            of_pairs = tl.join(q_p * m_p + q_q * m_q, q_q * m_p - q_p * m_q)
            turning = tl.reshape(of_pairs, [ROWS, 2 * SIDE.value.pair_columns])
    coarse, fine, exponent = normal_halves(turning)
    return still, coarse, fine, exponent


# -- exact tokens ---------------------------------------------------------------------------------------------------
@triton.jit
def skipped_tokens(share, lead, token, inside):
    """Which of some tokens of a stream count among the exact ones."""
    address, tokens = tl.load(share + CODED.value.skipped), tl.load(share + CODED.value.tokens)
    at = address.to(tl.pointer_type(tl.uint8)) + lead * tokens + token
    return tl.load(at, mask=inside & (address + 0 * token != 0), other=0) > 0


@triton.jit
def exact_positions(share, lead, token, inside):
    """Where exact tokens stand in their sequence, int64 [TILE]; -1: nowhere."""
    places, tokens = tl.load(share + EXACT.value.places), tl.load(share + EXACT.value.tokens)
    at = places.to(tl.pointer_type(tl.int64)) + lead * tokens + token
    listed = inside & (places + 0 * token != 0)
    in_a_row = tl.where(inside, token + tl.load(share + EXACT.value.position), -1)
    return tl.where(listed, tl.load(at, mask=listed, other=-1), in_a_row)


@triton.jit
def load_exact(side, lead, token, inside, HEAD_DIM: tl.constexpr, COLUMNS: tl.constexpr, DTYPE: tl.constexpr):
    """Exact keys or values of some tokens of a head: float32 [TILE, COLUMNS]."""
    channel = tl.arange(0, COLUMNS)
    start = tl.load(side + OF_ROWS.value.start) + lead * tl.load(side + OF_ROWS.value.head_bytes)
    columns = channel * tl.load(side + OF_ROWS.value.channel)
    mask = inside[:, None] & (channel < HEAD_DIM)[None, :]
    return load_rows(start, token, tl.load(side + OF_ROWS.value.token), columns, mask, DTYPE)
