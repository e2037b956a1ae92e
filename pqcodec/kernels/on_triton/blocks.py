"""Law: one program of a Triton kernel codes one block: a chunk of tokens of one leading index, and its checksum.

These are the portable GPU kernels: no trigonometry, no shared scratch, every preset, head_dim and dtype. A program walks its
block in tiles of ROWS vectors, and each tile in groups of 16 coordinates. A group's rotation is a matrix product with a matrix
of integers, exact in the decoder (sums stay below 2^24); a node of the tree is a vector over the tile's rows. Arithmetic that
decides output bits is never fused: kernels are launched with ``enable_fp_fusion=False``. The rows of ``spans`` (SpanRow) say
where a program reads and writes.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pqcodec.kernels.on_triton.bits import find_span, get_word, put_field, word_sum
from pqcodec.kernels.on_triton.numbers import (
    CHECKSUM_BYTES,
    FAR,
    LARGEST,
    OF_QUADS,
    QUADS,
    RUN_ROWS,
    SPAN,
    SPLIT,
    load_rows,
    power_of_two,
    store_rows,
    two_factors,
)
from pqcodec.kernels.on_triton.offsets import offset_of_rows
from pqcodec.kernels.on_triton.paper import decode_paper, encode_paper
from pqcodec.kernels.on_triton.quads import decode_quad_rows, encode_quad_rows, own_radius
from pqcodec.kernels.on_triton.rotation import three_parts
from pqcodec.kernels.on_triton.split import decode_split, encode_split


@triton.jit
def block_place(spans, firsts, index, CHUNK, SEARCH: tl.constexpr):
    """Block ``index``: its span, chunk, lead and tokens, the aligned word it begins in, at which byte (0 .. 3) of that, and how
    many bytes its checksum covers.
    """
    which = find_span(firsts, index, SEARCH)
    span = spans + which * len(SPAN.value)
    local = index - tl.load(firsts + which)
    leads = tl.load(span + SPAN.value.leads)
    chunk = tl.load(span + SPAN.value.first_chunk) + local // leads
    lead = tl.load(span + SPAN.value.first_lead) + local % leads
    tokens = tl.minimum(tl.load(span + SPAN.value.coded) - chunk * CHUNK, CHUNK)
    whole = tl.load(span + SPAN.value.whole_bytes)
    size = tl.where(tokens < CHUNK, tl.load(span + SPAN.value.last_bytes), whole)
    start = tl.load(span + SPAN.value.payload) + chunk * tl.load(span + SPAN.value.leading) * whole + lead * size
    skew = (start & 3).to(tl.int32)
    words, covered = (start - skew).to(tl.pointer_type(tl.uint32)), (size - CHECKSUM_BYTES).to(tl.int32)
    return span, chunk, lead, tokens.to(tl.int32), words, skew, covered


@triton.jit
def clear_blocks(spans, firsts, chunk_tokens, TILE: tl.constexpr, SEARCH: tl.constexpr):
    """Write zeros over one block and its checksum."""
    _span, _chunk, _lead, _tokens, words, skew, covered = block_place(
        spans, firsts, tl.program_id(0).to(tl.int64), chunk_tokens, SEARCH
    )
    start = words.to(tl.pointer_type(tl.uint8)) + skew
    count = covered + CHECKSUM_BYTES
    for first in range(0, count, TILE):
        i = first + tl.arange(0, TILE)
        tl.store(start + i, tl.zeros([TILE], tl.uint8), mask=i < count)


@triton.jit
def whole_block(words, skew, covered, keys, SUM_TILE: tl.constexpr):
    """1 where a block's checksum holds, 0 where it does not: int32 [1]."""
    end = (skew + covered) * 8 + tl.zeros([1], tl.int32)
    return (get_word(words, end, end >= 0) == word_sum(words, skew, covered, keys, SUM_TILE)).to(tl.int32)


@triton.jit
def put_checksum(words, skew, covered, keys, SUM_TILE: tl.constexpr):
    """Write the checksum of a block whose other bytes are written."""
    tl.debug_barrier()
    total = word_sum(words, skew, covered, keys, SUM_TILE)
    end = (skew + covered) * 8 + tl.zeros([1], tl.int32)
    put_field(words, end, total + tl.zeros([1], tl.uint32), end >= 0)


@triton.jit
def centred_rows(
    span,
    lead,
    start,
    begin,
    first_row,
    row,
    mask,
    stride,
    columns,
    partner,
    pair,
    sign,
    frequencies,
    phases,
    DTYPE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    OFFSETS: tl.constexpr,
    ROPE: tl.constexpr,
    RUNS: tl.constexpr,
):
    """Rows of a block, centred and times powers of two: x [R, COLUMNS], the powers' exponents, and whether each row is finite.

    Rows that are not are zeros. ``first_row`` is the first of them.
    """
    inside = columns < HEAD_DIM
    x = load_rows(start, begin + row, stride, columns, mask[:, None] & inside[None, :], DTYPE)
    finite = tl.max((tl.abs(x) > LARGEST).to(tl.int32) | (x != x).to(tl.int32), 1) == 0
    x = tl.where(finite[:, None], x, 0.0)
    if OFFSETS:
        o = offset_of_rows(
            span, lead, begin, first_row, row, columns, inside, partner, pair, sign, frequencies, phases, HEAD_DIM, ROPE, RUNS
        )
        x = tl.where((finite & mask)[:, None], tl.minimum(tl.maximum(x - o, -LARGEST), LARGEST), 0.0)
    exponent = (tl.max(tl.abs(x), 1).to(tl.int32, bitcast=True) >> 23) - 127
    exponent = tl.where(tl.abs(exponent) > FAR, -tl.minimum(tl.maximum(exponent, -126), 126), 0)
    return x * power_of_two(exponent)[:, None], exponent, finite


@triton.jit
def encode_stream_blocks(
    spans,
    firsts,
    starts,
    flags,
    keys,
    path,
    node_shift,
    look_up,
    bounds,
    grid_shift,
    quad_ints,
    quad_look_up,
    records,
    paper,
    representatives,
    numbers,
    aim,
    rotation,
    partner,
    pair,
    sign,
    frequencies,
    phases,
    radius_exponent,
    CODING: tl.constexpr,
    DTYPE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ORDER: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROW_BYTES: tl.constexpr,
    ROOT_BUDGET: tl.constexpr,
    RADIUS_BITS: tl.constexpr,
    RADIUS_STEPS: tl.constexpr,
    CHUNK: tl.constexpr,
    LEVELS: tl.constexpr,
    ENERGY_SCALE: tl.constexpr,
    KIND_16: tl.constexpr,
    FIXES: tl.constexpr,
    OFFSETS: tl.constexpr,
    ROPE: tl.constexpr,
    RUNS: tl.constexpr,
    TERMS: tl.constexpr,
    OPERAND: tl.constexpr,
    QUAD_BITS: tl.constexpr,
    COUNT: tl.constexpr,
    SEARCHED: tl.constexpr,
    ROWS: tl.constexpr,
    SEARCH: tl.constexpr,
    SUM_TILE: tl.constexpr,
):
    """Encode one block into bytes that hold zeros. Vectors with NaN or Inf are coded as zeros; flags [block] counts them."""
    index = tl.program_id(0).to(tl.int64)
    span, chunk, lead, tokens, words, skew, covered = block_place(spans, firsts, index, CHUNK, SEARCH)
    begin = tl.load(span + SPAN.value.exact) + chunk * CHUNK
    start = tl.load(starts + tl.load(span + SPAN.value.starts) + lead)
    stride = tl.load(span + SPAN.value.stride)
    columns = tl.arange(0, COLUMNS)
    bad = tl.zeros([ROWS], tl.int32)
    base = 0
    if CODING == OF_QUADS:
        largest = 0
        for first_row in range(0, tokens, ROWS):
            row = first_row + tl.arange(0, ROWS)
            x, exponent, _finite = centred_rows(
                span, lead, start, begin, first_row, row, row < tokens, stride, columns, partner, pair, sign, frequencies,
                phases, DTYPE, HEAD_DIM, OFFSETS, ROPE, RUNS,
            )  # fmt: skip
            largest = tl.maximum(largest, tl.max(tl.where(row < tokens, own_radius(x, exponent, ORDER), 0)))
        base = tl.where(largest > 0, largest + SEARCHED - QUADS.value.codes, 1 - QUADS.value.least)
    for first_row in range(0, tokens, ROWS):
        row = first_row + tl.arange(0, ROWS)
        mask = row < tokens
        x, exponent, finite = centred_rows(
            span, lead, start, begin, first_row, row, mask, stride, columns, partner, pair, sign, frequencies, phases,
            DTYPE, HEAD_DIM, OFFSETS, ROPE, RUNS,
        )  # fmt: skip
        bad += (mask & (finite == 0)).to(tl.int32)
        coarse, fine, finest = three_parts(x, TERMS)
        bit0 = skew * 8 + row * (8 * ROW_BYTES)
        if CODING == SPLIT:
            encode_split(
                words,
                bit0,
                coarse,
                fine,
                finest,
                exponent,
                mask,
                path,
                node_shift,
                look_up,
                bounds,
                grid_shift,
                quad_ints,
                quad_look_up,
                records,
                rotation,
                columns,
                ORDER,
                COLUMNS,
                ROOT_BUDGET,
                RADIUS_BITS,
                RADIUS_STEPS,
                LEVELS,
                ENERGY_SCALE,
                KIND_16,
                FIXES,
                TERMS,
                OPERAND,
                ROWS,
            )
        elif CODING == OF_QUADS:
            encode_quad_rows(
                words,
                skew,
                row,
                tokens,
                base,
                x,
                coarse,
                fine,
                finest,
                exponent,
                mask,
                representatives,
                numbers,
                aim,
                rotation,
                columns,
                ORDER,
                COLUMNS,
                QUAD_BITS,
                COUNT,
                SEARCHED,
                TERMS,
                OPERAND,
            )
        else:
            encode_paper(
                words,
                bit0,
                coarse,
                fine,
                finest,
                exponent,
                radius_exponent,
                mask,
                paper,
                rotation,
                columns,
                ORDER,
                COLUMNS,
                TERMS,
                OPERAND,
            )
    tl.store(flags + index, tl.sum(bad))
    if CODING == OF_QUADS:
        at = (skew + tokens * ROW_BYTES) * 8 + tl.zeros([1], tl.int32)
        put_field(words, at, (base - 1 + QUADS.value.least + at * 0) & 0xFFFF, at >= 0)
    put_checksum(words, skew, covered, keys, SUM_TILE)


@triton.jit
def decode_stream_blocks(
    spans,
    firsts,
    starts,
    flags,
    keys,
    path,
    node_cos,
    node_sin,
    node_shift,
    quad_ints,
    quad_floats,
    records,
    record_floats,
    circle,
    mantissas,
    paper,
    points,
    rotation,
    partner,
    pair,
    sign,
    frequencies,
    phases,
    radius_exponent,
    limit,
    CODING: tl.constexpr,
    DTYPE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ORDER: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROW_BYTES: tl.constexpr,
    ROOT_BUDGET: tl.constexpr,
    RADIUS_BITS: tl.constexpr,
    RADIUS_STEPS: tl.constexpr,
    CHUNK: tl.constexpr,
    LEVELS: tl.constexpr,
    KIND_16: tl.constexpr,
    OFFSETS: tl.constexpr,
    ROPE: tl.constexpr,
    RUNS: tl.constexpr,
    QUAD_BITS: tl.constexpr,
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
    columns = tl.arange(0, COLUMNS)
    inside = columns < HEAD_DIM
    begun = low
    if RUNS:  # no tile lies in two runs
        tl.static_assert(RUN_ROWS % ROWS == 0)
        begun -= low % ROWS
    for first_row in range(begun, high, ROWS):
        row = first_row + tl.arange(0, ROWS)
        mask = (row >= low) & (row < high)
        bit0 = skew * 8 + row * (8 * ROW_BYTES)
        acc = tl.zeros([ROWS, COLUMNS], tl.float32)
        if CODING == SPLIT:
            acc, exponent, mantissa, nothing = decode_split(
                words,
                bit0,
                mask,
                path,
                node_cos,
                node_sin,
                node_shift,
                quad_ints,
                quad_floats,
                records,
                record_floats,
                circle,
                mantissas,
                rotation,
                columns,
                acc,
                ORDER,
                COLUMNS,
                ROOT_BUDGET,
                RADIUS_BITS,
                RADIUS_STEPS,
                LEVELS,
                KIND_16,
                ROWS,
            )
        elif CODING == OF_QUADS:
            acc, exponent, mantissa, nothing = decode_quad_rows(
                words,
                skew,
                row,
                tokens,
                mask,
                mantissas,
                points,
                rotation,
                columns,
                acc,
                ORDER,
                COLUMNS,
                QUAD_BITS,
                ROWS,
            )
        else:
            acc, exponent, mantissa = decode_paper(
                words,
                bit0,
                row,
                mask,
                radius_exponent,
                mantissas,
                paper,
                circle,
                rotation,
                columns,
                acc,
                ORDER,
                COLUMNS,
                ROWS,
            )
            nothing = row < 0
        first_factor, second_factor = two_factors(mantissa, exponent, nothing)
        y = acc * first_factor[:, None] * second_factor[:, None] + 0.0
        token = begin + row
        if OFFSETS:
            y += offset_of_rows(
                span, lead, begin, first_row, row, columns, inside, partner, pair, sign, frequencies, phases,
                HEAD_DIM, ROPE, RUNS,
            )  # fmt: skip
        y = tl.minimum(tl.maximum(y, -limit), limit)
        target = token - tl.load(span + SPAN.value.first_token)
        store_rows(start, target, stride, columns, y, mask[:, None] & inside[None, :], DTYPE)
