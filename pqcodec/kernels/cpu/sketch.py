"""Law: the numba kernels of the sign sketch (SPEC 21): eight vectors are rotated at a time, once for each block of S.

Norms and the choice of outlier channels are summed in float64, as the reference does.
"""

from __future__ import annotations

import math

import numpy as np
from numba import carray

from pqcodec.constants import (
    AFFINE_EXPONENTS,
    AFFINE_USUAL,
    AFFINE_USUAL_BITS,
    CHECKSUM_BYTES,
    DTYPE_FLOAT32,
    LARGEST_FINITE,
    SKETCH_EXPONENT_BYTES,
    SKETCH_NARROW,
)
from pqcodec.kernels.cpu.affine_blocks import block_scale, power_of_two
from pqcodec.kernels.cpu.affine_fields import as_halves, halves_at, put_last, put_shorts, shorts_of
from pqcodec.kernels.cpu.bits import checksum
from pqcodec.kernels.cpu.blocks import lanes_of
from pqcodec.kernels.cpu.lane_memory import fence, load, pointer, spread, store, word_at
from pqcodec.kernels.cpu.lanes import LANES, as_float, floats, ints, select
from pqcodec.kernels.cpu.numbers import flag_bad_rows, largest_bits, load_tile, narrow_tile
from pqcodec.kernels.cpu.offsets import add_offset, keep_phases
from pqcodec.kernels.cpu.records import (
    F32,
    I32,
    I64,
    SUMS,
    U64,
    Kind,
    Output,
    RopeTable,
    Rotation,
    SketchTable,
    inlined,
    jit,
    leaf,
)
from pqcodec.kernels.cpu.rotation import lies_in_other, rotate, rotate_back, transpose_back

_LARGEST = np.float32(LARGEST_FINITE[DTYPE_FLOAT32])
_NO_FLIPS, _NO_PLACES, _NO_SIGNS = (np.zeros(0, kind) for kind in (np.int32, np.int64, np.int16))


# -- encoding ------------------------------------------------------------------------------------------------------
@jit
def encode_sketch_blocks(first_block, last_block, kind, sketch, source, offsets, rope, keys, bad, payload):
    """Encode blocks first_block .. last_block - 1, counted chunk by chunk, into ``payload``.

    ``offsets`` are the means' negatives. Vectors with NaN or Inf are zeros, and are marked in bad [leading * coded]. Records
    come as plain tuples (``records.plain``).
    """
    kind, sketch, rope = Kind(*kind), SketchTable(*sketch), RopeTable(*rope)
    order, row_bytes, chunk_tokens = kind.order, kind.row_bytes, kind.chunk_tokens
    flat, starts, token_stride, leading, first_tokens, coded = source
    pairs = rope.frequencies.size
    most = min(chunk_tokens, max(coded, 1))
    x = lanes_of((most + LANES) * order)
    tile, turned, other, sums = lanes_of(LANES * order), lanes_of(LANES * order), lanes_of(LANES * order), sums_of(sketch)
    scratch, largest = np.zeros(LANES * LANES, np.int32), np.zeros(LANES, np.int32)
    cos, sin = np.zeros(chunk_tokens * pairs, np.float32), np.zeros(chunk_tokens * pairs, np.float32)
    filled = np.full(2, -1, np.int64)  # of cos and sin, see ``keep_phases``
    norms, halves, shorts = np.zeros((2, most + LANES)), np.zeros(LANES, np.float32), np.zeros(LANES, np.uint16)
    energy, apart = np.zeros(order), np.zeros(order, np.float32)
    for block in range(first_block, last_block):
        chunk, lead = block // leading, block % leading
        first = chunk * chunk_tokens
        tokens = min(chunk_tokens, coded - first)
        size = sketch_size(tokens, kind, sketch) - CHECKSUM_BYTES
        block_out = chunk * leading * sketch_size(chunk_tokens, kind, sketch) + lead * (size + CHECKSUM_BYTES)
        position = I64(rope.first_position + lead * rope.list_tokens + first_tokens + first)
        keep_phases(position, tokens, 1, rope, cos, sin, filled)
        bad_at = lead * coded + first
        for row in range(0, tokens, LANES):
            rows = min(LANES, tokens - row)
            start = starts[lead] + (first_tokens + first + row) * token_stride
            here = x[row * order : (row + LANES) * order]
            load_tile(flat, start, token_stride, rows, kind.head_dim, kind.dtype, here, order)
            largest_bits(here, order, scratch, largest)
            flag_bad_rows(here, rows, order, kind.dtype, largest, bad, bad_at + row)
            if offsets.size:
                add_offset(here, rows, order, offsets[lead], rope, cos, sin, row)
                for r in range(rows):
                    if bad[bad_at + row + r]:
                        here[r * order : (r + 1) * order] = F32(0)
                for k in range(0, LANES * order, LANES):
                    store(here, k, min(max(load(here, k), floats(-_LARGEST)), floats(_LARGEST)))
        lists_at = block_out + tokens * row_bytes
        top = 0.0
        for group in range(list_count(tokens, sketch)):
            row, end = group * sketch.tokens, min((group + 1) * sketch.tokens, tokens)
            if sketch.channels:
                choose_channels(x, row, end, kind, sketch, energy, apart, payload, lists_at + group * sketch.list_bytes)
            top = max(top, fill_norms(x, row, end, order, apart, norms))
        exponent = norm_exponent(top)
        scale = float(power_of_two(-exponent))
        have_group = I64(-1)
        for row in range(0, tokens, LANES):
            rows = min(LANES, tokens - row)
            at = block_out + row * row_bytes
            for part in range(2 if sketch.channels else 1):
                for r in range(LANES):
                    halves[r] = F32(norms[part, row + r] * scale) if r < rows else F32(0)
                as_halves(load(halves, 0), shorts, 0)
                for r in range(rows):
                    put_shorts(shorts[r:], 1, payload, at + r * row_bytes + 2 * part)
                for r in range(rows):
                    if sketch.channels:
                        group = (row + r) // sketch.tokens
                        if group != have_group:
                            fill_apart(payload, lists_at + group * sketch.list_bytes, kind, sketch, apart)
                            have_group = group
                    copy_part(x, (row + r) * order, order, apart, part, tile, r * order)
                if rows < LANES:
                    tile[rows * order :] = F32(0)
                put_sketch(tile, rows, kind, sketch, part, turned, other, sums, scratch, largest, halves, payload, at)
        put_last(exponent, payload, block_out + size - SKETCH_EXPONENT_BYTES)
        total = checksum(payload, block_out, size, keys)
        for j in range(CHECKSUM_BYTES):
            payload[block_out + size + j] = np.uint8(total >> U64(8 * j))


@jit
def choose_channels(x, first, last, kind, sketch, energy, apart, payload, at):
    """The outlier channels of rows ``first`` .. ``last`` - 1, those of the largest norms, to ``apart`` and payload [at ...]."""
    energy[:] = 0
    for row in range(first, last):
        for k in range(kind.head_dim):
            energy[k] += float(x[row * kind.order + k]) ** 2
    apart[:] = F32(0)
    for _ in range(sketch.channels):
        best = -1
        for k in range(kind.head_dim):
            if apart[k] == 0 and (best < 0 or energy[k] > energy[best]):
                best = k
        apart[best] = F32(1)
    for k in range(kind.head_dim):
        if apart[k]:
            payload[at] = np.uint8(k & 255)
            if kind.head_dim > SKETCH_NARROW:
                payload[at + 1] = np.uint8(k >> 8)
                at += 1
            at += 1


@jit
def fill_norms(x, first, last, order, apart, norms):
    """Norms of rows, without and with outlier channels: float64 [2, rows]. Returns the largest."""
    top = 0.0
    for row in range(first, last):
        inner, outer = 0.0, 0.0
        for k in range(order):
            square = float(x[row * order + k]) ** 2
            if apart[k]:
                outer += square
            else:
                inner += square
        norms[0, row], norms[1, row] = math.sqrt(inner), math.sqrt(outer)
        top = max(top, norms[0, row], norms[1, row])
    return top


@jit
def norm_exponent(largest):
    """The power of two that a block's norms are divided by, as ``codings.affine.block_exponent`` has it."""
    if largest == 0 or AFFINE_USUAL[0] <= largest < AFFINE_USUAL[1]:
        return 0
    return max(math.frexp(largest)[1] - AFFINE_USUAL_BITS, AFFINE_EXPONENTS[0])


@leaf
def copy_part(x, source, order, apart, part, tile, at):
    """A row's numbers, of which one part are zeros: the outlier channels (part 0), or all others (part 1)."""
    for k in range(0, order, LANES):
        outer = load(apart, k) > floats(F32(0))
        number, none = load(x, source + k), floats(F32(0))
        store(tile, at + k, select(outer, none, number) if part == 0 else select(outer, number, none))


@jit
def put_sketch(tile, rows, kind, sketch, part, turned, other, sums, scratch, largest, row_scales, payload, at):
    """The signs of a part of eight rows to where they stand in the rows that begin at payload [at]."""
    order = kind.order
    largest_bits(tile, order, scratch, largest)
    exponent = (load(largest, 0) >> ints(I32(23))) - ints(I32(127))
    exponent = ints(I32(127)) - min(max(exponent, ints(I32(-126))), ints(I32(126)))
    store(row_scales, 0, as_float(exponent << ints(I32(23))))
    begin = at + (4 if sketch.channels else 2) + part * sketch.blocks * order // 8
    for block in range(sketch.outlier_blocks if part else sketch.blocks):
        rotation = rotation_of(sketch, block)
        found = other if sketch.dense.size > 0 or lies_in_other(rotation) else turned
        if sketch.dense.size:
            project(tile, order, row_scales, sketch.dense, block, turned, other)
        else:
            rotate(tile, turned, other, sums, order, row_scales, rotation)
        for k in range(0, order, 8):
            byte = ints(I32(0))
            for i in range(8):
                byte = byte | select(load(found, (k + i) * LANES) > floats(F32(0)), ints(I32(1 << i)), ints(I32(0)))
            store(scratch, 0, byte)
            for r in range(rows):
                payload[begin + r * kind.row_bytes + (block * order + k) // 8] = np.uint8(scratch[r])


@leaf
def project(tile, order, row_scales, dense, block, turned, found):
    """Products of a block of independent numbers with eight rows, scaled: found [order, LANES]; ``turned`` is scratch."""
    for r in range(LANES):
        for k in range(order):
            turned[k * LANES + r] = tile[r * order + k] * row_scales[r]
    for i in range(order):
        total, at = floats(F32(0)), (block * order + i) * order
        for k in range(order):
            total = total + floats(F32(dense[at + k])) * load(turned, k * LANES)
        store(found, i * LANES, total)


# -- decoding ------------------------------------------------------------------------------------------------------
@jit
def decode_sketch_blocks(items, kind, sketch, output, rope, keys, damaged):
    """Check the blocks of int64 items [n, ITEM], which lie anywhere in memory, and decode their rows where ``output.write``.

    Records come as plain tuples (``records.plain``).
    """
    kind, sketch, output, rope = Kind(*kind), SketchTable(*sketch), Output(*output), RopeTable(*rope)
    order, pairs = kind.order, rope.frequencies.size
    inner, outer, tile = lanes_of(LANES * order), lanes_of(LANES * order), lanes_of(LANES * order)
    turned, other, sums = lanes_of(LANES * order), lanes_of(LANES * order), sums_of(sketch)
    factors, shorts, bytes_of = np.zeros(LANES, np.float32), np.zeros(LANES, np.uint16), np.zeros(LANES, np.int32)
    ones, apart = np.ones(LANES, np.float32), np.zeros(order, np.float32)
    cos, sin = np.zeros(kind.chunk_tokens * pairs, np.float32), np.zeros(kind.chunk_tokens * pairs, np.float32)
    filled = np.full(2, -1, np.int64)  # of cos and sin, see ``keep_phases``
    like, past = output.like, output.past
    for i in range(items.shape[0]):
        tokens, low, high, source, target, offset_at, token_stride, position, _ = items[i]
        size = sketch_size(tokens, kind, sketch) - CHECKSUM_BYTES
        payload = carray(pointer(source), (size + CHECKSUM_BYTES,), np.uint8)
        damaged[i] = word_at(payload, size) != checksum(payload, 0, size, keys)
        if not output.write or low >= high:
            continue
        keep_phases(position, tokens, 1, rope, cos, sin, filled)
        out = carray(pointer(target + low * token_stride * like.itemsize), ((high - low) * token_stride,), like.dtype)
        scale, have_group = block_scale(payload, size), I64(-1)
        for row in range(low, high, LANES):
            rows = min(LANES, high - row)
            for part in range(2 if sketch.channels else 1):
                found = outer if part else inner
                add_signs(payload, row, rows, kind, sketch, part, turned, other, sums, ones, bytes_of, tile, found)
                scale_rows(payload, row, rows, kind, sketch, part, scale, shorts, factors, found)
            for r in range(rows if sketch.channels else 0):
                group = (row + r) // sketch.tokens
                if group != have_group:
                    fill_apart(payload, tokens * kind.row_bytes + group * sketch.list_bytes, kind, sketch, apart)
                    have_group = group
                for k in range(0, order, LANES):
                    chosen = load(apart, k) > floats(F32(0))
                    store(inner, r * order + k, select(chosen, load(outer, r * order + k), load(inner, r * order + k)))
            if offset_at:
                offset = carray(pointer(offset_at), (order,), np.float32)
                add_offset(inner, rows, order, offset, rope, cos, sin, row)
            at = (row - low) * token_stride
            narrow_tile(inner, rows, kind.head_dim, order, kind.dtype, output.limit, shorts, past, out, at, token_stride)
    if past:
        fence()


@jit
def add_signs(payload, row, rows, kind, sketch, part, turned, other, sums, ones, bytes_of, tile, found):
    """Of eight rows the sums S^T of a part's signs, whole numbers, row by row."""
    order = kind.order
    begin = (4 if sketch.channels else 2) + part * sketch.blocks * order // 8
    for k in range(0, LANES * order, LANES):
        store(found, k, floats(F32(0)))
    for block in range(sketch.outlier_blocks if part else sketch.blocks):
        for k in range(0, order, 8):
            for r in range(LANES):
                at = (row + min(r, rows - 1)) * kind.row_bytes + begin + (block * order + k) // 8
                bytes_of[r] = I32(payload[at])
            byte = load(bytes_of, 0)
            for i in range(8):
                set_ = (byte >> ints(I32(i)) & ints(I32(1))) == ints(I32(1))
                store(turned, (k + i) * LANES, select(set_, floats(F32(1)), floats(F32(-1))))
        if sketch.dense.size:
            project_back(turned, order, sketch.dense, block, other, tile)
        else:
            rotation = rotation_of(sketch, block)
            rotate_back(turned, other, sums, order, rotation)
            transpose_back(turned, other, other.view(np.int32), False, order, ones, ones, rotation, tile)
        for k in range(0, LANES * order, LANES):
            store(found, k, load(found, k) + load(tile, k))


@leaf
def project_back(signs, order, dense, block, other, tile):
    """Sums of a block's rows of independent numbers by the signs [order, LANES] of eight rows, row by row in ``tile``."""
    for k in range(order):
        store(other, k * LANES, floats(F32(0)))
    for i in range(order):
        sign, at = load(signs, i * LANES), (block * order + i) * order
        for k in range(order):
            store(other, k * LANES, load(other, k * LANES) + floats(F32(dense[at + k])) * sign)
    for r in range(LANES):
        for k in range(order):
            tile[r * order + k] = other[k * LANES + r]


@leaf
def scale_rows(payload, row, rows, kind, sketch, part, scale, shorts, factors, found):
    """Multiply a part of eight rows by their norms, by what its sums are norms of, and by the block's power of two."""
    store(factors, 0, norm_factors(payload, row, rows, kind, sketch, part, shorts))
    for r in range(rows):
        for k in range(0, kind.order, LANES):
            number = load(found, r * kind.order + k) * spread(factors, r) * floats(scale) + floats(F32(0))
            store(found, r * kind.order + k, number)


# -- both ----------------------------------------------------------------------------------------------------------
@leaf
def norm_factors(payload, row, rows, kind, sketch, part, shorts):
    """Of eight rows the norms of a part, times what its sums are norms of, float lanes; without the block's power of two."""
    for r in range(LANES):
        shorts_of(payload, (row + min(r, rows - 1)) * kind.row_bytes + 2 * part, 1, shorts[r:])
    return halves_at(shorts, 0) * spread(sketch.scales, 2 * part) * spread(sketch.scales, 2 * part + 1)


@inlined
def rotation_of(sketch, block):
    """The rotation of a block of S."""
    signs, between = sketch.signs[block], sketch.between[block]
    return Rotation(signs, _NO_FLIPS, sketch.base, sketch.places, between, _NO_PLACES, _NO_SIGNS)


@jit
def fill_apart(payload, at, kind, sketch, apart):
    """1 for the outlier channels that a group's list, at payload [at], names, 0 for the others."""
    apart[:] = F32(0)
    for i in range(sketch.channels):
        if kind.head_dim > SKETCH_NARROW:
            channel = I64(payload[at + 2 * i]) | I64(payload[at + 2 * i + 1]) << 8
        else:
            channel = I64(payload[at + i])
        if channel < kind.order:
            apart[channel] = F32(1)


@inlined
def list_count(tokens, sketch):
    """Groups of a block of so many tokens, which have lists of outlier channels; the block itself where there are none."""
    return (tokens + sketch.tokens - 1) // sketch.tokens


@inlined
def sketch_size(tokens, kind, sketch):
    """Bytes of a block of so many tokens, its checksum included."""
    return tokens * kind.row_bytes + list_count(tokens, sketch) * sketch.list_bytes + kind.beside


@jit
def sums_of(sketch):
    """Scratch of ``rotation.base_stage``."""
    return lanes_of(sketch.base.shape[1] * len(SUMS) * 2 * LANES)
