"""Law: rows whose groups share affine fields as kernels of attention read them: units in float16, and factors.

A unit is a number over the power of two that brings the largest one which its fields allow below 2^15, rounded to float16; of
tensors of float32 it is the sum of two such numbers. Pairs stand side by side. Where a tile lies in one group of tokens, its
fields are read once.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import libdevice

from pqcodec.kernels.on_triton.affine import fields_bit, finite_half, half_at, stored_exponent
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
def row_words(words, bit, row, SIDE: tl.constexpr):
    """The codes of rows [R, 1] of blocks that begin at ``bit``, four to a word, or two of more than 8 bits: uint32 [n].

    They are in a row, so that no Triton lets neighbouring lanes read words of different rows.
    """
    CHANNELS: tl.constexpr = 2 if SIDE.value.coding == PAIRS else 1  # of a code
    COUNT: tl.constexpr = SIDE.value.order // CHANNELS
    COLUMNS: tl.constexpr = SIDE.value.columns // CHANNELS
    TOGETHER: tl.constexpr = 2 if SIDE.value.bits > 8 else 4
    index = tl.minimum(tl.arange(0, COLUMNS // TOGETHER), COUNT // TOGETHER - 1)[None, :]
    place = bit + row * (8 * SIDE.value.row_bytes) + index * (TOGETHER * SIDE.value.bits)
    return words_at(words, tl.reshape(place, [row.shape[0] * (COLUMNS // TOGETHER)]))


@triton.jit
def shifted(word, FROM: tl.constexpr, TO: tl.constexpr):
    """A word whose bit FROM stands at TO."""
    if FROM > TO:
        return word >> (FROM - TO)
    else:
        return word << (TO - FROM)


@triton.jit
def codes_of(word, TO: tl.constexpr, SIDE: tl.constexpr):
    """The codes of ``row_words``, uint32 [R, COLUMNS] that hold them from bit TO on, between other bits."""
    BITS: tl.constexpr = SIDE.value.bits
    COLUMNS: tl.constexpr = SIDE.value.columns // 2 if SIDE.value.coding == PAIRS else SIDE.value.columns
    if BITS > 8:
        codes = tl.join(shifted(word, 0, TO), shifted(word, BITS, TO))
    else:
        even = tl.join(shifted(word, 0, TO), shifted(word, 2 * BITS, TO))
        odd = tl.join(shifted(word, BITS, TO), shifted(word, 3 * BITS, TO))
        codes = tl.join(even, odd)
    return tl.reshape(codes, [word.shape[0] * (2 if BITS > 8 else 4) // COLUMNS, COLUMNS])


@triton.jit
def row_fields(words, bit, COUNT: tl.constexpr, COLUMNS: tl.constexpr):
    """COUNT fields of 16 bits that begin at ``bit`` [R, 1], int32 [R, COLUMNS]; those from COUNT on are some of them again."""
    index = tl.minimum(tl.arange(0, COLUMNS // 4), (COUNT - 1) // 4)[None, :]
    place = tl.reshape(bit + 64 * index, [bit.shape[0] * (COLUMNS // 4)])
    two = tl.join(words_at(words, place), words_at(words, place + 32))
    return tl.reshape(tl.join(two & 0xFFFF, two >> 16), [bit.shape[0], COLUMNS]).to(tl.int32)


@triton.jit
def one_and(codes, FIRST: tl.constexpr, LAST: tl.constexpr, one):
    """1 and the bits of codes from FIRST on, before LAST, as digits behind it: float32. ``one``: the bits of 1."""
    return ((codes & ((1 << LAST) - (1 << FIRST))) | one).to(tl.float32, bitcast=True)


# -- numbers ---------------------------------------------------------------------------------------------------------
@triton.jit
def unit_power(bound):
    """Exponents of the powers of two that bring numbers up to ``bound`` [R, n] below 2^15 in each row: int32 [R, 1]."""
    if bound.shape[0] == 1:  # noqa: SIM108 - one number, which every layout has
        most = tl.max(bound) + tl.zeros([1, 1], tl.float32)
    else:
        most = tl.max(bound, 1)[:, None]
    exponent = (most.to(tl.int32, bitcast=True) >> 23) - 127
    return tl.minimum(UNIT_BITS - tl.maximum(exponent, -100), 126)


@triton.jit
def pair_terms(words, fields, SIDE: tl.constexpr):
    """What makes units of the pairs of groups whose fields begin at bits ``fields`` [R, 1], [R, columns / 2] each: scale and
    start of radii, scale and start of angles (``native``: in radians), and the exponents of the units' powers [R, 1].
    """
    COUNT: tl.constexpr = SIDE.value.order // 2
    COLUMNS: tl.constexpr = SIDE.value.columns // 2
    RADII: tl.constexpr = 1 << (SIDE.value.bits - SIDE.value.angle_bits)
    CODES: tl.constexpr = 1 << SIDE.value.bits
    start = finite_half(row_fields(words, fields, COUNT, COLUMNS))
    step = finite_half(row_fields(words, fields + 16 * COUNT, COUNT, COLUMNS))
    first = row_fields(words, fields + 32 * COUNT, COUNT, COLUMNS)
    wide = row_fields(words, fields + 48 * COUNT, COUNT, COLUMNS)
    power = unit_power(tl.abs(start) + RADII * tl.abs(step))
    start, step = start * power_of_two(power), step * power_of_two(power)
    start += (0.5 - RADII) * step
    if SIDE.value.native:
        turn = (first + (wide >> 1) - wide * CODES) * RADIANS
        return RADII * step, start, wide * CODES * RADIANS, turn, power
    else:
        return RADII * step, start, wide, first, power


@triton.jit
def pair_units(word, radii, start, wide, first, phases, SIDE: tl.constexpr):
    """Codes of pairs, as ``row_words`` gives them, by their ``pair_terms`` as units, float32 [R, columns]."""
    BITS: tl.constexpr = SIDE.value.bits
    BEHIND: tl.constexpr = 23 - BITS  # a code is the first digits behind a 1: its radius, and then its angle
    one = tl.load(phases).to(tl.uint32, bitcast=True)  # a cosine of 0; as a constant it would take an instruction at every use
    codes = codes_of(word, BEHIND, SIDE)
    radius = one_and(codes, BEHIND + SIDE.value.angle_bits, 23, one) * radii + start
    if SIDE.value.native:  # a thousandth of a float16's last digit
        angle = one_and(codes, BEHIND, BEHIND + SIDE.value.angle_bits, one) * wide + first
        cos, sin = libdevice.fast_cosf(angle), libdevice.fast_sinf(angle)
    else:
        cell = ((codes >> BEHIND) & ((1 << SIDE.value.angle_bits) - 1)).to(tl.int32)
        cos, sin = turn_parts((first + ((2 * cell + 1) * wide >> 1)) & (TURN - 1), phases)
    units = tl.join(radius * cos, radius * sin)
    return tl.reshape(units, [units.shape[0], SIDE.value.columns])


@triton.jit
def scalar_terms(words, fields, levels, SIDE: tl.constexpr):
    """The same of scalar coding, [R, columns] each: scales and zeros, twice, and the exponents of the units' powers [R, 1]."""
    COLUMNS: tl.constexpr = SIDE.value.columns
    WIDTH: tl.constexpr = min(SIDE.value.group_channels, COLUMNS)
    LEVELS: tl.constexpr = 1 << SIDE.value.bits
    group = tl.arange(0, COLUMNS // WIDTH)[None, :] + 0 * fields
    at, there = fields + 16 * group, group < SIDE.value.groups
    step = half_at(words, at, there)
    zero = step * 0
    if SIDE.value.zeros:
        zero = half_at(words, at + 16 * SIDE.value.groups, there)
    most = 1.0 * LEVELS
    if SIDE.value.code_levels > 0:
        most = tl.maximum(tl.abs(tl.load(levels)), tl.abs(tl.load(levels + (LEVELS - 1))))
    power = unit_power(most * tl.abs(step) + tl.abs(zero))
    step = for_each_channel(step * power_of_two(power), COLUMNS)
    zero = for_each_channel(zero * power_of_two(power), COLUMNS)
    return step, zero, step, zero, power


@triton.jit
def scalar_units(word, step, zero, levels, SIDE: tl.constexpr):
    """Codes of numbers by their ``scalar_terms`` as units, float32 [R, columns]."""
    code = (codes_of(word, 0, SIDE) & ((1 << SIDE.value.bits) - 1)).to(tl.int32)
    if SIDE.value.code_levels > 0:
        level = tl.load(levels + code)
    elif SIDE.value.zeros:
        level = code.to(tl.float32)
    else:
        level = (code - (1 << SIDE.value.bits >> 1)).to(tl.float32)
    return level * step + zero


# -- rows ------------------------------------------------------------------------------------------------------------
@triton.jit
def terms_of(words, fields, tables, SIDE: tl.constexpr):
    """``pair_terms`` or ``scalar_terms``."""
    if SIDE.value.coding == PAIRS:
        return pair_terms(words, fields, SIDE)
    else:
        return scalar_terms(words, fields, floats(tables, OF_TABLE.value.code_levels), SIDE)


@triton.jit
def units_of(words, bit, row, scale, start, wide, first, tables, SIDE: tl.constexpr):
    """Units of rows [R, 1] of blocks that begin at ``bit``, by their ``terms_of``: two float16 numbers [R, columns] each."""
    word = row_words(words, bit, row, SIDE)
    if SIDE.value.coding == PAIRS:
        units = pair_units(word, scale, start, wide, first, floats(tables, OF_TABLE.value.phases), SIDE)
    else:
        units = scalar_units(word, scale, start, floats(tables, OF_TABLE.value.code_levels), SIDE)
    high = units.to(tl.float16)
    low = high
    if SIDE.value.fine:
        low = (units - high.to(tl.float32)).to(tl.float16)
    return high, low


@triton.jit
def row_places(side, lead, leads, place, SIDE: tl.constexpr):
    """Of coded tokens number ``place``: what is before their blocks in the payload, the blocks' bytes and tokens, rows."""
    coded = tl.load(side + OF_SIDE.value.coded)
    chunk = place // SIDE.value.chunk
    row = (place - chunk * SIDE.value.chunk).to(tl.int32)
    tokens = tl.minimum(coded - chunk * SIDE.value.chunk, SIDE.value.chunk).to(tl.int32)
    whole = tl.load(side + OF_SIDE.value.whole_bytes)
    size = tl.where(tokens < SIDE.value.chunk, tl.load(side + OF_SIDE.value.last_bytes), whole).to(tl.int32)
    return chunk * leads * whole + lead * size, size, tokens, row


@triton.jit
def factor_of(words, bit, size, power):
    """What units are multiplied by, float32 [R, 1]; ``bit``: of blocks of so many bytes, ``power``: of ``terms_of``."""
    exponent = stored_exponent(words, bit + 8 * (size - CHECKSUM_BYTES), LEAST_EXPONENT, MOST_EXPONENT)
    return power_of_two(exponent + power * 0) * power_of_two(-power)


@triton.jit
def affine_units(side, tables, lead, leads, token, SIDE: tl.constexpr):
    """Units and factors as ``side_units`` gives them, each row's fields read for itself; beyond the stream those of ends."""
    place = tl.maximum(token - tl.load(side + OF_SIDE.value.exact), 0)
    place = tl.minimum(place, tl.load(side + OF_SIDE.value.coded) - 1)[:, None]
    before, size, tokens, row = row_places(side, lead, leads, place, SIDE)
    payload = tl.load(side + OF_SIDE.value.payload)
    skew = payload & 3
    words = (payload - skew).to(tl.pointer_type(tl.uint32))
    bit = 8 * (skew + before)
    scale, start, wide, first, power = terms_of(words, fields_bit(bit, tokens, row, SIDE), tables, SIDE)
    high, low = units_of(words, bit, row, scale, start, wide, first, tables, SIDE)
    return high, low, tl.reshape(factor_of(words, bit, size, power), [token.shape[0]])


@triton.jit
def group_place(side, lead, leads, first, SIDE: tl.constexpr):
    """The group of tokens that begins with the token ``first``: its block's words and first bit in them [1, 1], bytes, tokens,
    the group's first row, and where its fields begin [1, 1].
    """
    before, size, tokens, row = row_places(side, lead, leads, first - tl.load(side + OF_SIDE.value.exact), SIDE)
    address = tl.load(side + OF_SIDE.value.payload) + before
    skew = (address & 3).to(tl.int32)
    words = (address - skew).to(tl.pointer_type(tl.uint32))
    bit = 8 * skew + tl.zeros([1, 1], tl.int32)
    return words, bit, size, tokens, row, fields_bit(bit, tokens, row, SIDE)


@triton.jit
def side_units(side, tables, lead, leads, token, mask, SIDE: tl.constexpr, TILE: tl.constexpr):
    """Coded rows of some tokens of a stream, int64 [TILE]: units, as two float16 numbers [TILE, columns] each, and factors.

    The second numbers count where SIDE is fine.
    """
    if SIDE.value.bits > 0:
        high, low, factor = affine_units(side, tables, lead, leads, token, SIDE)
    else:
        high, factor = tile_units(side, tables, lead, leads, token, mask, SIDE, TILE)
        low = high
    return high, low, factor


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
