"""Law: the numba kernels; the only file that imports numba.

A tile is LANES vectors, held coordinate-major ([coordinate, lane]), so that inner loops run across vectors and fill the
SIMD lanes. Arithmetic that decides output bits is float32 multiplies and integer adds, never fused (no fastmath).
Numbers come from the plan's tables; what stands here as a literal is a shift, a mask or an approximation of the encoder.
"""

from __future__ import annotations

import numpy as np
from numba import njit

LANES = 16
F32, U64, I64 = np.float32, np.uint64, np.int64
_LARGEST = np.float32(3.4028234663852886e38)
_TINY = np.float32(1e-37)
_PRIME = np.uint64(4294967291)

jit = njit(cache=True, nogil=True, boundscheck=False, error_model="numpy")


# -- loading and storing -----------------------------------------------------------------------------------------
@jit
def load_rows(flat, start, stride, rows, head_dim, half, tile_bits, order):
    """Stored numbers of ``rows`` vectors -> float32 bits, row-major uint32 [LANES * order]; returns nothing."""
    for r in range(rows):
        source = start + r * stride
        target = r * order
        if half:
            for k in range(head_dim):
                h = np.uint32(flat[source + k])
                tile_bits[target + k] = ((h & np.uint32(0x7FFF)) << np.uint32(13)) | ((h & np.uint32(0x8000)) << np.uint32(16))
        else:
            for k in range(head_dim):
                tile_bits[target + k] = np.uint32(flat[source + k]) << np.uint32(16)


@jit
def scale_rows(tile, rows, head_dim, order, factor):
    """tile[r, k] *= factor over the row-major tile; 2^112 turns moved float16 bits into their float32 value, exactly."""
    for r in range(rows):
        for k in range(r * order, r * order + head_dim):
            tile[k] *= factor


@jit
def load_float_rows(flat, start, stride, rows, head_dim, tile, order):
    for r in range(rows):
        for k in range(head_dim):
            tile[r * order + k] = flat[start + r * stride + k]


@jit
def largest_bits(tile_bits, rows, head_dim, order, largest):
    """Bits of each row's largest magnitude -> largest uint32 [LANES]; NaN and Inf compare above every finite number."""
    for r in range(rows):
        most = np.uint32(0)
        for k in range(r * order, r * order + head_dim):
            magnitude = tile_bits[k] & np.uint32(0x7FFFFFFF)
            most = max(most, magnitude)
        largest[r] = most


@jit
def narrow_rows(tile, rows, head_dim, order, limit, half, tile_bits, flat, start, stride):
    """float32 tile (row-major) -> float16 or bfloat16 in ``flat``, ties to even, saturating at ``limit``."""
    for r in range(rows):
        for k in range(r * order, r * order + head_dim):
            tile[k] = min(max(tile[k], -limit), limit)
    if half:
        for r in range(rows):
            source = r * order
            target = start + r * stride
            for k in range(head_dim):
                bits = tile_bits[source + k]
                sign = (bits >> np.uint32(16)) & np.uint32(0x8000)
                magnitude = bits & np.uint32(0x7FFFFFFF)
                normal = (magnitude + np.uint32(0xC8000FFF) + ((magnitude >> np.uint32(13)) & np.uint32(1))) >> np.uint32(13)
                # below 2^-14: count in steps of 2^-24, by the shift that the exponent asks for
                shift = np.uint32(126) - (magnitude >> np.uint32(23))
                shift = min(shift, np.uint32(31))
                whole = (magnitude & np.uint32(0x7FFFFF)) | np.uint32(0x800000)
                down = whole >> shift
                rest = whole & ((np.uint32(1) << shift) - np.uint32(1))
                middle = (np.uint32(1) << shift) >> np.uint32(1)
                up = np.uint32(1) if (rest > middle) or ((rest == middle) and ((down & np.uint32(1)) == np.uint32(1))) else np.uint32(0)
                small = down + up
                flat[target + k] = np.uint16(sign | (small if magnitude < np.uint32(0x38800000) else normal))
    else:
        for r in range(rows):
            source = r * order
            target = start + r * stride
            for k in range(head_dim):
                bits = tile_bits[source + k]
                rounded = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
                flat[target + k] = np.uint16(rounded >> np.uint32(16))


@jit
def store_float_rows(tile, rows, head_dim, order, limit, flat, start, stride):
    for r in range(rows):
        for k in range(head_dim):
            flat[start + r * stride + k] = min(max(tile[r * order + k], -limit), limit)


# -- offsets -----------------------------------------------------------------------------------------------------
@jit
def fill_phases(first, tokens, frequencies, tables, cos, sin):
    """cos, sin of each token and pair, float32 [tokens, pairs]; every product and sum rounds (SPEC 8.2)."""
    for t in range(tokens):
        position = np.uint64(first + t)
        for i in range(frequencies.size):
            phase = np.uint32((position * frequencies[i]) & np.uint64(0xFFFFFFFF)) >> np.uint32(16)
            h = phase >> np.uint32(8)
            l = phase & np.uint32(255)
            cos[t, i] = tables[0, h] * tables[2, l] - tables[1, h] * tables[3, l]
            sin[t, i] = tables[1, h] * tables[2, l] + tables[0, h] * tables[3, l]


@jit
def add_offset(tile, rows, head_dim, order, offset, sign, pairs, pair_p, step, cos, sin, first_row):
    """tile[r] += sign * offset, the first 2 * pairs channels turned by each row's phase (SPEC 8.3).

    Pair i is the channels pair_p * i and pair_p * i + step: (1, pairs) is half-split, (2, 1) interleaved.
    """
    for r in range(rows):
        base = r * order
        t = first_row + r
        for i in range(pairs):
            p = pair_p * i
            q = p + step
            turned_p = offset[p] * cos[t, i] - offset[q] * sin[t, i]
            turned_q = offset[p] * sin[t, i] + offset[q] * cos[t, i]
            tile[base + p] += sign * turned_p
            tile[base + q] += sign * turned_q
        for k in range(2 * pairs, head_dim):
            tile[base + k] += sign * offset[k]


@jit
def sum_rows(tile, rows, head_dim, order, pairs, pair_p, step, cos, sin, first_row, total):
    """total[k] += rows, turned back: float64 [head_dim]."""
    for r in range(rows):
        base = r * order
        t = first_row + r
        for i in range(pairs):
            p = pair_p * i
            q = p + step
            x, y = np.float64(tile[base + p]), np.float64(tile[base + q])
            total[p] += x * cos[t, i] + y * sin[t, i]
            total[q] += y * cos[t, i] - x * sin[t, i]
        for k in range(2 * pairs, head_dim):
            total[k] += tile[base + k]


# -- rotation ----------------------------------------------------------------------------------------------------
@jit
def hadamard(x, spare, order, base, transpose):
    """x [order * LANES] <- H x (or H^T x): exact on integers below 2^24, in any order of the additions."""
    b = base.shape[0]
    inner = order // b
    half = 1
    while half < inner:
        if 2 * half < inner:  # two stages in one pass over the tile
            for first in range(0, order, 4 * half):
                for i in range(first * LANES, (first + half) * LANES):
                    j = half * LANES
                    p, q, r, s = x[i], x[i + j], x[i + 2 * j], x[i + 3 * j]
                    a, c, d, e = p + q, p - q, r + s, r - s
                    x[i], x[i + j], x[i + 2 * j], x[i + 3 * j] = a + d, c + e, a - d, c - e
            half *= 4
        else:
            for first in range(0, order, 2 * half):
                for i in range(first * LANES, (first + half) * LANES):
                    p, q = x[i], x[i + half * LANES]
                    x[i], x[i + half * LANES] = p + q, p - q
            half *= 2
    if b > 1:
        block = inner * LANES
        for i in range(b):
            for l in range(block):
                spare[i * block + l] = F32(0)
            for j in range(b):
                sign = F32(base[j, i]) if transpose else F32(base[i, j])
                for l in range(block):
                    spare[i * block + l] += sign * x[j * block + l]
        for l in range(order * LANES):
            x[l] = spare[l]


@jit
def to_lanes(tile, order, head_dim, factors, row_scale, x):
    """Row-major tile -> coordinate-major x, times the coordinate's sign and the row's scale."""
    for k in range(head_dim):
        for l in range(LANES):
            x[k * LANES + l] = tile[l * order + k] * (factors[k] * row_scale[l])
    for i in range(head_dim * LANES, order * LANES):
        x[i] = F32(0)


@jit
def from_lanes(x, order, head_dim, factors, first, second, tile):
    """Coordinate-major sums -> row-major outputs: sum * A * B, with the coordinate's sign; adding 0 turns -0 into 0."""
    for k in range(head_dim):
        for l in range(LANES):
            tile[l * order + k] = ((factors[k] * x[k * LANES + l] + F32(0)) * first[l]) * second[l]


# -- bits --------------------------------------------------------------------------------------------------------
@jit
def put(words, base, place, width, value):
    """Or ``value`` of ``width`` <= 32 bits into the row of 64-bit words that begins at ``base``."""
    at = base + (place >> U64(6))
    shift = place & U64(63)
    words[at] |= value << shift
    words[at + U64(1)] |= (value >> U64(1)) >> (U64(63) - shift)


@jit
def get(words, base, place, width):
    """The field of ``width`` <= 32 bits at ``place``, uint64."""
    at = base + (place >> U64(6))
    shift = place & U64(63)
    value = (words[at] >> shift) | ((words[at + U64(1)] << U64(1)) << (U64(63) - shift))
    return value & ((U64(1) << width) - U64(1))


@jit
def words_to_bytes(words, stride, rows, row_bytes, out, start):
    for r in range(rows):
        base = r * stride
        target = start + r * row_bytes
        for i in range(row_bytes):
            out[target + i] = np.uint8(words[base + (i >> 3)] >> U64(8 * (i & 7)))


@jit
def bytes_to_words(data, start, rows, row_bytes, words, stride):
    for r in range(rows):
        base = r * stride
        source = start + r * row_bytes
        whole = row_bytes >> 3
        for i in range(whole):
            value = U64(0)
            for j in range(8):
                value |= U64(data[source + 8 * i + j]) << U64(8 * j)
            words[base + i] = value
        value = U64(0)
        for j in range(8 * whole, row_bytes):
            value |= U64(data[source + j]) << U64(8 * (j - 8 * whole))
        words[base + whole] = value


@jit
def checksum(data, start, size, keys):
    """Checksum of a run of bytes (SPEC 4.2)."""
    low, high = U64(0), U64(0)
    whole = size >> 2
    for i in range(whole):
        at = start + 4 * i
        word = U64(data[at]) | U64(data[at + 1]) << U64(8) | U64(data[at + 2]) << U64(16) | U64(data[at + 3]) << U64(24)
        product = word * keys[i + 1]
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
@jit
def turns_of(x, y):
    """Angle of (x, y) in turns, 0 .. 1: a polynomial, good to 2e-8."""
    a, b = abs(x), abs(y)
    small, large = min(a, b), max(a, b)
    q = small / (large + _TINY)
    z = q * q
    t = F32(-0.00074305835)
    t = t * z + F32(0.00384616852)
    t = t * z + F32(-0.00944856755)
    t = t * z + F32(0.0157660429)
    t = t * z + F32(-0.0223080879)
    t = t * z + F32(0.0317820252)
    t = t * z + F32(-0.0530494615)
    t = t * z + F32(0.159154927)
    t = t * q
    t = F32(0.25) - t if b > a else t
    t = F32(0.5) - t if x < F32(0) else t
    return F32(1) - t if y < F32(0) else t


@jit
def analyse(x, order, turns, energy, shares, kind, left, right, fine):
    """Up the tree: angles of the pairs in turns, energies of nodes, and each node's share of its right child.

    energy is [internal + quads, LANES]; shares holds the quads' and nodes' right-hand energy on their sin^2 grid.
    """
    internal = kind.size
    quads = order // 4
    for quad in range(quads):
        at = quad * 4 * LANES
        node = (internal + quad) * LANES
        for l in range(LANES):
            p, q, r, s = x[at + l], x[at + LANES + l], x[at + 2 * LANES + l], x[at + 3 * LANES + l]
            turns[quad * 2 * LANES + l] = turns_of(p, q)
            turns[quad * 2 * LANES + LANES + l] = turns_of(r, s)
            a, b = p * p + q * q, r * r + s * s
            energy[node + l] = a + b
            shares[node + l] = np.int32(min(b / (a + b + _TINY) * F32(1024), F32(1023)))
    for i in range(internal):
        n = internal - 1 - i
        grid = fine[kind[n]]
        a_at, b_at = left[n] * LANES, right[n] * LANES
        for l in range(LANES):
            a, b = energy[a_at + l], energy[b_at + l]
            energy[n * LANES + l] = a + b
            shares[n * LANES + l] = np.int32(min(b / (a + b + _TINY) * grid, grid - F32(1)))


@jit
def encode_split(rows, plan_ints, energy, shares, turns, exponents, tree, node_tables, quad_tables, place, budget, words, stride):
    """Down the tree: every node writes its angle and splits what is left of its budget (SPEC 6)."""
    radius_bits, steps, root_budget, order = plan_ints
    kind, left, right, m_a, m_b = tree
    widths, shift, halves, look_up, bounds, look_shift = node_tables
    cells, per_cell, first, quad_look_up, record_a, record_b = quad_tables
    internal = kind.size
    norm_bias = 0.5 * np.log2(np.float64(order))
    most = (1 << radius_bits) - 1
    for l in range(rows):
        base = U64(l * stride)
        code = I64(0)
        if energy[l] > F32(0):
            log2 = 0.5 * np.log2(np.float64(energy[l])) - norm_bias - exponents[l]
            code = min(max(I64(np.floor(steps * (log2 + 155.0) + 0.5)) + 1, 1), most)
        put(words, base, U64(0), U64(radius_bits), U64(code))
        place[l] = radius_bits
        budget[l] = root_budget
    for n in range(internal):
        k = kind[n]
        at, a_at, b_at = n * LANES, left[n] * LANES, right[n] * LANES
        cap_a, cap_b = np.int32(7 * m_a[k]), np.int32(7 * m_b[k])
        for l in range(rows):
            have = budget[at + l]
            width = widths[k, have]
            grid = shares[at + l]
            code = np.int32(look_up[k, width, grid >> look_shift[k]])
            while bounds[k, width, code + 1] <= grid:
                code += np.int32(1)
            where = place[at + l]
            put(words, U64(l * stride), U64(where), U64(width), U64(code))
            rest = have - width
            share = halves[k, rest] + shift[k, (np.int32(1) << width) + code]
            share = min(max(share, max(np.int32(0), rest - cap_b)), min(cap_a, rest))
            budget[a_at + l] = share
            budget[b_at + l] = rest - share
            place[a_at + l] = where + width
            place[b_at + l] = where + width + share
    for quad in range(order // 4):
        at = (internal + quad) * LANES
        turn_at = quad * 2 * LANES
        for l in range(rows):
            have = budget[at + l]
            cell = np.int32(quad_look_up[have, shares[at + l]])
            record = first[have] + cell
            n_a, n_b = record_a[record], record_b[record]
            sector_a = min(np.int32(turns[turn_at + l] * F32(n_a)), n_a - np.int32(1))
            sector_b = min(np.int32(turns[turn_at + LANES + l] * F32(n_b)), n_b - np.int32(1))
            code = cell * per_cell[have] + sector_a * n_b + sector_b
            put(words, U64(l * stride), U64(place[at + l]), U64(have), U64(code))


@jit
def decode_split(rows, plan_ints, tree, node_tables, quad_tables, circle, mantissas, place, budget, radius, words, stride, x, first_factor, second_factor):
    """Down the tree: read, look up, multiply; leaves unit-norm coordinates on the grid in x [order, LANES] (SPEC 6.5)."""
    radius_bits, steps, root_budget, order = plan_ints
    kind, left, right, m_a, m_b = tree
    widths, shift, halves, node_cos, node_sin = node_tables
    cells, cell_reciprocal, per_cell, first, record_n, record_reciprocal, step_a, step_b, record_cos, record_sin = quad_tables
    circle_cos, circle_sin = circle
    internal = kind.size
    for l in range(rows):
        code = I64(get(words, U64(l * stride), U64(0), U64(radius_bits)))
        octave = (max(code, 1) - 1) // steps
        mantissa = mantissas[max(code, 1) - 1 - octave * steps]
        exponent = octave - 155
        small = exponent < -100
        first_factor[l] = F32(np.float64(mantissa) * 2.0 ** (exponent + (64 if small else 0))) if code > 0 else F32(0)
        second_factor[l] = F32(2.0**-64) if small else F32(1)
        place[l] = radius_bits
        budget[l] = root_budget
        radius[l] = F32(2048)
    for n in range(internal):
        k = kind[n]
        at, a_at, b_at = n * LANES, left[n] * LANES, right[n] * LANES
        cap_a, cap_b = np.int32(7 * m_a[k]), np.int32(7 * m_b[k])
        for l in range(rows):
            have = budget[at + l]
            width = widths[k, have]
            where = place[at + l]
            code = np.int32(get(words, U64(l * stride), U64(where), U64(width))) + (np.int32(1) << width)
            rest = have - width
            share = halves[k, rest] + shift[k, code]
            share = min(max(share, max(np.int32(0), rest - cap_b)), min(cap_a, rest))
            budget[a_at + l] = share
            budget[b_at + l] = rest - share
            place[a_at + l] = where + width
            place[b_at + l] = where + width + share
            radius[a_at + l] = radius[at + l] * node_cos[k, code]
            radius[b_at + l] = radius[at + l] * node_sin[k, code]
    for quad in range(order // 4):
        at = (internal + quad) * LANES
        target = quad * 4 * LANES
        for l in range(rows):
            have = budget[at + l]
            code = get(words, U64(l * stride), U64(place[at + l]), U64(have))
            cell = min((code * cell_reciprocal[have]) >> U64(56), U64(cells[have] - 1))
            record = U64(first[have]) + cell
            rest = code - cell * U64(per_cell[have])
            sector_a = (rest * record_reciprocal[record]) >> U64(40)
            sector_b = rest - sector_a * U64(record_n[record])
            phase_a = (((U64(2) * sector_a + U64(1)) * U64(step_a[record]) + U64(32768)) >> U64(16)) & U64(2047)
            phase_b = (((U64(2) * sector_b + U64(1)) * U64(step_b[record]) + U64(32768)) >> U64(16)) & U64(2047)
            ra = radius[at + l] * record_cos[record]
            rb = radius[at + l] * record_sin[record]
            x[target + l] = ra * circle_cos[phase_a]
            x[target + LANES + l] = ra * circle_sin[phase_a]
            x[target + 2 * LANES + l] = rb * circle_cos[phase_b]
            x[target + 3 * LANES + l] = rb * circle_sin[phase_b]


@jit
def to_grid(x, size):
    for i in range(size):
        x[i] = np.rint(x[i])


# -- paper coding ------------------------------------------------------------------------------------------------
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
                codes[1, i] = U64(min(np.int32(turns_of(p, q) * F32(16)), np.int32(15)))
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
            put(words, base, where, U64(16), half_of(radius))
            where += U64(16)
            for up in range(4):
                level = 4 - up
                width = U64(2) if level > 1 else U64(4)
                for i in range(16 >> level):
                    put(words, base, where, width, codes[level, i])
                    where += width


@jit
def decode_paper(rows, order, radius_exponent, cos, sin, circle, mantissa, words, stride, x, first_factor, second_factor):
    """62 bits a block -> coordinates on the grid of each vector's power of two, in x [order, LANES] (SPEC 7)."""
    circle_cos, circle_sin = circle
    level_radius = np.empty((5, 8), np.float32)
    for l in range(rows):
        base = U64(l * stride)
        largest = 0.0
        for block in range(order // 16):
            largest = max(largest, half_value(get(words, base, U64(62 * block), U64(16))))
        power = np.int64(np.floor(np.log2(largest))) + 1 if largest > 0 else np.int64(0)
        for block in range(order // 16):
            where = U64(62 * block)
            level_radius[4, 0] = F32(half_value(get(words, base, where, U64(16))) * 2.0 ** (11 - power))
            where += U64(16)
            for up in range(3):
                level = 4 - up
                for i in range(16 >> level):
                    code = get(words, base, where, U64(2))
                    where += U64(2)
                    level_radius[level - 1, 2 * i] = level_radius[level, i] * cos[level - 2, code]
                    level_radius[level - 1, 2 * i + 1] = level_radius[level, i] * sin[level - 2, code]
            for i in range(8):
                phase = (U64(2) * get(words, base, where, U64(4)) + U64(1)) * U64(64)
                where += U64(4)
                x[(16 * block + 2 * i) * LANES + l] = level_radius[1, i] * circle_cos[phase]
                x[(16 * block + 2 * i + 1) * LANES + l] = level_radius[1, i] * circle_sin[phase]
        exponent = power + radius_exponent
        small = exponent < -100
        first_factor[l] = F32(np.float64(mantissa) * 2.0 ** (exponent + (64 if small else 0)))
        second_factor[l] = F32(2.0**-64) if small else F32(1)


# -- blocks ------------------------------------------------------------------------------------------------------
@jit
def load_tile(flat, start, stride, rows, head_dim, dtype, tile, tile_bits, order):
    """Stored numbers of a tile -> float32, row-major; ``dtype`` as in the stream's header."""
    if dtype == 1:
        load_rows(flat, start, stride, rows, head_dim, True, tile_bits, order)
        scale_rows(tile, rows, head_dim, order, F32(2.0**112))
    elif dtype == 2:
        load_rows(flat, start, stride, rows, head_dim, False, tile_bits, order)
    else:
        load_float_rows(flat, start, stride, rows, head_dim, tile, order)


@jit
def flag_bad_rows(flat, start, stride, rows, head_dim, dtype, tile, tile_bits, order, largest, bad, first_bad):
    """Mark rows with NaN or Inf in bad [first_bad + row] and set them to zero."""
    largest_bits(tile_bits, rows, head_dim, order, largest)
    limit = np.uint32(0x47800000) if dtype == 1 else np.uint32(0x7F800000)  # float16's Inf was scaled to 2^16
    for r in range(rows):
        if largest[r] >= limit:
            bad[first_bad + r] = True
            for k in range(head_dim):
                tile[r * order + k] = F32(0)


@jit
def encode_blocks(
    first_block, last_block, sizes, flat, places, offsets, rope, phase_tables, plan_ints, radius_exponent, factors, base, tree,
    node_tables, quad_tables, paper_bounds, keys, bad, payload,
):
    """Encode blocks first_block .. last_block-1 (chunk-major) into ``payload``."""
    coding, dtype, head_dim, order, row_bytes, chunk_tokens, leading, first_tokens, coded = sizes
    starts, token_stride = places
    frequencies, pair_p, step, first_position = rope
    pairs = frequencies.size
    stride = (row_bytes >> 3) + 2
    quads = order // 4
    nodes = 2 * quads
    tile = np.zeros(LANES * order, np.float32)
    tile_bits = tile.view(np.uint32)
    x = np.zeros(order * LANES, np.float32)
    spare = np.zeros(order * LANES if base.shape[0] > 1 else 1, np.float32)
    largest = np.zeros(LANES, np.uint32)
    row_scales = np.ones(LANES, np.float32)
    exponents = np.zeros(LANES, np.int64)
    turns = np.zeros(quads * 2 * LANES, np.float32)
    energy = np.zeros(nodes * LANES, np.float32)
    shares, place, budget = np.zeros(nodes * LANES, np.int32), np.zeros(nodes * LANES, np.int32), np.zeros(nodes * LANES, np.int32)
    words = np.zeros(LANES * stride, np.uint64)
    cos = np.zeros((chunk_tokens if pairs else 1, max(pairs, 1)), np.float32)
    sin = np.zeros_like(cos)
    have_chunk = -1
    for block in range(first_block, last_block):
        chunk, lead = block // leading, block % leading
        first = chunk * chunk_tokens
        tokens = min(chunk_tokens, coded - first)
        out = chunk * leading * (chunk_tokens * row_bytes + 4) + lead * (tokens * row_bytes + 4)
        block_out = out
        if pairs and chunk != have_chunk:
            fill_phases(first_position + first_tokens + first, tokens, frequencies, phase_tables, cos, sin)
            have_chunk = chunk
        for row in range(0, tokens, LANES):
            rows = min(LANES, tokens - row)
            start = starts[lead] + (first_tokens + first + row) * token_stride
            load_tile(flat, start, token_stride, rows, head_dim, dtype, tile, tile_bits, order)
            bad_at = lead * coded + first + row
            flag_bad_rows(flat, start, token_stride, rows, head_dim, dtype, tile, tile_bits, order, largest, bad, bad_at)
            if offsets.size:
                add_offset(tile, rows, head_dim, order, offsets[lead], F32(-1), pairs, pair_p, step, cos, sin, row)
                for r in range(rows):
                    for k in range(r * order, r * order + head_dim):
                        tile[k] = F32(0) if bad[bad_at + r] else min(max(tile[k], -_LARGEST), _LARGEST)
                largest_bits(tile_bits, rows, head_dim, order, largest)
            for r in range(LANES):
                exponent = I64(largest[r] >> np.uint32(23)) - 127 if r < rows else 0
                exponents[r] = -min(max(exponent, -126), 126) if abs(exponent) > 40 else 0
                row_scales[r] = F32(2.0 ** exponents[r])
            to_lanes(tile, order, head_dim, factors, row_scales, x)
            hadamard(x, spare, order, base, False)
            words[:] = U64(0)
            if coding == 1:
                analyse(x, order, turns, energy, shares, tree[0], tree[1], tree[2], node_tables[6])
                encode_split(
                    rows, plan_ints, energy, shares, turns, exponents, tree, node_tables[:6], quad_tables, place, budget, words, stride
                )
            else:
                encode_paper(rows, x, order, row_scales, radius_exponent, paper_bounds, words, stride)
            words_to_bytes(words, stride, rows, row_bytes, payload, out)
            out += rows * row_bytes
        total = checksum(payload, block_out, tokens * row_bytes, keys)
        for j in range(4):
            payload[out + j] = np.uint8(total >> U64(8 * j))


@jit
def decode_blocks(
    work, sizes, payload, origin, flat, places, first_lead, first_token, offsets, rope, phase_tables, plan_ints, radius_exponent,
    factors, base, tree, node_tables, quad_tables, paper_cos, paper_sin, circle, mantissas, keys, limit, write, damaged,
):
    """Check, and where ``write`` is set decode, the blocks of ``work`` int64 [n, 5]: chunk, lead, low row, high row, place."""
    coding, dtype, head_dim, order, row_bytes, chunk_tokens, leading, first_tokens, coded = sizes
    starts, token_stride = places
    frequencies, pair_p, step, first_position = rope
    pairs = frequencies.size
    stride = (row_bytes >> 3) + 2
    quads = order // 4
    nodes = 2 * quads
    tile = np.zeros(LANES * order, np.float32)
    tile_bits = tile.view(np.uint32)
    x = np.zeros(order * LANES, np.float32)
    spare = np.zeros(order * LANES if base.shape[0] > 1 else 1, np.float32)
    first_factor, second_factor = np.zeros(LANES, np.float32), np.zeros(LANES, np.float32)
    radius = np.zeros(nodes * LANES, np.float32)
    place, budget = np.zeros(nodes * LANES, np.int32), np.zeros(nodes * LANES, np.int32)
    words = np.zeros(LANES * stride, np.uint64)
    cos = np.zeros((chunk_tokens if pairs else 1, max(pairs, 1)), np.float32)
    sin = np.zeros_like(cos)
    have_chunk = -1
    for item in range(work.shape[0]):
        chunk, lead, low, high, source = work[item]
        first = chunk * chunk_tokens
        tokens = min(chunk_tokens, coded - first)
        end = source + tokens * row_bytes
        stored = U64(0)
        for j in range(4):
            stored |= U64(payload[end + j]) << U64(8 * j)
        damaged[item] = stored != checksum(payload, source, tokens * row_bytes, keys)
        if not write:
            continue
        if pairs and chunk != have_chunk:
            fill_phases(first_position + first_tokens + first, tokens, frequencies, phase_tables, cos, sin)
            have_chunk = chunk
        for row in range(low, high, LANES):
            rows = min(LANES, high - row)
            bytes_to_words(payload, source + row * row_bytes, rows, row_bytes, words, stride)
            if coding == 1:
                decode_split(
                    rows, plan_ints, tree, node_tables, quad_tables, circle, mantissas, place, budget, radius, words, stride, x,
                    first_factor, second_factor,
                )
            else:
                decode_paper(
                    rows, order, radius_exponent, paper_cos, paper_sin, circle, mantissas[0], words, stride, x, first_factor,
                    second_factor,
                )
            to_grid(x, order * LANES)
            hadamard(x, spare, order, base, True)
            from_lanes(x, order, head_dim, factors, first_factor, second_factor, tile)
            if offsets.size:
                add_offset(tile, rows, head_dim, order, offsets[lead], F32(1), pairs, pair_p, step, cos, sin, row)
            target = starts[lead - first_lead] + (first_tokens + first + row - first_token) * token_stride
            if dtype == 3:
                store_float_rows(tile, rows, head_dim, order, limit, flat, target, token_stride)
            else:
                narrow_rows(tile, rows, head_dim, order, limit, dtype == 1, tile_bits, flat, target, token_stride)


@jit
def sum_blocks(first_lead, last_lead, sizes, flat, places, rope, phase_tables, total):
    """Sums of the coded tokens, turned back: float64 total [leading, head_dim]; NaN and Inf count as zero vectors."""
    _, dtype, head_dim, order, _, chunk_tokens, leading, first_tokens, coded = sizes
    starts, token_stride = places
    frequencies, pair_p, step, first_position = rope
    pairs = frequencies.size
    tile = np.zeros(LANES * order, np.float32)
    tile_bits = tile.view(np.uint32)
    largest = np.zeros(LANES, np.uint32)
    bad = np.zeros(LANES, np.bool_)
    cos = np.zeros((chunk_tokens if pairs else 1, max(pairs, 1)), np.float32)
    sin = np.zeros_like(cos)
    for first in range(0, coded, chunk_tokens):
        tokens = min(chunk_tokens, coded - first)
        if pairs:
            fill_phases(first_position + first_tokens + first, tokens, frequencies, phase_tables, cos, sin)
        for lead in range(first_lead, last_lead):
            for row in range(0, tokens, LANES):
                rows = min(LANES, tokens - row)
                start = starts[lead] + (first_tokens + first + row) * token_stride
                load_tile(flat, start, token_stride, rows, head_dim, dtype, tile, tile_bits, order)
                flag_bad_rows(flat, start, token_stride, rows, head_dim, dtype, tile, tile_bits, order, largest, bad, 0)
                sum_rows(tile, rows, head_dim, order, pairs, pair_p, step, cos, sin, row, total[lead])
