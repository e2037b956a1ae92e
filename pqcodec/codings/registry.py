"""Law: the codings, each with the functions that code rows as the specification tells it; one table, an entry a coding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from pqcodec.codings import paper, split
from pqcodec.codings.declared import PAPER, SPLIT, Declared
from pqcodec.codings.plan import Plan


@dataclass(frozen=True)
class Coding:
    """A coding. ``exponent`` is the header's ``radius_exponent``; bits are uint8 [n, row_bits] of 0 and 1."""

    declared: Declared
    encode: Callable[[np.ndarray, Plan, np.ndarray, int], None]  # (v float64 [n, order], plan, bits to be set, exponent)
    # (bits, plan, exponent) -> coordinates on the grid int32 [n, order], and the factors A and B float32 [n] (SPEC 6.5)
    decode: Callable[[np.ndarray, Plan, int], tuple[np.ndarray, np.ndarray, np.ndarray]]
    # (largest magnitude of the tensor, order) -> radius_exponent; None where the coding takes every radius as it is
    radius_exponent: Callable[[float, int], int] | None = None


CODINGS = {
    coding.declared.code: coding
    for coding in (
        Coding(SPLIT, split.encode, split.decode),
        Coding(PAPER, paper.encode, paper.decode, paper.radius_exponent),
    )
}
