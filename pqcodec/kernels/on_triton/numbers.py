"""Law: what the other modules here share: the constants, and numbers as a tensor stores them, as float32 and as powers of two.

Triton reads globals of a kernel only where they are ``tl.constexpr``. Each launch compares every global that a kernel uses,
once for each module that names it, so indices that belong together are one constant: ``NODE.value.kind``.
"""

from __future__ import annotations

import math
import os
from typing import Any, NamedTuple, Self

import triton
import triton.language as tl

from pqcodec import constants as c
from pqcodec.codings import look_ups as t
from pqcodec.kernels import device_tables as tables
from pqcodec.kernels import spans as s
from pqcodec.stages.centre import HALVES


def interpreted() -> bool:
    """Whether the kernels run in Triton's interpreter."""
    return os.environ.get("TRITON_INTERPRET", "") == "1"


class Constants:
    """A named tuple of whole numbers, whose fields are ``tl.constexpr`` where Triton compiles: ``SIDE.value.columns``.

    A field of any other record is an int there, which is fine as an argument and beside a tensor. But Triton 3.6 takes no int
    in a list that it hands to a function, as in ``tl.zeros([ROWS, n])``, and 3.2 none before a ``tl.constexpr``: ``n - 1``.
    """

    def __init__(self, record: Any) -> None:
        self.record = record
        field = int if interpreted() else tl.constexpr  # Python, which interprets, cannot shift by a constexpr
        vars(self).update({name: field(number) for name, number in record._asdict().items()})

    @property
    def value(self) -> Self:
        """Itself: Triton wraps an argument where it compiles, and does not where it interprets."""
        return self

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Constants) and self.record == other.record

    def __hash__(self) -> int:
        return hash(self.record)

    def __repr__(self) -> str:  # Triton names what it has compiled by it
        return repr(self.record)


# Stored numbers
FLOAT16 = tl.constexpr(c.DTYPE_FLOAT16)
FLOAT32 = tl.constexpr(c.DTYPE_FLOAT32)
LARGEST_HALF = tl.constexpr(c.LARGEST_FINITE[c.DTYPE_FLOAT16])
LEAST_HALF = tl.constexpr(float(HALVES.smallest_normal))
HALF_BITS = tl.constexpr(HALVES.nmant)  # of a fraction
LARGEST = tl.constexpr(c.LARGEST_FINITE[c.DTYPE_FLOAT32])
TINY = tl.constexpr(1e-37)  # keeps a quotient of two zeros finite
FAR = tl.constexpr(40)  # rows beyond 2^40 or below 2^-40 are scaled, so that squares stay in float32

# The grid of coordinates, and the directions of pairs
GRID = tl.constexpr(float(c.GRID))
MAGIC = tl.constexpr(1.5 * 2**23)  # adding and subtracting it rounds a float32 to an integer, ties to even
CIRCLE = tl.constexpr(c.CIRCLE)
PHASE_SHIFT = tl.constexpr(c.PHASE_SHIFT)
PHASE_HALF = tl.constexpr(1 << (c.PHASE_SHIFT - 1))
RUN_ROWS = tl.constexpr(c.RUN_ROWS)
RUN_TURN_MAGIC = tl.constexpr(1.5 * 2.0 ** (23 - c.RUN_TURN_BITS))  # as MAGIC, to multiples of 2^-RUN_TURN_BITS
PHASE_TURNS = tl.constexpr(c.PHASE_BITS - 2 * c.PHASE_TABLE_BITS)

# Codings
SPLIT = tl.constexpr(c.CODING_SPLIT)
OF_QUADS = tl.constexpr(c.CODING_QUADS)
GROUP = tl.constexpr(c.GROUP)
PAPER_BITS = tl.constexpr(c.PAPER_BLOCK_BITS)
CHECKSUM_BYTES = tl.constexpr(c.CHECKSUM_BYTES)
RADIUS_BIAS = tl.constexpr(c.RADIUS_BIAS)
RADIUS_SPLIT = tl.constexpr(c.RADIUS_SPLIT)
RADIUS_SHIFT = tl.constexpr(c.RADIUS_SHIFT)
SECOND_FACTOR = tl.constexpr(2.0**-c.RADIUS_SHIFT)

# Look-ups (codings/look_ups.py)
CAP = tl.constexpr(c.MAX_BUDGET_PER_COORDINATE)
MOST_WIDTH = tl.constexpr(c.MAX_ANGLE_BITS)
STEPS = tl.constexpr(t.STEPS)
WIDTHS = tl.constexpr(t.WIDTHS)
BOUNDS = tl.constexpr(t.BOUNDS)
CODES = tl.constexpr(t.CODES)
WIDTH_SHIFT = tl.constexpr(t.WIDTH_SHIFT)
SHARE_SHIFT = tl.constexpr(t.SHARE_SHIFT)
WIDTH_OF_16 = tl.constexpr(t.division(8, 8).width)
WIDTH_OF_8 = tl.constexpr(t.division(4, 4).width)

# Affine fields
PAIRS = tl.constexpr(c.CODING_PAIRS)
TURN = tl.constexpr(c.TURN)
TURN_TINY = tl.constexpr(c.TURN_TINY)
TURN_POLYNOMIAL = tl.constexpr(c.TURN_POLYNOMIAL)
LEAST_EXPONENT = tl.constexpr(c.AFFINE_EXPONENTS[0])
MOST_EXPONENT = tl.constexpr(c.AFFINE_EXPONENTS[1])
USUAL = tl.constexpr(c.AFFINE_USUAL[0])
TOO_LARGE = tl.constexpr(c.AFFINE_USUAL[1])
USUAL_BITS = tl.constexpr(c.AFFINE_USUAL_BITS)
EXPONENT_BYTES = tl.constexpr(c.AFFINE_EXPONENT_BYTES)
COUNT_BYTES = tl.constexpr(c.OUTLIER_COUNT_BYTES)
SEGMENT = tl.constexpr(c.OUTLIER_SEGMENT)
NONE = tl.constexpr(3e38)  # beyond every number
RADIANS = tl.constexpr(2 * math.pi / c.TURN)  # of a unit of an angle
UNIT_BITS = tl.constexpr(14)  # float16 holds numbers below 2^15 whose exponents these are

# Where a number stands in a row of a table (kernels/device_tables.py); ``len`` of them make the row
NODE = tl.constexpr(tables.NODE)
QUAD_ROW = tl.constexpr(tables.QUAD_ROW)
RECORD = tl.constexpr(tables.RECORD)
RECORD_FLOAT = tl.constexpr(tables.RECORD_FLOAT)
PAPER = tl.constexpr(Constants(tables.PAPER))
SPAN = tl.constexpr(s.SPAN)  # kernels/spans.py


class Quads(NamedTuple):
    """Numbers of the quads coding."""

    least: int  # radius, in steps
    most: int
    steps: int  # an octave
    radius_bits: int  # of a radius counted from the least on
    codes: int  # of a radius in a block, zero vector left out, less one


QUADS = tl.constexpr(Constants(Quads(*c.QUADS_RADII, c.QUADS_RADIUS_STEPS, 12, (1 << c.QUADS_RADIUS_BITS) - 2)))

# A byte of the stream
EXPONENT_AT = tl.constexpr(c.OFFSET_EXPONENT_AT)


@triton.jit
def load_rows(start, tokens, stride, columns, mask, DTYPE: tl.constexpr):
    """Stored numbers -> float32 [R, columns]. ``start`` is an address, ``stride`` the elements from one token to the next."""
    at = tokens.to(tl.int64)[:, None] * stride + columns[None, :]
    if DTYPE == FLOAT32:
        x = tl.load(start.to(tl.pointer_type(tl.float32)) + at, mask=mask, other=0.0)
    else:
        raw = tl.load(start.to(tl.pointer_type(tl.uint16)) + at, mask=mask, other=0)
        if DTYPE == FLOAT16:
            x = raw.to(tl.float16, bitcast=True).to(tl.float32)
        else:
            x = (raw.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return x


@triton.jit
def store_rows(start, tokens, stride, columns, y, mask, DTYPE: tl.constexpr):
    """Round float32 within the dtype's range to stored numbers, ties to even; arguments as ``load_rows`` takes them."""
    store_numbers(start, tokens.to(tl.int64)[:, None] * stride + columns[None, :], y, mask, DTYPE)


@triton.jit
def store_numbers(start, at, y, mask, DTYPE: tl.constexpr):
    """The same of numbers at any elements behind the address ``start``."""
    if DTYPE == FLOAT32:
        tl.store(start.to(tl.pointer_type(tl.float32)) + at, y, mask=mask)
    else:
        if DTYPE == FLOAT16:
            raw = y.to(tl.float16).to(tl.uint16, bitcast=True)
        else:
            bits = y.to(tl.uint32, bitcast=True)
            raw = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.uint16)
        tl.store(start.to(tl.pointer_type(tl.uint16)) + at, raw, mask=mask)


@triton.jit
def power_of_two(exponent):
    """2^exponent for -126 .. 127, float32."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def half_of(bits):
    """The float16 numbers in the lower halves of words."""
    return (bits & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True)


@triton.jit
def scaled(mantissa, exponent):
    """mantissa * 2^exponent for a normal mantissa and a normal result: adds to the exponent's field."""
    return (mantissa.to(tl.int32, bitcast=True) + (exponent << 23)).to(tl.float32, bitcast=True)


@triton.jit
def two_factors(mantissa, exponent, nothing):
    """The two float32 factors of rows, whose product may be too small for one normal number (SPEC 6.5)."""
    small = exponent < RADIUS_SPLIT
    first = tl.where(nothing, 0.0, scaled(mantissa, exponent + tl.where(small, RADIUS_SHIFT, 0)))
    return first, tl.where(small, SECOND_FACTOR, 1.0)


@triton.jit
def halves(x):
    """The even and the odd columns of [R, 2n], each [R, n]; [R] where n is 1."""
    return tl.split(tl.reshape(x, [x.shape[0], x.shape[1] // 2, 2]))


@triton.jit
def first_of(x):
    """[R, 1] -> [R]."""
    return tl.reshape(x, [x.shape[0]])


@triton.jit
def nearest(x):
    """float32 rounded to whole numbers, ties to even."""
    return (x + MAGIC) - MAGIC


@triton.jit
def turns_of(x, y):
    """Angle of (x, y) in turns, 0 .. 1: a polynomial, good to 2e-8."""
    a, b = tl.abs(x), tl.abs(y)
    q = tl.minimum(a, b) / (tl.maximum(a, b) + TINY)
    z = q * q
    t = -0.00074305835 * z + 0.00384616852
    t = t * z - 0.00944856755
    t = t * z + 0.0157660429
    t = t * z - 0.0223080879
    t = t * z + 0.0317820252
    t = t * z - 0.0530494615
    t = (t * z + 0.159154927) * q
    t = tl.where(b > a, 0.25 - t, t)
    t = tl.where(x < 0, 0.5 - t, t)
    return tl.where(y < 0, 1.0 - t, t)
