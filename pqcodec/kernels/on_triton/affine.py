"""Law: affine fields (SPEC 13), the codes of numbers and outliers (SPEC 16.4), between a block's bytes and numbers.

SHAPE is what kernels are compiled for of such a coding: an ``AffineShape``, or what has its fields among others.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from pqcodec import constants as c
from pqcodec.kernels.on_triton.bits import get_field, get_word, put_field
from pqcodec.kernels.on_triton.numbers import half_of
from pqcodec.kernels.on_triton.offsets import offsets_at_places
from pqcodec.stream.header import Header


class AffineShape(NamedTuple):
    """Of a header with affine fields; all zeros of another."""

    bits: int = 0  # of a code: of a number, or of a pair
    angle_bits: int = 0  # of these, those of a pair's angle
    row_bytes: int = 0
    group_tokens: int = 1
    group_channels: int = 0  # a power of two; of pair polar 2
    groups: int = 0  # side by side along the channels
    group_bytes: int = 0  # of the fields of all groups of the same tokens
    zeros: bool = False  # whether a group has a zero beside its scale
    code_levels: int = 0  # that codes choose among; 0: an even grid
    outliers: int = 0  # for which there is room at each end of a whole group's range


def affine_shape(h: Header) -> AffineShape:
    """The shape of a header's affine fields."""
    if h.affine is None:
        return AffineShape()
    return AffineShape(
        bits=h.row_bits * (c.PAIR_CHANNELS if h.coding == c.CODING_PAIRS else 1) // h.order,
        angle_bits=h.affine.angle_bits,
        row_bytes=h.row_bytes,
        group_tokens=h.affine.tokens,
        group_channels=h.affine.channels,
        groups=h.affine.groups(h.order),
        group_bytes=h.affine.bytes_of(h.order),
        zeros=h.affine.fields == c.AFFINE_SCALE_ZERO,
        code_levels=1 << h.row_bits // h.order if h.codebook else 0,
        outliers=h.affine.outliers,
    )


# -- fields ----------------------------------------------------------------------------------------------------------
@triton.jit
def fields_bit(block, tokens, row, SHAPE: tl.constexpr):
    """Bit at which the fields of a row's group of tokens begin; ``block``: the bit of its block, of ``tokens`` rows."""
    return block + 8 * (tokens * SHAPE.value.row_bytes + row // SHAPE.value.group_tokens * SHAPE.value.group_bytes)


@triton.jit
def short_at(words, bit, mask):
    """Fields of 16 bits, int32."""
    return (get_word(words, bit, mask) & 0xFFFF).to(tl.int32)


@triton.jit
def half_at(words, bit, mask):
    """Fields of float16, as ``finite_half`` gives them."""
    return finite_half(short_at(words, bit, mask))


@triton.jit
def finite_half(field):
    """The float16 of fields of 16 bits, float32: NaN counts as 0, an infinity as the largest finite number of its sign."""
    size = field & 0x7FFF
    size = tl.where(size > 0x7C00, 0, tl.minimum(size, 0x7BFF))
    return half_of(size | (field & 0x8000)).to(tl.float32)


@triton.jit
def stored_exponent(words, end, LEAST: tl.constexpr, MOST: tl.constexpr):
    """The exponent of blocks whose checksum begins at bit ``end``."""
    field = short_at(words, end - 16, end >= 0)
    return tl.minimum(tl.maximum(field - ((field & 0x8000) << 1), LEAST), MOST)


@triton.jit
def put_half(words, bit, x, mask):
    """Write float32 numbers rounded to float16, and return what these stand for."""
    half = x.to(tl.float16)
    put_field(words, bit, half.to(tl.uint16, bitcast=True), mask)
    return half.to(tl.float32)


# -- codes -----------------------------------------------------------------------------------------------------------
@triton.jit
def codes_at(words, bit, index, mask, BITS: tl.constexpr):
    """Codes number ``index`` of rows that begin at ``bit``, int32."""
    field = bit + index * BITS
    return get_field(words, field, tl.full(field.shape, BITS, tl.int32), mask)


@triton.jit
def put_codes(words, bit, codes, first, mask, COUNT: tl.constexpr, BITS: tl.constexpr):
    """Write codes [R, n] of BITS bits from ``bit`` [R] on: those from number ``first`` to COUNT - 1."""
    FITS: tl.constexpr = 2 if BITS > 8 else (4 if BITS > 4 else (8 if BITS > 2 else 16))  # in a word
    WIDE: tl.constexpr = min(FITS, codes.shape[1])
    runs = tl.reshape(codes, [codes.shape[0], codes.shape[1] // WIDE, WIDE]).to(tl.uint32)
    value = tl.sum(runs << (BITS * tl.arange(0, WIDE))[None, None, :].to(tl.uint32), 2)
    run = first + WIDE * tl.arange(0, codes.shape[1] // WIDE)[None, :]
    put_field(words, bit[:, None] + run * BITS, value, mask[:, None] & (run < COUNT))


# -- numbers ---------------------------------------------------------------------------------------------------------
@triton.jit
def finished(
    span, lead, token, column, wanted, x, scale, limit, partner, pair, sign, frequencies, phases,
    HEAD_DIM: tl.constexpr, OFFSETS: tl.constexpr, ROPE: tl.constexpr,
):  # fmt: skip
    """Numbers of a block's fields as a decoder gives them, float32: times the block's scale, and their offsets added."""
    y = x * scale + 0.0
    if OFFSETS:
        y += offsets_at_places(span, lead, token, column, wanted, partner, pair, sign, frequencies, phases, HEAD_DIM, ROPE)
    return tl.minimum(tl.maximum(y, -limit), limit)
