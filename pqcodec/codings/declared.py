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
    row_bits: Callable[[int, int], int]  # (order, four times a preset's bits per coordinate) -> bits of a row
    problem: Callable[[int, int, int], str]  # (order, row_bits, radius_bits) -> what is wrong with them, or ""
    # A block is its rows, ``beside`` bytes and zeros up to a multiple of ``align``; it ends with the checksum of all that
    beside: int = c.CHECKSUM_BYTES
    align: int = 1


def _split_problem(order: int, row_bits: int, radius_bits: int) -> str:
    most = c.MAX_BUDGET_PER_COORDINATE * order
    if radius_bits in c.RADIUS_BITS and order <= row_bits <= radius_bits + most:
        return ""
    return f"rows of {row_bits} bits with a radius of {radius_bits} are not possible at order {order}"


def _paper_row_bits(order: int, quarter_bits: int) -> int:
    return c.PAPER_BLOCK_BITS * (order // c.PAPER_BLOCK)


def _paper_problem(order: int, row_bits: int, radius_bits: int) -> str:
    if row_bits == _paper_row_bits(order, 0) and radius_bits == c.PAPER_RADIUS_BITS:
        return ""
    return f"the paper's coding takes {c.PAPER_BLOCK_BITS} bits a block of {c.PAPER_BLOCK}, not rows of {row_bits} bits"


def _quads_row_bits(order: int, quarter_bits: int) -> int:
    return c.QUADS_RADIUS_BITS + order * quarter_bits // 4


def quads_index_bits(order: int, row_bits: int) -> int:
    """Bits of a quad's index in rows of so many bits; 0 where no such rows are possible."""
    bits, rest = divmod(row_bits - c.QUADS_RADIUS_BITS - order, order // c.QUAD)
    return 0 if rest or bits not in c.QUADS_INDEX_BITS else bits


def _quads_problem(order: int, row_bits: int, radius_bits: int) -> str:
    if radius_bits == c.QUADS_RADIUS_BITS and quads_index_bits(order, row_bits):
        return ""
    return f"rows of {row_bits} bits with a radius of {radius_bits} are not possible in quads at order {order}"


SPLIT = Declared(c.CODING_SPLIT, "split", (1, 2), lambda order, quarter_bits: quarter_bits * order // 4, _split_problem)
PAPER = Declared(c.CODING_PAPER, "paper", (1,), _paper_row_bits, _paper_problem)

QUADS = Declared(
    c.CODING_QUADS,
    "quads",
    (2,),
    _quads_row_bits,
    _quads_problem,
    beside=c.QUADS_BASE_BYTES + c.CHECKSUM_BYTES,
    align=c.QUADS_BLOCK_ALIGN,
)

DECLARED = {coding.code: coding for coding in (SPLIT, PAPER, QUADS)}
