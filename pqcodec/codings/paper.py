"""Law: the paper's coding (SPEC 7; arXiv 2502.02617, algorithm 1) in numpy: blocks of 16, angles of fixed widths."""

from __future__ import annotations

import math

import numpy as np

from pqcodec import constants as c
from pqcodec.codings.angles import truncate_to_half
from pqcodec.codings.bits import read_field, write_field
from pqcodec.codings.plan import Plan
from pqcodec.codings.split import sector


def encode(v: np.ndarray, plan: Plan, bits: np.ndarray, exponent: int) -> None:
    """Rotated vectors v float64 [n, order] into bits [n, row_bits], block by block; ``exponent``: of the radii."""
    n = len(v)
    for block in range(plan.order // c.PAPER_BLOCK):
        x = v[:, c.PAPER_BLOCK * block :][:, : c.PAPER_BLOCK]
        fields = []
        codes = sector(x[:, 0::2].ravel(), x[:, 1::2].ravel(), np.array(1 << c.PAPER_LEVEL_BITS[0])).reshape(n, -1)
        fields.append(codes)
        radius = np.hypot(x[:, 0::2], x[:, 1::2])
        for level in (2, 3, 4):
            a, b = radius[:, 0::2], radius[:, 1::2]
            bounds, _, _ = paper_cells(level)
            fields.append((b[..., None] >= bounds * a[..., None]).sum(-1) * (a + b > 0))
            radius = np.hypot(a, b)
        stored = np.minimum(np.ldexp(radius, -exponent), c.LARGEST_FINITE[c.DTYPE_FLOAT16]).astype(np.float16)
        place = np.full(n, c.PAPER_BLOCK_BITS * block, np.int64)
        place = _write_run(bits, place, c.PAPER_RADIUS_BITS, stored.view(np.uint16).astype(np.int64))
        for codes, width in zip(reversed(fields), reversed(c.PAPER_LEVEL_BITS), strict=True):
            place = _write_run(bits, place, width, codes)


def _write_run(bits: np.ndarray, place: np.ndarray, width: int, codes: np.ndarray) -> np.ndarray:
    """Fields of one width, codes [n, k], side by side; returns the place behind them."""
    for column in codes.T:
        write_field(bits, place, np.full(len(bits), width), column)
        place = place + width
    return place


def decode(bits: np.ndarray, plan: Plan, exponent: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Bits [n, row_bits] -> coordinates on the grid of each vector's power of two, int32 [n, order], and factors A, B."""
    n, blocks = len(bits), plan.order // c.PAPER_BLOCK
    place = np.arange(blocks) * c.PAPER_BLOCK_BITS
    stored = np.stack([read_field(bits, np.full(n, p), np.full(n, c.PAPER_RADIUS_BITS)) for p in place], 1)
    radius = (stored & 0x7FFF).astype(np.uint16).view(np.float16).astype(np.float32)
    radius = np.minimum(np.where(np.isnan(radius), np.float32(0), radius), np.float32(c.LARGEST_FINITE[c.DTYPE_FLOAT16]))
    power = np.frexp(radius.max(1))[1]  # every radius is below 2^power
    radius = np.ldexp(radius, (11 - power)[:, None]).astype(np.float32)
    units = np.zeros((n, plan.order), np.int32)
    for block in range(blocks):
        at = int(place[block]) + c.PAPER_RADIUS_BITS
        values = radius[:, block : block + 1]
        for level in (4, 3, 2):
            _, cos, sin = paper_cells(level)
            codes, at = _read_run(bits, at, c.PAPER_LEVEL_BITS[level - 1], values.shape[1])
            values = np.stack([values * cos[codes], values * sin[codes]], 2).reshape(n, -1)
        codes, at = _read_run(bits, at, c.PAPER_LEVEL_BITS[0], values.shape[1])
        phase = (2 * codes + 1) * (c.CIRCLE >> (c.PAPER_LEVEL_BITS[0] + 1))
        values = np.stack([values * plan.circle_cos[phase], values * plan.circle_sin[phase]], 2).reshape(n, -1)
        units[:, c.PAPER_BLOCK * block :][:, : c.PAPER_BLOCK] = np.rint(values).astype(np.int32)
    return units, *_paper_scale(power + exponent, plan)


def _read_run(bits: np.ndarray, place: int, width: int, count: int) -> tuple[np.ndarray, int]:
    full = np.full(len(bits), width)
    columns = [read_field(bits, np.full(len(bits), place + width * i), full) for i in range(count)]
    return np.stack(columns, 1), place + width * count


def _paper_scale(power: np.ndarray, plan: Plan) -> tuple[np.ndarray, np.ndarray]:
    """Factors A, B [n] of vectors whose radii lie below 2^power."""
    small = power < c.RADIUS_SPLIT
    first = np.ldexp(plan.mantissas[0], power + np.where(small, c.RADIUS_SHIFT, 0)).astype(np.float32)
    return first, np.where(small, np.float32(2.0**-c.RADIUS_SHIFT), np.float32(1)).astype(np.float32)


def paper_cells(level: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Bounds in tan psi [3], cos [4] and sin [4] of the paper coding's four cells of levels 2 to 4 (SPEC 7)."""
    first, second = c.PAPER_ANGLES[level]
    centroids = np.array([first, second, np.pi / 2 - second, np.pi / 2 - first])
    bounds = np.tan((centroids[1:] + centroids[:-1]) / 2)
    cos, sin = truncate_to_half(np.cos(centroids)), truncate_to_half(np.sin(centroids))
    return bounds, cos.astype(np.float32), sin.astype(np.float32)


def radius_exponent(largest: float, order: int) -> int:
    """Power of two that brings the paper coding's radii into float16's range; 0 where they are there already."""
    norm = largest * math.sqrt(order)
    if norm == 0 or 2.0**-4 <= norm < 2.0**15:
        return 0
    low, high = c.RADIUS_EXPONENTS
    return min(max(math.frexp(norm)[1] - 15, low), high)
