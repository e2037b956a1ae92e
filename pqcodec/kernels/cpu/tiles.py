"""Law: the numba kernels of the CPU backend.

A tile is eight vectors, held coordinate-major ([coordinate, lane]): a coordinate of all eight is one SIMD register, and
everything but the first radius is computed eight at a time. Arithmetic that decides output bits is float32 multiplies and
integer adds, never fused (no fastmath). Numbers come from the plan's tables; what stands here as a literal is a mask or
an approximation that the encoder is free to choose.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray

from pqcodec.constants import (
    CHECKSUM_PRIME,
    CIRCLE,
    COARSE_GRID_BITS,
    CODING_SPLIT,
    DTYPE_FLOAT16,
    DTYPE_FLOAT32,
    GRID,
    MAX_ANGLE_BITS,
    MAX_BUDGET_PER_COORDINATE,
    PHASE_SHIFT,
    RADIUS_BIAS,
)
from pqcodec.kernels.cpu.disk_cache import kept
from pqcodec.kernels.cpu.lanes import (
    LANES,
    any_lane,
    as_bits,
    as_float,
    fence,
    floats,
    gather,
    gather_at,
    gather_eight_at,
    gather_four_at,
    gather_pair,
    gather_pair_at,
    ints,
    largest_of_rows,
    load,
    load_short,
    load_wide,
    long_at,
    long_window_at,
    low_half,
    magnitude,
    nearest,
    pointer,
    put_at,
    select,
    set_long_at,
    side_by_side,
    store,
    store_past,
    store_short,
    store_short_past,
    to_float,
    to_long,
    transpose_back_three,
    transpose_back_two,
    transpose_three,
    transpose_two,
    truncate,
    window_at,
    word_at,
)

F32, I32, I64, U64 = np.float32, np.int32, np.int64, np.uint64
_LARGEST = np.float32(3.4028234663852886e38)
_TINY = np.float32(1e-37)
_PRIME = np.uint64(CHECKSUM_PRIME)
_HALF_INFINITY = np.int32(0x47800000)  # float16's Inf and NaN are 2^16 and more after the exact widening
_INFINITY = np.int32(0x7F800000)
_FAR = 40  # a row whose largest magnitude is beyond 2^40 or below 2^-40 is scaled, so that squares stay in float32
CODEBOOK_BUDGET = 13  # bits; quads up to there are listed point by point, 256 KiB
_SMALL_BUDGETS = 3.2  # bits a coordinate, above which too many quads are larger than that
STEP = 8  # numbers of a node for the decoder: places of its children and their largest budgets, of its codes, shape, portions
OF_QUADS, EVEN, UNEVEN = 0, 1, 2  # shapes: of two quads, of two equal children, of others
_WIDTHS = MAX_ANGLE_BITS + 1
CODES = 2 << MAX_ANGLE_BITS
_BOUNDS = (1 << MAX_ANGLE_BITS) + 1
_STEPS = 1 << COARSE_GRID_BITS
# signs of the sums of four coordinates that ``base_stage`` makes, in their order
SUMS = tuple(
    (one, one * first, one * second, one * third)
    for first in (1, -1)
    for one in (1, -1)
    for second, third in ((1, 1), (1, -1), (-1, 1), (-1, -1))
)

_OPTIONS: dict[str, Any] = {"nogil": True, "boundscheck": False, "error_model": "numpy"}
jit = kept(**_OPTIONS)
# allocates nothing: without reference counting of its arrays, a third faster; inlined, for an array is seven arguments
leaf = kept(**{**_OPTIONS, "_nrt": False, "forceinline": True})
inlined = kept(**{**_OPTIONS, "inline": "always"})


# -- loading and storing: row-major tiles [lane, coordinate], padded with zeros to the order --------------------------
@leaf
def load_tile(flat, start, stride, rows, head_dim, dtype, tile, order):
    """Stored numbers of ``rows`` vectors -> float32, exact (float16's Inf and NaN become 2^16 and more)."""
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
                h = load_short(flat, source + k)
                moved = ((h & ints(I32(0x7FFF))) << ints(I32(13))) | ((h & ints(I32(0x8000))) << ints(I32(16)))
                store(tile, target + k, as_float(moved) * floats(F32(2.0**112)))
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
    """Bits of each row's largest magnitude -> largest int32 [8]; NaN and Inf compare above every finite number."""
    bits = tile.view(np.int32)
    for r in range(LANES):
        most = ints(I32(0))
        for k in range(r * order, r * order + order, LANES):
            most = max(most, load(bits, k) & ints(I32(0x7FFFFFFF)))
        store(scratch, r * LANES, most)
    store(largest, 0, largest_of_rows(scratch))


@leaf
def flag_bad_rows(tile, rows, order, dtype, largest, bad, first_bad):
    """Mark rows with NaN or Inf in bad [first_bad + row] and set them to zero."""
    limit = _HALF_INFINITY if dtype == DTYPE_FLOAT16 else _INFINITY
    for r in range(rows):
        if largest[r] >= limit:
            bad[first_bad + r] = True
            largest[r] = I32(0)
            for k in range(r * order, r * order + order):
                tile[k] = F32(0)


@leaf
def narrow_tile(tile, rows, head_dim, order, dtype, limit, short, past, flat, start, stride):
    """float32 tile -> stored numbers, ties to even, saturating at ``limit``; ``short`` is scratch for a ragged end.

    ``past``: past the caches, where every eight of a row are aligned.
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
                bits = as_bits(min(max(load(tile, source + k), least), most))
                result = half_bits(bits) if dtype == DTYPE_FLOAT16 else brain_bits(bits)
                if k < whole:
                    if past:
                        store_short_past(flat, target + k, result)
                    else:
                        store_short(flat, target + k, result)
                else:
                    store_short(short, 0, result)
                    for i in range(head_dim - whole):
                        flat[target + k + i] = short[i]


@inlined
def half_bits(bits):
    """Bits of finite float32 lanes within float16's range -> float16 bits."""
    sign = (bits >> ints(I32(16))) & ints(I32(0x8000))
    size = bits & ints(I32(0x7FFFFFFF))
    odd = (size >> ints(I32(13))) & ints(I32(1))
    normal = (size + ints(I32(0xFFF - 0x38000000)) + odd) >> ints(I32(13))
    small = as_bits(as_float(size) + floats(F32(0.5))) - ints(I32(0x3F000000))
    return sign | select(size < ints(I32(0x38800000)), small, normal)


@inlined
def brain_bits(bits):
    """Bits of finite float32 lanes -> bfloat16 bits."""
    odd = (bits >> ints(I32(16))) & ints(I32(1))
    return (bits + ints(I32(0x7FFF)) + odd) >> ints(I32(16))


# -- offsets -----------------------------------------------------------------------------------------------------
@leaf
def fill_phases(first, tokens, step, frequencies, tables, cos, sin):
    """cos, sin of each token and pair, float32 [tokens * pairs]; every product and sum rounds (SPEC 8.2).

    ``tables``: cos and sin side by side of the coarse turns, then of the fine ones: float32 [1024].
    """
    pairs = frequencies.size
    whole = pairs - pairs % LANES
    for t in range(tokens):
        position, at = I32(first + t * step), t * pairs
        for i in range(0, whole, LANES):
            turn = ints(position) * load(frequencies, i)
            cos_h, sin_h = gather_pair(tables, (turn >> ints(I32(24))) << ints(I32(1)))
            cos_l, sin_l = gather_pair(tables, ((turn >> ints(I32(15))) & ints(I32(510))) | ints(I32(512)))
            store(cos, at + i, cos_h * cos_l - sin_h * sin_l)
            store(sin, at + i, sin_h * cos_l + cos_h * sin_l)
        for i in range(whole, pairs):
            turn = U64(first + t * step) * U64(frequencies[i])
            h, l = ((turn >> U64(24)) & U64(255)) * U64(2), ((turn >> U64(16)) & U64(255)) * U64(2) + U64(512)
            cos[at + i] = tables[h] * tables[l] - tables[h + U64(1)] * tables[l + U64(1)]
            sin[at + i] = tables[h + U64(1)] * tables[l] + tables[h] * tables[l + U64(1)]


@leaf
def add_offset(tile, rows, order, offset, pairs, pair_p, step, cos, sin, first_row):
    """tile[r] += offset [order], the first 2 * pairs channels turned by each row's phase (SPEC 8.3).

    Pair i is the channels pair_p * i and pair_p * i + step: (1, pairs) is half-split, (2, 1) interleaved.
    """
    wide = pairs - pairs % (2 * LANES) if pair_p == 1 else 0
    whole = pairs - pairs % LANES if pair_p == 1 else 0
    for r in range(rows):
        base, turn = r * order, (first_row + r) * pairs
        for i in range(0, wide, 2 * LANES):
            c, s = load_wide(cos, turn + i), load_wide(sin, turn + i)
            p, q = load_wide(offset, i), load_wide(offset, i + step)
            store(tile, base + i, load_wide(tile, base + i) + (p * c - q * s))
            store(tile, base + i + step, load_wide(tile, base + i + step) + (p * s + q * c))
        for i in range(wide, whole, LANES):
            c, s = load(cos, turn + i), load(sin, turn + i)
            p, q = load(offset, i), load(offset, i + step)
            store(tile, base + i, load(tile, base + i) + (p * c - q * s))
            store(tile, base + i + step, load(tile, base + i + step) + (p * s + q * c))
        for i in range(whole, pairs):
            c, s = cos[turn + i], sin[turn + i]
            p, q = offset[pair_p * i], offset[pair_p * i + step]
            tile[base + pair_p * i] += p * c - q * s
            tile[base + pair_p * i + step] += p * s + q * c
        ragged = (order - 2 * pairs) % LANES
        for k in range(2 * pairs, 2 * pairs + ragged):
            tile[base + k] += offset[k]
        for k in range(2 * pairs + ragged, order, LANES):
            store(tile, base + k, load(tile, base + k) + load(offset, k))


@jit
def sum_rows(tile, rows, order, pairs, pair_p, step, cos, sin, first_row, total):
    """total[k] += rows, turned back: float64 [order]."""
    for r in range(rows):
        base, turn = r * order, (first_row + r) * pairs
        for i in range(pairs):
            p = pair_p * i
            q = p + step
            x, y = np.float64(tile[base + p]), np.float64(tile[base + q])
            c, s = np.float64(cos[turn + i]), np.float64(sin[turn + i])
            total[p] += x * c + y * s
            total[q] += y * c - x * s
        for k in range(2 * pairs, order):
            total[k] += np.float64(tile[base + k])


# -- rotation ----------------------------------------------------------------------------------------------------
@inlined
def sums_of_four(p, q, r, s):
    """Two stages of the Hadamard matrix: of neighbours, and of pairs."""
    a, c, d, e = p + q, p - q, r + s, r - s
    return a + d, c + e, a - d, c - e


@inlined
def four_wide(x, i, j):
    """Those two stages of two coordinates each, ``j`` numbers apart."""
    return sums_of_four(load_wide(x, i), load_wide(x, i + j), load_wide(x, i + 2 * j), load_wide(x, i + 3 * j))


@inlined
def neighbours(x, i):
    """The stage of neighbours, of two coordinates."""
    p, q = load(x, i), load(x, i + LANES)
    return side_by_side(p + q, p - q)


@inlined
def signed_pair(x, places, signs, k):
    """Two coordinates that lie anywhere in x, side by side, with their signs."""
    return side_by_side(load(x, places[k]), load(x, places[k + 1])) * load_wide(signs, k * LANES)


@inlined
def four_signed_pairs(x, places, signs, k):
    """The fourth and the fifth stage of two such pairs each."""
    p, q = signed_pair(x, places, signs, k), signed_pair(x, places, signs, k + 8)
    r, s = signed_pair(x, places, signs, k + 16), signed_pair(x, places, signs, k + 24)
    return sums_of_four(p, q, r, s)


@leaf
def rotate(tile, x, other, sums, order, signs, row_scale, rotation):
    """Row-major tile -> rotated, coordinate-major, in x or in ``other`` (``lies_in_other``). Scales the rows.

    ``signs``: of the tile's coordinates. ``rotation``: how to add up H's base (``base_stage``), and each coordinate's place
    between two rounds and its sign, once for every lane; either may be empty.
    """
    inner = order // max(rotation[0].shape[0], 1)
    for k in range(0, order, LANES):
        if inner == 4:
            transpose_two(tile, k, order, load(signs, k), row_scale, x, k * LANES)
        else:
            transpose_three(tile, k, order, load(signs, k), row_scale, x, k * LANES)
    rounds_but_first_stages(x, other, sums, order, inner, rotation)
    if rotation[1].size > 0:
        first_stages(x if rotation[0].size > 0 else other, order, inner)


@leaf
def rotate_back(x, other, sums, order, signs, first, second, rotation, tile):
    """Coordinate-major x -> row-major outputs: sum * A * B, with the coordinate's sign; + 0 turns -0 into 0.

    The sums are exact: integers below 2^24, in whatever order they are added up. ``rotation``: as above, of the way back.
    """
    inner = order // max(rotation[0].shape[0], 1)
    if rotation[1].size > 0:
        first_stages(x, order, inner)
    rounds_but_first_stages(x, other, sums, order, inner, rotation)
    v = other if lies_in_other(rotation) else x
    for k in range(0, order, LANES):
        if inner == 4:
            transpose_back_two(v, k * LANES, load(signs, k), first, second, tile, k, order)
        else:
            transpose_back_three(v, k * LANES, load(signs, k), first, second, tile, k, order)


@inlined
def lies_in_other(rotation):
    """Where the stages leave what they have rotated."""
    return (rotation[0].size > 0) != (rotation[1].size > 0)


@leaf
def rounds_but_first_stages(x, other, sums, order, inner, rotation):
    """All stages of both rounds but those that ``first_stages`` of the first one and of the last one do."""
    base, places, signs = rotation
    later_stages(x, order, inner, 8)
    if base.size > 0:
        base_stage(x, other, sums, inner, base, places[:0], signs)
        if places.size > 0:
            base_stage(other, x, sums, inner, base, places, signs)
            later_stages(x, order, inner, 8)
    elif places.size > 0 and inner < 64:
        for k in range(0, order, 2):
            store(other, k * LANES, signed_pair(x, places, signs, k))
        later_stages(other, order, inner, 8)
    elif places.size > 0:
        middle_stages_between(x, other, order, places, signs)
        later_stages(other, order, inner, 64)


@leaf
def first_stages(x, order, inner):
    """Three stages of the Hadamard matrix in one pass over the tile; two where ``inner`` is 4."""
    if inner == 4:
        for i in range(0, order * LANES, 4 * LANES):
            a, c = neighbours(x, i), neighbours(x, i + 2 * LANES)
            store(x, i, a + c)
            store(x, i + 2 * LANES, a - c)
        return
    for i in range(0, order * LANES, 8 * LANES):
        a, c = neighbours(x, i), neighbours(x, i + 2 * LANES)
        d, e = neighbours(x, i + 4 * LANES), neighbours(x, i + 6 * LANES)
        p, q, r, s = sums_of_four(a, c, d, e)
        store(x, i, p)
        store(x, i + 2 * LANES, q)
        store(x, i + 4 * LANES, r)
        store(x, i + 6 * LANES, s)


@leaf
def middle_stages_between(x, out, order, places, signs):
    """The fourth to sixth stage of the second round: of x permuted and with signs, into ``out``."""
    for first in range(0, order, 64):
        for k in range(first, first + 8, 2):
            a, c, d, e = four_signed_pairs(x, places, signs, k)
            p, q, r, s = four_signed_pairs(x, places, signs, k + 32)
            store(out, k * LANES, a + p)
            store(out, (k + 8) * LANES, c + q)
            store(out, (k + 16) * LANES, d + r)
            store(out, (k + 24) * LANES, e + s)
            store(out, (k + 32) * LANES, a - p)
            store(out, (k + 40) * LANES, c - q)
            store(out, (k + 48) * LANES, d - r)
            store(out, (k + 56) * LANES, e - s)


@leaf
def later_stages(x, order, inner, half):
    """The stages from blocks of ``half`` coordinates on, up to blocks of ``inner``."""
    while half < inner:
        j = half * LANES
        if 4 * half < inner:
            for first in range(0, order, 8 * half):
                for i in range(first * LANES, (first + half) * LANES, 2 * LANES):
                    a, c, d, e = four_wide(x, i, j)
                    k = i + 4 * j
                    p, q, r, s = four_wide(x, k, j)
                    store(x, i, a + p)
                    store(x, i + j, c + q)
                    store(x, i + 2 * j, d + r)
                    store(x, i + 3 * j, e + s)
                    store(x, k, a - p)
                    store(x, k + j, c - q)
                    store(x, k + 2 * j, d - r)
                    store(x, k + 3 * j, e - s)
            half *= 8
        elif 2 * half < inner:
            for first in range(0, order, 4 * half):
                for i in range(first * LANES, (first + half) * LANES, 2 * LANES):
                    p, q, r, s = four_wide(x, i, j)
                    store(x, i, p)
                    store(x, i + j, q)
                    store(x, i + 2 * j, r)
                    store(x, i + 3 * j, s)
            half *= 4
        else:
            for first in range(0, order, 2 * half):
                for i in range(first * LANES, (first + half) * LANES, 2 * LANES):
                    p, q = load_wide(x, i), load_wide(x, i + j)
                    store(x, i, p + q)
                    store(x, i + j, p - q)
            half *= 2


@leaf
def base_stage(x, out, sums, inner, base, places, signs):
    """H's base, into ``out``: of four coordinates each all sums of either sign are made, SUMS, of which ``base`` [b, b/4] lists
    the place in ``sums`` of those that a coordinate is made of. ``places`` and ``signs``: of x, if it is to be permuted.
    """
    b, groups = base.shape
    block = inner * LANES
    nothing = side_by_side(floats(F32(0)), floats(F32(0)))
    for l in range(0, block, 2 * LANES):
        for g in range(groups):
            first = 4 * g * block + l
            if places.size > 0:
                k = first // LANES
                p, q = signed_pair(x, places, signs, k), signed_pair(x, places, signs, k + inner)
                r, s = signed_pair(x, places, signs, k + 2 * inner), signed_pair(x, places, signs, k + 3 * inner)
            else:
                p, q = load_wide(x, first), load_wide(x, first + block)
                r, s = load_wide(x, first + 2 * block), load_wide(x, first + 3 * block)
            a, c, d, e = p + q, p - q, r + s, r - s
            at = len(SUMS) * g * 2 * LANES
            keep_sums(sums, at, nothing, a + d, a + e, a - e, a - d)
            keep_sums(sums, at + 8 * 2 * LANES, nothing, c + d, c + e, c - e, c - d)
        for i in range(b):
            total = load_wide(sums, base[i, 0])
            for g in range(1, groups):
                total = total + load_wide(sums, base[i, g])
            store(out, i * block + l, total)


@inlined
def keep_sums(sums, at, nothing, p, q, r, s):
    """Four sums, then their negatives."""
    store(sums, at, p)
    store(sums, at + 2 * LANES, q)
    store(sums, at + 4 * LANES, r)
    store(sums, at + 6 * LANES, s)
    store(sums, at + 8 * LANES, nothing - p)
    store(sums, at + 10 * LANES, nothing - q)
    store(sums, at + 12 * LANES, nothing - r)
    store(sums, at + 14 * LANES, nothing - s)


@jit
def lanes_of(count):
    """Zeros, float32 [count]; sixteen numbers of a multiple of sixteen lie in one line of the caches."""
    whole = np.zeros(count + 2 * LANES, np.float32)
    skipped = (-whole.ctypes.data % (2 * LANES * 4)) // 4
    return whole[skipped : skipped + count]


# -- bits: rows of 64-bit words, little-endian ---------------------------------------------------------------------
@jit
def put_field(words, base, place, width, value):
    """Or one field into the row of words that begins at ``base``."""
    at = base + (place >> U64(6))
    shift = place & U64(63)
    words[at] |= value << shift
    words[at + U64(1)] |= (value >> U64(1)) >> (U64(63) - shift)


@jit
def get_field(words, base, place, width):
    """One field of ``width`` <= 32 bits, uint64."""
    at = base + (place >> U64(6))
    shift = place & U64(63)
    value = (words[at] >> shift) | ((words[at + U64(1)] << U64(1)) << (U64(63) - shift))
    return value & ((U64(1) << width) - U64(1))


@leaf
def rows_to_bytes(words, stride, rows, row_bytes, out, start):
    whole = row_bytes >> 3
    for r in range(rows):
        base, target = r * stride, start + r * row_bytes
        for i in range(whole):
            set_long_at(out, target + 8 * i, words[base + i])
        for i in range(8 * whole, row_bytes):
            out[target + i] = np.uint8(words[base + whole] >> U64(8 * (i - 8 * whole)))


@leaf
def bytes_to_rows(data, start, rows, row_bytes, words, stride):
    whole = row_bytes >> 3
    for r in range(rows):
        base, source = r * stride, start + r * row_bytes
        for i in range(whole):
            words[base + i] = long_at(data, source + 8 * i)
        rest = U64(0)
        for i in range(8 * whole, row_bytes):
            rest |= U64(data[source + i]) << U64(8 * (i - 8 * whole))
        words[base + whole] = rest


@leaf
def checksum(data, start, size, keys):
    """Checksum of a run of bytes (SPEC 4.2)."""
    low, high = U64(0), U64(0)
    whole = size >> 2
    for i in range(whole):
        product = word_at(data, start + 4 * i) * keys[i + 1]
        low += product & U64(0xFFFFFFFF)
        high += product >> U64(32)
    rest = U64(0)
    for j in range(4 * whole, size):
        rest |= U64(data[start + j]) << U64(8 * (j - 4 * whole))
    if size & 3:
        product = rest * keys[whole + 1]
        low += product & U64(0xFFFFFFFF)
        high += product >> U64(32)
    total = ((high % _PRIME) << U64(32)) % _PRIME + low % _PRIME + (U64(size) % _PRIME) * keys[0] % _PRIME
    return total % _PRIME


# -- split coding ------------------------------------------------------------------------------------------------
@inlined
def turns_of(x, y):
    """Angle of (x, y) in turns, 0 .. 1: a polynomial, good to 2e-8."""
    a, b = magnitude(x), magnitude(y)
    q = min(a, b) / (max(a, b) + floats(_TINY))
    z = q * q
    t = floats(F32(-0.00074305835))
    t = t * z + floats(F32(0.00384616852))
    t = t * z + floats(F32(-0.00944856755))
    t = t * z + floats(F32(0.0157660429))
    t = t * z + floats(F32(-0.0223080879))
    t = t * z + floats(F32(0.0317820252))
    t = t * z + floats(F32(-0.0530494615))
    t = t * z + floats(F32(0.159154927))
    t = t * q
    t = select(b > a, floats(F32(0.25)) - t, t)
    t = select(x < floats(F32(0)), floats(F32(0.5)) - t, t)
    return select(y < floats(F32(0)), floats(F32(1)) - t, t)


@inlined
def place_of(a, b, grid):
    """b's share of the energy a + b on a sin^2 grid of ``grid`` steps, int lanes."""
    share = b / (a + b + floats(_TINY)) * floats(grid)
    return truncate(min(share, floats(grid - F32(1))))


@leaf
def analyse(x, order, turns, energy, places, kind, left, right, grids):
    """Up the tree: the pairs' angles in turns, every node's energy, and each node's place on its sin^2 grid."""
    internal = kind.size
    for quad in range(order // 4):
        at = quad * 4 * LANES
        p, q, r, s = load(x, at), load(x, at + LANES), load(x, at + 2 * LANES), load(x, at + 3 * LANES)
        store(turns, quad * 2 * LANES, turns_of(p, q))
        store(turns, quad * 2 * LANES + LANES, turns_of(r, s))
        a, b = p * p + q * q, r * r + s * s
        node = (internal + quad) * LANES
        store(energy, node, a + b)
        store(places, node, place_of(a, b, F32(_STEPS)))
    for i in range(internal):
        n = internal - 1 - i
        a, b = load(energy, left[n] * LANES), load(energy, right[n] * LANES)
        store(energy, n * LANES, a + b)
        store(places, n * LANES, place_of(a, b, grids[kind[n]]))


@inlined
def width_of(budget, per_bit):
    """The angle's bits for int-lane budgets; ``per_bit`` is 16 / (15 coordinates) (SPEC 6.3)."""
    width = truncate((to_float(budget) + floats(F32(0.25))) * floats(per_bit))
    return min(min(max(width, ints(I32(1))), ints(I32(MAX_ANGLE_BITS))), budget)


@inlined
def share_of(rest, shift, cap_a, cap_b, even, portions, portion_at):
    """Bits of the left child (SPEC 6.3); ``portions`` is looked up where the children are unequal."""
    portion = rest >> ints(I32(1)) if even else gather(portions, rest + ints(portion_at))
    low = max(ints(I32(0)), rest - ints(cap_b))
    return min(max(portion + shift, low), min(ints(cap_a), rest))


@inlined
def radius_codes(energy, exponent, steps, radius_bits, energy_scale):
    """Codes of sqrt(energy / energy_scale) 2^-exponent, int lanes (SPEC 6.1); whole octaves apart: float32 is too coarse."""
    scale = 0.5 * np.log2(np.float64(energy_scale))
    whole = I32(np.floor(scale)) + I32(1)
    bits = as_bits(energy)
    power = (bits >> ints(I32(23))) + ints(I32(1))  # its exponent, plus 128
    octave = (power >> ints(I32(1))) - ints(I32(64)) - exponent + ints(I32(RADIUS_BIAS - whole))
    m = as_float((bits & ints(I32(0x7FFFFF))) | ints(I32(0x3F800000)))
    t = (m - floats(F32(1.5))) / (m + floats(F32(1.5)))  # log2(m / 1.5) is odd in it: good to 1e-8
    z = t * t
    log2 = floats(F32(0.32059889)) * z + floats(F32(0.41219858))
    log2 = log2 * z + floats(F32(0.57707802))
    log2 = log2 * z + floats(F32(0.96179669))
    log2 = (log2 * z + floats(F32(2.88539008))) * t
    half = floats(F32(0.5)) * (log2 + to_float(power & ints(I32(1))))
    part = half + floats(F32(whole - scale + 0.5 * np.log2(1.5)))  # 0 .. 2
    code = octave * ints(I32(steps)) + truncate(part * floats(F32(steps)) + floats(F32(0.5))) + ints(I32(1))
    code = min(max(code, ints(I32(1))), ints(I32((1 << radius_bits) - 1)))
    return select(energy > floats(F32(0)), code, ints(I32(0)))


@leaf
def encode_split(rows, plan_ints, energy, places, turns, exponents, tree, nodes, quads, work, words, stride):
    """Down the tree: every node writes its angle and splits what is left of its budget (SPEC 6).

    Each loop is short, so that the processor overlaps its table look-ups over several nodes; ``work`` is their scratch.
    """
    radius_bits, steps, root_budget, order, energy_scale = plan_ints
    kind, left, right, m_a, m_b, per_bit, portions = tree
    shift, look_up, bounds, look_shift, fixes = nodes
    budget_table, quad_look_up, records = quads
    bit_place, budget, codes, widths, cells = work
    internal, most = kind.size, portions.size // m_a.size
    store(codes, 0, radius_codes(load(energy, 0), load(exponents, 0), steps, radius_bits, energy_scale))
    for l in range(rows):
        words[l * stride] = U64(codes[l])
    store(bit_place, 0, ints(I32(radius_bits)))
    store(budget, 0, ints(I32(root_budget)))
    for n in range(internal):
        k = kind[n]
        a, b = left[n] * LANES, right[n] * LANES
        have, where, grid = load(budget, n * LANES), load(bit_place, n * LANES), load(places, n * LANES)
        width = width_of(have, per_bit[k])
        code = gather(
            look_up, ((width + ints(I32(k * _WIDTHS))) << ints(I32(COARSE_GRID_BITS))) + (grid >> ints(look_shift[k]))
        )
        if fixes[k]:
            first = (width + ints(I32(k * _WIDTHS))) * ints(I32(_BOUNDS)) + ints(I32(1))
            for _ in range(fixes[k]):
                code = code + select(gather(bounds, first + code) <= grid, ints(I32(1)), ints(I32(0)))
        rest = have - width
        moved = gather(shift, (ints(I32(1)) << width) + code + ints(I32(k * CODES)))
        cap_a, cap_b = I32(MAX_BUDGET_PER_COORDINATE * m_a[k]), I32(MAX_BUDGET_PER_COORDINATE * m_b[k])
        share = share_of(rest, moved, cap_a, cap_b, m_a[k] == m_b[k], portions, I32(k * most))
        store(budget, a, share)
        store(budget, b, rest - share)
        store(bit_place, a, where + width)
        store(bit_place, b, where + width + share)
        store(codes, n * LANES, code)
        store(widths, n * LANES, width)
    for quad in range(order // 4):
        at = (internal + quad) * LANES
        store(codes, at, (load(budget, at) << ints(I32(COARSE_GRID_BITS))) + load(places, at))
    for quad in range(order // 4):
        at = (internal + quad) * LANES
        cell = gather_at(quad_look_up, codes, at)
        per_cell, first = gather_pair(budget_table, load(budget, at) << ints(I32(1)))
        store(cells, quad * LANES, cell * per_cell)
        store(codes, at, (first + cell) << ints(I32(1)))
    for quad in range(order // 4):
        at = (internal + quad) * LANES
        n_a, n_b = gather_pair_at(records, codes, at)
        sector_a = min(truncate(load(turns, 2 * quad * LANES) * to_float(n_a)), n_a - ints(I32(1)))
        sector_b = min(truncate(load(turns, (2 * quad + 1) * LANES) * to_float(n_b)), n_b - ints(I32(1)))
        store(codes, at, load(cells, quad * LANES) + sector_a * n_b + sector_b)
    for n in range(internal):
        own = to_long(load(codes, n * LANES))
        if m_a[kind[n]] == 4:  # the node's and its two quads' bits lie side by side: 56 at the most
            a, b, width = left[n] * LANES, right[n] * LANES, load(widths, n * LANES)
            own = own | (to_long(load(codes, a)) << to_long(width))
            own = own | (to_long(load(codes, b)) << to_long(width + load(budget, a)))
        put_at(words, stride, bit_place, n * LANES, own)


@leaf
def radius_factors(rows, radius_bits, radii, words, stride, first_factor, second_factor):
    """Factors A and B of each row from its radius code (SPEC 6.1), which ``radii`` float32 [2, codes] lists."""
    for l in range(LANES):
        code = I64(words[l * stride] & U64((1 << radius_bits) - 1)) if l < rows else 0
        first_factor[l] = radii[0, code]
        second_factor[l] = radii[1, code]


@leaf
def decode_split(plan_ints, tree, nodes, quads, circle, work, words, stride, x):
    """Down the tree: read, look up, multiply; leaves unit-norm coordinates in x, in steps of the grid (SPEC 6.5)."""
    radius_bits, _, root_budget, order, _ = plan_ints
    steps, per_bit, portions = tree
    bit_place, budget, radius, entries, _, _ = work
    words32 = words.view(np.int32)
    internal = per_bit.size
    store(bit_place, 0, ints(I32(radius_bits)))
    store(budget, 0, ints(I32(root_budget)))
    store(radius, 0, floats(F32(GRID)))
    for n in range(internal):
        s = STEP * n
        a, b, shape = steps[s], steps[s + 1], steps[s + 5]
        cap_a, cap_b, first = I32(steps[s + 2]), I32(steps[s + 3]), ints(I32(steps[s + 4]))
        have, where, whole = load(budget, n * LANES), load(bit_place, n * LANES), load(radius, n * LANES)
        width = width_of(have, per_bit[n])
        one = ints(I32(1)) << width
        if shape == OF_QUADS:  # the node's and its two quads' bits lie side by side: 56 at the most
            window = long_window_at(words, stride, bit_place, n * LANES)
            store(entries, 0, (one + (low_half(window) & (one - ints(I32(1)))) + first) << ints(I32(2)))
            cos, sin, moved, _ = gather_four_at(nodes, entries, 0)
            rest = have - width
            share = share_of(rest, moved, cap_a, cap_b, True, portions, I32(0))
            other = rest - share
            window = window >> to_long(width)
            store(bit_place, a, low_half(window) & ((ints(I32(1)) << share) - ints(I32(1))))
            store(bit_place, b, low_half(window >> to_long(share)) & ((ints(I32(1)) << other) - ints(I32(1))))
            store(budget, a, share)
            store(budget, b, other)
        else:
            code = window_at(words32, 2 * stride, bit_place, n * LANES) & (one - ints(I32(1)))
            store(entries, 0, (one + code + first) << ints(I32(2)))
            cos, sin, moved, _ = gather_four_at(nodes, entries, 0)
            rest = have - width
            share = share_of(rest, moved, cap_a, cap_b, shape == EVEN, portions, I32(steps[s + 6]))
            store(budget, a, share)
            store(budget, b, rest - share)
            store(bit_place, a, where + width)
            store(bit_place, b, where + width + share)
        store(radius, a, whole * as_float(cos))
        store(radius, b, whole * as_float(sin))
    if root_budget <= _SMALL_BUDGETS * order:
        large = decode_small_quads(order // 4, internal * LANES, quads, work, x)
    else:
        large = order // 4
        for quad in range(large):
            work[-1][quad] = quad
    decode_quads(large, internal * LANES, quads, circle, work, x)


@leaf
def decode_small_quads(count, base, quads, work, x):
    """Quads of few bits: one look-up in the list of all their points. Lists those that have more, and returns how many."""
    codebook = quads[2]
    codes, budget, radius, phases, _, large = work
    largest, last = ints(I32(CODEBOOK_BUDGET)), ints(I32((2 << CODEBOOK_BUDGET) - 1))
    found = 0
    for quad in range(count):
        at = base + quad * LANES
        have = load(budget, at)
        code = (ints(I32(1)) << have) | load(codes, at)
        more = have > largest
        store(phases, quad * LANES, select(more, last, code) << ints(I32(2)))
        large[found] = quad
        found += any_lane(more)
    for quad in range(count):
        p, q, r, s = gather_four_at(codebook, phases, quad * LANES)
        whole, target = load(radius, base + quad * LANES), 4 * quad * LANES
        store(x, target, nearest(whole * p))
        store(x, target + LANES, nearest(whole * q))
        store(x, target + 2 * LANES, nearest(whole * r))
        store(x, target + 3 * LANES, nearest(whole * s))
    return found


@leaf
def decode_quads(count, base, quads, circle, work, x):
    """The first ``count`` of the quads that are listed, of any number of bits (SPEC 6.4); every code decodes to something."""
    budget_table, records, _ = quads
    codes, budget, radius, phases, scratch, listed = work
    for i in range(count):
        store(phases, i * LANES, load(budget, base + listed[i] * LANES) << ints(I32(2)))
    for i in range(count):  # which record, and the code inside it
        at = base + listed[i] * LANES
        code = load(codes, at)
        each, first, last, reciprocal = gather_four_at(budget_table, phases, i * LANES)
        cell = truncate(to_float(code) * as_float(reciprocal))  # off by one at most
        rest = code - cell * each
        cell = cell + select(rest >= each, ints(I32(1)), ints(I32(0))) - select(rest < ints(I32(0)), ints(I32(1)), ints(I32(0)))
        cell = min(cell, last)
        store(budget, at, (first + cell) << ints(I32(3)))
        store(codes, at, code - cell * each)
    for i in range(count):  # the two circles' phases; the pairs' shares of the radius take the place of record and code
        at = base + listed[i] * LANES
        rest = load(codes, at)
        cos, sin, n_b, reciprocal, step_a, step_b, _, _ = gather_eight_at(records, budget, at)
        sector_a = truncate((to_float(rest) + floats(F32(0.5))) * as_float(reciprocal))  # exact below 2^21
        store(scratch, 2 * i * LANES, phase_of(sector_a, step_a))
        store(scratch, (2 * i + 1) * LANES, phase_of(rest - sector_a * n_b, step_b))
        store(codes, at, cos)
        store(budget, at, sin)
    for i in range(count):
        at = base + listed[i] * LANES
        cos, sin, whole, target = as_float(load(codes, at)), as_float(load(budget, at)), load(radius, at), 4 * listed[i] * LANES
        cos_a, sin_a = gather_pair_at(circle, scratch, 2 * i * LANES)
        cos_b, sin_b = gather_pair_at(circle, scratch, (2 * i + 1) * LANES)
        store(x, target, nearest(whole * (cos * cos_a)))
        store(x, target + LANES, nearest(whole * (cos * sin_a)))
        store(x, target + 2 * LANES, nearest(whole * (sin * cos_b)))
        store(x, target + 3 * LANES, nearest(whole * (sin * sin_b)))


@inlined
def phase_of(sector, step):
    """Place of a sector's middle in the table of 2,048 directions, two numbers each."""
    turn = (sector + sector + ints(I32(1))) * step + ints(I32(1 << (PHASE_SHIFT - 1)))
    return ((turn >> ints(I32(PHASE_SHIFT))) & ints(I32(CIRCLE - 1))) << ints(I32(1))


# -- paper coding ------------------------------------------------------------------------------------------------
@jit
def turn_of(x, y):
    """Angle of one (x, y) in turns, 0 .. 1."""
    turn = np.arctan2(y, x) / F32(2 * np.pi)
    return turn + F32(1) if turn < F32(0) else turn


@jit
def half_of(value):
    """Nearest float16 of a non-negative float64, as its bits; saturates at 65504."""
    if value >= 65504.0:
        return U64(0x7BFF)
    exponent = max(np.int64(np.floor(np.log2(value))), -14) if value > 0 else -14
    steps = np.int64(np.rint(value * 2.0 ** (10 - exponent)))
    return U64(steps + ((exponent + 14) << 10)) if exponent > -14 else U64(steps)


@jit
def half_value(bits):
    """float64 of the magnitude of float16 bits; NaN counts as 0, infinity as the largest finite value (SPEC 7)."""
    magnitude = np.int64(bits & U64(0x7FFF))
    if magnitude > 0x7C00:
        return 0.0
    magnitude = min(magnitude, 0x7BFF)
    exponent = magnitude >> 10
    if exponent == 0:
        return magnitude * 2.0**-24
    return ((magnitude & 0x3FF) + 1024) * 2.0 ** (exponent - 25)


@jit
def encode_paper(rows, x, order, row_scales, radius_exponent, bounds2, words, stride):
    """Rotated, unnormalised tile x -> 62 bits a block of 16: radius, levels 4, 3, 2 and 1 (SPEC 7)."""
    energy = np.empty((5, 16), np.float64)
    codes = np.empty((5, 8), np.uint64)
    for l in range(rows):
        base = U64(l * stride)
        for block in range(order // 16):
            for i in range(8):
                p, q = x[(16 * block + 2 * i) * LANES + l], x[(16 * block + 2 * i + 1) * LANES + l]
                energy[1, i] = np.float64(p) * p + np.float64(q) * q
                codes[1, i] = U64(min(np.int32(turn_of(p, q) * F32(16)), np.int32(15)))
            for level in range(2, 5):
                for i in range(16 >> level):
                    a, b = energy[level - 1, 2 * i], energy[level - 1, 2 * i + 1]
                    energy[level, i] = a + b
                    cell = 0
                    for j in range(3):
                        cell += np.int64(b >= bounds2[level - 2, j] * a)
                    codes[level, i] = U64(cell if a + b > 0 else 0)
            radius = np.sqrt(energy[4, 0] / order) / np.float64(row_scales[l]) * 2.0**-radius_exponent
            where = U64(62 * block)
            put_field(words, base, where, U64(16), half_of(radius))
            where += U64(16)
            for up in range(4):
                level = 4 - up
                width = U64(2) if level > 1 else U64(4)
                for i in range(16 >> level):
                    put_field(words, base, where, width, codes[level, i])
                    where += width


@jit
def decode_paper(rows, order, radius_exponent, tables, circle, mantissa, words, stride, x, first_factor, second_factor):
    """62 bits a block -> coordinates on the grid of each vector's power of two, in x [order, LANES] (SPEC 7)."""
    cos, sin = tables
    level_radius = np.empty((5, 8), np.float32)
    for l in range(rows):
        base = U64(l * stride)
        largest = 0.0
        for block in range(order // 16):
            largest = max(largest, half_value(get_field(words, base, U64(62 * block), U64(16))))
        power = np.int64(np.floor(np.log2(largest))) + 1 if largest > 0 else np.int64(0)
        for block in range(order // 16):
            where = U64(62 * block)
            level_radius[4, 0] = F32(half_value(get_field(words, base, where, U64(16))) * 2.0 ** (11 - power))
            where += U64(16)
            for up in range(3):
                level = 4 - up
                for i in range(16 >> level):
                    code = get_field(words, base, where, U64(2))
                    where += U64(2)
                    level_radius[level - 1, 2 * i] = level_radius[level, i] * cos[level - 2, code]
                    level_radius[level - 1, 2 * i + 1] = level_radius[level, i] * sin[level - 2, code]
            for i in range(8):
                phase = (U64(2) * get_field(words, base, where, U64(4)) + U64(1)) * U64(64)
                where += U64(4)
                at = (16 * block + 2 * i) * LANES + l
                x[at] = np.rint(level_radius[1, i] * circle[U64(2) * phase])
                x[at + LANES] = np.rint(level_radius[1, i] * circle[U64(2) * phase + U64(1)])
        exponent = power + radius_exponent
        small = exponent < -100
        first_factor[l] = F32(np.float64(mantissa) * 2.0 ** (exponent + (64 if small else 0)))
        second_factor[l] = F32(2.0**-64) if small else F32(1)


# -- blocks ------------------------------------------------------------------------------------------------------
@jit
def encode_blocks(
    first_block,
    last_block,
    sizes,
    flat,
    places_of,
    offsets,
    rope,
    phase_tables,
    plan_ints,
    radius_exponent,
    factors,
    rotation,
    tree,
    nodes,
    quads,
    grids,
    paper_bounds,
    keys,
    bad,
    payload,
):
    """Encode blocks first_block .. last_block-1 (chunk-major) into ``payload``; ``offsets``: the means' negative."""
    coding, dtype, head_dim, order, row_bytes, chunk_tokens, leading, first_tokens, coded = sizes
    starts, token_stride = places_of
    frequencies, pair_p, step, first_position = rope
    pairs = frequencies.size
    stride = (row_bytes >> 3) + 2
    tile, x = lanes_of(LANES * order), lanes_of(order * LANES)
    other = lanes_of(x.size if rotation[0].size + rotation[1].size > 0 else 0)
    sums = lanes_of(rotation[0].shape[1] * len(SUMS) * 2 * LANES)
    scratch, largest = np.zeros(LANES * LANES, np.int32), np.zeros(LANES, np.int32)
    row_scales, exponents = np.ones(LANES, np.float32), np.zeros(LANES, np.int32)
    turns, energy = np.zeros(order // 2 * LANES, np.float32), np.zeros(order // 2 * LANES, np.float32)
    places, codes = np.zeros(order // 2 * LANES, np.int32), np.zeros(order // 2 * LANES, np.int32)
    bit_place, budget = np.zeros(order // 2 * LANES, np.int32), np.zeros(order // 2 * LANES, np.int32)
    work = (bit_place, budget, codes, np.zeros(order // 4 * LANES, np.int32), np.zeros(order // 4 * LANES, np.int32))
    words = np.zeros(LANES * stride, np.uint64)
    cos, sin = np.zeros(chunk_tokens * pairs, np.float32), np.zeros(chunk_tokens * pairs, np.float32)
    have_chunk = -1
    for block in range(first_block, last_block):
        chunk, lead = block // leading, block % leading
        first = chunk * chunk_tokens
        tokens = min(chunk_tokens, coded - first)
        block_out = chunk * leading * (chunk_tokens * row_bytes + 4) + lead * (tokens * row_bytes + 4)
        out = block_out
        if pairs and chunk != have_chunk:
            fill_phases(first_position + first_tokens + first, tokens, 1, frequencies, phase_tables, cos, sin)
            have_chunk = chunk
        for row in range(0, tokens, LANES):
            rows = min(LANES, tokens - row)
            start = starts[lead] + (first_tokens + first + row) * token_stride
            bad_at = lead * coded + first + row
            load_tile(flat, start, token_stride, rows, head_dim, dtype, tile, order)
            largest_bits(tile, order, scratch, largest)
            flag_bad_rows(tile, rows, order, dtype, largest, bad, bad_at)
            if offsets.size:
                add_offset(tile, rows, order, offsets[lead], pairs, pair_p, step, cos, sin, row)
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
            rotate(tile, x, other, sums, order, factors, row_scales, rotation)
            v = other if lies_in_other(rotation) else x
            words[:] = U64(0)
            if coding == CODING_SPLIT:
                analyse(v, order, turns, energy, places, tree[0], tree[1], tree[2], grids)
                encode_split(rows, plan_ints, energy, places, turns, exponents, tree, nodes, quads, work, words, stride)
            else:
                encode_paper(rows, v, order, row_scales, radius_exponent, paper_bounds, words, stride)
            rows_to_bytes(words, stride, rows, row_bytes, payload, out)
            out += rows * row_bytes
        total = checksum(payload, block_out, tokens * row_bytes, keys)
        for j in range(4):
            payload[out + j] = np.uint8(total >> U64(8 * j))


@jit
def decode_blocks(
    items,
    sizes,
    like,
    rope,
    phase_tables,
    plan_ints,
    radius_exponent,
    factors,
    rotation,
    tree,
    nodes,
    quads,
    paper_tables,
    circle,
    radii,
    mantissa,
    keys,
    limit,
    write,
    past,
    damaged,
):
    """Check, and where ``write`` is set decode, the blocks of ``items`` int64 [n, 8], which lie anywhere in memory.

    ``past``: past the caches, where every eight numbers of a row are aligned.
    An item: tokens of the block, rows low .. high - 1 that are wanted, addresses of its bytes, of row 0 in the result (of
    ``like``'s dtype) and of its offset float32 [order] (0: none), elements from row to row, position of row 0 under RoPE.
    """
    coding, dtype, head_dim, order, row_bytes, chunk_tokens = sizes
    frequencies, pair_p, step = rope
    pairs = frequencies.size
    stride = (row_bytes >> 3) + 2
    tile, x = lanes_of(LANES * order), lanes_of(order * LANES)
    other = lanes_of(x.size if rotation[0].size + rotation[1].size > 0 else 0)
    sums = lanes_of(rotation[0].shape[1] * len(SUMS) * 2 * LANES)
    first_factor, second_factor = np.zeros(LANES, np.float32), np.zeros(LANES, np.float32)
    radius = np.zeros(order // 2 * LANES, np.float32)
    bit_place, budget = np.zeros(order // 2 * LANES, np.int32), np.zeros(order // 2 * LANES, np.int32)
    entries, phases = np.zeros(order // 4 * LANES, np.int32), np.zeros(order // 2 * LANES, np.int32)
    work = (bit_place, budget, radius, entries, phases, np.zeros(order // 4 + 1, np.int32))
    words = np.zeros(LANES * stride, np.uint64)
    short = np.zeros(LANES, np.uint16)
    cos, sin = np.zeros(chunk_tokens * pairs, np.float32), np.zeros(chunk_tokens * pairs, np.float32)
    have_position = I64(-1)
    for item in range(items.shape[0]):
        tokens, low, high, source, target, offset_at, token_stride, position = items[item]
        size = tokens * row_bytes
        payload = carray(pointer(source), (size + 4,), np.uint8)
        damaged[item] = word_at(payload, size) != checksum(payload, 0, size, keys)
        if not write or low >= high:
            continue
        if pairs and position != have_position:
            fill_phases(position, tokens, 1, frequencies, phase_tables, cos, sin)
            have_position = position
        out = carray(pointer(target + low * token_stride * like.itemsize), ((high - low) * token_stride,), like.dtype)
        for row in range(low, high, LANES):
            rows = min(LANES, high - row)
            bytes_to_rows(payload, row * row_bytes, rows, row_bytes, words, stride)
            if coding == CODING_SPLIT:
                radius_factors(rows, plan_ints[0], radii, words, stride, first_factor, second_factor)
                decode_split(plan_ints, tree, nodes, quads, circle, work, words, stride, x)
            else:
                decode_paper(
                    rows,
                    order,
                    radius_exponent,
                    paper_tables,
                    circle,
                    mantissa,
                    words,
                    stride,
                    x,
                    first_factor,
                    second_factor,
                )
            rotate_back(x, other, sums, order, factors, first_factor, second_factor, rotation, tile)
            if offset_at:
                offset = carray(pointer(offset_at), (order,), np.float32)
                add_offset(tile, rows, order, offset, pairs, pair_p, step, cos, sin, row)
            narrow_tile(tile, rows, head_dim, order, dtype, limit, short, past, out, (row - low) * token_stride, token_stride)
    if past:
        fence()


@jit
def sum_tokens(first_lead, last_lead, count, token_step, sizes, flat, places_of, rope, phase_tables, total):
    """Sums of ``count`` tokens, turned back: float64 total [leading, order]; NaN and Inf count as zero vectors."""
    _, dtype, head_dim, order, _, _, _, first_tokens, _ = sizes
    starts, token_stride = places_of
    frequencies, pair_p, step, first_position = rope
    pairs = frequencies.size
    tile = np.zeros(LANES * order, np.float32)
    scratch, largest = np.zeros(LANES * LANES, np.int32), np.zeros(LANES, np.int32)
    bad = np.zeros(LANES, np.bool_)
    cos, sin = np.zeros(count * pairs, np.float32), np.zeros(count * pairs, np.float32)
    fill_phases(first_position + first_tokens, count, token_step, frequencies, phase_tables, cos, sin)
    for lead in range(first_lead, last_lead):
        for row in range(0, count, LANES):
            rows = min(LANES, count - row)
            load_tile(flat, starts[lead] + row * token_stride, token_stride, rows, head_dim, dtype, tile, order)
            largest_bits(tile, order, scratch, largest)
            flag_bad_rows(tile, rows, order, dtype, largest, bad, 0)
            sum_rows(tile, rows, order, pairs, pair_p, step, cos, sin, row, total[lead])
