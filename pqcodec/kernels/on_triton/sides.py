"""Law: side sections: a program writes or checks the offsets and exact tokens of one leading index."""

from __future__ import annotations

import triton
import triton.language as tl

from pqcodec.kernels.on_triton.bits import PRIME, PRIME_GAP, find_span, reduced
from pqcodec.kernels.on_triton.numbers import (
    CHECKSUM_BYTES,
    EXPONENT_AT,
    LARGEST,
    LARGEST_HALF,
    SPAN,
    load_rows,
    power_of_two,
)
from pqcodec.kernels.on_triton.offsets import phase_parts


@triton.jit
def sum_tokens(
    spans,
    firsts,
    starts,
    sums,
    ones,
    twos,
    pair_frequencies,
    phases,
    DTYPE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROPE: tl.constexpr,
    MEAN_TOKENS: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    IN_HALVES: tl.constexpr,
    SEARCH: tl.constexpr,
):
    """Sum one part of PARTS of a lead's sampled tokens into float64 sums [leads, PARTS, COLUMNS], two columns at a time.

    Under RoPE vectors are turned back first; vectors with NaN or Inf count as zeros. IN_HALVES: ``ones`` are the first half of
    the columns, and ``twos`` the second, in ascending order.
    """
    index = tl.program_id(0).to(tl.int64)
    which = find_span(firsts, index, SEARCH)
    span = spans + which * len(SPAN.value)
    lead = index - tl.load(firsts + which)
    coded, exact = tl.load(span + SPAN.value.coded), tl.load(span + SPAN.value.exact)
    step = tl.maximum((coded + MEAN_TOKENS - 1) // MEAN_TOKENS, 1)
    count = (coded + step - 1) // step
    start, stride = tl.load(starts + tl.load(span + SPAN.value.starts) + lead), tl.load(span + SPAN.value.stride)
    position = tl.load(span + SPAN.value.position)
    places = tl.arange(0, COLUMNS // 2)
    if IN_HALVES:  # known to the compiler, which then loads many numbers at once
        one, two = places, COLUMNS // 2 + places
    else:
        one, two = tl.load(ones + places), tl.load(twos + places)
    frequency = tl.load(pair_frequencies + places).to(tl.uint32, bitcast=True)
    part = tl.program_id(1)
    one_total, two_total = tl.zeros([ROWS, COLUMNS // 2], tl.float64), tl.zeros([ROWS, COLUMNS // 2], tl.float64)
    for first in range(part * ROWS, count, PARTS * ROWS):
        sample = first + tl.arange(0, ROWS)
        token = exact + sample * step
        there = (sample < count)[:, None]
        x = load_rows(start, token, stride, one, there & (one < HEAD_DIM)[None, :], DTYPE)
        y = load_rows(start, token, stride, two, there & (two < HEAD_DIM)[None, :], DTYPE)
        finite = (tl.abs(x) <= LARGEST) & (tl.abs(y) <= LARGEST)
        finite = (tl.min(finite.to(tl.int32), 1) > 0)[:, None]
        x, y = tl.where(finite, x, 0.0).to(tl.float64), tl.where(finite, y, 0.0).to(tl.float64)
        if ROPE:
            cos, sin = phase_parts((token + position).to(tl.uint32)[:, None], frequency[None, :], phases)
            cos, sin = cos.to(tl.float64), sin.to(tl.float64)
            x, y = x * cos + y * sin, y * cos - x * sin
        one_total += x
        two_total += y
    to = sums + (index * PARTS + part) * COLUMNS
    tl.store(to + one, tl.sum(one_total, 0))
    tl.store(to + two, tl.sum(two_total, 0))


@triton.jit
def find_means(
    spans,
    firsts,
    starts,
    sums,
    largest,
    keys,
    EXACT: tl.constexpr,
    UNITS: tl.constexpr,
    ROW_UNITS: tl.constexpr,
    MEAN_TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PARTS: tl.constexpr,
    AT_ONCE: tl.constexpr,
    TILE: tl.constexpr,
    SEARCH: tl.constexpr,
):
    """One lead's means, into sums [lead, 0], and the largest magnitude, into largest [lead]; where there are any (EXACT), its
    exact tokens as ``write_exact`` leaves them. AT_ONCE: parts that are added up together.
    """
    index = tl.program_id(0).to(tl.int64)
    which = find_span(firsts, index, SEARCH)
    span = spans + which * len(SPAN.value)
    coded = tl.load(span + SPAN.value.coded)
    step = tl.maximum((coded + MEAN_TOKENS - 1) // MEAN_TOKENS, 1)
    count = tl.maximum((coded + step - 1) // step, 1)
    columns = tl.arange(0, COLUMNS)
    total = tl.zeros([COLUMNS], tl.float64)
    for first in range(0, PARTS, AT_ONCE):
        parts = first + tl.arange(0, AT_ONCE)
        total += tl.sum(tl.load(sums + (index * PARTS + parts)[:, None] * COLUMNS + columns[None, :]), 0)
    mean = total / count.to(tl.float64)
    tl.store(sums + index * PARTS * COLUMNS + columns, mean)
    tl.store(largest + index, tl.max(tl.abs(mean).to(tl.float32)))
    if EXACT:
        copy_exact(span, index - tl.load(firsts + which), starts, keys, UNITS, ROW_UNITS, TILE)


@triton.jit
def write_offsets(
    spans,
    firsts,
    sums,
    largest,
    keys,
    HEAD_DIM: tl.constexpr,
    COLUMNS: tl.constexpr,
    PARTS: tl.constexpr,
    LEAST: tl.constexpr,
    MOST: tl.constexpr,
    TILE: tl.constexpr,
    SEARCH: tl.constexpr,
):
    """Store one lead's means as halves (SPEC 9.1); the program of a span's first lead also writes the header's exponent."""
    index = tl.program_id(0).to(tl.int64)
    which = find_span(firsts, index, SEARCH)
    span = spans + which * len(SPAN.value)
    lead = index - tl.load(firsts + which)
    stream = tl.load(span + SPAN.value.stream)
    first_of_span, leads = tl.load(firsts + which), tl.load(span + SPAN.value.leads)
    largest_of = tl.zeros([TILE], tl.float32)
    for first in range(0, leads, TILE):
        of_span = first + tl.arange(0, TILE)
        largest_of = tl.maximum(largest_of, tl.load(largest + first_of_span + of_span, mask=of_span < leads, other=0.0))
    most = tl.max(largest_of)
    bits = most.to(tl.int32, bitcast=True)
    exponent = tl.minimum(tl.maximum((bits >> 23) - 126 - 15, LEAST), MOST)
    exponent = tl.where((most == 0) | ((most >= 0.0625) & (most < 32768.0)), 0, exponent)
    columns = tl.arange(0, COLUMNS)
    mean = tl.load(sums + index * PARTS * COLUMNS + columns)
    scaled_mean = tl.minimum(tl.maximum(mean * power_of_two(-exponent).to(tl.float64), -LARGEST_HALF), LARGEST_HALF)
    half = scaled_mean.to(tl.float16).to(tl.uint16, bitcast=True)
    half = tl.where(columns < HEAD_DIM, half, 0)
    at = (stream + tl.load(span + SPAN.value.offsets_at) + lead * (2 * HEAD_DIM + CHECKSUM_BYTES)).to(
        tl.pointer_type(tl.uint16)
    )
    tl.store(at + columns, half, mask=columns < HEAD_DIM)
    total = unit_products(half, columns, columns < HEAD_DIM, keys)
    store_sum(at + HEAD_DIM, reduced(total, 2 * HEAD_DIM + tl.zeros([], tl.int32), keys))
    if lead == 0:  # change the header's word that holds the exponent, and its checksum, which is linear in the words
        word = (stream + EXPONENT_AT).to(tl.pointer_type(tl.uint32))
        old = tl.load(word)
        new = (old & 0xFFFF0000) | (exponent & 0xFFFF).to(tl.uint32)
        place = (stream + tl.load(span + SPAN.value.offsets_at) - 4).to(tl.pointer_type(tl.uint32))
        change = (new.to(tl.uint64) + PRIME - old.to(tl.uint64) % PRIME) % PRIME
        sum_ = tl.load(place).to(tl.uint64) + change * tl.load(keys + 1 + EXPONENT_AT // 4).to(tl.uint64) % PRIME
        tl.store(place, (sum_ % PRIME).to(tl.uint32))
        tl.store(word, new)


@triton.jit
def write_exact(
    spans, firsts, starts, keys, UNITS: tl.constexpr, ROW_UNITS: tl.constexpr, TILE: tl.constexpr, SEARCH: tl.constexpr
):
    """Copy one lead's exact first tokens and write their checksum. In 16-bit units: a number is UNITS, a vector ROW_UNITS."""
    index = tl.program_id(0).to(tl.int64)
    which = find_span(firsts, index, SEARCH)
    span = spans + which * len(SPAN.value)
    copy_exact(span, index - tl.load(firsts + which), starts, keys, UNITS, ROW_UNITS, TILE)


@triton.jit
def copy_exact(span, lead, starts, keys, UNITS: tl.constexpr, ROW_UNITS: tl.constexpr, TILE: tl.constexpr):
    """What ``write_exact`` does for a span's lead."""
    count = tl.load(span + SPAN.value.exact) * ROW_UNITS
    at = (tl.load(span + SPAN.value.stream) + tl.load(span + SPAN.value.exact_at) + lead * (2 * count + CHECKSUM_BYTES)).to(
        tl.pointer_type(tl.uint16)
    )
    start = tl.load(starts + tl.load(span + SPAN.value.starts) + lead).to(tl.pointer_type(tl.uint16))
    stride = tl.load(span + SPAN.value.stride) * UNITS
    total = tl.zeros([TILE], tl.uint64)
    for first in range(0, count, TILE):
        i = first + tl.arange(0, TILE)
        unit = tl.load(start + (i // ROW_UNITS) * stride + i % ROW_UNITS, mask=i < count, other=0)
        tl.store(at + i, unit, mask=i < count)
        total += unit_products(unit, i, i < count, keys)
    if count > 0:
        store_sum(at + count, reduced(total, 2 * count, keys))


@triton.jit
def read_sides(
    spans,
    firsts,
    starts,
    flags,
    keys,
    HEAD_DIM: tl.constexpr,
    OFFSETS: tl.constexpr,
    UNITS: tl.constexpr,
    ROW_UNITS: tl.constexpr,
    TILE: tl.constexpr,
    SEARCH: tl.constexpr,
):
    """Check one lead's offsets and exact tokens, and copy the exact tokens that its span wants.

    flags [2 * index] is the sum of 1 where the offsets' checksum is wrong and 2 where an offset is not finite;
    flags [2 * index + 1] is 1 where the exact tokens' checksum is wrong.
    """
    index = tl.program_id(0).to(tl.int64)
    which = find_span(firsts, index, SEARCH)
    span = spans + which * len(SPAN.value)
    local = index - tl.load(firsts + which)
    lead = tl.load(span + SPAN.value.first_lead) + local
    stream = tl.load(span + SPAN.value.stream)
    if OFFSETS:
        at = (stream + tl.load(span + SPAN.value.offsets_at) + lead * (2 * HEAD_DIM + CHECKSUM_BYTES)).to(
            tl.pointer_type(tl.uint16)
        )
        total = tl.zeros([TILE], tl.uint64)
        wild = tl.zeros([TILE], tl.int32)
        for channel in range(0, HEAD_DIM, TILE):
            i = channel + tl.arange(0, TILE)
            unit = tl.load(at + i, mask=i < HEAD_DIM, other=0)
            total += unit_products(unit, i, i < HEAD_DIM, keys)
            wild |= ((unit & 0x7C00) == 0x7C00).to(tl.int32)
        stored = tl.load(at + HEAD_DIM).to(tl.uint32) | (tl.load(at + HEAD_DIM + 1).to(tl.uint32) << 16)
        wrong = (stored != reduced(total, 2 * HEAD_DIM + tl.zeros([], tl.int32), keys)).to(tl.int32)
        tl.store(flags + 2 * index, wrong + 2 * tl.max(wild))
    begin, end = tl.load(span + SPAN.value.first_token), tl.load(span + SPAN.value.last_token)
    exact = tl.load(span + SPAN.value.exact)
    if begin < exact:
        count = exact * ROW_UNITS
        source = (stream + tl.load(span + SPAN.value.exact_at) + lead * (2 * count + CHECKSUM_BYTES)).to(
            tl.pointer_type(tl.uint16)
        )
        target = tl.load(starts + tl.load(span + SPAN.value.starts) + local).to(tl.pointer_type(tl.uint16))
        stride = tl.load(span + SPAN.value.stride) * UNITS
        total_exact = tl.zeros([TILE], tl.uint64)
        for first in range(0, count, TILE):
            j = first + tl.arange(0, TILE)
            word = tl.load(source + j, mask=j < count, other=0)
            total_exact += unit_products(word, j, j < count, keys)
            token = j // ROW_UNITS
            wanted = (j < count) & (token >= begin) & (token < end)
            tl.store(target + (token - begin) * stride + j % ROW_UNITS, word, mask=wanted)
        stored_exact = tl.load(source + count).to(tl.uint32) | (tl.load(source + count + 1).to(tl.uint32) << 16)
        tl.store(flags + 2 * index + 1, (stored_exact != reduced(total_exact, 2 * count, keys)).to(tl.int32))


@triton.jit
def unit_products(unit, index, mask, keys):
    """16-bit units times the keys of the 32-bit words that they stand in, each folded below 2^36."""
    word = unit.to(tl.uint64) << (16 * (index & 1)).to(tl.uint64)
    product = word * tl.load(keys + 1 + (index >> 1), mask=mask, other=0).to(tl.uint64)
    return (product & 0xFFFFFFFF) + (product >> 32) * PRIME_GAP


@triton.jit
def store_sum(at, total):
    """Store a checksum as two 16-bit units."""
    tl.store(at, (total & 0xFFFF).to(tl.uint16))
    tl.store(at + 1, (total >> 16).to(tl.uint16))
