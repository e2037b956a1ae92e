"""Law: what a header must know of each coding: its number and name, the rows it may have; one table, an entry a coding.

How rows are coded is the coding's own module's business (``codings.registry`` holds those).
"""

from __future__ import annotations

import itertools
import math
import struct
from collections.abc import Callable
from dataclasses import dataclass

from pqcodec import constants as c
from pqcodec.stream.orders import order_for, whole_groups


@dataclass(frozen=True)
class Affine:
    """The fields that a group of numbers of a block shares (SPEC 13): of ``tokens`` times ``channels``."""

    tokens: int
    channels: int
    fields: int  # which ones: AFFINE_SCALE, AFFINE_SCALE_ZERO or AFFINE_POLAR
    pairing: int = 0  # of the channels of pair polar: ROPE_HALF or ROPE_INTERLEAVED
    angle_bits: int = 0  # of pair polar
    outliers: int = 0  # numbers at each end of a whole group's range for which a block has room apart (SPEC 16.4)
    shared: bool = False  # whether a shared table has the fields, for all tokens, and blocks have none

    @property
    def rate(self) -> float:
        """Bits a coordinate that fields and outliers take in whole groups."""
        size = (0 if self.shared else c.AFFINE_FIELD_BYTES[self.fields]) + 2 * c.OUTLIER_BYTES * self.outliers
        return 8 * size / (self.tokens * self.channels)

    def groups(self, order: int) -> int:
        """Groups side by side along the channels."""
        return -(-order // self.channels)

    def bytes_of(self, order: int) -> int:
        """Bytes of the fields that a block has of all groups of the same tokens."""
        return 0 if self.shared else self.groups(order) * c.AFFINE_FIELD_BYTES[self.fields]

    def room(self, order: int) -> tuple[int, int]:
        """Outliers that a block has room for: the first number times (its rows times the second div ``tokens``).

        Of fields in blocks so many of each group, at both ends; of those of a shared table so many in all.
        """
        both = 2 * self.groups(order)
        return (1, both * self.outliers) if self.shared else (both, self.outliers)

    def problem(self) -> str:
        """What no coding takes, or an empty string."""
        if not 1 <= self.tokens <= c.MAX_CHUNK_TOKENS or not 1 <= self.channels <= c.MAX_HEAD_DIM:
            return f"groups of {self.tokens} tokens and {self.channels} channels are not possible"
        if not 0 <= 2 * self.outliers <= self.tokens * self.channels or self.outliers >= 1 << 16:
            return f"{self.outliers} outliers at each end of {self.tokens} x {self.channels} numbers are not possible"
        return ""


def table_name_problem(name: bytes) -> str:
    """What is wrong with the name of a shared table in a header, or an empty string."""
    return (
        "" if len(name) == c.TABLE_NAME_BYTES else f"the name of a shared table has {len(name)} bytes, not {c.TABLE_NAME_BYTES}"
    )


@dataclass(frozen=True)
class Codebook:
    """Levels that a header brings for its coding (SPEC 16): its own, or those of a table that many streams share."""

    levels: tuple[int, ...] | None  # bits of float16, ascending; None: those of a shared table that is not here
    name: bytes = b""  # SHA-256 of the shared table; empty: the levels stand in the header

    @property
    def here(self) -> bool:
        """Whether the levels are: where they stand in the header, or the shared table was given."""
        return self.levels is not None

    @property
    def header_bytes(self) -> int:
        """What it takes in a header."""
        return len(self.name) or c.LEVEL_BYTES * len(self.levels or ())

    def problem(self, bits: int) -> str:
        """What is wrong with it where codes have so many bits, or an empty string."""
        if self.name and (problem := table_name_problem(self.name)):
            return problem
        if self.levels is None:
            return "" if self.name else "levels are neither there nor named"
        if len(self.levels) != 1 << bits:
            return f"{len(self.levels)} levels for codes of {bits} bits, which choose among {1 << bits}"
        numbers = half_numbers(self.levels)
        if not all(map(math.isfinite, numbers)) or any(a > b for a, b in itertools.pairwise(numbers)):
            return "levels are not finite, or do not ascend"
        return ""


@dataclass(frozen=True)
class Sketch:
    """How vectors are sketched by signs (SPEC 21); a block of signs has N, the order of a row."""

    blocks: int  # of signs of a vector; of its channels that are no outliers, where there are such
    matrix: int = c.SKETCH_ORTHOGONAL
    tokens: int = 0  # of a group, which has outlier channels of its own; 0: there are none
    channels: int = 0  # outlier channels of a group
    outlier_blocks: int = 0  # of signs of these

    @property
    def norm_bits(self) -> int:
        """Bits of the norms of a row: one, or one more of the outlier channels."""
        return c.SKETCH_NORM_BITS * (2 if self.channels else 1)

    def row_bits(self, order: int) -> int:
        """Bits of a row: norms and signs."""
        return self.norm_bits + (self.blocks + self.outlier_blocks) * order

    def list_bytes(self, head_dim: int) -> int:
        """Bytes of the list of a group's outlier channels."""
        return self.channels * (1 if head_dim <= c.SKETCH_NARROW else 2)

    def error(self, head_dim: int, order: int) -> float:
        """Squared error of a decoded vector over its squared norm, without outlier channels, by closed form."""
        slope, start = c.SKETCH_ERRORS[self.matrix]
        return (slope * (head_dim - self.channels) + start) / (self.blocks * order << c.SKETCH_ERROR_BITS)

    def problem(self, head_dim: int, chunk_tokens: int) -> str:
        """What is not possible, or an empty string."""
        if self.matrix not in c.SKETCH_ERRORS or self.blocks not in c.SKETCH_BLOCKS:
            return f"a sketch of {self.blocks} blocks by matrix {self.matrix} is not possible"
        if not self.channels and not self.outlier_blocks and not self.tokens:
            return ""
        if not 1 <= self.channels <= head_dim or self.outlier_blocks not in c.SKETCH_BLOCKS:
            return f"a sketch of {self.channels} of {head_dim} channels apart, in {self.outlier_blocks} blocks, is not possible"
        if not 1 <= self.tokens <= c.MAX_CHUNK_TOKENS or chunk_tokens % self.tokens:
            return f"chunk_tokens {chunk_tokens} is no multiple of the {self.tokens} tokens of a group"
        return ""


def half_numbers(bits: tuple[int, ...]) -> tuple[float, ...]:
    """The numbers that bits of float16 stand for."""
    return struct.unpack(f"<{len(bits)}e", struct.pack(f"<{len(bits)}H", *bits))


def half_bits(numbers: list[float]) -> tuple[int, ...]:
    """Numbers rounded to float16, as bits; raises OverflowError beyond its range."""
    return struct.unpack(f"<{len(numbers)}H", struct.pack(f"<{len(numbers)}e", *numbers))


@dataclass(frozen=True)
class Declared:
    """A coding as the stream's header knows it."""

    code: int
    name: str
    rounds: tuple[int, ...]  # of the rotation that streams may have; new streams have the last
    row_bits: Callable[[int, int], int]  # (order, four times a preset's bits per coordinate) -> bits of a row; 0: not told so
    problem: Callable[[int, int, int], str]  # (order, row_bits, radius_bits) -> what is wrong with them, or ""
    # A block is its rows, ``beside`` bytes and zeros up to a multiple of ``align``; it ends with the checksum of all that
    beside: int = c.CHECKSUM_BYTES
    align: int = 1
    order: Callable[[int], int] = order_for  # head_dim -> coordinates of a row
    # (order, row_bits, radius_bits, affine) -> what is wrong with affine fields, or ""; None: the coding has none
    affine_problem: Callable[[int, int, int, Affine], str] | None = None
    takes_levels: bool = False  # whether its codes may be those of a ``Codebook``
    by_vectors: bool = False  # whether its codes are those of a ``VectorCodebook``
    sketches: bool = False  # whether a ``Sketch`` says how vectors are coded, of which so only inner products are kept

    @property
    def shares_fields(self) -> bool:
        """Whether groups of its numbers share affine fields."""
        return self.affine_problem is not None


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


def _pairs_problem(order: int, row_bits: int, radius_bits: int, affine: Affine) -> str:
    bits = (radius_bits, affine.angle_bits)
    if any(n not in c.PAIR_BITS for n in bits) or row_bits != sum(bits) * order // c.PAIR_CHANNELS:
        return f"rows of {row_bits} bits with radii of {bits[0]} and angles of {bits[1]} are not possible at order {order}"
    if affine.fields != c.AFFINE_POLAR or affine.channels != c.PAIR_CHANNELS:
        return f"pair polar has the fields {c.AFFINE_POLAR} of groups of 2 channels, not {affine.fields} of {affine.channels}"
    if affine.outliers:
        return "pair polar keeps no outliers"
    if affine.pairing not in (c.ROPE_HALF, c.ROPE_INTERLEAVED):
        return f"pairing {affine.pairing} of pair polar is unknown"
    return ""


def _scalar_problem(order: int, row_bits: int, radius_bits: int, affine: Affine) -> str:
    bits, rest = divmod(row_bits, order)
    if rest or bits not in c.SCALAR_BITS or radius_bits:
        return f"rows of {row_bits} bits with a radius of {radius_bits} are not possible in scalar coding at order {order}"
    if affine.fields not in (c.AFFINE_SCALE, c.AFFINE_SCALE_ZERO) or affine.pairing or affine.angle_bits:
        return f"scalar coding has a scale, or a scale and a zero, not the fields {affine.fields}, no pairs and no angles"
    return ""


def _no_problem(order: int, row_bits: int, radius_bits: int) -> str:
    return ""


def _sharing_fields(
    code: int, name: str, problem: Callable[[int, int, int, Affine], str], takes_levels: bool = False
) -> Declared:
    """A coding whose rows are not rotated and share affine fields."""
    return Declared(
        code,
        name,
        (0,),
        lambda order, quarter_bits: order * quarter_bits // 4,
        _no_problem,
        beside=c.AFFINE_EXPONENT_BYTES + c.CHECKSUM_BYTES,
        order=whole_groups,
        affine_problem=problem,
        takes_levels=takes_levels,
    )


PAIRS = _sharing_fields(c.CODING_PAIRS, "pair polar", _pairs_problem)
SCALAR = _sharing_fields(c.CODING_SCALAR, "scalar", _scalar_problem, takes_levels=True)


def _residual_problem(head_dim: int, row_bits: int, stages: int) -> str:
    bits, rest = divmod(row_bits - c.RESIDUAL_SCALE_BITS, max(stages, 1))  # of a stage
    cuts = [head_dim // width for width in c.RESIDUAL_GROUPS if head_dim % width == 0]
    if stages in c.RESIDUAL_STAGES and not rest and any(bits in [n * b for b in c.RESIDUAL_INDEX_BITS] for n in cuts):
        return ""
    return f"rows of {row_bits} bits of {stages} stages are not possible in residual VQ at head_dim {head_dim}"


RESIDUAL = Declared(
    c.CODING_RESIDUAL,
    "residual VQ",
    (0,),
    lambda head_dim, quarter_bits: 0,  # codebooks tell it
    _residual_problem,
    order=lambda head_dim: head_dim,
    by_vectors=True,
)


def _sketch_problem(order: int, row_bits: int, radius_bits: int) -> str:
    return "" if radius_bits == c.SKETCH_NORM_BITS else f"a sign sketch has norms of 16 bits, not of {radius_bits}"


SKETCH = Declared(
    c.CODING_SKETCH,
    "sign sketch",
    (0,),  # the rotations are the sketch's own
    lambda order, quarter_bits: order * quarter_bits // 4,
    _sketch_problem,
    beside=c.SKETCH_EXPONENT_BYTES + c.CHECKSUM_BYTES,
    sketches=True,
)

DECLARED = {coding.code: coding for coding in (SPLIT, PAPER, QUADS, PAIRS, SCALAR, RESIDUAL, SKETCH)}
