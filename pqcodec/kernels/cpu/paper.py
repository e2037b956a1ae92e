"""Law: the paper coding (SPEC 7): 62 bits for each 16 coordinates, a float16 radius and 15 angles of fixed widths."""

from __future__ import annotations

import numpy as np

from pqcodec.constants import CIRCLE, DTYPE_FLOAT16, LARGEST_FINITE, PAPER_BLOCK, PAPER_BLOCK_BITS
from pqcodec.kernels.cpu.bits import get_field, put_field
from pqcodec.kernels.cpu.lanes import LANES
from pqcodec.kernels.cpu.records import F32, U64, jit

_LARGEST_HALF = LARGEST_FINITE[DTYPE_FLOAT16]


@jit
def half_value(bits):
    """float64 of the magnitude of float16 bits; NaN counts as 0, infinity as the largest finite value (SPEC 7)."""
    magnitude = np.int64(bits & U64(0x7FFF))
    if magnitude > 0x7C00:
        return 0.0
    magnitude = min(magnitude, 0x7BFF)
    exponent = magnitude >> 10
    if exponent == 0:
        return magnitude * 2.0**-24
    return ((magnitude & 0x3FF) + 1024) * 2.0 ** (exponent - 25)


@jit
def decode_paper(rows, order, paper, words, stride, x, first_factor, second_factor):
    """62 bits a block -> coordinates in x [order, LANES], whole numbers of a grid of each vector's own, and its factors."""
    cos, sin, circle = paper.cos, paper.sin, paper.circle
    level_radius = np.empty((5, 8), np.float32)
    for l in range(rows):
        base = U64(l * stride)
        largest = 0.0
        for block in range(order // PAPER_BLOCK):
            largest = max(largest, half_value(get_field(words, base, U64(PAPER_BLOCK_BITS * block), U64(16))))
        power = np.int64(np.floor(np.log2(largest))) + 1 if largest > 0 else np.int64(0)
        for block in range(order // PAPER_BLOCK):
            where = U64(PAPER_BLOCK_BITS * block)
            level_radius[4, 0] = F32(half_value(get_field(words, base, where, U64(16))) * 2.0 ** (11 - power))
            where += U64(16)
            for up in range(3):
                level = 4 - up
                for i in range(16 >> level):
                    code = get_field(words, base, where, U64(2))
                    where += U64(2)
                    level_radius[level - 1, 2 * i] = level_radius[level, i] * cos[level - 2, code]
                    level_radius[level - 1, 2 * i + 1] = level_radius[level, i] * sin[level - 2, code]
            for i in range(8):
                phase = (U64(2) * get_field(words, base, where, U64(4)) + U64(1)) * U64(CIRCLE // 32)
                where += U64(4)
                at = (16 * block + 2 * i) * LANES + l
                x[at] = np.rint(level_radius[1, i] * circle[U64(2) * phase])
                x[at + LANES] = np.rint(level_radius[1, i] * circle[U64(2) * phase + U64(1)])
        exponent = power + paper.radius_exponent
        small = exponent < -100
        first_factor[l] = F32(np.float64(paper.mantissa) * 2.0 ** (exponent + (64 if small else 0)))
        second_factor[l] = F32(2.0**-64) if small else F32(1)


@jit
def turn_of(x, y):
    """Angle of one (x, y) in turns, 0 .. 1."""
    turn = np.arctan2(y, x) / F32(2 * np.pi)
    return turn + F32(1) if turn < F32(0) else turn


@jit
def half_of(value):
    """Bits of the nearest float16 of a float64 >= 0, uint64; clamped to the largest finite float16."""
    if value >= _LARGEST_HALF:
        return U64(0x7BFF)
    exponent = max(np.int64(np.floor(np.log2(value))), -14) if value > 0 else -14
    steps = np.int64(np.rint(value * 2.0 ** (10 - exponent)))
    return U64(steps + ((exponent + 14) << 10)) if exponent > -14 else U64(steps)


@jit
def encode_paper(rows, x, order, row_scales, paper, words, stride):
    """Rotated rows x, divided by row_scales -> 62 bits a block of 16: radius, levels 4, 3, 2 and 1 (SPEC 7)."""
    bounds2 = paper.bounds
    energy = np.empty((5, 16), np.float64)
    codes = np.empty((5, 8), np.uint64)
    for l in range(rows):
        base = U64(l * stride)
        for block in range(order // PAPER_BLOCK):
            for i in range(8):
                p, q = x[(16 * block + 2 * i) * LANES + l], x[(16 * block + 2 * i + 1) * LANES + l]
                energy[1, i] = np.float64(p) * p + np.float64(q) * q
                codes[1, i] = U64(min(np.int32(turn_of(p, q) * F32(16)), np.int32(15)))
            for level in range(2, 5):
                for i in range(16 >> level):
                    a, b = energy[level - 1, 2 * i], energy[level - 1, 2 * i + 1]
                    energy[level, i] = a + b
                    cell = 0
                    for j in range(3):
                        cell += np.int64(b >= bounds2[level - 2, j] * a)
                    codes[level, i] = U64(cell if a + b > 0 else 0)
            radius = np.sqrt(energy[4, 0] / order) / np.float64(row_scales[l]) * 2.0**-paper.radius_exponent
            where = U64(PAPER_BLOCK_BITS * block)
            put_field(words, base, where, U64(16), half_of(radius))
            where += U64(16)
            for up in range(4):
                level = 4 - up
                width = U64(2) if level > 1 else U64(4)
                for i in range(16 >> level):
                    put_field(words, base, where, width, codes[level, i])
                    where += width
