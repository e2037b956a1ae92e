"""Law: what a header must know of each coding: its number and name, the rows it may have; one table, an entry a coding.

How rows are coded is the coding's own module's business (``codings.registry`` holds those).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pqcodec import constants as c


@dataclass(frozen=True)
class Declared:
    """A coding as the stream's header knows it."""

    code: int
    name: str
    rounds: tuple[int, ...]  # of the rotation that streams may have; new streams have the last
    row_bits: Callable[[int, int], int]  # (order, twice a preset's bits per coordinate) -> bits of a row
    problem: Callable[[int, int, int], str]  # (order, row_bits, radius_bits) -> what is wrong with them, or ""


def _split_problem(order: int, row_bits: int, radius_bits: int) -> str:
    most = c.MAX_BUDGET_PER_COORDINATE * order
    if radius_bits in c.RADIUS_BITS and order <= row_bits <= radius_bits + most:
        return ""
    return f"rows of {row_bits} bits with a radius of {radius_bits} are not possible at order {order}"


def _paper_row_bits(order: int, half_bits: int) -> int:
    return c.PAPER_BLOCK_BITS * (order // c.PAPER_BLOCK)


def _paper_problem(order: int, row_bits: int, radius_bits: int) -> str:
    if row_bits == _paper_row_bits(order, 0) and radius_bits == c.PAPER_RADIUS_BITS:
        return ""
    return f"the paper's coding takes {c.PAPER_BLOCK_BITS} bits a block of {c.PAPER_BLOCK}, not rows of {row_bits} bits"


SPLIT = Declared(c.CODING_SPLIT, "split", (1, 2), lambda order, half_bits: half_bits * order // 2, _split_problem)
PAPER = Declared(c.CODING_PAPER, "paper", (1,), _paper_row_bits, _paper_problem)

DECLARED = {coding.code: coding for coding in (SPLIT, PAPER)}
