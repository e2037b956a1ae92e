"""Law: pair polar coding (SPEC 14; arXiv 2502.00527, section 3) in numpy: radius and angle of the two channels that RoPE turns.

Both are uniform codes between the least and the largest of a group of tokens; decoded is the middle of a cell. Angles are
counted in turns / 2^16, and their cosines are those by which offsets turn, so decoded numbers are the same on every machine.
"""

from __future__ import annotations

import numpy as np

from pqcodec import constants as c
from pqcodec.codings import affine
from pqcodec.codings.plan import Plan
from pqcodec.stages.centre import phase_cosines


def channels(plan: Plan) -> tuple[np.ndarray, np.ndarray]:
    """The two channels of each pair, intp [order / 2]; from head_dim on there are none, and all are zeros."""
    assert plan.affine is not None
    pair, half = np.arange(plan.order // 2), -(-plan.head_dim // 2)
    if plan.affine.pairing == c.ROPE_INTERLEAVED:
        return 2 * pair, 2 * pair + 1
    behind = pair >= half  # these stand for no channel of the vector
    return np.where(behind, 2 * pair, pair), np.where(behind, 2 * pair + 1, pair + half)


# -- encoding ------------------------------------------------------------------------------------------------------
def encode(v: np.ndarray, plan: Plan, exponent: int, effort: str) -> np.ndarray:
    """Vectors [n, order] of one block -> its bytes without the checksum; ``effort``: "best" looks for the shortest arc."""
    assert plan.affine is not None
    p, q = channels(plan)
    radius_bits, angle_bits = plan.radius_bits, plan.affine.angle_bits

    def encode_group(x: np.ndarray, finite: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        a, b = x[:, p], x[:, q]
        radius, units = np.sqrt(a * a + b * b), turns(a, b) * np.float32(c.TURN)
        units = np.where(units >= c.TURN, np.float32(0), units)
        least, step = _radii(radius[finite], radius_bits)
        arc = _shortest_arc if effort == "best" else _arc
        arcs = [arc(*each) for each in zip(units[finite].T, (radius > 0)[finite].T, strict=True)]
        first, span = np.array([f for f, _ in arcs]), np.array([s for _, s in arcs])
        wide = np.where(span < 0, 0, (np.trunc(span).astype(np.int64) + (1 << angle_bits)) >> angle_bits)
        ahead = units - first.astype(np.float32)
        ahead = np.where(ahead < 0, ahead + np.float32(c.TURN), ahead)
        codes = affine.cells(radius - least[1], step[1], 1 << radius_bits) << angle_bits
        codes |= affine.cells(ahead, wide.astype(np.float32), 1 << angle_bits)
        codes[~finite] = 0
        apart = np.zeros(x.shape, np.bool_)
        return codes, np.concatenate([least[0], step[0], *(each.astype("<u2").view(np.uint8) for each in (first, wide))]), apart

    return affine.encode_groups(v, plan, encode_group)


def _radii(radius: np.ndarray, bits: int) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Start and step of radii [n, pairs], each as bytes and as float32."""
    if not len(radius):
        radius = np.zeros((1, radius.shape[1]), np.float32)
    start = affine.half_fields(radius.min(0))
    return start, affine.half_fields(np.maximum(radius.max(0) - start[1], np.float32(0)) * np.float32(2.0**-bits))


def _arc(units: np.ndarray, there: np.ndarray) -> tuple[int, np.float32]:
    """From the least angle to the largest, as the paper has it: whole units before the first, and what the arc spans.

    Pairs of radius 0 have no angle; where no other is ``there``, the arc spans less than nothing.
    """
    if not there.any():
        return 0, np.float32(-1)
    first = np.floor(units[there].min())
    return int(first), units[there].max() - first


def _shortest_arc(units: np.ndarray, there: np.ndarray) -> tuple[int, np.float32]:
    """The same of the shortest arc that holds all angles: it begins behind the largest gap between two of them."""
    if not there.any():
        return 0, np.float32(-1)
    angle = np.sort(units[there])
    gaps = np.concatenate([[angle[0] + np.float32(c.TURN) - angle[-1]], np.diff(angle)])
    behind = int(gaps.argmax())
    first = np.floor(angle[behind])
    span = angle[behind - 1] - first
    return int(first), span + np.float32(c.TURN) if span < 0 else span


def turns(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Angle of (x, y) in turns, 0 .. 1, float32: a polynomial, in the operations of every kernel."""
    a, b = np.abs(x), np.abs(y)
    slope = np.minimum(a, b) / (np.maximum(a, b) + np.float32(c.TURN_TINY))
    square = slope * slope
    found = np.zeros_like(slope)
    for coefficient in c.TURN_POLYNOMIAL:
        found = found * square + np.float32(coefficient)
    found = found * slope
    found = np.where(b > a, np.float32(0.25) - found, found)
    found = np.where(x < 0, np.float32(0.5) - found, found)
    return np.where(y < 0, np.float32(1) - found, found)


# -- decoding ------------------------------------------------------------------------------------------------------
def decode(
    body: np.ndarray, tokens: int, rows: tuple[int, int], plan: Plan, exponent: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Bytes of a block of ``tokens`` rows -> coordinates of the wanted rows float32 [n, order], and factors A and B [n]."""
    assert plan.affine is not None
    (p, q), pairs, angle_bits = channels(plan), plan.order // 2, plan.affine.angle_bits

    def decode_group(codes: np.ndarray, fields: np.ndarray) -> np.ndarray:
        start, step = (affine.halves_of(plane) for plane in np.split(fields[: 4 * pairs], 2))
        first, wide = (plane.view("<u2").astype(np.int64) for plane in np.split(fields[4 * pairs :], 2))
        radius = ((codes >> angle_bits).astype(np.float32) + np.float32(0.5)) * step + start
        phase = (first + ((2 * (codes & (1 << angle_bits) - 1) + 1) * wide >> 1)) % c.TURN
        cos, sin = phase_cosines(phase)
        x = np.zeros((len(codes), plan.order), np.float32)
        x[:, p], x[:, q] = radius * cos, radius * sin
        return x

    return affine.decode_groups(body, tokens, rows, plan, decode_group, pairs)
