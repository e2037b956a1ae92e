"""Law: pair polar coding (SPEC 14) in Triton: radius and angle of two channels, whose ranges a group of tokens shares.

Encoders do the float32 operations of ``codings.pairs`` in the same order, and so write the same bytes.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pqcodec.kernels.on_triton.affine import codes_at, fields_bit, half_at, put_half, short_at
from pqcodec.kernels.on_triton.bits import put_field
from pqcodec.kernels.on_triton.numbers import NONE, TURN, TURN_POLYNOMIAL, TURN_TINY
from pqcodec.kernels.on_triton.offsets import turn_parts


@triton.jit
def channels_of_pair(pair, HEAD_DIM: tl.constexpr, INTERLEAVED: tl.constexpr):
    """The two channels of pairs; those from head_dim on stand for none."""
    HALF: tl.constexpr = (HEAD_DIM + 1) // 2
    if INTERLEAVED:
        return 2 * pair, 2 * pair + 1
    else:
        there = pair < HALF
        return tl.where(there, pair, 2 * pair), tl.where(there, pair + HALF, 2 * pair + 1)


# -- decoding --------------------------------------------------------------------------------------------------------
@triton.jit
def pair_fields(words, block, tokens, row, pair, mask, SHAPE: tl.constexpr):
    """Start and step of the radii, float32, and of the angles, int32, of pairs [1, P] in the groups of rows [R, 1]."""
    bit = fields_bit(block, tokens, row, SHAPE) + 16 * pair
    start, step = half_at(words, bit, mask), half_at(words, bit + 16 * SHAPE.value.groups, mask)
    first, wide = short_at(words, bit + 32 * SHAPE.value.groups, mask), short_at(words, bit + 48 * SHAPE.value.groups, mask)
    return start, step, first, wide


@triton.jit
def pair_numbers(words, block, tokens, row, pair, mask, phases, SHAPE: tl.constexpr):
    """The two numbers of pairs [1, P] of rows [R, 1]: float32 [R, P] each."""
    code = codes_at(words, block + row * (8 * SHAPE.value.row_bytes), pair, mask, SHAPE.value.bits)
    start, step, first, wide = pair_fields(words, block, tokens, row, pair, mask, SHAPE)
    radius = ((code >> SHAPE.value.angle_bits).to(tl.float32) + 0.5) * step + start
    cell = code & ((1 << SHAPE.value.angle_bits) - 1)
    cos, sin = turn_parts((first + ((2 * cell + 1) * wide >> 1)) & (TURN - 1), phases)
    return radius * cos, radius * sin


# -- encoding --------------------------------------------------------------------------------------------------------
@triton.jit
def exact_turns(x, y):
    """Angle of (x, y) in turns, 0 .. 1, float32: a polynomial, in the operations of every kernel."""
    a, b = tl.abs(x), tl.abs(y)
    slope = tl.div_rn(tl.minimum(a, b), tl.maximum(a, b) + TURN_TINY)
    square = slope * slope
    found = square * TURN_POLYNOMIAL.value[0] + TURN_POLYNOMIAL.value[1]
    found = found * square + TURN_POLYNOMIAL.value[2]
    found = found * square + TURN_POLYNOMIAL.value[3]
    found = found * square + TURN_POLYNOMIAL.value[4]
    found = found * square + TURN_POLYNOMIAL.value[5]
    found = found * square + TURN_POLYNOMIAL.value[6]
    found = (found * square + TURN_POLYNOMIAL.value[7]) * slope
    found = tl.where(b > a, 0.25 - found, found)
    found = tl.where(x < 0, 0.5 - found, found)
    return tl.where(y < 0, 1.0 - found, found)


@triton.jit
def cells_behind(ahead, step, COUNT: tl.constexpr):
    """The cells of numbers so far behind the first of COUNT cells of width ``step``: int32; 0 where step is 0."""
    at = tl.div_rn(ahead, tl.where(step > 0, step, 1.0))
    return tl.where(step > 0, tl.minimum(tl.maximum(at, 0.0), COUNT - 1.0), 0.0).to(tl.int32)


@triton.jit
def shortest_arcs(angle, there, first, span, BINS: tl.constexpr):
    """Where the shortest arc that holds each pair's angles [T, P] begins, and how long it is: [P], for those that have some.

    The circle has as many bins as there are angles, so the largest gap is between the bins, of which the least and the largest
    angle are enough.
    """
    bins = tl.where(there, (angle.to(tl.int32) * BINS) // TURN, -1)
    last = tl.max(tl.where(there, angle, -1.0), 0)
    before = last - TURN
    gap = last * 0.0 - 1.0
    begin, end = gap, gap
    for i in range(BINS):
        least = tl.min(tl.where(bins == i, angle, NONE), 0)
        some = least < NONE
        wrapped = before < 0
        behind = tl.where(wrapped, least + TURN - last, least - before)
        larger = some & (behind > gap)
        end = tl.where(larger, tl.where(wrapped, last, before), end)
        begin = tl.where(larger, least, begin)
        gap = tl.where(larger, behind, gap)
        before = tl.where(some, tl.max(tl.where(bins == i, angle, -1.0), 0), before)
    arc = end - tl.floor(begin)
    arc = tl.where(arc < 0, arc + TURN, arc)
    return tl.where(last < 0, first, tl.floor(begin)), tl.where(last < 0, span, arc)


@triton.jit
def encode_pair_group(words, block, tokens, begin, pair, a, b, finite, SHORTEST: tl.constexpr, SHAPE: tl.constexpr):
    """Write the fields of pairs [P] of one group, whose rows begin at ``begin``, and return the codes of a, b [T, P], int32.

    ``finite``: which of the T rows widen the ranges; the others are not of the group, or are coded as zeros.
    """
    radius = tl.sqrt_rn(a * a + b * b)
    angle = exact_turns(a, b) * TURN
    angle = tl.where(angle < TURN, angle, 0.0)
    least = tl.min(tl.where(finite[:, None], radius, NONE), 0)
    most = tl.max(tl.where(finite[:, None], radius, 0.0), 0)
    bit = fields_bit(block, tokens, begin, SHAPE) + 16 * pair
    wanted = pair < SHAPE.value.groups
    start = put_half(words, bit, tl.where(least < NONE, least, 0.0), wanted)
    step = tl.maximum(most - start, 0.0) * (1.0 / (1 << (SHAPE.value.bits - SHAPE.value.angle_bits)))
    step = put_half(words, bit + 16 * SHAPE.value.groups, step, wanted)
    there = finite[:, None] & (radius > 0)
    far = tl.max(tl.where(there, angle, -1.0), 0)
    first = tl.where(far < 0, 0.0, tl.floor(tl.min(tl.where(there, angle, NONE), 0)))
    span = far - first
    if SHORTEST:
        first, span = shortest_arcs(angle, there, first, span, angle.shape[0])
    wide = (tl.maximum(span, 0.0).to(tl.int32) + (1 << SHAPE.value.angle_bits)) >> SHAPE.value.angle_bits
    wide = tl.where(span < 0, 0, wide)
    put_field(words, bit + 32 * SHAPE.value.groups, first.to(tl.int32), wanted)
    put_field(words, bit + 48 * SHAPE.value.groups, wide, wanted)
    ahead = angle - first[None, :]
    ahead = tl.where(ahead < 0, ahead + TURN, ahead)
    code = cells_behind(radius - start[None, :], step[None, :], 1 << (SHAPE.value.bits - SHAPE.value.angle_bits))
    code = (code << SHAPE.value.angle_bits) | cells_behind(ahead, wide.to(tl.float32)[None, :], 1 << SHAPE.value.angle_bits)
    return tl.where(finite[:, None], code, 0)
