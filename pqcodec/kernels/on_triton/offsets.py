"""Law: offsets (SPEC 9): each channel's stored mean, turned by its token's position under RoPE."""

from __future__ import annotations

import triton
import triton.language as tl

from pqcodec.kernels.on_triton.numbers import (
    CHECKSUM_BYTES,
    EXPONENT_AT,
    HALF_BITS,
    LARGEST_HALF,
    LEAST_HALF,
    MAGIC,
    PHASE_TURNS,
    RUN_ROWS,
    RUN_TURN_MAGIC,
    SPAN,
    power_of_two,
)


@triton.jit
def phase_parts(position, frequency, phases):
    """cos and sin of a token's angle (SPEC 9.2)."""
    return turn_parts((((position * frequency) >> PHASE_TURNS) & 0xFFFF).to(tl.int32), phases)


@triton.jit
def turn_parts(turn, phases):
    """cos and sin of phases, in turns / 2^16. ``phases`` float32 [4, 256]: cos and sin of coarse, then of fine turns."""
    high, low = turn >> 8, turn & 255
    cos_h, sin_h = tl.load(phases + high), tl.load(phases + 256 + high)
    cos_l, sin_l = tl.load(phases + 512 + low), tl.load(phases + 768 + low)
    return cos_h * cos_l - sin_h * sin_l, sin_h * cos_l + cos_h * sin_l


@triton.jit
def load_offset(stream, offsets_at, lead, columns, wanted, HEAD_DIM: tl.constexpr):
    """Stored offsets of one lead's columns, float32: half * 2^exponent, exact (SPEC 9.1)."""
    return times_exponent(stream, load_halves(stream, offsets_at, lead, columns, wanted, HEAD_DIM))


@triton.jit
def load_halves(stream, offsets_at, lead, columns, wanted, HEAD_DIM: tl.constexpr):
    """The same as float16 has them, without the stream's exponent: float32."""
    at = (stream + offsets_at + lead * (2 * HEAD_DIM + CHECKSUM_BYTES)).to(tl.pointer_type(tl.uint16))
    return tl.load(at + columns, mask=wanted, other=0).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def times_exponent(stream, halves):
    """Numbers times 2^exponent, that of the stream's offsets."""
    exponent = tl.load((stream + EXPONENT_AT).to(tl.pointer_type(tl.int16))).to(tl.int32)
    first = exponent // 2  # two factors, for one alone may lie outside of float32's normal numbers
    return halves * power_of_two(first) * power_of_two(exponent - first)


@triton.jit
def turned(own, other, sign, cos, sin):
    """One channel of a pair turned by an angle (SPEC 9.3): own cos + sign other sin; each operation rounds, none is fused."""
    return own * cos + sign * (other * sin)


@triton.jit
def offset_rows(
    span, lead, tokens, columns, wanted, partner, pair, sign, frequencies, phases, HEAD_DIM: tl.constexpr, ROPE: tl.constexpr
):
    """The offset of each token: float32 [R, columns], without RoPE [1, columns]. Tokens count from the tensor's first one."""
    return offsets_at_places(
        span, lead, tokens[:, None], columns[None, :], wanted[None, :], partner, pair, sign, frequencies, phases, HEAD_DIM, ROPE
    )


@triton.jit
def offsets_at_places(
    span, lead, token, column, wanted, partner, pair, sign, frequencies, phases, HEAD_DIM: tl.constexpr, ROPE: tl.constexpr
):
    """The offset of a number of each token and column, which go together as an operation's numbers do: float32."""
    stream, offsets_at = tl.load(span + SPAN.value.stream), tl.load(span + SPAN.value.offsets_at)
    own = load_offset(stream, offsets_at, lead, column, wanted, HEAD_DIM)
    if ROPE:
        partners, pairs = tl.load(partner + column), tl.load(pair + column)
        other = load_offset(stream, offsets_at, lead, partners, wanted, HEAD_DIM)
        frequency = tl.load(frequencies + tl.maximum(pairs, 0))
        position = token.to(tl.int64) + tl.load(span + SPAN.value.position)
        cos, sin = phase_parts(position, frequency, phases)
        own = tl.where(pairs >= 0, turned(own, other, tl.load(sign + column), cos, sin), own)
    return own


@triton.jit
def offset_of_rows(
    span, lead, begin, first_row, row, columns, wanted, partner, pair, sign, frequencies, phases,
    HEAD_DIM: tl.constexpr, ROPE: tl.constexpr, RUNS: tl.constexpr,
):  # fmt: skip
    """The offset of rows of a block, whose first token is ``begin``, as ``offset_rows`` has it.

    With RUNS they turn run by run, and all rows lie in the run of ``first_row``.
    """
    if RUNS:
        first = begin + first_row // RUN_ROWS * RUN_ROWS
        turned_on = (row % RUN_ROWS)[:, None]
        found = offsets_in_run(
            span, lead, first, turned_on, columns[None, :], wanted[None, :], partner, pair, sign, frequencies, phases, HEAD_DIM
        )
    else:
        found = offset_rows(span, lead, begin + row, columns, wanted, partner, pair, sign, frequencies, phases, HEAD_DIM, ROPE)
    return found


@triton.jit
def offsets_in_run(span, lead, first, row, column, wanted, partner, pair, sign, frequencies, phases, HEAD_DIM: tl.constexpr):
    """The offsets [1, columns] of a run, which begins with token ``first``, at some of its rows [R, 1] (SPEC 9.5): float32."""
    stream, offsets_at = tl.load(span + SPAN.value.stream), tl.load(span + SPAN.value.offsets_at)
    partners, pairs, sign = tl.load(partner + column), tl.load(pair + column), tl.load(sign + column)
    own = load_halves(stream, offsets_at, lead, column, wanted, HEAD_DIM)
    other = load_halves(stream, offsets_at, lead, partners, wanted, HEAD_DIM)
    frequency = tl.load(frequencies + tl.maximum(pairs, 0))
    cos, sin = phase_parts(first + tl.load(span + SPAN.value.position), frequency, phases)
    x, y = rounded_pair(turned(own, other, sign, cos, sin), turned(other, own, -sign, cos, sin))
    cos, sin = phase_parts(row.to(tl.int64), frequency, phases)
    cos = (cos + RUN_TURN_MAGIC) - RUN_TURN_MAGIC
    sin = (sin + RUN_TURN_MAGIC) - RUN_TURN_MAGIC
    return times_exponent(stream, tl.where(pairs >= 0, turned(x, y, sign, cos, sin), own))


@triton.jit
def rounded_pair(x, y):
    """Both numbers of a pair as float16 holds them, in multiples of the larger one's unit, ties to even."""
    x = tl.minimum(tl.maximum(x, -LARGEST_HALF), LARGEST_HALF)
    y = tl.minimum(tl.maximum(y, -LARGEST_HALF), LARGEST_HALF)
    largest = tl.maximum(tl.maximum(tl.abs(x), tl.abs(y)), LEAST_HALF)
    magic = MAGIC * power_of_two((largest.to(tl.int32, bitcast=True) >> 23) - 127 - HALF_BITS)
    return (x + magic) - magic, (y + magic) - magic
