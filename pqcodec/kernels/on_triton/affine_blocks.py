"""Law: one program codes one block whose rows share affine fields (SPEC 13); nothing is rotated.

The encoders' float32 operations are those of ``codings.affine`` in the same order, and divisions and roots are rounded, so that
they write the same bytes. Launched with ``enable_fp_fusion=False``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pqcodec.kernels.on_triton.affine import finished, half_at, put_codes, short_at, stored_exponent
from pqcodec.kernels.on_triton.bits import get_word, put_field
from pqcodec.kernels.on_triton.blocks import block_place, put_checksum, whole_block
from pqcodec.kernels.on_triton.numbers import (
    COUNT_BYTES,
    EXPONENT_BYTES,
    LARGEST,
    LEAST_EXPONENT,
    MOST_EXPONENT,
    NONE,
    PAIRS,
    SEGMENT,
    SPAN,
    TOO_LARGE,
    USUAL,
    USUAL_BITS,
    load_rows,
    power_of_two,
    store_numbers,
    store_rows,
)
from pqcodec.kernels.on_triton.offsets import offset_rows
from pqcodec.kernels.on_triton.pairs import channels_of_pair, encode_pair_group, pair_numbers
from pqcodec.kernels.on_triton.scalar import (
    for_each_channel,
    least_of_groups,
    put_scalar_fields,
    scalar_codes,
    scalar_fields,
    scalar_levels,
)


# -- decoding --------------------------------------------------------------------------------------------------------
@triton.jit
def larger(a, b):
    """The larger one."""
    return tl.maximum(a, b)


@triton.jit
def decode_outliers(
    words, byte, tokens, low, high, begin, span, lead, start, stride, scale, limit, partner, pair, sign, frequencies, phases,
    SHAPE: tl.constexpr, DTYPE: tl.constexpr, HEAD_DIM: tl.constexpr, OFFSETS: tl.constexpr, ROPE: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """Put the outliers of a block of ``tokens`` rows, which stand from ``byte`` on, over those of its rows low .. high - 1.

    Of a segment's records one counts whose place is above those of all before it. ``begin``: the token of the first row.
    """
    segments = (tokens * HEAD_DIM + SEGMENT - 1) // SEGMENT
    room = 2 * SHAPE.value.groups * (tokens * SHAPE.value.outliers // SHAPE.value.group_tokens)
    places = 8 * (byte + COUNT_BYTES * segments)
    first = tokens * 0
    for segment in range(segments):
        at = 8 * (byte + COUNT_BYTES * segment) + tl.zeros([1], tl.int32)
        stated = tl.max(get_word(words, at, at >= 0).to(tl.int64), 0)
        last = tl.minimum(first + stated, room).to(tl.int32)
        above = tokens * 0 - 1
        for record in range(first, last, TILE):
            i = record + tl.arange(0, TILE)
            inside = i < last
            own = tl.where(inside, short_at(words, places + 16 * i, inside), -1)
            before = tl.where(i > record, short_at(words, places + 16 * (i - 1), inside & (i > record)), above)
            before = tl.associative_scan(before, 0, larger)
            above = tl.maximum(above, tl.max(own, 0))
            row = (segment * SEGMENT + own) // HEAD_DIM
            channel = segment * SEGMENT + own - row * HEAD_DIM
            kept = (own > before) & (row >= low) & (row < high)
            x = half_at(words, places + 16 * (room + i), inside)
            token = begin + row
            y = finished(
                span, lead, token, channel, kept, x, scale, limit, partner, pair, sign, frequencies, phases,
                HEAD_DIM, OFFSETS, ROPE,
            )  # fmt: skip
            target = token - tl.load(span + SPAN.value.first_token)
            store_numbers(start, target.to(tl.int64) * stride + channel, y, kept, DTYPE)
        first = last


@triton.jit
def decode_affine_blocks(
    spans,
    firsts,
    starts,
    flags,
    keys,
    levels,
    partner,
    pair,
    sign,
    frequencies,
    phases,
    limit,
    SHAPE: tl.constexpr,
    CODING: tl.constexpr,
    DTYPE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ORDER: tl.constexpr,
    COLUMNS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    CHUNK: tl.constexpr,
    OFFSETS: tl.constexpr,
    ROPE: tl.constexpr,
    ROWS: tl.constexpr,
    SEARCH: tl.constexpr,
    SUM_TILE: tl.constexpr,
):
    """Check one block (flags [block] becomes 1 where it is damaged), and decode those of its tokens that its span wants."""
    index = tl.program_id(0).to(tl.int64)
    span, chunk, lead, tokens, words, skew, covered = block_place(spans, firsts, index, CHUNK, SEARCH)
    tl.store(flags + index + tl.arange(0, 1), 1 - whole_block(words, skew, covered, keys, SUM_TILE))
    begin = tl.load(span + SPAN.value.exact) + chunk * CHUNK  # the block's first token
    low = tl.maximum(tl.load(span + SPAN.value.first_token) - begin, 0).to(tl.int32)
    high = tl.minimum(tl.load(span + SPAN.value.last_token) - begin, tokens.to(tl.int64)).to(tl.int32)
    start = tl.load(starts + tl.load(span + SPAN.value.starts) + lead - tl.load(span + SPAN.value.first_lead))
    stride = tl.load(span + SPAN.value.stride)
    scale = power_of_two(stored_exponent(words, (skew + covered) * 8, LEAST_EXPONENT, MOST_EXPONENT))
    for first_row in range(low, high, ROWS):
        row = first_row + tl.arange(0, ROWS)[:, None]
        token = begin + row
        target = tl.reshape(token, [ROWS]) - tl.load(span + SPAN.value.first_token)
        if CODING == PAIRS:
            number = tl.arange(0, COLUMNS // 2)
            inside = (row < high) & (number < ORDER // 2)[None, :]
            one, other = pair_numbers(words, skew * 8, tokens, row, number[None, :], inside, phases, SHAPE)
            p, q = channels_of_pair(number, HEAD_DIM, INTERLEAVED)
            y = finished(
                span, lead, token, p[None, :], (p < HEAD_DIM)[None, :], one, scale, limit, partner, pair, sign, frequencies,
                phases, HEAD_DIM, OFFSETS, ROPE,
            )  # fmt: skip
            store_rows(start, target, stride, p, y, (row < high) & (p < HEAD_DIM)[None, :], DTYPE)
            y = finished(
                span, lead, token, q[None, :], (q < HEAD_DIM)[None, :], other, scale, limit, partner, pair, sign, frequencies,
                phases, HEAD_DIM, OFFSETS, ROPE,
            )  # fmt: skip
            store_rows(start, target, stride, q, y, (row < high) & (q < HEAD_DIM)[None, :], DTYPE)
        else:
            column = tl.arange(0, COLUMNS)
            inside = (row < high) & (column < HEAD_DIM)[None, :]
            step, zero = scalar_fields(words, skew * 8, tokens, row, column[None, :], inside, SHAPE)
            x = scalar_levels(words, skew * 8, row, column[None, :], inside, levels, SHAPE) * step + zero
            y = finished(
                span, lead, token, column[None, :], (column < HEAD_DIM)[None, :], x, scale, limit, partner, pair, sign,
                frequencies, phases, HEAD_DIM, OFFSETS, ROPE,
            )  # fmt: skip
            store_rows(start, target, stride, column, y, inside, DTYPE)
    if SHAPE.value.outliers > 0:
        tl.debug_barrier()
        groups = (tokens + SHAPE.value.group_tokens - 1) // SHAPE.value.group_tokens
        byte = skew + tokens * SHAPE.value.row_bytes + groups * SHAPE.value.group_bytes
        decode_outliers(
            words, byte, tokens, low, high, begin, span, lead, start, stride, scale, limit, partner, pair, sign, frequencies,
            phases, SHAPE, DTYPE, HEAD_DIM, OFFSETS, ROPE, SUM_TILE,
        )  # fmt: skip


# -- encoding --------------------------------------------------------------------------------------------------------
@triton.jit
def centred_columns(
    span, lead, start, token, finite, stride, column, partner, pair, sign, frequencies, phases,
    DTYPE: tl.constexpr, HEAD_DIM: tl.constexpr, OFFSETS: tl.constexpr, ROPE: tl.constexpr,
):  # fmt: skip
    """Some channels of tokens, less their offsets: float32 [R, C]; zeros where a row is not finite, and from head_dim on."""
    inside = finite[:, None] & (column < HEAD_DIM)[None, :]
    x = load_rows(start, token, stride, column, inside, DTYPE)
    if OFFSETS:
        o = offset_rows(span, lead, token, column, column < HEAD_DIM, partner, pair, sign, frequencies, phases, HEAD_DIM, ROPE)
        x = tl.where(inside, tl.minimum(tl.maximum(x - o, -LARGEST), LARGEST), 0.0)
    return x


@triton.jit
def finite_rows(start, token, mask, stride, HEAD_DIM: tl.constexpr, DTYPE: tl.constexpr, WIDTH: tl.constexpr):
    """Which rows hold neither NaN nor Inf; those of ``mask`` alone count."""
    worst = tl.zeros(token.shape, tl.int32)
    for first in range(0, HEAD_DIM, WIDTH):
        column = first + tl.arange(0, WIDTH)
        x = load_rows(start, token, stride, column, mask[:, None] & (column < HEAD_DIM)[None, :], DTYPE)
        worst = tl.maximum(worst, tl.max((tl.abs(x) > LARGEST).to(tl.int32) | (x != x).to(tl.int32), 1))
    return mask & (worst == 0)


@triton.jit
def exponent_of(largest):
    """The power of two that a block is divided by, as ``codings.affine`` has it; ``largest``: its largest magnitude."""
    exponent = tl.maximum((largest.to(tl.int32, bitcast=True) >> 23) - 126 - USUAL_BITS, LEAST_EXPONENT)
    return tl.where((largest == 0) | (largest >= USUAL) & (largest < TOO_LARGE), 0, exponent)


@triton.jit
def scalar_tile(
    row, last_row, begin, span, lead, start, stride, scale, partner, pair, sign, frequencies, phases,
    DTYPE: tl.constexpr, HEAD_DIM: tl.constexpr, COLUMNS: tl.constexpr, OFFSETS: tl.constexpr, ROPE: tl.constexpr,
):  # fmt: skip
    """Numbers of rows below ``last_row`` over the block's scale, float32 [R, COLUMNS], and which of them a range holds."""
    column = tl.arange(0, COLUMNS)
    finite = finite_rows(start, begin + row, row < last_row, stride, HEAD_DIM, DTYPE, COLUMNS)
    x = centred_columns(
        span, lead, start, begin + row, finite, stride, column, partner, pair, sign, frequencies, phases,
        DTYPE, HEAD_DIM, OFFSETS, ROPE,
    )  # fmt: skip
    return x * scale, finite[:, None] & (column < HEAD_DIM)[None, :]


@triton.jit
def encode_scalar_rows(
    words, skew, tokens, begin, span, lead, start, stride, scale, levels, partner, pair, sign, frequencies, phases,
    SHAPE: tl.constexpr, DTYPE: tl.constexpr, HEAD_DIM: tl.constexpr, ORDER: tl.constexpr, COLUMNS: tl.constexpr,
    OFFSETS: tl.constexpr, ROPE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Write the fields and the codes of a block's numbers: ROWS groups of a token, or one of more, at a time."""
    ALONE: tl.constexpr = SHAPE.value.group_tokens == 1
    TAKEN: tl.constexpr = ROWS if ALONE else SHAPE.value.group_tokens
    GROUPS: tl.constexpr = ROWS if ALONE else 1
    for first_row in range(0, tokens, TAKEN):
        last_row = tl.minimum(first_row + TAKEN, tokens)
        least = tl.full([GROUPS, COLUMNS], NONE, tl.float32)
        most = tl.full([GROUPS, COLUMNS], -NONE, tl.float32)
        for tile_row in range(first_row, last_row, ROWS):
            x, there = scalar_tile(
                tile_row + tl.arange(0, ROWS), last_row, begin, span, lead, start, stride, scale, partner, pair, sign,
                frequencies, phases, DTYPE, HEAD_DIM, COLUMNS, OFFSETS, ROPE,
            )  # fmt: skip
            low, high = tl.where(there, x, NONE), tl.where(there, x, -NONE)
            if ALONE:
                least, most = low, high
            else:
                least = tl.minimum(least, tl.min(low, 0)[None, :])
                most = tl.maximum(most, tl.max(high, 0)[None, :])
        group_row = first_row + tl.arange(0, GROUPS)
        step, zero = put_scalar_fields(
            words, skew * 8, tokens, group_row, least_of_groups(least, SHAPE), -least_of_groups(-most, SHAPE),
            group_row < last_row, SHAPE,
        )  # fmt: skip
        step, zero = for_each_channel(step, COLUMNS), for_each_channel(zero, COLUMNS)
        for tile_row in range(first_row, last_row, ROWS):
            row = tile_row + tl.arange(0, ROWS)
            x, there = scalar_tile(
                row, last_row, begin, span, lead, start, stride, scale, partner, pair, sign, frequencies, phases,
                DTYPE, HEAD_DIM, COLUMNS, OFFSETS, ROPE,
            )  # fmt: skip
            codes = tl.where(there, scalar_codes(x, step, zero, levels, SHAPE), 0)
            bit = skew * 8 + row * (8 * SHAPE.value.row_bytes)
            put_codes(words, bit, codes, 0, row < last_row, ORDER, SHAPE.value.bits)


@triton.jit
def encode_affine_blocks(
    spans,
    firsts,
    starts,
    flags,
    keys,
    levels,
    partner,
    pair,
    sign,
    frequencies,
    phases,
    SHAPE: tl.constexpr,
    CODING: tl.constexpr,
    DTYPE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ORDER: tl.constexpr,
    COLUMNS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    CHUNK: tl.constexpr,
    OFFSETS: tl.constexpr,
    ROPE: tl.constexpr,
    SHORTEST: tl.constexpr,
    ROWS: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    SEARCH: tl.constexpr,
    SUM_TILE: tl.constexpr,
):
    """Encode one block into bytes that hold zeros. Vectors with NaN or Inf have codes 0; flags [block] counts them.

    Scalar coding takes ROWS rows at a time; pair polar a whole group, which has GROUP_ROWS rows at the most, and WIDTH pairs.
    """
    index = tl.program_id(0).to(tl.int64)
    span, chunk, lead, tokens, words, skew, covered = block_place(spans, firsts, index, CHUNK, SEARCH)
    begin = tl.load(span + SPAN.value.exact) + chunk * CHUNK
    start = tl.load(starts + tl.load(span + SPAN.value.starts) + lead)
    stride = tl.load(span + SPAN.value.stride)
    column = tl.arange(0, COLUMNS)
    bad = tl.zeros([ROWS], tl.int32)
    largest = 0.0
    for first_row in range(0, tokens, ROWS):
        row = first_row + tl.arange(0, ROWS)
        finite = finite_rows(start, begin + row, row < tokens, stride, HEAD_DIM, DTYPE, COLUMNS)
        x = centred_columns(
            span, lead, start, begin + row, finite, stride, column, partner, pair, sign, frequencies, phases,
            DTYPE, HEAD_DIM, OFFSETS, ROPE,
        )  # fmt: skip
        bad += ((row < tokens) & (finite == 0)).to(tl.int32)
        largest = tl.maximum(largest, tl.max(tl.abs(x)))
    tl.store(flags + index, tl.sum(bad))
    exponent = exponent_of(largest)
    scale = power_of_two(-exponent)
    if CODING == PAIRS:
        for first_row in range(0, tokens, SHAPE.value.group_tokens):
            local = tl.arange(0, GROUP_ROWS)
            row = first_row + local
            mask = (local < SHAPE.value.group_tokens) & (row < tokens)
            finite = finite_rows(start, begin + row, mask, stride, HEAD_DIM, DTYPE, 2 * WIDTH)
            for first_pair in range(0, ORDER // 2, WIDTH):
                number = first_pair + tl.arange(0, WIDTH)
                p, q = channels_of_pair(number, HEAD_DIM, INTERLEAVED)
                a = centred_columns(
                    span, lead, start, begin + row, finite, stride, p, partner, pair, sign, frequencies, phases,
                    DTYPE, HEAD_DIM, OFFSETS, ROPE,
                )  # fmt: skip
                b = centred_columns(
                    span, lead, start, begin + row, finite, stride, q, partner, pair, sign, frequencies, phases,
                    DTYPE, HEAD_DIM, OFFSETS, ROPE,
                )  # fmt: skip
                codes = encode_pair_group(
                    words, skew * 8, tokens, first_row, number, a * scale, b * scale, finite, SHORTEST, SHAPE
                )
                bit = skew * 8 + row * (8 * SHAPE.value.row_bytes)
                put_codes(words, bit, codes, first_pair, mask, ORDER // 2, SHAPE.value.bits)
    else:
        encode_scalar_rows(
            words, skew, tokens, begin, span, lead, start, stride, scale, levels, partner, pair, sign, frequencies, phases,
            SHAPE, DTYPE, HEAD_DIM, ORDER, COLUMNS, OFFSETS, ROPE, ROWS,
        )  # fmt: skip
    at = (skew + covered - EXPONENT_BYTES) * 8 + tl.zeros([1], tl.int32)
    put_field(words, at, (exponent + at * 0) & 0xFFFF, at >= 0)
    put_checksum(words, skew, covered, keys, SUM_TILE)
