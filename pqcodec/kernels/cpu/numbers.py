"""Law: numbers as a tensor stores them, as float32 in tiles: row-major [lane, coordinate], padded with zeros to the order."""

from __future__ import annotations

import numpy as np

from pqcodec.constants import DTYPE_FLOAT16, DTYPE_FLOAT32
from pqcodec.kernels.cpu.lane_halves import load_half, rounded_half
from pqcodec.kernels.cpu.lane_memory import (
    copy_shorts,
    copy_shorts_past,
    load,
    load_short,
    store,
    store_past,
    store_short,
    store_short_past,
)
from pqcodec.kernels.cpu.lane_rows import largest_of_rows
from pqcodec.kernels.cpu.lanes import LANES, as_bits, as_float, floats, ints
from pqcodec.kernels.cpu.records import F32, I32, inlined, leaf

_HALF_INFINITY = np.int32(0x47800000)  # 2^16: float16's Inf and NaN are as large or larger after ``load_tile``
_INFINITY = np.int32(0x7F800000)


@leaf
def load_tile(flat, start, stride, rows, head_dim, dtype, tile, order):
    """Widen the stored numbers of ``rows`` vectors to float32, exactly; float16's Inf and NaN become 2^16 and more."""
    if rows < LANES:
        tile[:] = F32(0)
    bits = tile.view(np.int32)
    whole = head_dim - head_dim % LANES
    for r in range(rows):
        source, target = start + r * stride, r * order
        if dtype == DTYPE_FLOAT32:
            for k in range(head_dim):
                tile[target + k] = flat[source + k]
        elif dtype == DTYPE_FLOAT16:
            for k in range(0, whole, LANES):
                store(tile, target + k, load_half(flat, source + k))
            for k in range(whole, head_dim):
                one = I32(flat[source + k])
                bits[target + k] = ((one & I32(0x7FFF)) << I32(13)) | ((one & I32(0x8000)) << I32(16))
                tile[target + k] *= F32(2.0**112)
        else:
            for k in range(0, whole, LANES):
                store(tile, target + k, as_float(load_short(flat, source + k) << ints(I32(16))))
            for k in range(whole, head_dim):
                bits[target + k] = I32(flat[source + k]) << I32(16)


@leaf
def largest_bits(tile, order, scratch, largest):
    """Write the bits of each row's largest magnitude into int32 largest [8]: NaN and Inf compare above every finite number."""
    bits = tile.view(np.int32)
    for r in range(LANES):
        most = ints(I32(0))
        for k in range(r * order, r * order + order, LANES):
            most = max(most, load(bits, k) & ints(I32(0x7FFFFFFF)))
        store(scratch, r * LANES, most)
    store(largest, 0, largest_of_rows(scratch))


@leaf
def flag_bad_rows(tile, rows, order, dtype, largest, bad, first_bad):
    """Set rows with NaN or Inf to zero, and bad [first_bad + row] to True."""
    limit = _HALF_INFINITY if dtype == DTYPE_FLOAT16 else _INFINITY
    for r in range(rows):
        if largest[r] >= limit:
            bad[first_bad + r] = True
            largest[r] = I32(0)
            for k in range(r * order, r * order + order):
                tile[k] = F32(0)


@leaf
def narrow_tile(tile, rows, head_dim, order, dtype, limit, short, past, flat, start, stride):
    """Round a float32 tile to stored numbers, ties to even, clamped to ``limit``; ``short`` is scratch for a ragged end.

    ``past``: by non-temporal stores, for which every eight numbers of a row must be aligned.
    """
    whole = head_dim - head_dim % LANES
    most, least = floats(limit), floats(-limit)
    for r in range(rows):
        source, target = r * order, start + r * stride
        if dtype == DTYPE_FLOAT32:
            for k in range(0, whole, LANES):
                result = min(max(load(tile, source + k), least), most)
                if past:
                    store_past(flat, target + k, result)
                else:
                    store(flat, target + k, result)
            for k in range(whole, head_dim):
                flat[target + k] = min(max(tile[source + k], -limit), limit)
        else:
            for k in range(0, head_dim, LANES):
                value = min(max(load(tile, source + k), least), most)
                result = rounded_half(value) if dtype == DTYPE_FLOAT16 else brain_bits(as_bits(value))
                if k < whole:
                    if past:
                        store_short_past(flat, target + k, result)
                    else:
                        store_short(flat, target + k, result)
                else:
                    store_short(short, 0, result)
                    for i in range(head_dim - whole):
                        flat[target + k + i] = short[i]


@leaf
def put_narrowed(shorts, rows, head_dim, order, past, flat, start, stride):
    """Copy rows of 16-bit numbers, shorts [lanes, order], to flat [start + row * stride ...], each row's lines one by one.

    ``past``: by non-temporal stores, for which every eight numbers of a row must be aligned. A row is written as a whole,
    because a CPU has few buffers for lines that are not yet full.
    """
    whole = head_dim - head_dim % LANES
    for r in range(rows):
        source, target = r * order, start + r * stride
        if past:
            for k in range(0, whole, LANES):
                copy_shorts_past(shorts, source + k, flat, target + k)
        else:
            for k in range(0, whole, LANES):
                copy_shorts(shorts, source + k, flat, target + k)
        for k in range(whole, head_dim):
            flat[target + k] = shorts[source + k]


@inlined
def brain_bits(bits):
    """Bits of finite float32 lanes -> bfloat16 bits."""
    odd = (bits >> ints(I32(16))) & ints(I32(1))
    return (bits + ints(I32(0x7FFF)) + odd) >> ints(I32(16))
