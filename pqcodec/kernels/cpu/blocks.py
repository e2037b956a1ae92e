"""Law: the numba kernels that code blocks: chunks of tokens of one leading index, and their checksums.

A tile is eight vectors, held coordinate-major ([coordinate, lane]): one coordinate of all eight is one SIMD register, and
everything but the radius is computed eight at a time. Arithmetic that decides output bits is float32 multiplications and
integer additions, never fused (no fastmath). Numbers come from the plan's tables; a literal in these modules is a mask, a part
of a float's layout, or an approximation that the encoder is free to choose.
"""

from __future__ import annotations

import numpy as np
from numba import carray

from pqcodec.constants import (
    CHECKSUM_BYTES,
    CODING_PAPER,
    CODING_QUADS,
    CODING_SPLIT,
    DTYPE_FLOAT16,
    DTYPE_FLOAT32,
    LARGEST_FINITE,
    QUAD,
    QUADS_GROUP,
    RUN_ROWS,
)
from pqcodec.kernels.cpu.bits import bytes_to_rows, checksum, rows_to_bytes
from pqcodec.kernels.cpu.lane_memory import fence, load, pointer, store, word_at
from pqcodec.kernels.cpu.lanes import LANES, as_float, floats, ints, select
from pqcodec.kernels.cpu.numbers import flag_bad_rows, largest_bits, load_tile, narrow_tile, put_narrowed
from pqcodec.kernels.cpu.offsets import (
    add_offset,
    begin_run,
    fill_phases_across,
    fill_turns_of_run_across,
    keep_phases,
    keep_phases_of_runs,
    keep_turns_of_run,
    runs_in,
    turn_offset,
)
from pqcodec.kernels.cpu.paper import decode_paper, encode_paper
from pqcodec.kernels.cpu.quads import decode_quad_rows, encode_quad_rows, finish_quads, quad_factors
from pqcodec.kernels.cpu.records import (
    F32,
    I32,
    I64,
    SUMS,
    U64,
    DecoderQuads,
    DecoderTree,
    EncoderQuads,
    EncoderTree,
    Kind,
    OffsetRun,
    Output,
    PaperDecoder,
    PaperEncoder,
    QuadsDecoder,
    QuadsEncoder,
    QuadsEncoderWork,
    RopeTable,
    Rotation,
    SplitDecoder,
    SplitDecoderWork,
    SplitEncoder,
    SplitEncoderWork,
    Turning,
    inlined,
    jit,
)
from pqcodec.kernels.cpu.rotation import (
    are_small,
    lies_in_other,
    narrow_back,
    rotate,
    rotate_back,
    rotate_begun_back,
    transpose_back,
)
from pqcodec.kernels.cpu.split import decode_split, encode_split, radius_factors

_LARGEST = np.float32(LARGEST_FINITE[DTYPE_FLOAT32])
_NEARLY = np.float32(1 - 2.0**-10)  # times a limit, what stays below it when sums are rounded
_FAR = 40  # a row whose largest magnitude is beyond 2^40 or below 2^-40 is scaled, so that squares stay in float32


@jit
def encode_stream_blocks(
    first_block, last_block, kind, source, offsets, rope, rotation, split, paper, quads, keys, bad, payload
):
    """Encode blocks first_block .. last_block - 1, counted chunk by chunk, into ``payload``.

    ``offsets`` are the means' negatives. Vectors with NaN or Inf are coded as zeros, and marked in bad [leading * coded].
    Records come as plain tuples (``records.plain``).
    """
    kind, rope, rotation = Kind(*kind), RopeTable(*rope), Rotation(*rotation)
    split, paper = SplitEncoder(*split[:-2], EncoderTree(*split[-2]), EncoderQuads(*split[-1])), PaperEncoder(*paper)
    quads = QuadsEncoder(*quads)
    order, row_bytes, chunk_tokens = kind.order, kind.row_bytes, kind.chunk_tokens
    flat, starts, token_stride, leading, first_tokens, coded = source
    pairs = rope.frequencies.size
    stride = (row_bytes >> 3) + 2
    tile, x = lanes_of(LANES * order), lanes_of(order * LANES)
    other = lanes_of(x.size if rotation.base.size + rotation.places.size > 0 else 0)
    rotated = other if lies_in_other(rotation) else x
    sums = lanes_of(rotation.base.shape[1] * len(SUMS) * 2 * LANES)
    scratch, largest = np.zeros(LANES * LANES, np.int32), np.zeros(LANES, np.int32)
    row_scales, exponents = np.ones(LANES, np.float32), np.zeros(LANES, np.int32)
    work = SplitEncoderWork(
        turns=np.zeros(order // 2 * LANES, np.float32),
        energy=np.zeros(order // 2 * LANES, np.float32),
        places=np.zeros(order // 2 * LANES, np.int32),
        bit_place=np.zeros(order // 2 * LANES, np.int32),
        budget=np.zeros(order // 2 * LANES, np.int32),
        codes=np.zeros(order // 2 * LANES, np.int32),
        widths=np.zeros(order // 4 * LANES, np.int32),
        cells=np.zeros(order // 4 * LANES, np.int32),
    )
    of_quads = QuadsEncoderWork(
        energy=np.zeros(LANES, np.float32),
        codes=np.zeros(order // QUAD * LANES, np.int32),
        trial=np.zeros(order // QUAD * LANES, np.int32),
        packed=np.zeros((order // QUAD // QUADS_GROUP + 1) * 2 * LANES, np.uint64),
        own=np.zeros(chunk_tokens + LANES, np.int32),
        radius=np.zeros(chunk_tokens + LANES, np.int32),
    )
    words = np.zeros(LANES * stride, np.uint64)
    by_runs = rope.to_halves > 0
    turned_rows = min(chunk_tokens, coded, RUN_ROWS) if by_runs else chunk_tokens
    cos, sin = np.zeros(turned_rows * pairs, np.float32), np.zeros(turned_rows * pairs, np.float32)
    filled = np.full(2, -1, np.int64)  # of cos and sin, see ``keep_phases``
    run = run_of(order, chunk_tokens, rope)
    if by_runs:
        keep_turns_of_run(turned_rows, rope, cos, sin, filled)
    for block in range(first_block, last_block):
        chunk, lead = block // leading, block % leading
        first = chunk * chunk_tokens
        tokens = min(chunk_tokens, coded - first)
        size = block_size(tokens, kind) - CHECKSUM_BYTES
        block_out = chunk * leading * block_size(chunk_tokens, kind) + lead * (size + CHECKSUM_BYTES)
        position = I64(rope.first_position + lead * rope.list_tokens + first_tokens + first)
        if by_runs:
            keep_phases_of_runs(position, tokens, rope, run)
        else:
            keep_phases(position, tokens, 1, rope, cos, sin, filled)
        for row in range(0, tokens, LANES):
            rows = min(LANES, tokens - row)
            if by_runs and row % RUN_ROWS == 0:
                begin_run(offsets[lead], order, rope, row // RUN_ROWS, run)
            start = starts[lead] + (first_tokens + first + row) * token_stride
            bad_at = lead * coded + first + row
            load_tile(flat, start, token_stride, rows, kind.head_dim, kind.dtype, tile, order)
            largest_bits(tile, order, scratch, largest)
            flag_bad_rows(tile, rows, order, kind.dtype, largest, bad, bad_at)
            if offsets.size:
                offset = run.offset if by_runs else offsets[lead]
                add_offset(tile, rows, order, offset, rope, cos, sin, row % RUN_ROWS if by_runs else row)
                for r in range(rows):
                    if bad[bad_at + r]:
                        tile[r * order : (r + 1) * order] = F32(0)
                for k in range(0, LANES * order, LANES):
                    store(tile, k, min(max(load(tile, k), floats(-_LARGEST)), floats(_LARGEST)))
                largest_bits(tile, order, scratch, largest)
            exponent = (load(largest, 0) >> ints(I32(23))) - ints(I32(127))
            near = min(max(exponent, ints(I32(-_FAR))), ints(I32(_FAR))) == exponent
            exponent = select(near, ints(I32(0)), ints(I32(0)) - min(max(exponent, ints(I32(-126))), ints(I32(126))))
            store(exponents, 0, exponent)
            store(row_scales, 0, as_float((exponent + ints(I32(127))) << ints(I32(23))))
            rotate(tile, x, other, sums, order, row_scales, rotation)
            if kind.coding == CODING_QUADS:
                encode_quad_rows(rows, rotated, order, exponents, quads, of_quads, payload, block_out, row, tokens)
                continue
            words[:] = U64(0)
            if kind.coding == CODING_SPLIT:
                encode_split(rows, rotated, order, exponents, split, work, words, stride)
            else:
                encode_paper(rows, rotated, order, row_scales, paper, words, stride)
            rows_to_bytes(words, stride, rows, row_bytes, payload, block_out + row * row_bytes)
        if kind.coding == CODING_QUADS:
            finish_quads(tokens, quads, of_quads, payload, block_out, size)
        total = checksum(payload, block_out, size, keys)
        for j in range(CHECKSUM_BYTES):
            payload[block_out + size + j] = np.uint8(total >> U64(8 * j))


@jit
def decode_stream_blocks(items, kind, output, rope, rotation, split, paper, quads, keys, damaged):
    """Check the blocks of int64 items [n, ITEM], which lie anywhere in memory, and decode their rows where ``output.write``.

    Records come as plain tuples (``records.plain``).
    """
    kind, output, rope, rotation = Kind(*kind), Output(*output), RopeTable(*rope), Rotation(*rotation)
    split, paper = SplitDecoder(*split[:-2], DecoderTree(*split[-2]), DecoderQuads(*split[-1])), PaperDecoder(*paper)
    quads = QuadsDecoder(*quads)
    order, row_bytes = kind.order, kind.row_bytes
    pairs = rope.frequencies.size
    stride = (row_bytes >> 3) + 2
    tile, x = lanes_of(LANES * order), lanes_of(order * LANES)
    other = lanes_of(x.size if rotation.base.size + rotation.places.size > 0 else 0)
    sums = lanes_of(rotation.base.shape[1] * len(SUMS) * 2 * LANES)
    first_factor, second_factor = np.zeros(LANES, np.float32), np.zeros(LANES, np.float32)
    work = SplitDecoderWork(
        bits=np.zeros(order // 2 * LANES, np.int32),
        budget=np.zeros(order // 2 * LANES, np.int32),
        radius=np.zeros(order // 2 * LANES, np.float32),
        entries=np.zeros(order // 4 * LANES, np.int32),
        phases=np.zeros(order // 2 * LANES, np.int32),
        listed=np.zeros(order // 4 + 1, np.int32),
    )
    words = np.zeros(LANES * stride, np.uint64)
    of_quads = np.zeros(2 * LANES, np.int32), np.zeros(order // QUAD * LANES, np.int32), np.zeros(order // 2, np.int32)
    short, shorts, brain = np.zeros(LANES, np.uint16), np.zeros(LANES * order, np.uint16), kind.dtype != DTYPE_FLOAT16
    whole = other.view(np.int32)
    as_pairs = kind.coding == CODING_QUADS and rotation.pair_places.size > 0
    pairs_of_tile = lanes_of(order * LANES // 2).view(np.int16)
    by_runs = rope.to_halves > 0
    turned_rows = min(kind.chunk_tokens, RUN_ROWS) if by_runs else kind.chunk_tokens
    cos, sin = np.zeros(turned_rows * pairs, np.float32), np.zeros(turned_rows * pairs, np.float32)
    filled = np.full(2, -1, np.int64)  # of cos and sin, see ``keep_phases``
    turning = turning_of(order, turned_rows, rope)
    of_tile, run = (pairs + 1) * LANES, run_of(order, kind.chunk_tokens, rope)
    if by_runs and output.write:
        fill_turns_of_run_across(turned_rows, rope, LANES, of_tile, turning.cos, turning.sin, of_quads[0])
    like, past = output.like, output.past
    have_across = I64(-1), I64(0)  # as ``filled``, of ``turning``
    for i in range(items.shape[0]):
        tokens, low, high, source, target, offset_at, token_stride, position, _ = items[i]
        size = block_size(tokens, kind) - CHECKSUM_BYTES
        payload = carray(pointer(source), (size + CHECKSUM_BYTES,), np.uint8)
        damaged[i] = word_at(payload, size) != checksum(payload, 0, size, keys)
        if not output.write or low >= high:
            continue
        offset, limit = carray(pointer(offset_at), (order if offset_at else 0,), np.float32), output.limit
        if by_runs:
            keep_phases_of_runs(position, tokens, rope, run)
        elif offset_at:
            limit = limit * _NEARLY - F32(2) * turn_offset(offset, order, rope, turning)
            if pairs and (position + low != have_across[0] or high - low > have_across[1]):
                fill_phases_across(position + low, high - low, rope, LANES, of_tile, turning.cos, turning.sin, of_quads[0])
                have_across = position + low, high - low
        out = carray(pointer(target + low * token_stride * like.itemsize), ((high - low) * token_stride,), like.dtype)
        for tile_row in range(low - low % LANES if by_runs else low, high, LANES):
            row = max(tile_row, low)
            rows, turned_row = min(tile_row + LANES, high) - row, row % RUN_ROWS if by_runs else row - low
            if by_runs and (row == low or turned_row == 0):
                begin_run(offset, order, rope, row // RUN_ROWS, run)
                limit = output.limit * _NEARLY - F32(2) * turn_offset(run.offset, order, rope, turning)
            if kind.coding == CODING_QUADS:
                quad_factors(quads, payload, row, rows, tokens, first_factor, second_factor)
                decode_quad_rows(quads, order, payload, row, rows, tokens, of_quads, as_pairs, x, pairs_of_tile)
                rotate_begun_back(x, pairs_of_tile, other, whole, sums, order, rotation)
            else:
                bytes_to_rows(payload, row * row_bytes, rows, row_bytes, words, stride)
            if kind.coding == CODING_SPLIT:
                radius_factors(rows, split, words, stride, first_factor, second_factor)
                decode_split(split, order, work, words, stride, x)
            elif kind.coding == CODING_PAPER:
                decode_paper(rows, order, paper, words, stride, x, first_factor, second_factor)
            if kind.coding != CODING_QUADS:
                rotate_back(x, other, sums, order, rotation)
            at = (row - low) * token_stride
            fast = kind.dtype != DTYPE_FLOAT32 and turned_row % LANES == 0
            if fast and are_small(first_factor, second_factor, limit):
                there = Turning(offset_at != 0, *turning[1:])
                tile_at = turned_row * (pairs + 1)
                narrow_back(x, other, whole, as_pairs, order, first_factor, rotation, there, tile_at, shorts, brain)
                put_narrowed(shorts, rows, kind.head_dim, order, past, out, at, token_stride)
                continue
            transpose_back(x, other, whole, as_pairs, order, first_factor, second_factor, rotation, tile)
            if by_runs:
                keep_turns_of_run(turned_rows, rope, cos, sin, filled)
                add_offset(tile, rows, order, run.offset, rope, cos, sin, turned_row)
            elif offset_at:
                keep_phases(position, tokens, 1, rope, cos, sin, filled)
                add_offset(tile, rows, order, offset, rope, cos, sin, row)
            narrow_tile(tile, rows, kind.head_dim, order, kind.dtype, output.limit, short, past, out, at, token_stride)
    if past:
        fence()


@inlined
def block_size(tokens, kind):
    """Bytes of a block of so many tokens, its checksum included."""
    return (tokens * kind.row_bytes + kind.beside + kind.align - 1) // kind.align * kind.align


@jit
def turning_of(order, tokens, rope):
    """A Turning for blocks of up to ``tokens``, without its offset and phases."""
    pairs, tiles = rope.frequencies.size, (tokens + LANES - 1) // LANES
    along, across = np.zeros(order, np.float32), np.zeros(order, np.float32)
    places = np.full(order, pairs * LANES, np.int64)
    for i in range(pairs):
        places[rope.pair_p * i] = i * LANES
        places[rope.pair_p * i + rope.step] = i * LANES
    cos, sin = lanes_of(tiles * (pairs + 1) * LANES), lanes_of(tiles * (pairs + 1) * LANES)
    for tile in range(tiles):
        cos[(tile * (pairs + 1) + pairs) * LANES : (tile + 1) * (pairs + 1) * LANES] = F32(1)
    return Turning(False, along, across, places, cos, sin)


@jit
def run_of(order, tokens, rope):
    """An OffsetRun for blocks of up to ``tokens``, whose arrays are filled later; without runs nothing uses it."""
    pairs, runs = rope.frequencies.size, runs_in(tokens)
    cos, sin = np.zeros(runs * pairs + LANES, np.float32), np.zeros(runs * pairs + LANES, np.float32)
    first, second = np.zeros(pairs + LANES, np.float32), np.zeros(pairs + LANES, np.float32)
    return OffsetRun(np.zeros(order, np.float32), cos, sin, np.full(2, -1, np.int64), first, second)


@jit
def lanes_of(count):
    """Zeros, float32 [count], that begin at a multiple of 64 bytes: sixteen numbers are one line of the caches."""
    whole = np.zeros(count + 2 * LANES, np.float32)
    skipped = (-whole.ctypes.data % (2 * LANES * 4)) // 4
    return whole[skipped : skipped + count]
