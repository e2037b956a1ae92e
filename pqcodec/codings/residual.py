"""Law: residual VQ (SPEC 20; A. Kumar, arXiv 2410.15704) in numpy: a group of channels is the sum of an entry of each codebook.

A row is divided by one scale, and its channels are cut into groups. The first stage takes the entry nearest to a group, the
next the entry of its own codebook nearest to what is left, and so on.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from pqcodec import constants as c
from pqcodec.codings.affine import halves_of
from pqcodec.codings.plan import Plan
from pqcodec.codings.vectors import Book

Search = Callable[[np.ndarray, Book], np.ndarray]  # vectors float32 [n, channels of a group] -> indices int64 [n]
_SCALE_BYTES = c.RESIDUAL_SCALE_BITS // 8


# -- encoding ------------------------------------------------------------------------------------------------------
def nearest_entries(x: np.ndarray, book: Book) -> np.ndarray:
    """The entry nearest to each of x float32 [n, channels]: int64 [n]; of those equally near the first.

    It is the one of the least |entry|^2 / 2 - <x, entry>, which is computed in float32, from the first channel to the last.
    """
    score = np.repeat(book.halves[None], len(x), 0)
    for i in range(x.shape[1]):
        score -= x[:, i, None] * book.entries[:, i]
    return score.argmin(1)


def encode(v: np.ndarray, plan: Plan, exponent: int, effort: str, search: Search = nearest_entries) -> np.ndarray:
    """Vectors [n, head_dim] of one block -> its bytes without the checksum; ``exponent``: of scales; ``effort`` is not used."""
    assert plan.vectors is not None
    scales, grouped = scaled_groups(np.ldexp(v, -exponent).astype(np.float32), plan.vectors.channels, plan.vectors.groups)
    indices = np.empty((len(grouped), plan.radius_bits), np.int64)
    for stage, book in enumerate(plan.vectors.books[: plan.radius_bits]):
        indices[:, stage] = search(grouped, book)
        grouped -= book.entries[indices[:, stage]]
    indices = indices.reshape(len(v), -1)
    indices[scales == 0] = 0
    bits = (indices[..., None] >> np.arange(plan.vectors.index_bits) & 1).astype(np.uint8).reshape(len(v), -1)
    rows = np.zeros((len(v), plan.row_bytes), np.uint8)
    rows[:, :_SCALE_BYTES] = scales.astype("<f2")[:, None].view(np.uint8)
    rows[:, _SCALE_BYTES:] = np.packbits(bits, axis=1, bitorder="little")
    return rows.ravel()


def scaled_groups(x: np.ndarray, channels: np.ndarray, groups: int) -> tuple[np.ndarray, np.ndarray]:
    """Scales float16 [n] of vectors x float32 [n, head_dim], and their groups over them, float32 [n * groups, channels].

    A scale is the root of the sum of squares over head_dim - 1. Where it is 0, the groups are zeros.
    """
    norms = np.sqrt(np.cumsum(x.astype(np.float64) ** 2, 1)[:, -1] / (x.shape[1] - 1))
    scales = np.minimum(norms, c.LARGEST_FINITE[c.DTYPE_FLOAT16]).astype(np.float16)
    over = scales.astype(np.float32)[:, None]
    there = np.where(over > 0, x / np.where(over > 0, over, np.float32(1)), np.float32(0))
    return scales, np.ascontiguousarray(there[:, channels]).reshape(len(x) * groups, -1)


# -- decoding ------------------------------------------------------------------------------------------------------
def decode(
    body: np.ndarray, tokens: int, rows: tuple[int, int], plan: Plan, exponent: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Bytes of a block of ``tokens`` rows -> sums of entries of the wanted rows float32 [n, head_dim], and factors A and B."""
    assert plan.vectors is not None
    wanted = body.reshape(tokens, plan.row_bytes)[slice(*rows)]
    count = plan.vectors.groups * plan.radius_bits
    bits = np.unpackbits(wanted[:, _SCALE_BYTES:], axis=1, bitorder="little")[:, : count * plan.vectors.index_bits]
    fields = bits.reshape(len(wanted), count, plan.vectors.index_bits).astype(np.int64)
    indices = (fields << np.arange(plan.vectors.index_bits)).sum(2).reshape(len(wanted), -1, plan.radius_bits)
    total = np.zeros((len(wanted), plan.vectors.groups, plan.vectors.entries.shape[2]), np.float32)
    for stage, book in enumerate(plan.vectors.books[: plan.radius_bits]):
        total += book.entries[indices[..., stage]]
    units = np.empty((len(wanted), plan.head_dim), np.float32)
    units[:, plan.vectors.channels] = total.reshape(len(wanted), -1)
    scales = halves_of(np.ascontiguousarray(wanted[:, :_SCALE_BYTES]).reshape(-1))
    return units, scales, np.full(len(wanted), 2.0**exponent, np.float32)
