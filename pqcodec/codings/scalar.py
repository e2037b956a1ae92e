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
        low, high = _ranges(x[finite][:, : plan.head_dim], len(x), plan)
        apart = (x < _spread(low, plan)) | (x > _spread(high, plan))
        apart[~finite], apart[:, plan.head_dim :] = False, False
        code_group = _even_codes if plan.levels is None else _nearest_levels
        codes, fields = code_group(x, low, high, plan)
        codes[~finite], codes[:, plan.head_dim :] = 0, 0
        return codes, fields, apart

    return affine.encode_groups(v, plan, encode_group)


def _even_codes(x: np.ndarray, low: np.ndarray, high: np.ndarray, plan: Plan) -> tuple[np.ndarray, np.ndarray]:
    """Codes [n, order] and fields of one group of tokens, on an even grid."""
    assert plan.affine is not None
    most = (1 << plan.row_bits // plan.order) - 1
    fields, zero, shift = [], np.zeros(len(low), np.float32), 0
    if plan.affine.fields == c.AFFINE_SCALE_ZERO:
        zero_bytes, zero = affine.half_fields(low + np.float32(0))  # never -0, which least numbers of two orders may be
        fields = [zero_bytes]
        step = np.maximum(high - zero, np.float32(0)) / np.float32(most)
    else:  # the number of the largest magnitude is the first level, as in q4_0
        shift = most + 1 >> 1
        step = np.where(high >= -low, high, low) / np.float32(-shift) + np.float32(0)
    step_bytes, step = affine.half_fields(step)
    step, zero = (_spread(each, plan) for each in (step, zero))
    at = np.rint((x - zero) / np.where(step == 0, np.float32(1), step)) + np.float32(shift)
    return np.where(step == 0, 0, np.clip(at, 0, most)).astype(np.int64), np.concatenate([step_bytes, *fields])


def _nearest_levels(x: np.ndarray, low: np.ndarray, high: np.ndarray, plan: Plan) -> tuple[np.ndarray, np.ndarray]:
    """The same by the levels of a codebook."""
    assert plan.affine is not None
    assert plan.levels is not None
    fields, zero = [], np.zeros(len(low), np.float32)
    if plan.affine.fields == c.AFFINE_SCALE_ZERO:  # the middle of the range
        zero_bytes, zero = affine.half_fields((low + high) * np.float32(0.5) + np.float32(0))
        fields = [zero_bytes]
    step_bytes, step = affine.half_fields(np.maximum(high - zero, zero - low))
    step, zero = (_spread(each, plan) for each in (step, zero))
    place = (x - zero) / np.where(step == 0, np.float32(1), step)
    codes = np.searchsorted(levels.bounds(plan.levels), place.ravel(), "left").reshape(place.shape)
    codes[:, step == 0] = 0
    return codes, np.concatenate([step_bytes, *fields])


def _ranges(x: np.ndarray, tokens: int, plan: Plan) -> tuple[np.ndarray, np.ndarray]:
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
    assert plan.affine is not None
    groups, zeros = plan.affine.groups(plan.order), plan.affine.fields == c.AFFINE_SCALE_ZERO
    shift = 0 if zeros else 1 << plan.row_bits // plan.order >> 1

    def decode_group(codes: np.ndarray, fields: np.ndarray) -> np.ndarray:
        step = _spread(affine.halves_of(fields[: 2 * groups]), plan)
        zero = _spread(affine.halves_of(fields[2 * groups :]), plan) if zeros else np.float32(0)
        level = (codes - shift).astype(np.float32) if plan.levels is None else plan.levels[codes]
        return level * step + zero

    return affine.decode_groups(body, tokens, rows, plan, decode_group, plan.order)
