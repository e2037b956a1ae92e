"""Law: rows whose groups share affine fields as kernels of attention read them: units in float16, and factors.

A unit is a number over the power of two that brings the largest one which its fields allow below 2^15, rounded to float16; of
tensors of float32 it is the sum of two such numbers. Pairs stand side by side. Where a tile lies in one group of tokens, its
fields are read once.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import libdevice

from pqcodec.kernels.on_triton.affine import block_exponent, fields_bit, finite_half, half_at
from pqcodec.kernels.on_triton.numbers import (
    CHECKSUM_BYTES,
    LEAST_EXPONENT,
    MOST_EXPONENT,
    PAIRS,
    RADIANS,
    TURN,
    UNIT_BITS,
    power_of_two,
)
from pqcodec.kernels.on_triton.offsets import turn_parts
from pqcodec.kernels.on_triton.scalar import for_each_channel
from pqcodec.kernels.on_triton.shares import OF_SIDE, OF_TABLE, floats, tile_units


# -- codes -----------------------------------------------------------------------------------------------------------
@triton.jit
def words_at(words, bit):
    """32 bits that begin at ``bit``, uint32, where more bytes of the same block follow them."""
    shift = (bit & 31).to(tl.uint32)
    at = words + (bit >> 5)
    return (tl.load(at) >> shift) | ((tl.load(at + 1) << 1) << (31 - shift))


@triton.jit
def row_codes(words, bit, row, COUNT: tl.constexpr, COLUMNS: tl.constexpr, SIDE: tl.constexpr):
    """The COUNT codes of rows [R, 1] of blocks that begin at ``bit``, uint32 [R, COLUMNS]; bits of later ones stand above each.

    A word is read for four of them, or for two of more than 8 bits.
    """
    BITS: tl.constexpr = SIDE.value.bits
    TOGETHER: tl.constexpr = 2 if BITS > 8 else 4
    index = tl.minimum(tl.arange(0, COLUMNS // TOGETHER), COUNT // TOGETHER - 1)[None, :]
    word = words_at(words, bit + row * (8 * SIDE.value.row_bytes) + index * (TOGETHER * BITS))
    if BITS > 8:
        codes = tl.join(word, word >> BITS)
    else:
        two = tl.join(word, word >> (2 * BITS))
        codes = tl.join(two, two >> BITS)
    return tl.reshape(codes, [word.shape[0], COLUMNS])


@triton.jit
def row_fields(words, bit, COUNT: tl.constexpr, COLUMNS: tl.constexpr):
    """COUNT fields of 16 bits that begin at ``bit`` [R, 1], int32 [R, COLUMNS]; those from COUNT on are some of them again."""
    index = tl.minimum(tl.arange(0, COLUMNS // 4), (COUNT - 1) // 4)[None, :]
    two = tl.join(words_at(words, bit + 64 * index), words_at(words, bit + 64 * index + 32))
    return tl.reshape(tl.join(two & 0xFFFF, two >> 16), [two.shape[0], COLUMNS]).to(tl.int32)


@triton.jit
def one_and(codes, SHIFT: tl.constexpr, BITS: tl.constexpr):
    """1 + k / 2^BITS of the BITS bits k of a code above the lowest SHIFT, float32: its bits are put there, not converted."""
    MASK: tl.constexpr = ((1 << BITS) - 1) << (23 - BITS)
    return (((codes << (23 - BITS - SHIFT)) & MASK) | 0x3F800000).to(tl.float32, bitcast=True)


# -- numbers ---------------------------------------------------------------------------------------------------------
@triton.jit
def unit_power(bound):
    """Exponents of the powers of two that bring numbers up to ``bound`` [R, n] below 2^15 in each row: int32 [R, 1]."""
    exponent = (tl.max(bound, 1).to(tl.int32, bitcast=True) >> 23) - 127
    return tl.minimum(UNIT_BITS - tl.maximum(exponent, -100), 126)[:, None]


@triton.jit
def pair_units(words, bit, row, fields, phases, SIDE: tl.constexpr):
    """Pairs of rows [R, 1] as units float32 [R, columns], and the exponents of their powers; ``bit``: of their blocks.

    ``fields``: bits at which the fields of each row's group begin, [R, 1], or of all rows' [1, 1].
    """
    PAIRS_OF_ROW: tl.constexpr = SIDE.value.order // 2
    COLUMNS: tl.constexpr = SIDE.value.columns // 2
    RADIUS_BITS: tl.constexpr = SIDE.value.bits - SIDE.value.angle_bits
    RADII: tl.constexpr = 1 << RADIUS_BITS
    ANGLES: tl.constexpr = 1 << SIDE.value.angle_bits
    codes = row_codes(words, bit, row, PAIRS_OF_ROW, COLUMNS, SIDE)
    start = finite_half(row_fields(words, fields, PAIRS_OF_ROW, COLUMNS))
    step = finite_half(row_fields(words, fields + 16 * PAIRS_OF_ROW, PAIRS_OF_ROW, COLUMNS))
    first = row_fields(words, fields + 32 * PAIRS_OF_ROW, PAIRS_OF_ROW, COLUMNS)
    wide = row_fields(words, fields + 48 * PAIRS_OF_ROW, PAIRS_OF_ROW, COLUMNS)
    power = unit_power(tl.abs(start) + RADII * tl.abs(step))
    start, step = start * power_of_two(power), step * power_of_two(power)
    radius = one_and(codes, SIDE.value.angle_bits, RADIUS_BITS) * (RADII * step) + (start + (0.5 - RADII) * step)
    if SIDE.value.native:  # a thousandth of a float16's last digit
        spread, begin = wide * ANGLES, first + (wide >> 1) - wide * ANGLES
        angle = one_and(codes, 0, SIDE.value.angle_bits) * (spread * RADIANS) + begin * RADIANS
        cos, sin = libdevice.fast_cosf(angle), libdevice.fast_sinf(angle)
    else:
        cell = (codes & (ANGLES - 1)).to(tl.int32)
        cos, sin = turn_parts((first + ((2 * cell + 1) * wide >> 1)) & (TURN - 1), phases)
    units = tl.join(radius * cos, radius * sin)
    return tl.reshape(units, [units.shape[0], SIDE.value.columns]), power


@triton.jit
def scalar_units(words, bit, row, fields, levels, SIDE: tl.constexpr):
    """The same of scalar coding."""
    COLUMNS: tl.constexpr = SIDE.value.columns
    WIDTH: tl.constexpr = min(SIDE.value.group_channels, COLUMNS)
    LEVELS: tl.constexpr = 1 << SIDE.value.bits
    codes = (row_codes(words, bit, row, SIDE.value.order, COLUMNS, SIDE) & (LEVELS - 1)).to(tl.int32)
    group = tl.arange(0, COLUMNS // WIDTH)[None, :] + 0 * fields
    at, there = fields + 16 * group, group < SIDE.value.groups
    step = half_at(words, at, there)
    zero = step * 0
    if SIDE.value.zeros:
        zero = half_at(words, at + 16 * SIDE.value.groups, there)
    most = 1.0 * LEVELS
    if SIDE.value.code_levels > 0:
        level = tl.load(levels + codes)
        most = tl.maximum(tl.abs(tl.load(levels)), tl.abs(tl.load(levels + (LEVELS - 1))))
    elif SIDE.value.zeros:
        level = codes.to(tl.float32)
    else:
        level = (codes - LEVELS // 2).to(tl.float32)
    power = unit_power(most * tl.abs(step) + tl.abs(zero))
    step, zero = step * power_of_two(power), zero * power_of_two(power)
    return level * for_each_channel(step, COLUMNS) + for_each_channel(zero, COLUMNS), power


@triton.jit
def affine_units(side, tables, lead, leads, first, token, SIDE: tl.constexpr, TILE: tl.constexpr, ALIGNED: tl.constexpr):
    """Units and factors as ``side_units`` gives them; of tokens that the stream has not got, those of others."""
    payload = tl.load(side + OF_SIDE.value.payload)
    exact, coded = tl.load(side + OF_SIDE.value.exact), tl.load(side + OF_SIDE.value.coded)
    if ALIGNED:
        place = first - exact
    else:
        place = tl.minimum(tl.maximum(token - exact, 0), coded - 1)[:, None]
    chunk = place // SIDE.value.chunk
    row = (place - chunk * SIDE.value.chunk).to(tl.int32)
    tokens = tl.minimum(coded - chunk * SIDE.value.chunk, SIDE.value.chunk).to(tl.int32)
    whole = tl.load(side + OF_SIDE.value.whole_bytes)
    size = tl.where(tokens < SIDE.value.chunk, tl.load(side + OF_SIDE.value.last_bytes), whole).to(tl.int32)
    before = chunk * leads * whole + lead * size
    if ALIGNED:  # then places in the one block take 32 bits
        skew = ((payload + before) & 3).to(tl.int32)
        words = (payload + before - skew).to(tl.pointer_type(tl.uint32))
        bit = 8 * skew + tl.zeros([1, 1], tl.int32)
        rows = tl.minimum(row + tl.arange(0, TILE)[:, None], tokens - 1)
    else:
        skew = payload & 3
        words = (payload - skew).to(tl.pointer_type(tl.uint32))
        bit = 8 * (skew + before)
        rows = row
    fields = fields_bit(bit, tokens, row, SIDE)
    if SIDE.value.coding == PAIRS:
        units, power = pair_units(words, bit, rows, fields, floats(tables, OF_TABLE.value.phases), SIDE)
    else:
        units, power = scalar_units(words, bit, rows, fields, floats(tables, OF_TABLE.value.code_levels), SIDE)
    exponent = block_exponent(words, bit + 8 * (size - CHECKSUM_BYTES), LEAST_EXPONENT, MOST_EXPONENT)
    factor = power_of_two(exponent + power * 0) * power_of_two(-power)
    return units, tl.reshape(tl.broadcast_to(factor, [TILE, 1]), [TILE])


@triton.jit
def side_units(
    side, tables, lead, leads, first, token, mask, SIDE: tl.constexpr, TILE: tl.constexpr, ALIGNED: tl.constexpr
):
    """Coded rows of some tokens of a stream, int64 [TILE]: units, as two float16 numbers [TILE, columns] each, and factors [TILE].

    The second numbers count where SIDE is fine. ALIGNED: the tile begins at the token ``first``, and lies in one group of tokens.
    """
    if SIDE.value.bits > 0:
        units, factor = affine_units(side, tables, lead, leads, first, token, SIDE, TILE, ALIGNED)
        high = units.to(tl.float16)
        low = high
        if SIDE.value.fine:
            low = (units - high.to(tl.float32)).to(tl.float16)
    else:
        high, factor = tile_units(side, tables, lead, leads, token, mask, SIDE, TILE)
        low = high
    return high, low, factor


@triton.jit
def first_tile(side, token, SIDE: tl.constexpr, TILE: tl.constexpr):
    """The token at which the tile of a token begins: where whole tiles make a group, one of them, else its own."""
    if SIDE.value.group_tokens % TILE == 0:
        token -= (token - tl.load(side + OF_SIDE.value.exact)) % TILE
    return token


@triton.jit
def side_product(coarse, fine, exponent, high, low, SIDE: tl.constexpr):
    """Rows as ``normal_halves`` gives them times units as ``side_units`` gives them, float32."""
    found = tl.dot(fine, high, tl.dot(coarse, high))
    if SIDE.value.fine:
        found = tl.dot(coarse, low, found)
    return found * power_of_two(exponent)[:, None]


@triton.jit
def unit_scores(coarse, fine, exponent, high, low, factor, SIDE: tl.constexpr):
    """Rows of queries [R, columns], as ``normal_halves`` gives them, times units of a tile: float32 [R, TILE].

    Of rows that share fields, units stand on the left, where there are many, and both halves of queries in one matrix.
    """
    if SIDE.value.bits > 0:
        ROWS: tl.constexpr = coarse.shape[0]
        halves = tl.reshape(tl.permute(tl.join(coarse, fine), (2, 0, 1)), [2 * ROWS, coarse.shape[1]])
        found = tl.dot(high, tl.trans(halves))
        if SIDE.value.fine:
            found = tl.dot(low, tl.trans(halves), found)
        found = tl.trans(tl.sum(tl.reshape(found, [high.shape[0], 2, ROWS]), 1)) * power_of_two(exponent)[:, None]
    else:
        found = side_product(coarse, fine, exponent, tl.trans(high), tl.trans(low), SIDE)
    return found * factor[None, :]
