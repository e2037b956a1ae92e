"""Law: the numba kernels that code blocks whose rows share affine fields (SPEC 13), group by group; nothing is rotated."""

from __future__ import annotations

import numpy as np
from numba import carray

from pqcodec.constants import (
    AFFINE_EXPONENT_BYTES,
    AFFINE_EXPONENTS,
    AFFINE_USUAL,
    AFFINE_USUAL_BITS,
    CHECKSUM_BYTES,
    CODING_PAIRS,
    DTYPE_FLOAT32,
    LARGEST_FINITE,
)
from pqcodec.kernels.cpu.affine_fields import fill_steps, put_last, put_shorts
from pqcodec.kernels.cpu.bits import checksum
from pqcodec.kernels.cpu.lane_memory import fence, load, pointer, store, word_at
from pqcodec.kernels.cpu.lanes import LANES, floats
from pqcodec.kernels.cpu.numbers import flag_bad_rows, largest_bits, load_tile, narrow_tile
from pqcodec.kernels.cpu.offsets import add_offset, keep_phases
from pqcodec.kernels.cpu.outliers import (
    keep_farthest,
    outlier_bytes,
    outliers_of,
    place_outliers,
    put_outliers,
    read_outliers,
)
from pqcodec.kernels.cpu.pairs import decode_pairs_row, encode_pairs, fill_pairs
from pqcodec.kernels.cpu.ranges import list_numbers, rows_are_groups
from pqcodec.kernels.cpu.records import F32, I32, I64, U64, Groups, GroupWork, Kind, Output, RopeTable, inlined, jit, leaf
from pqcodec.kernels.cpu.scalar import decode_scalar_row, encode_by_table, encode_scalars, fill_scalars, shared_at

_LARGEST = np.float32(LARGEST_FINITE[DTYPE_FLOAT32])
_LEAST_EXPONENT, _MOST_EXPONENT = AFFINE_EXPONENTS
_USUAL, _TOO_LARGE = np.float32(AFFINE_USUAL[0]), np.float32(AFFINE_USUAL[1])


@jit
def encode_affine_blocks(first_block, last_block, kind, groups, source, offsets, rope, keys, bad, payload):
    """Encode blocks first_block .. last_block - 1, counted chunk by chunk, into ``payload``.

    ``offsets`` are the means' negatives. Vectors with NaN or Inf have codes 0, and are marked in bad [leading * coded].
    Records come as plain tuples (``records.plain``).
    """
    kind, groups, rope = Kind(*kind), Groups(*groups), RopeTable(*rope)
    order, row_bytes, chunk_tokens = kind.order, kind.row_bytes, kind.chunk_tokens
    flat, starts, token_stride, leading, first_tokens, coded = source
    pairs = rope.frequencies.size
    most = min(chunk_tokens, max(coded, 1))
    x = np.zeros((most + LANES) * order, np.float32)
    scratch, largest = np.zeros(LANES * LANES, np.int32), np.zeros(LANES, np.int32)
    cos, sin = np.zeros(chunk_tokens * pairs, np.float32), np.zeros(chunk_tokens * pairs, np.float32)
    filled = np.full(2, -1, np.int64)  # of cos and sin, see ``keep_phases``
    work = work_of(kind, groups)
    polar = np.zeros((2, min(groups.tokens, most) * (order // 2 if kind.coding == CODING_PAIRS else 0)), np.float32)
    halves = groups.field_bytes // 2
    fields = np.zeros((most + groups.tokens - 1) // groups.tokens * halves + LANES, np.uint16)
    missed = np.zeros(most * kind.head_dim + LANES if groups.shared_bytes and groups.outliers else 0, np.float32)
    together = LANES if rows_are_groups(groups) else groups.tokens
    for block in range(first_block, last_block):
        chunk, lead = block // leading, block % leading
        first = chunk * chunk_tokens
        tokens = min(chunk_tokens, coded - first)
        size = affine_size(tokens, kind, groups) - CHECKSUM_BYTES
        block_out = chunk * leading * affine_size(chunk_tokens, kind, groups) + lead * (size + CHECKSUM_BYTES)
        position = I64(rope.first_position + lead * rope.list_tokens + first_tokens + first)
        keep_phases(position, tokens, 1, rope, cos, sin, filled)
        bad_at, top = lead * coded + first, I32(0)
        for row in range(0, tokens, LANES):
            rows = min(LANES, tokens - row)
            start = starts[lead] + (first_tokens + first + row) * token_stride
            tile = x[row * order : (row + LANES) * order]
            load_tile(flat, start, token_stride, rows, kind.head_dim, kind.dtype, tile, order)
            largest_bits(tile, order, scratch, largest)
            flag_bad_rows(tile, rows, order, kind.dtype, largest, bad, bad_at + row)
            if offsets.size:
                add_offset(tile, rows, order, offsets[lead], rope, cos, sin, row)
                for r in range(rows):
                    if bad[bad_at + row + r]:
                        tile[r * order : (r + 1) * order] = F32(0)
                for k in range(0, LANES * order, LANES):
                    store(tile, k, min(max(load(tile, k), floats(-_LARGEST)), floats(_LARGEST)))
                largest_bits(tile, order, scratch, largest)
            for r in range(LANES):
                top = max(top, largest[r])
        exponent = 0 if groups.shared_bytes else exponent_of(top)
        scale, kept = power_of_two(-exponent), 0
        if groups.shared_bytes:
            flags = bad[bad_at : bad_at + tokens]
            encode_by_table(x, tokens, lead, kind, groups, flags, work, payload, block_out, row_bytes, missed)
            kept = keep_farthest(x, tokens, missed, kind, groups, work.apart) if groups.outliers else 0
        for row in range(0, 0 if groups.shared_bytes else tokens, together):
            rows = min(together, tokens - row)
            there, its = x[row * order :], fields[row // groups.tokens * halves :]
            flags, at = bad[bad_at + row : bad_at + row + rows], block_out + row * row_bytes
            if kind.coding == CODING_PAIRS:
                encode_pairs(there, rows, order, groups, scale, flags, polar, work, payload, at, row_bytes, its)
            else:
                kept = encode_scalars(there, rows, row, kind, groups, scale, flags, kept, work, payload, at, row_bytes, its)
        at = block_out + tokens * row_bytes
        put_shorts(fields, group_count(tokens, groups) * halves, payload, at)
        if groups.outliers:
            at += group_count(tokens, groups) * groups.field_bytes
            put_outliers(tokens, kind, groups, kept, work.apart, payload, at)
        put_last(exponent, payload, block_out + size - AFFINE_EXPONENT_BYTES)
        total = checksum(payload, block_out, size, keys)
        for j in range(CHECKSUM_BYTES):
            payload[block_out + size + j] = np.uint8(total >> U64(8 * j))


@jit
def decode_affine_blocks(items, kind, groups, output, rope, keys, damaged):
    """Check the blocks of int64 items [n, ITEM], which lie anywhere in memory, and decode their rows where ``output.write``.

    Records come as plain tuples (``records.plain``).
    """
    kind, groups, output, rope = Kind(*kind), Groups(*groups), Output(*output), RopeTable(*rope)
    order, pairs = kind.order, rope.frequencies.size
    tile, short = np.zeros(LANES * order + LANES, np.float32), np.zeros(LANES, np.uint16)
    cos, sin = np.zeros(kind.chunk_tokens * pairs, np.float32), np.zeros(kind.chunk_tokens * pairs, np.float32)
    filled = np.full(2, -1, np.int64)  # of cos and sin, see ``keep_phases``
    work = work_of(kind, groups)
    like, past = output.like, output.past
    for i in range(items.shape[0]):
        tokens, low, high, source, target, offset_at, token_stride, position, lead = items[i]
        size = affine_size(tokens, kind, groups) - CHECKSUM_BYTES
        payload = carray(pointer(source), (size + CHECKSUM_BYTES,), np.uint8)
        damaged[i] = word_at(payload, size) != checksum(payload, 0, size, keys)
        if not output.write or low >= high:
            continue
        keep_phases(position, tokens, 1, rope, cos, sin, filled)
        out = carray(pointer(target + low * token_stride * like.itemsize), ((high - low) * token_stride,), like.dtype)
        scale, have_group = block_scale(payload, size), I64(-1)
        for row in range(low, high, LANES):
            rows = min(LANES, high - row)
            where = (tokens, row, rows, lead)
            have_group = decode_rows(payload, where, kind, groups, rope.phases, scale, have_group, work, tile)
            if offset_at:
                offset = carray(pointer(offset_at), (order,), np.float32)
                add_offset(tile, rows, order, offset, rope, cos, sin, row)
            at = (row - low) * token_stride
            narrow_tile(tile, rows, kind.head_dim, order, kind.dtype, output.limit, short, past, out, at, token_stride)
    if past:
        fence()


@inlined
def group_count(tokens, groups):
    """Groups of a block of so many tokens, the last of which may have fewer."""
    return (tokens + groups.tokens - 1) // groups.tokens


@leaf
def decode_rows(payload, where, kind, groups, phases, scale, have_group, work, tile):
    """Decode rows of a block into a tile, row by row; ``where``: tokens of the block, first row, rows, leading index.

    ``have_group``: the group whose fields ``work`` holds. Returns the one that it holds then.
    """
    tokens, first, rows, lead = where
    order, row_bytes = kind.order, kind.row_bytes
    if groups.outliers and have_group < 0:
        apart_at = tokens * row_bytes + group_count(tokens, groups) * groups.field_bytes
        read_outliers(payload, apart_at, tokens, kind, groups, scale, work.apart)
    for r in range(rows):
        row_at, group = (first + r) * row_bytes, I64(0) if groups.shared_bytes else (first + r) // groups.tokens
        fields_at = tokens * row_bytes + group * groups.field_bytes
        if kind.coding == CODING_PAIRS:
            if group != have_group:
                fill_pairs(payload, fields_at, order, groups, phases, work)
            decode_pairs_row(payload, row_at, order, groups, scale, work, tile, r * order)
        else:
            if group != have_group and groups.shared_bytes:
                fill_scalars(groups.shared, shared_at(groups, lead), kind, groups, work)
            elif group != have_group:
                fill_scalars(payload, fields_at, kind, groups, work)
            decode_scalar_row(payload, row_at, order, groups, scale, work, tile, r * order)
        have_group = group
    if groups.outliers:
        place_outliers(first, rows, order, work.apart, tile)
    return have_group


@inlined
def affine_size(tokens, kind, groups):
    """Bytes of a block of so many tokens, its checksum included."""
    size = tokens * kind.row_bytes + group_count(tokens, groups) * groups.field_bytes + kind.beside
    return size + outlier_bytes(tokens, kind, groups) if groups.outliers else size


@jit
def block_scale(payload, size):
    """What the coordinates of a block of ``size`` bytes, its checksum not counted, are multiplied by."""
    exponent = I64(payload[size - 2]) | I64(payload[size - 1]) << 8
    exponent -= (exponent & 0x8000) << 1
    return power_of_two(min(max(exponent, _LEAST_EXPONENT), _MOST_EXPONENT))


@jit
def work_of(kind, groups):
    """Scratch of one thread."""
    order = kind.order
    angles = (1 << groups.angle_bits) * order // 2
    work = GroupWork(
        start=np.zeros(order, np.float32),
        step=np.zeros(order, np.float32),
        first=np.zeros(order, np.float32),
        span=np.zeros(order, np.float32),
        low=np.zeros(order, np.float32),
        high=np.zeros(order, np.float32),
        least=np.zeros(list_numbers(kind, groups), np.float32),
        most=np.zeros(list_numbers(kind, groups), np.float32),
        cos=np.zeros(angles, np.float32),
        sin=np.zeros(angles, np.float32),
        one=np.zeros(LANES, np.float32),
        other=np.zeros(LANES, np.float32),
        places=np.arange(order).astype(np.int32),
        used=np.zeros(order, np.int32),
        codes=np.zeros(order, np.int32),
        shorts=np.zeros(2 * order + LANES, np.uint16),
        steps=np.zeros(LANES, np.int32),
        shifts=np.zeros(LANES, np.int32),
        apart=outliers_of(kind, groups),
    )
    fill_steps(groups.bits + groups.angle_bits, work.steps, work.shifts)
    return work


@jit
def exponent_of(top):
    """The power of two that a block is divided by, as ``codings.affine`` has it; ``top``: bits of its largest magnitude."""
    largest = np.array([top], np.int32).view(np.float32)[0]
    if top == 0 or _USUAL <= largest < _TOO_LARGE:
        return 0
    return max((top >> 23) - 126 - AFFINE_USUAL_BITS, _LEAST_EXPONENT)


@jit
def power_of_two(exponent):
    """2^exponent, float32, for exponents -126 .. 127."""
    return np.array([(exponent + 127) << 23], np.int32).view(np.float32)[0]
