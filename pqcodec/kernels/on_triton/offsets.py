"""Law: offsets (SPEC 9): each channel's stored mean, turned by its token's position under RoPE."""

from __future__ import annotations

import triton
import triton.language as tl

from pqcodec.kernels.on_triton.numbers import (
    CHECKSUM_BYTES,
    EXPONENT_AT,
    PHASE_TURNS,
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
    exponent = tl.load((stream + EXPONENT_AT).to(tl.pointer_type(tl.int16))).to(tl.int32)
    at = (stream + offsets_at + lead * (2 * HEAD_DIM + CHECKSUM_BYTES)).to(tl.pointer_type(tl.uint16))
    half = tl.load(at + columns, mask=wanted, other=0).to(tl.float16, bitcast=True).to(tl.float32)
    first = exponent // 2  # two factors, for one alone may lie outside of float32's normal numbers
    return half * power_of_two(first) * power_of_two(exponent - first)


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
