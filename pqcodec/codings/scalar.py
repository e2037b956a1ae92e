"""Law: scalar coding (SPEC 15, 16) in numpy: each number is a level, times a scale, and added to a zero if there is one.

Levels are those of a uniform grid, or the ones that a codebook brings.

The granularity of scales and zeros is the stream's (SPEC 13): a channel's of some tokens and a token's of some channels are the
two axes of KIVI (arXiv 2402.02750), and a scale alone is that of llama.cpp's q4_0.
"""

from __future__ import annotations

import numpy as np

from pqcodec import constants as c
from pqcodec.codings import affine, levels, outliers
from pqcodec.codings.plan import Plan


# -- encoding ------------------------------------------------------------------------------------------------------
def encode(v: np.ndarray, plan: Plan, exponent: int, effort: str) -> np.ndarray:
    """Vectors [n, order] of one block -> its bytes without the checksum; ``exponent`` and ``effort`` are not used."""

    def encode_group(x: np.ndarray, finite: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        low, high = ranges_of(x[finite][:, : plan.head_dim], len(x), plan)
        apart = (x < _spread(low, plan)) | (x > _spread(high, plan))
        apart[~finite], apart[:, plan.head_dim :] = False, False
        fields = fields_of(low, high, plan)
        return _codes(x, finite, fields, plan), fields, apart

    def encode_by_table(x: np.ndarray, finite: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        assert plan.shared_fields is not None
        codes = _codes(x, finite, plan.shared_fields, plan)
        missed = np.abs(x - _numbers(codes, plan.shared_fields, plan))[:, : plan.head_dim]
        return codes, np.zeros(0, np.uint8), outliers.farthest(missed, finite, plan)

    return affine.encode_groups(v, plan, encode_group if plan.shared_fields is None else encode_by_table)


def fields_of(low: np.ndarray, high: np.ndarray, plan: Plan) -> np.ndarray:
    """The fields of groups whose numbers are from ``low`` to ``high``, float32 [groups], as they stand in a block: uint8."""
    assert plan.affine is not None
    most, zeros = (1 << plan.row_bits // plan.order) - 1, []
    zero = np.zeros(len(low), np.float32)
    if plan.affine.fields == c.AFFINE_SCALE_ZERO:  # of levels the middle of the range
        zero = low if plan.levels is None else (low + high) * np.float32(0.5)
        zero_bytes, zero = affine.half_fields(zero + np.float32(0))  # never -0, which least numbers of two orders may be
        zeros = [zero_bytes]
    if plan.levels is not None:
        step = np.maximum(high - zero, zero - low)
    elif zeros:
        step = np.maximum(high - zero, np.float32(0)) / np.float32(most)
    else:  # the number of the largest magnitude is the first level, as in q4_0
        step = np.where(high >= -low, high, low) / np.float32(-(most + 1 >> 1)) + np.float32(0)
    return np.concatenate([affine.half_fields(step)[0], *zeros])


def _codes(x: np.ndarray, finite: np.ndarray, fields: np.ndarray, plan: Plan) -> np.ndarray:
    """Codes [n, order] of one group of tokens that has such fields; 0 of rows that are not ``finite``."""
    assert plan.affine is not None
    most = (1 << plan.row_bits // plan.order) - 1
    step, zero = _steps_and_zeros(fields, plan)
    place = (x - zero) / np.where(step == 0, np.float32(1), step)
    if plan.levels is None:
        shift = 0 if plan.affine.fields == c.AFFINE_SCALE_ZERO else most + 1 >> 1
        found = np.clip(np.rint(place) + np.float32(shift), 0, most).astype(np.int64)
    else:
        found = np.searchsorted(levels.bounds(plan.levels), place.ravel(), "left").reshape(place.shape)
    found[:, step == 0] = 0
    found[~finite], found[:, plan.head_dim :] = 0, 0
    return found


def ranges_of(x: np.ndarray, tokens: int, plan: Plan) -> tuple[np.ndarray, np.ndarray]:
    """The least and the largest number of x [n, head_dim] in each group of channels, float32 [groups]; 0 for none.

    Without those that a group of ``tokens`` tokens keeps apart.
    """
    assert plan.affine is not None
    count, found = outliers.at_an_end(tokens, plan.affine), []
    for first in range(0, plan.affine.groups(plan.order) * plan.affine.channels, plan.affine.channels):
        found.append(outliers.ends(x[:, first : first + plan.affine.channels], count))
    low, high = np.array(found, np.float32).T
    return np.where(low <= high, low, np.float32(0)), np.where(low <= high, high, np.float32(0))


def _spread(fields: np.ndarray, plan: Plan) -> np.ndarray:
    """Fields of groups [groups] -> of channels [order]."""
    assert plan.affine is not None
    return np.repeat(fields, plan.affine.channels)[: plan.order]


# -- decoding ------------------------------------------------------------------------------------------------------
def decode(
    body: np.ndarray, tokens: int, rows: tuple[int, int], plan: Plan, exponent: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Bytes of a block of ``tokens`` rows -> coordinates of the wanted rows float32 [n, order], and factors A and B [n]."""

    def decode_group(codes: np.ndarray, fields: np.ndarray) -> np.ndarray:
        return _numbers(codes, fields, plan)

    return affine.decode_groups(body, tokens, rows, plan, decode_group, plan.order)


def _numbers(codes: np.ndarray, fields: np.ndarray, plan: Plan) -> np.ndarray:
    """The numbers float32 [n, order] of codes of one group of tokens that has such fields."""
    assert plan.affine is not None
    step, zero = _steps_and_zeros(fields, plan)
    shift = 0 if plan.affine.fields == c.AFFINE_SCALE_ZERO else 1 << plan.row_bits // plan.order >> 1
    level = (codes - shift).astype(np.float32) if plan.levels is None else plan.levels[codes]
    return level * step + zero


def _steps_and_zeros(fields: np.ndarray, plan: Plan) -> tuple[np.ndarray, np.ndarray]:
    """Scale and zero of every coordinate, float32 [order], from the fields of one group of tokens, uint8."""
    assert plan.affine is not None
    groups = plan.affine.groups(plan.order)
    step, zero = affine.halves_of(fields[: 2 * groups]), np.zeros(groups, np.float32)
    if plan.affine.fields == c.AFFINE_SCALE_ZERO:
        zero = affine.halves_of(fields[2 * groups :])
    return _spread(step, plan), _spread(zero, plan)
