"""Law: scalar coding (SPEC 15) in numpy: each number is a level of a uniform grid, times a scale, and added to a zero.

The granularity of scales and zeros is the stream's (SPEC 13): a channel's of some tokens and a token's of some channels are the
two axes of KIVI (arXiv 2402.02750), and a scale alone is that of llama.cpp's q4_0.
"""

from __future__ import annotations

import numpy as np

from pqcodec import constants as c
from pqcodec.codings import affine
from pqcodec.codings.plan import Plan


# -- encoding ------------------------------------------------------------------------------------------------------
def encode(v: np.ndarray, plan: Plan, exponent: int, effort: str) -> np.ndarray:
    """Vectors [n, order] of one block -> its bytes without the checksum; ``exponent`` and ``effort`` are not used."""
    assert plan.affine is not None
    most = (1 << plan.row_bits // plan.order) - 1
    zeros = plan.affine.fields == c.AFFINE_SCALE_ZERO

    def encode_group(x: np.ndarray, finite: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        low, high = _ranges(x[finite][:, : plan.head_dim], plan)
        fields, zero, shift = [], np.zeros(len(low), np.float32), 0
        if zeros:
            zero_bytes, zero = affine.half_fields(low + np.float32(0))  # never -0, which least numbers of two orders may be
            fields = [zero_bytes]
            step = np.maximum(high - zero, np.float32(0)) / np.float32(most)
        else:  # the number of the largest magnitude is the first level, as in q4_0
            shift = most + 1 >> 1
            step = np.where(high >= -low, high, low) / np.float32(-shift) + np.float32(0)
        step_bytes, step = affine.half_fields(step)
        step, zero = (_spread(each, plan) for each in (step, zero))
        at = np.rint((x - zero) / np.where(step == 0, np.float32(1), step)) + np.float32(shift)
        codes = np.where(step == 0, 0, np.clip(at, 0, most)).astype(np.int64)
        codes[~finite], codes[:, plan.head_dim :] = 0, 0
        return codes, np.concatenate([step_bytes, *fields])

    return affine.encode_groups(v, plan, encode_group)


def _ranges(x: np.ndarray, plan: Plan) -> tuple[np.ndarray, np.ndarray]:
    """The least and the largest number of x [n, head_dim] in each group of channels, float32 [groups]; 0 for none."""
    assert plan.affine is not None
    found = []
    for pick, none in ((np.min, np.inf), (np.max, -np.inf)):
        spread = np.full(plan.affine.groups(plan.order) * plan.affine.channels, none, np.float32)
        spread[: plan.head_dim] = pick(x, axis=0, initial=none)
        each = pick(spread.reshape(-1, plan.affine.channels), axis=1)
        found.append(np.where(np.isfinite(each), each, np.float32(0)))
    return found[0], found[1]


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
        return (codes - shift).astype(np.float32) * step + zero

    return affine.decode_groups(body, tokens, rows, plan, decode_group, plan.order)
