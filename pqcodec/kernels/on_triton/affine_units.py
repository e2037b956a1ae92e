"""Law: rows whose groups share affine fields as kernels of attention read them: units in float16, and factors.

A unit is a number over the power of two that brings the largest one which its fields allow below 2^15, rounded to float16; of
tensors of float32 it is the sum of two such numbers. Pairs stand side by side. Where a tile lies in one group of tokens, its
fields are read once.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import libdevice

from pqcodec.kernels.on_triton.affine import block_exponent
from pqcodec.kernels.on_triton.bits import get_word
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
from pqcodec.kernels.on_triton.pairs import pair_fields
from pqcodec.kernels.on_triton.scalar import for_each_channel, scalar_fields
from pqcodec.kernels.on_triton.shares import OF_SIDE, OF_TABLE, floats, tile_units


# -- codes -----------------------------------------------------------------------------------------------------------
@triton.jit
def each_code(words, bit, mask, BITS: tl.constexpr, COLUMNS: tl.constexpr):
    """Codes of rows that begin at ``bit`` [R, 1], uint32 [R, COLUMNS]; bits of later ones stand above each.

    A word is read for four of them, or for two of more than 8 bits.
    """
    if BITS > 8:
        at = bit + (2 * BITS) * tl.arange(0, COLUMNS // 2)[None, :]
        word = get_word(words, at, mask & (at >= 0))
        codes = tl.join(word, word >> BITS)
    else:
        at = bit + (4 * BITS) * tl.arange(0, COLUMNS // 4)[None, :]
        word = get_word(words, at, mask & (at >= 0))
        two = tl.join(word, word >> (2 * BITS))
        codes = tl.join(two, two >> BITS)
    return tl.reshape(codes, [word.shape[0], COLUMNS])


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
def pair_units(words, bit, rows, tokens, row, mask, phases, SIDE: tl.constexpr):
    """Pairs of rows that begin at bits ``rows`` [R, 1], as units float32 [R, columns], and the exponents of their powers.

    ``bit``: of their blocks, of so many tokens; ``row``: a row of the group of each, or of all of them.
    """
    PAIR_COLUMNS: tl.constexpr = SIDE.value.columns // 2
    RADIUS_BITS: tl.constexpr = SIDE.value.bits - SIDE.value.angle_bits
    RADII: tl.constexpr = 1 << RADIUS_BITS
    ANGLES: tl.constexpr = 1 << SIDE.value.angle_bits
    codes = each_code(words, rows, mask, SIDE.value.bits, PAIR_COLUMNS)
    pair = tl.arange(0, PAIR_COLUMNS)[None, :]
    there = (pair < SIDE.value.groups) & (row >= 0)
    start, step, first, wide = pair_fields(words, bit, tokens, row, pair, there, SIDE)
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
def scalar_units(words, bit, rows, tokens, row, mask, levels, SIDE: tl.constexpr):
    """The same of scalar coding."""
    COLUMNS: tl.constexpr = SIDE.value.columns
    WIDTH: tl.constexpr = min(SIDE.value.group_channels, COLUMNS)
    LEVELS: tl.constexpr = 1 << SIDE.value.bits
    codes = (each_code(words, rows, mask, SIDE.value.bits, COLUMNS) & (LEVELS - 1)).to(tl.int32)
    group = tl.arange(0, COLUMNS // WIDTH)[None, :]
    there = (group < SIDE.value.groups) & (row >= 0)
    step, zero = scalar_fields(words, bit, tokens, row, group * WIDTH, there, SIDE)
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
def affine_units(
    side, tables, lead, leads, first, token, mask, SIDE: tl.constexpr, TILE: tl.constexpr, ALIGNED: tl.constexpr
):
    """Units and factors as ``side_units`` gives them."""
    payload = tl.load(side + OF_SIDE.value.payload)
    exact = tl.load(side + OF_SIDE.value.exact)
    if ALIGNED:
        place = first - exact
    else:
        place = (token - exact)[:, None]
    chunk = place // SIDE.value.chunk
    row = (place - chunk * SIDE.value.chunk).to(tl.int32)
    tokens = tl.minimum(tl.load(side + OF_SIDE.value.coded) - chunk * SIDE.value.chunk, SIDE.value.chunk).to(tl.int32)
    whole = tl.load(side + OF_SIDE.value.whole_bytes)
    size = tl.where(tokens < SIDE.value.chunk, tl.load(side + OF_SIDE.value.last_bytes), whole).to(tl.int32)
    before = chunk * leads * whole + lead * size
    if ALIGNED:  # then places in the one block take 32 bits
        skew = ((payload + before) & 3).to(tl.int32)
        words = (payload + before - skew).to(tl.pointer_type(tl.uint32))
        row += tl.zeros([1, 1], tl.int32)
        bit = 8 * skew
        rows = bit + (row + tl.arange(0, TILE)[:, None]) * (8 * SIDE.value.row_bytes)
    else:
        skew = payload & 3
        words = (payload - skew).to(tl.pointer_type(tl.uint32))
        bit = 8 * (skew + before)
        rows = bit + row * (8 * SIDE.value.row_bytes)
        row = tl.where(mask[:, None], row, -1)
    if SIDE.value.coding == PAIRS:
        phases = floats(tables, OF_TABLE.value.phases)
        units, power = pair_units(words, bit, rows, tokens, row, mask[:, None], phases, SIDE)
    else:
        levels = floats(tables, OF_TABLE.value.code_levels)
        units, power = scalar_units(words, bit, rows, tokens, row, mask[:, None], levels, SIDE)
    end = tl.where(row >= 0, bit + 8 * (size - CHECKSUM_BYTES), -1)
    exponent = block_exponent(words, end, LEAST_EXPONENT, MOST_EXPONENT)
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
        units, factor = affine_units(side, tables, lead, leads, first, token, mask, SIDE, TILE, ALIGNED)
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
