"""Law: the codings, each with the functions that code blocks as the specification tells it; one table, an entry a coding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from pqcodec.codings import pairs, paper, quads, residual, scalar, sketch, split
from pqcodec.codings.bits import block_of_rows, rows_of_block
from pqcodec.codings.declared import PAIRS, PAPER, QUADS, RESIDUAL, SCALAR, SKETCH, SPLIT, Declared
from pqcodec.codings.plan import Plan


@dataclass(frozen=True)
class Coding:
    """A coding. ``exponent`` is the header's ``radius_exponent``; a block's bytes are uint8 [n], without the checksum."""

    declared: Declared
    # (rotated vectors float64 [tokens, order], plan, exponent, effort) -> the block's bytes. Vectors that are not finite are
    # zeros, and where vectors share affine fields NaN
    encode: Callable[[np.ndarray, Plan, int, str], np.ndarray]
    # (the block's bytes, its tokens, rows (first, last + 1), plan, exponent) -> of the rows: coordinates on the coding's grid
    # int32 [n, order] (without a rotation float32), and the factors A and B float32 [n] (SPEC 6.5)
    decode: Callable[[np.ndarray, int, tuple[int, int], Plan, int], tuple[np.ndarray, np.ndarray, np.ndarray]]
    # (largest magnitude of the tensor, order) -> radius_exponent; None where the coding takes every radius as it is
    radius_exponent: Callable[[float, int], int] | None = None


CODINGS = {
    coding.declared.code: coding
    for coding in (
        Coding(SPLIT, block_of_rows(split.encode), rows_of_block(split.decode)),
        Coding(PAPER, block_of_rows(paper.encode), rows_of_block(paper.decode), paper.radius_exponent),
        Coding(QUADS, quads.encode, quads.decode),
        Coding(PAIRS, pairs.encode, pairs.decode),
        Coding(SCALAR, scalar.encode, scalar.decode),
        Coding(RESIDUAL, residual.encode, residual.decode, paper.radius_exponent),
        Coding(SKETCH, sketch.encode, sketch.decode),
    )
}
