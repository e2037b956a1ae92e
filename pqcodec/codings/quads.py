"""Law: the quads coding (SPEC 8) in numpy: four coordinates are one point of a table, and a vector has one radius.

It is the polar tree with its lowest levels coded jointly: a quad's share of the radius and its three angles are one choice. A
table is all permutations of a few sorted representatives, so the nearest point to four magnitudes is that permutation of the
nearest representative which sorts them alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import permutations

import numpy as np

from pqcodec import constants as c
from pqcodec.codings.declared import quads_index_bits
from pqcodec.codings.plan import Plan


@dataclass(frozen=True)
class Table:
    """Points of the positive orthant, int8 [2^bits, 4], in units of 1 / ``grid`` of the radius."""

    bits: int
    grid: float  # units of a point in the root mean square of a vector's coordinates
    points: np.ndarray
    representatives: np.ndarray  # float64 [r, 4], in the same units, each largest first
    numbers: np.ndarray  # int16 [r, 256]: the point with the representative's coordinates at some places (``_base_four``)

    @property
    def aim(self) -> float:
        """Units in a radius as encoders take them: they aim a little further out, so that decoded vectors keep their norm."""
        return self.grid * c.QUADS_STRETCH[self.bits]

    @property
    def numbers_by_three(self) -> np.ndarray:
        """``numbers`` by the places of the three largest coordinates alone, int16 [r, 64]: the fourth has what is left."""
        key = np.arange(4 ** (c.QUAD - 1))
        three = key[:, None] >> np.array([0, 2, 4]) & 3
        least = np.clip(6 - three.sum(1), 0, 3)  # its place, where the places of the others are different
        return self.numbers[:, key | least << 6]


@lru_cache(maxsize=16)
def points_of(bits: int) -> Table:
    """The table of 2^bits points (SPEC 8.2)."""
    grid, listed = c.QUADS_TABLES[bits]
    representatives = [tuple(map(int, each.split())) for each in listed.split(",")]
    points = [point for each in representatives for point in sorted(set(permutations(each)))]
    number = {point: i for i, point in enumerate(points)}
    numbers = np.zeros((len(representatives), 4**c.QUAD), np.int16)
    for r, each in enumerate(representatives):
        for places in permutations(range(c.QUAD)):
            point = [0] * c.QUAD
            for place, magnitude in zip(places, each, strict=True):
                point[place] = magnitude
            numbers[r, _base_four(np.array(places))] = number[tuple(point)]
    found = Table(bits, grid, np.array(points, np.int8), np.array(representatives, np.float64), numbers)
    for array in (found.points, found.representatives, found.numbers):
        array.flags.writeable = False
    return found


def _base_four(places: np.ndarray) -> np.ndarray:
    """Places [..., 4] of the coordinates as one number: the first is the largest coordinate's."""
    return (places << (2 * np.arange(c.QUAD))).sum(-1)


def table_of(plan: Plan) -> Table:
    """The table of a plan's rows."""
    return points_of(quads_index_bits(plan.order, plan.row_bits))


def plane_bytes(order: int, bits: int) -> tuple[int, int]:
    """Bytes of a row in the planes of signs and of indices (SPEC 8.1)."""
    return order // 8, -(-order // c.QUAD * bits // 8)


# -- encoding ------------------------------------------------------------------------------------------------------
def encode(v: np.ndarray, plan: Plan, exponent: int, effort: str) -> np.ndarray:
    """Rotated vectors v float64 [n, order] of one block -> its bytes without the checksum; ``exponent`` is not used."""
    points = table_of(plan)
    radius, codes, most = _nearest(v, points, effort)
    signs = np.signbit(v).reshape(len(v), -1, c.QUAD)
    present = radius >= c.QUADS_RADII[0]
    base = most + max(c.QUADS_EFFORTS[effort]) - (1 << c.QUADS_RADIUS_BITS) + 2 if present.any() else 0
    code = np.where(present, np.maximum(radius - base + 1, 0), 0)
    planes = [
        _sign_bytes(signs),
        np.packbits((codes[..., None] >> np.arange(points.bits) & 1).astype(np.uint8).reshape(len(v), -1), 1, "little"),
        code.astype(np.uint8),
        np.array([base], "<i2").view(np.uint8),
    ]
    size = sum(plane.size for plane in planes) + c.CHECKSUM_BYTES
    return np.concatenate([*(plane.ravel() for plane in planes), np.zeros(-size % c.QUADS_BLOCK_ALIGN, np.uint8)])


def _nearest(v: np.ndarray, points: Table, effort: str) -> tuple[np.ndarray, np.ndarray, int]:
    """Radii in steps int64 [n] (below the range: the zero vector), codes int64 [n, quads], and the largest own radius."""
    norm = np.sqrt((v * v).mean(1))
    steps = np.floor(c.QUADS_RADIUS_STEPS * np.log2(np.where(norm > 0, norm, 1)) + 0.5).astype(np.int64)
    quads = np.abs(v).reshape(len(v), -1, c.QUAD)
    places = np.argsort(-quads, axis=2, kind="stable")
    largest_first = np.take_along_axis(quads, places, 2)
    best, radius, codes = np.full(len(v), np.inf), steps, np.zeros(quads.shape[:2], np.int64)
    half = (points.representatives**2).sum(1) / 2
    for more in c.QUADS_EFFORTS[effort]:
        unit = np.exp2(np.clip(steps + more, *c.QUADS_RADII) / c.QUADS_RADIUS_STEPS) / points.aim
        x = largest_first / unit[:, None, None]
        score = x @ points.representatives.T - half
        chosen = score.argmax(2)
        error = ((x * x).sum((1, 2)) - 2 * score.max(2).sum(1)) * unit * unit
        codes[error < best] = points.numbers[chosen, _base_four(places)][error < best]
        radius = np.where(error < best, steps + more, radius)
        best = np.minimum(best, error)
    own = np.clip(steps[norm > 0], *c.QUADS_RADII)
    nothing = c.QUADS_RADII[0] - 1
    return np.where(norm > 0, np.clip(radius, *c.QUADS_RADII), nothing), codes, int(own.max(initial=nothing))


def _sign_bytes(signs: np.ndarray) -> np.ndarray:
    """Signs bool [n, quads, 4] -> uint8 [n, quads / 2]: those of eight quads lie together, coordinate by coordinate."""
    turned = []
    for first in range(0, signs.shape[1], c.QUADS_GROUP):
        group = signs[:, first : first + c.QUADS_GROUP]
        turned.append(group[:, :, c.QUADS_SIGN_PLACES].transpose(0, 2, 1).reshape(len(signs), -1))
    return np.packbits(np.concatenate(turned, 1), axis=1, bitorder="little")


# -- decoding ------------------------------------------------------------------------------------------------------
def decode(
    body: np.ndarray, tokens: int, rows: tuple[int, int], plan: Plan, exponent: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Bytes of a block of ``tokens`` rows -> points of the wanted rows, int32 [n, order], and the factors A and B [n]."""
    points, low, high = table_of(plan), *rows
    sign_bytes, index_bytes = plane_bytes(plan.order, points.bits)
    ends = np.cumsum([tokens * sign_bytes, tokens * index_bytes, tokens])
    signs, indices, code = (
        plane.reshape(tokens, -1)[low:high] for plane in np.split(body[: ends[-1]], ends[:-1])
    )  # three planes, row by row
    base = int(body[ends[-1] :][: c.QUADS_BASE_BYTES].view("<i2")[0])
    quads = plan.order // c.QUAD
    fields = np.unpackbits(indices, axis=1, bitorder="little")[:, : quads * points.bits].reshape(high - low, quads, -1)
    units = points.points[(fields.astype(np.int64) << np.arange(points.bits)).sum(2)].astype(np.int32)
    bits = np.unpackbits(signs, axis=1, bitorder="little")
    negative = np.concatenate(
        [
            group.reshape(high - low, c.QUAD, -1).transpose(0, 2, 1)[:, :, c.QUADS_SIGN_PLACES]
            for group in np.split(bits, range(4 * c.QUADS_GROUP, plan.order, 4 * c.QUADS_GROUP), axis=1)
        ],
        1,
    )
    units = np.where(negative, -units, units).reshape(high - low, plan.order)
    radius = np.clip(base + code[:, 0].astype(np.int64) - 1, *c.QUADS_RADII)
    first, second = factors(radius, plan.mantissas)
    return units, np.where(code[:, 0] > 0, first, np.float32(0)), second  # code 0 is the zero vector


def factors(radius: np.ndarray, mantissas: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Factors A and B, float32 [n], of radii in steps (SPEC 8.3)."""
    power, step = np.divmod(radius, c.QUADS_RADIUS_STEPS)
    small = power < c.RADIUS_SPLIT
    first = np.ldexp(mantissas[step].astype(np.float64), power + np.where(small, c.RADIUS_SHIFT, 0))
    return first.astype(np.float32), np.where(small, np.float32(2.0**-c.RADIUS_SHIFT), np.float32(1))
