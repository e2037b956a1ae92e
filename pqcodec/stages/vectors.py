"""Law: what stages make of a tensor's vectors before they are coded, as float32 rows, and how vectors come back (SPEC 18, 19).

Encoding, the coded tokens are turned back from RoPE, less their offsets, those of all heads joined, and a linear stage makes
rows of these; decoding does the contrary, in the other order. A sum that is beyond float32 becomes the largest finite number,
so nothing here is NaN.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from pqcodec import constants as c
from pqcodec.stages import centre
from pqcodec.stages.keep import places_of
from pqcodec.stages.linear import Linear, LinearOptions, Multiplying
from pqcodec.stream.header import Header
from pqcodec.stream.index import Bounds
from pqcodec.tensors.numbers import widen
from pqcodec.tensors.rows import Values


class Transforming(Multiplying, Protocol):
    """What of a backend the stages need (``kernels.job.Backend``)."""

    def turn(self, x: np.ndarray, header: Header, first: tuple[int, int], positions: np.ndarray | None, back: bool) -> None:
        """Turn vectors float32 [leads, tokens, head_dim] by their tokens' angles, or back, in place."""
        ...


def rows_of_vectors(
    h: Header,
    values: Values,
    offsets: np.ndarray | None,
    positions: np.ndarray | None,
    asked: LinearOptions,
    kernel: Transforming,
) -> tuple[np.ndarray, np.ndarray, Linear | None]:
    """The rows that the coding sees, float32 [leading of rows, coded tokens, width], bad vectors, and the linear stage.

    Those that are not finite, bool [leading, coded tokens], count as zeros; a row of such vectors alone is NaN, so that codings
    give it no weight. ``offsets``: float32 [leading, head_dim]; ``positions``: as in an ``EncodeJob``; ``asked``: of the stage.
    """
    x = np.empty((h.leading, h.coded_tokens, h.head_dim), np.float32)
    for lead in range(h.leading):
        x[lead] = widen(values.rows(lead, h.first_tokens, h.coded_tokens), h.dtype)
    bad = np.asarray(~np.isfinite(x).all(-1))
    x[bad] = 0
    if h.before_rope:
        _turn(x, h, (0, h.first_tokens), positions, True, kernel)
    if offsets is not None:
        _add_offsets(x, h, (0, h.first_tokens), -offsets, positions)
    x[bad] = 0
    leading, tokens = h.leading // h.heads, h.coded_tokens
    rows = x.reshape(leading, h.heads, tokens, h.head_dim).swapaxes(1, 2).reshape(leading, tokens, h.heads * h.head_dim)
    linear = asked.stage(h, rows) if h.linear else None
    if linear:
        rows = linear.rows(rows, kernel)
    rows[bad.reshape(leading, h.heads, tokens).all(1)] = np.nan
    return rows, bad, linear


def vectors_of_rows(
    h: Header,
    rows: np.ndarray,
    leads: Bounds,
    first_token: int,
    offsets: np.ndarray | None,
    positions: np.ndarray | None,
    linear: Linear | None,
    kernel: Transforming,
) -> np.ndarray:
    """The vectors of decoded rows, which begin at a token of the tensor: float32 [leads, n, head_dim].

    ``rows``: float32 [n, width] of each leading index that ``Header.leads_of_rows`` tells of ``leads``; they may become the
    vectors, which are not rounded to the tensor's dtype. Other arguments are those of ``rows_of_vectors``.
    """
    of_rows, tokens = h.leads_of_rows(leads), rows.shape[1]
    if linear:
        rows = linear.vectors(rows, of_rows, kernel)
    first = of_rows[0] * h.heads
    x = rows.reshape(len(rows), tokens, h.heads, h.head_dim).swapaxes(1, 2).reshape(-1, tokens, h.head_dim)
    x = x[leads[0] - first : leads[1] - first]
    if offsets is not None:
        _add_offsets(x, h, (leads[0], first_token), offsets, positions)
    if h.before_rope:
        _turn(x, h, (leads[0], first_token), positions, False, kernel)
    return x


def _turn(
    x: np.ndarray, h: Header, first: tuple[int, int], positions: np.ndarray | None, back: bool, kernel: Transforming
) -> None:
    if x.size:
        with np.errstate(over="ignore"):
            kernel.turn(x, h, first, positions, back)
        _saturate(x)


def _add_offsets(x: np.ndarray, h: Header, first: tuple[int, int], offsets: np.ndarray, positions: np.ndarray | None) -> None:
    """Add each leading index's offset to its vectors, under RoPE turned by each token's angles."""
    tokens = first[1] + np.arange(x.shape[1])
    for n, vectors in enumerate(x):
        offset = offsets[first[0] + n]
        with np.errstate(over="ignore"):
            if h.before_rope or h.rope is None:
                vectors += offset
            else:
                vectors += centre.offset_at(h.rope, offset, places_of(positions, first[0] + n, tokens))
    _saturate(x)


def _saturate(x: np.ndarray) -> None:
    largest = np.float32(c.LARGEST_FINITE[c.DTYPE_FLOAT32])
    np.clip(x, -largest, largest, out=x)
