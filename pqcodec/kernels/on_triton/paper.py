"""Law: the paper coding (SPEC 7): 62 bits for each 16 coordinates, a float16 radius and 15 angles of fixed widths."""

from __future__ import annotations

import triton
import triton.language as tl

from pqcodec.kernels.on_triton.bits import get_field, put_field
from pqcodec.kernels.on_triton.numbers import (
    CIRCLE,
    GROUP,
    LARGEST_HALF,
    PAPER,
    PAPER_BITS,
    first_of,
    halves,
    nearest,
    power_of_two,
    turns_of,
)
from pqcodec.kernels.on_triton.rotation import rotated, rotated_back


@triton.jit
def paper_radius(words, bit, mask):
    """The radius of a block of 16, float32. Its sign is ignored; NaN counts as 0, infinity as the largest float16."""
    bits = get_field(words, bit, tl.full(bit.shape, 15, tl.int32), mask)
    bits = tl.where(bits > 0x7C00, 0, tl.minimum(bits, 0x7BFF))
    return bits.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def paper_level(words, bit, radius, mask, paper, LEVEL: tl.constexpr):
    """Radii [R, n] of level 2, 3 or 4 -> those of the level below [R, 2 n], by an angle of two bits each."""
    COUNT: tl.constexpr = GROUP >> LEVEL
    cos = paper + (PAPER.value.cos + 4 * (LEVEL - 2))
    sin = paper + (PAPER.value.sin + 4 * (LEVEL - 2))
    index = tl.arange(0, COUNT)[None, :]
    field = bit[:, None] + 2 * index
    code = get_field(words, field, tl.full(field.shape, 2, tl.int32), mask[:, None] & (index >= 0))
    both = tl.join(radius * tl.load(cos + code), radius * tl.load(sin + code))
    return tl.reshape(both, [both.shape[0], 2 * COUNT])


@triton.jit
def paper_coordinates(words, bit, radius, mask, paper, circle):
    """Angles of levels 4, 3, 2 and 1 from ``bit`` on -> a block's sixteen coordinates, whole numbers of the vector's grid."""
    x = paper_level(words, bit, radius[:, None], mask, paper, 4)
    x = paper_level(words, bit + 2, x, mask, paper, 3)
    x = paper_level(words, bit + 6, x, mask, paper, 2)
    index = tl.arange(0, 8)[None, :]
    field = bit[:, None] + 14 + 4 * index
    code = get_field(words, field, tl.full(field.shape, 4, tl.int32), mask[:, None] & (index >= 0))
    phase = (2 * code + 1) * (CIRCLE // 32)
    x = tl.join(x * tl.load(circle + phase), x * tl.load(circle + CIRCLE + phase))
    return nearest(tl.reshape(x, [x.shape[0], GROUP]))


@triton.jit
def paper_power(largest):
    """Exponent of the power of two above a row's largest radius: the row's grid."""
    return tl.where(largest > 0, (largest.to(tl.int32, bitcast=True) >> 23) - 126, 0)


@triton.jit
def decode_paper(
    words,
    bit0,
    row,
    mask,
    radius_exponent,
    mantissas,
    paper,
    circle,
    rotation,
    columns,
    acc,
    ORDER: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Rows from ``bit0`` on -> acc [R, COLUMNS] rotated back, and each row's exponent and mantissa of its factor."""
    largest = tl.zeros([ROWS], tl.float32)
    for group in range(ORDER // GROUP):
        largest = tl.maximum(largest, paper_radius(words, bit0 + group * PAPER_BITS, mask))
    power = paper_power(largest)
    for group in range(ORDER // GROUP):
        bit = bit0 + group * PAPER_BITS
        radius = paper_radius(words, bit, mask) * power_of_two(11 - power)
        v = paper_coordinates(words, bit + 16, radius, mask, paper, circle)
        acc = rotated_back(v, rotation, group, columns, acc, COLUMNS)
    return acc, power + radius_exponent, tl.load(mantissas + row * 0)


@triton.jit
def paper_codes(a, b, paper, LEVEL: tl.constexpr):
    """The cell, 0 .. 3, of each angle of level 2, 3 or 4 between energies a and b, by three squared bounds in tan psi."""
    bounds = paper + (PAPER.value.bounds + 3 * (LEVEL - 2))
    code = (b >= tl.load(bounds) * a).to(tl.int32)
    code += (b >= tl.load(bounds + 1) * a).to(tl.int32)
    code += (b >= tl.load(bounds + 2) * a).to(tl.int32)
    return tl.where(a + b > 0, code, 0)


@triton.jit
def write_run(words, bit, codes, mask, WIDTH: tl.constexpr, COUNT: tl.constexpr):
    """Write codes [R, COUNT] of WIDTH bits each side by side, as one field of 32 bits at the most."""
    value = tl.sum(codes.to(tl.uint32) << (WIDTH * tl.arange(0, COUNT)[None, :]).to(tl.uint32), 1)
    put_field(words, bit, value, mask)


@triton.jit
def encode_paper_block(words, bit, v, exponent, radius_exponent, mask, paper, ORDER: tl.constexpr):
    """A block of 16 rotated coordinates -> its radius and the angles of levels 4, 3, 2 and 1."""
    p, q = halves(v)
    code1 = tl.minimum((turns_of(p, q) * 16.0).to(tl.int32), 15)
    a, b = halves(p * p + q * q)
    code2 = paper_codes(a, b, paper, 2)
    a, b = halves(a + b)
    code3 = paper_codes(a, b, paper, 3)
    a, b = halves(a + b)
    code4 = paper_codes(a, b, paper, 4)
    energy = first_of(a + b)
    power = -exponent - radius_exponent
    first = power // 2
    radius = tl.sqrt(energy / ORDER) * power_of_two(first) * power_of_two(power - first)
    half = tl.minimum(radius, LARGEST_HALF).to(tl.float16).to(tl.uint16, bitcast=True).to(tl.int32)
    put_field(words, bit, half, mask)
    write_run(words, bit + 16, code4, mask, 2, 1)
    write_run(words, bit + 18, code3, mask, 2, 2)
    write_run(words, bit + 22, code2, mask, 2, 4)
    write_run(words, bit + 30, code1, mask, 4, 8)


@triton.jit
def encode_paper(
    words,
    bit0,
    coarse,
    fine,
    finest,
    exponent,
    radius_exponent,
    mask,
    paper,
    rotation,
    columns,
    ORDER: tl.constexpr,
    COLUMNS: tl.constexpr,
    TERMS: tl.constexpr,
    OPERAND: tl.constexpr,
):
    """Scaled rows, as ``three_parts`` gives them, times 2^-exponent -> their bits from ``bit0`` on."""
    for group in range(ORDER // GROUP):
        v = rotated(coarse, fine, finest, rotation, group, columns, TERMS, COLUMNS, OPERAND)
        encode_paper_block(words, bit0 + group * PAPER_BITS, v, exponent, radius_exponent, mask, paper, ORDER)
