"""Law: scalar coding (SPEC 15, 16) in Triton: each group's scale and zero for every channel, and codes on a grid or of levels.

Encoders do the float32 operations of ``codings.scalar`` in the same order, and so write the same bytes.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pqcodec.kernels.on_triton.affine import codes_at, fields_bit, half_at, put_half
from pqcodec.kernels.on_triton.numbers import NONE, nearest


# -- decoding --------------------------------------------------------------------------------------------------------
@triton.jit
def scalar_fields(words, block, tokens, row, column, mask, SHAPE: tl.constexpr):
    """Scales and zeros of the channels ``column`` [1, C] in the groups of rows [R, 1] of a block: float32 [R, C]."""
    bit = fields_bit(block, tokens, row, SHAPE) + 16 * (column // SHAPE.value.group_channels)
    step = half_at(words, bit, mask)
    zero = step * 0
    if SHAPE.value.zeros:
        zero = half_at(words, bit + 16 * SHAPE.value.groups, mask)
    return step, zero


@triton.jit
def scalar_levels(words, block, row, column, mask, levels, SHAPE: tl.constexpr):
    """Levels of the channels ``column`` of some rows, float32 [R, C]."""
    code = codes_at(words, block + row * (8 * SHAPE.value.row_bytes), column, mask, SHAPE.value.bits)
    if SHAPE.value.code_levels > 0:
        level = tl.load(levels + code)
    elif SHAPE.value.zeros:
        level = code.to(tl.float32)
    else:
        level = (code - (1 << SHAPE.value.bits >> 1)).to(tl.float32)
    return level


# -- encoding --------------------------------------------------------------------------------------------------------
@triton.jit
def least_of_groups(x, SHAPE: tl.constexpr):
    """The least number of each group of channels: [R, columns] -> [R, groups of the columns]."""
    WIDTH: tl.constexpr = min(SHAPE.value.group_channels, x.shape[1])
    return tl.min(tl.reshape(x, [x.shape[0], x.shape[1] // WIDTH, WIDTH]), 2)


@triton.jit
def for_each_channel(fields, COLUMNS: tl.constexpr):
    """Fields of groups [R, groups] -> of channels [R, COLUMNS]."""
    WIDTH: tl.constexpr = COLUMNS // fields.shape[1]
    spread = tl.broadcast_to(fields[:, :, None], [fields.shape[0], fields.shape[1], WIDTH])
    return tl.reshape(spread, [fields.shape[0], COLUMNS])


@triton.jit
def put_scalar_fields(words, block, tokens, row, low, high, mask, SHAPE: tl.constexpr):
    """Write scale and zero of groups whose numbers lie between ``low`` and ``high`` [R, groups], and return them, float32.

    ``row``: [R], one of each group of tokens; where low > high a group has no numbers.
    """
    there = low <= high
    low, high = tl.where(there, low, 0.0), tl.where(there, high, 0.0)
    group = tl.arange(0, low.shape[1])[None, :]
    bit = fields_bit(block, tokens, row, SHAPE)[:, None] + 16 * group
    wanted = mask[:, None] & (group < SHAPE.value.groups)
    zero = low * 0.0
    if SHAPE.value.zeros:
        least = low
        if SHAPE.value.code_levels > 0:  # the middle of the range
            least = (low + high) * 0.5
        zero = put_half(words, bit + 16 * SHAPE.value.groups, least + 0.0, wanted)
    if SHAPE.value.code_levels > 0:
        step = tl.maximum(high - zero, zero - low)
    elif SHAPE.value.zeros:
        step = tl.div_rn(tl.maximum(high - zero, 0.0), zero * 0.0 + ((1 << SHAPE.value.bits) - 1))
    else:  # the number of the largest magnitude is the first level
        step = tl.div_rn(tl.where(high >= -low, high, low), zero - (1 << SHAPE.value.bits >> 1)) + 0.0
    return put_half(words, bit, step, wanted), zero


@triton.jit
def scalar_codes(x, step, zero, levels, SHAPE: tl.constexpr):
    """Codes of numbers [R, C], int32."""
    place = tl.div_rn(x - zero, tl.where(step == 0, 1.0, step))
    if SHAPE.value.code_levels > 0:
        code = (place > NONE).to(tl.int32)
        below = tl.load(levels)
        for i in range(1, SHAPE.value.code_levels):
            level = tl.load(levels + i)
            code += (place > (level + below) * 0.5).to(tl.int32)
            below = level
    else:
        MOST: tl.constexpr = (1 << SHAPE.value.bits) - 1
        shift = 0.0
        if SHAPE.value.zeros == 0:
            shift = 1.0 * (1 << SHAPE.value.bits >> 1)
        code = tl.minimum(tl.maximum(nearest(tl.minimum(tl.maximum(place, -1e4), 1e4)) + shift, 0.0), MOST).to(tl.int32)
    return tl.where(step == 0, 0, code)
