"""Law: single numbers that a block keeps apart (SPEC 16.4) in numpy: the ends of a group's range, which so is narrower.

A block has room for as many as its whole groups may have, so that blocks of one number of tokens have one size.
"""

from __future__ import annotations

import numpy as np

from pqcodec import constants as c
from pqcodec.codings.declared import Affine
from pqcodec.codings.plan import Plan


def room_apart(tokens: int, plan: Plan) -> tuple[int, int]:
    """Segments of a block of ``tokens`` rows, and the outliers that it has room for."""
    assert plan.affine is not None
    segments = -(-tokens * plan.head_dim // c.OUTLIER_SEGMENT)
    ends, each = plan.affine.room(plan.order)
    return segments, ends * (tokens * each // plan.affine.tokens)


def at_an_end(tokens: int, affine: Affine) -> int:
    """Outliers that a group of ``tokens`` tokens has at each end."""
    return tokens * affine.outliers // affine.tokens


# -- encoding ------------------------------------------------------------------------------------------------------
def ends(x: np.ndarray, count: int) -> tuple[np.float32, np.float32]:
    """The least and the largest number of a group when ``count`` are taken away at each end; all stay where few are there."""
    if not x.size:
        return np.float32(np.inf), np.float32(-np.inf)
    count = count if x.size > 2 * count else 0
    ordered = np.partition(x.ravel(), (count, x.size - 1 - count))
    return ordered[count], ordered[x.size - 1 - count]


def farthest(errors: np.ndarray, finite: np.ndarray, plan: Plan) -> np.ndarray:
    """Which numbers of a block [n, head_dim] its codes miss by the most: as many as there is room for, of equals the first.

    None that codes hit, and none of a row that is not ``finite``.
    """
    missed = np.where(finite[:, None], errors, 0).ravel()
    found = np.zeros(missed.size, np.bool_)
    found[np.argsort(-missed, kind="stable")[: room_apart(len(errors), plan)[1]]] = True
    return (found & (missed > 0)).reshape(errors.shape)


def packed(x: np.ndarray, apart: np.ndarray, plan: Plan) -> np.ndarray:
    """The part of a block that holds its outliers; ``apart``: which numbers of x [n, head_dim] these are."""
    segments, count = room_apart(len(x), plan)
    places = np.flatnonzero(apart[:, : plan.head_dim])
    counts, at, values = np.zeros(segments, "<u4"), np.zeros(count, "<u2"), np.zeros(count, "<f2")
    counts += np.bincount(places // c.OUTLIER_SEGMENT, minlength=segments).astype(np.uint32)
    at[: len(places)] = places % c.OUTLIER_SEGMENT
    with np.errstate(over="ignore"):  # with a shared table's ranges numbers are not scaled: infinite is the largest one
        values[: len(places)] = x[:, : plan.head_dim].ravel()[places]
    return np.concatenate([each.view(np.uint8) for each in (counts, at, values)])


# -- decoding ------------------------------------------------------------------------------------------------------
def unpacked(raw: np.ndarray, tokens: int, plan: Plan) -> tuple[np.ndarray, np.ndarray]:
    """Places of a block's outliers among its tokens x head_dim numbers, ascending, and the bits of their float16.

    Of a segment's records one counts whose place is above those of all before it; what is behind the last row does not.
    """
    segments, count = room_apart(tokens, plan)
    at = raw[c.OUTLIER_COUNT_BYTES * segments :]
    local, bits = (half.view("<u2") for half in np.split(at, 2))
    counts = raw[: c.OUTLIER_COUNT_BYTES * segments].view("<u4").astype(np.int64)
    last = np.minimum(np.cumsum(counts), count)
    places, kept = np.zeros(count, np.int64), np.zeros(count, np.bool_)
    for segment, (first, end) in enumerate(zip(np.concatenate([[0], last[:-1]]), last, strict=True)):
        own = local[first:end].astype(np.int64)
        before = np.concatenate([[-1], np.maximum.accumulate(own)[:-1]]) if len(own) else own
        places[first:end], kept[first:end] = own + segment * c.OUTLIER_SEGMENT, own > before
    kept &= places < tokens * plan.head_dim
    return places[kept], bits[kept]
