"""Law: the quads coding (SPEC 8): a block's planes, four coordinates by one look-up, the search for the nearest point."""

from __future__ import annotations

import triton
import triton.language as tl

from pqcodec.kernels.on_triton.bits import get_field, put_field
from pqcodec.kernels.on_triton.numbers import GROUP, QUADS, half_of, halves, power_of_two
from pqcodec.kernels.on_triton.rotation import rotated, rotated_back
from pqcodec.kernels.on_triton.split import radius_code

# QUADS holds the numbers of the coding (on_triton.numbers.Quads); a group of 16 coordinates is four quads.


@triton.jit
def sign_place(group, ORDER: tl.constexpr):
    """Bit of each of a group's 16 signs in the row's run of the plane of signs, int32 [1, 16]."""
    i = tl.arange(0, GROUP)[None, :]
    coordinate = i % 4
    first = group // 2 * 2  # the first of the two groups whose signs lie together
    together = tl.where((first + 1) * GROUP < ORDER, 8, 4)
    return first * GROUP + (group - first) * 4 + i // 4 + together * (coordinate % 2 * 2 + coordinate // 2)


@triton.jit
def planes(first, row, tokens, ORDER: tl.constexpr, BITS: tl.constexpr):
    """Bits at which rows begin in a block's planes of signs and of indices, and its radii as a whole; ``first``: its own."""
    INDEX_BITS: tl.constexpr = (ORDER // 4 * BITS + 7) // 8 * 8
    return first + row * ORDER, first + tokens * ORDER + row * INDEX_BITS, first + tokens * (ORDER + INDEX_BITS)


@triton.jit
def quad_units(words, signs, indices, quad, mask, points, ORDER: tl.constexpr, BITS: tl.constexpr):
    """Coordinates of some quads [1, Q] of rows whose signs and indices begin at bits [R]: units float16 [R, 4 Q].

    A point is two words of two float16 numbers. The signs of two groups lie in 32 bits: a quad's four bits are ``together``
    apart, those of its coordinates 0, 2, 1 and 3.
    """
    field = indices[:, None] + quad * BITS
    code = get_field(words, field, tl.full(field.shape, BITS, tl.int32), mask[:, None] & (quad >= 0))
    point = points.to(tl.pointer_type(tl.uint32)) + 2 * code
    group = quad // 4
    first = group // 2 * 2  # the first of the two groups whose signs lie together
    both = (first + 1) * GROUP < ORDER
    together = tl.where(both, 8, 4)
    place = signs[:, None] + first * GROUP
    shift = (place & 31).to(tl.uint32)
    at = words + (place >> 5)
    low = tl.load(at, mask=mask[:, None] & (quad >= 0), other=0)
    high = tl.load(at + 1, mask=mask[:, None] & ((place & 31) + 4 * together > 32), other=0)
    negative = (low >> shift) | ((high << 1) << (31 - shift))
    negative = negative >> ((group - first) * 4 + quad % 4).to(tl.uint32)
    apart = together.to(tl.uint32)
    p = tl.load(point) ^ ((negative & 1) << 15) ^ (((negative >> (2 * apart)) & 1) << 31)
    q = tl.load(point + 1) ^ (((negative >> apart) & 1) << 15) ^ (((negative >> (3 * apart)) & 1) << 31)
    v = tl.join(tl.join(half_of(p), half_of(q)), tl.join(half_of(p >> 16), half_of(q >> 16)))
    return tl.reshape(v, [v.shape[0], 4 * v.shape[1]])


@triton.jit
def quad_radius(words, radii, row, tokens, mask, mantissas):
    """Exponent and mantissa of the factor of rows of blocks, and where it is 0; ``radii``: the bits of the blocks' radii."""
    eight = tl.full(row.shape, 8, tl.int32)
    code = get_field(words, radii + row * 8, eight, mask)
    at = radii + tokens * 8 + row * 0
    base = get_field(words, at, eight, mask) | get_field(words, at + 8, eight, mask) << 8
    base -= (base & 0x8000) << 1
    radius = tl.minimum(tl.maximum(base + code - 1, QUADS.value.least), QUADS.value.most)
    step = radius & (QUADS.value.steps - 1)
    exponent = (radius - step - QUADS.value.least) // QUADS.value.steps + QUADS.value.least // QUADS.value.steps
    return exponent, tl.load(mantissas + step), code == 0


@triton.jit
def decode_quad_rows(
    words,
    skew,
    row,
    tokens,
    mask,
    mantissas,
    points,
    rotation,
    columns,
    acc,
    ORDER: tl.constexpr,
    COLUMNS: tl.constexpr,
    BITS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Rows of a block -> acc [R, COLUMNS] rotated back, each row's exponent and mantissa, and whether it is the zero vector."""
    signs, indices, radii = planes(skew * 8, row, tokens, ORDER, BITS)
    for group in range(ORDER // GROUP):
        quad = group * 4 + tl.arange(0, 4)[None, :]
        v = quad_units(words, signs, indices, quad, mask, points, ORDER, BITS)
        acc = rotated_back(v, rotation, group, columns, acc, COLUMNS)
    exponent, mantissa, nothing = quad_radius(words, radii, row, tokens, mask, mantissas)
    return acc, exponent, mantissa, nothing


@triton.jit
def own_radius(x, exponent, ORDER: tl.constexpr):
    """The radius of each row x [R, COLUMNS], times 2^-exponent, counted from below the least one, which is 1; 0: nothing."""
    return radius_code(tl.sum(x * x, 1), exponent, QUADS.value.radius_bits, QUADS.value.steps, ORDER)


@triton.jit
def scale_of(radius, exponent, aim, ORDER: tl.constexpr):
    """What rotated rows are multiplied by so that a table's points lie beside them; ``radius`` as ``own_radius`` counts."""
    step = (radius - 1) & (QUADS.value.steps - 1)
    octave = (radius - 1 - step) // QUADS.value.steps + QUADS.value.least // QUADS.value.steps
    power = tl.minimum(tl.maximum(-octave - exponent, -126), 127)
    return aim / ORDER * tl.exp2(step.to(tl.float32) * (-1.0 / QUADS.value.steps)) * power_of_two(power)


@triton.jit
def larger_first(a, b):
    """Two int32 arrays, the larger of each pair in the first."""
    return tl.maximum(a, b), tl.minimum(a, b)


@triton.jit
def nearest_points(v, representatives, numbers, COUNT: tl.constexpr):
    """Numbers of the nearest points of four quads v float32 [R, 16], int32 [R, 4], and their squared errors, [R, 4].

    The magnitudes are sorted as integers whose two lowest bits tell their places.
    """
    even, odd = halves(v)
    p, r = halves(even)
    q, s = halves(odd)
    p = p.to(tl.int32, bitcast=True) & 0x7FFFFFFC
    q = q.to(tl.int32, bitcast=True) & 0x7FFFFFFC | 1
    r = r.to(tl.int32, bitcast=True) & 0x7FFFFFFC | 2
    s = s.to(tl.int32, bitcast=True) & 0x7FFFFFFC | 3
    p, q = larger_first(p, q)
    r, s = larger_first(r, s)
    p, r = larger_first(p, r)
    q, s = larger_first(q, s)
    q, r = larger_first(q, r)
    places = (p & 3) | (q & 3) << 2 | (r & 3) << 4 | (s & 3) << 6
    a, b = p.to(tl.float32, bitcast=True), q.to(tl.float32, bitcast=True)
    c, d = r.to(tl.float32, bitcast=True), s.to(tl.float32, bitcast=True)
    best = tl.full(a.shape, -3e38, tl.float32)
    which = tl.zeros(a.shape, tl.int32)
    for i in range(COUNT):
        at = representatives + 5 * i
        score = a * tl.load(at) + b * tl.load(at + 1) + c * tl.load(at + 2) + d * tl.load(at + 3) + tl.load(at + 4)
        which = tl.where(score > best, i, which)
        best = tl.maximum(score, best)
    return tl.load(numbers + which * 256 + places), a * a + b * b + c * c + d * d - 2 * best


@triton.jit
def encode_quad_rows(
    words,
    skew,
    row,
    tokens,
    base,
    x,
    coarse,
    fine,
    finest,
    exponent,
    mask,
    representatives,
    numbers,
    aim,
    rotation,
    columns,
    ORDER: tl.constexpr,
    COLUMNS: tl.constexpr,
    BITS: tl.constexpr,
    COUNT: tl.constexpr,
    SEARCHED: tl.constexpr,
    TERMS: tl.constexpr,
    OPERAND: tl.constexpr,
):
    """Scaled rows x, and as ``three_parts`` gives them, into the planes of their block, which hold zeros there.

    ``base``: of the block's radii, counted as ``own_radius`` does. Radii up to SEARCHED steps away are tried.
    """
    own = own_radius(x, exponent, ORDER)
    radius = own
    if SEARCHED > 0:
        least = tl.full(own.shape, 3e38, tl.float32)
        for choice in range(2 * SEARCHED + 1):
            step = (choice + 1) // 2 * (1 - choice % 2 * 2)  # 0, -1, 1, -2, 2
            tried = tl.minimum(tl.maximum(own + step, 1), QUADS.value.most - QUADS.value.least + 1)
            scale = scale_of(tried, exponent, aim, ORDER)
            error = tl.zeros(own.shape, tl.float32)
            for group in range(ORDER // GROUP):
                v = rotated(coarse, fine, finest, rotation, group, columns, TERMS, COLUMNS, OPERAND) * scale[:, None]
                _number, off = nearest_points(v, representatives, numbers, COUNT)
                error += tl.sum(off, 1)
            error = error / (scale * scale)
            radius = tl.where(error < least, tried, radius)
            least = tl.minimum(error, least)
    radius = tl.where(own > 0, radius, 0)
    signs, indices, radii = planes(skew * 8, row, tokens, ORDER, BITS)
    scale = scale_of(tl.maximum(radius, 1), exponent, aim, ORDER)
    quad = tl.arange(0, 4)[None, :]
    for group in range(ORDER // GROUP):
        v = rotated(coarse, fine, finest, rotation, group, columns, TERMS, COLUMNS, OPERAND) * scale[:, None]
        number, _off = nearest_points(v, representatives, numbers, COUNT)
        put_field(words, indices[:, None] + (group * 4 + quad) * BITS, number, mask[:, None] & (quad >= 0))
        first = group // 2 * 2 * GROUP  # of the signs that lie together, in the plane
        bits = (v < 0).to(tl.uint32) << (sign_place(group, ORDER) - first).to(tl.uint32)
        put_field(words, signs + first, tl.sum(bits, 1), mask)
    put_field(words, radii + row * 8, tl.where(radius > 0, tl.maximum(radius - base + 1, 0), 0), mask)
