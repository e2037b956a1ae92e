"""Law: the split coding (SPEC 6): a tree of angles that share a budget of bits, over tiles of eight vectors.

Each loop is short, so that the processor overlaps the table look-ups of several nodes.
"""

from __future__ import annotations

import numpy as np

from pqcodec.constants import (
    CIRCLE,
    COARSE_GRID_BITS,
    GRID,
    MAX_ANGLE_BITS,
    MAX_BUDGET_PER_COORDINATE,
    PHASE_SHIFT,
    QUAD,
    RADIUS_BIAS,
    TURN_POLYNOMIAL,
)
from pqcodec.kernels.cpu.lane_fields import long_window_at, put_at, window_at
from pqcodec.kernels.cpu.lane_look_ups import gather, gather_at, gather_eight_at, gather_four_at, gather_pair, gather_pair_at
from pqcodec.kernels.cpu.lane_memory import load, store
from pqcodec.kernels.cpu.lanes import (
    LANES,
    any_lane,
    as_bits,
    as_float,
    floats,
    ints,
    low_half,
    magnitude,
    nearest,
    select,
    to_float,
    to_long,
    truncate,
)
from pqcodec.kernels.cpu.records import (
    BOUNDS,
    CODEBOOK_BUDGET,
    CODES,
    EVEN,
    F32,
    I32,
    I64,
    NODE,
    OF_QUADS,
    SMALL_BUDGETS,
    STEPS,
    TINY,
    U64,
    WIDTHS,
    inlined,
    leaf,
)


@inlined
def radius_codes(energy, exponent, steps, radius_bits, energy_scale):
    """Codes of the radii sqrt(energy / energy_scale) 2^-exponent, int lanes (SPEC 6.1).

    Whole octaves are counted as integers, for float32 is too coarse for both.
    """
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


@inlined
def width_of(budget, per_bit):
    """Bits of a node's angle, int lanes (SPEC 6.3); ``per_bit`` is 16 / (15 coordinates)."""
    width = truncate((to_float(budget) + floats(F32(0.25))) * floats(per_bit))
    return min(min(max(width, ints(I32(1))), ints(I32(MAX_ANGLE_BITS))), budget)


@inlined
def share_of(rest, shift, cap_a, cap_b, even, portions, portion_at):
    """Bits of the left child, int lanes (SPEC 6.3). Unequal children look their portion up, from portions [portion_at] on."""
    portion = rest >> ints(I32(1)) if even else gather(portions, rest + ints(portion_at))
    low = max(ints(I32(0)), rest - ints(cap_b))
    return min(max(portion + shift, low), min(ints(cap_a), rest))


@inlined
def phase_of(sector, step):
    """Index of the direction of a sector's middle (SPEC 6.4) in the table of 2,048 directions, two numbers each."""
    turn = (sector + sector + ints(I32(1))) * step + ints(I32(1 << (PHASE_SHIFT - 1)))
    return ((turn >> ints(I32(PHASE_SHIFT))) & ints(I32(CIRCLE - 1))) << ints(I32(1))


@leaf
def radius_factors(rows, split, words, stride, first_factor, second_factor):
    """Look up factors A and B of each row by its radius code (SPEC 6.1); lanes behind ``rows`` have code 0."""
    radius_bits, radii = split.radius_bits, split.radii
    for l in range(LANES):
        code = I64(words[l * stride] & U64((1 << radius_bits) - 1)) if l < rows else 0
        first_factor[l] = radii[0, code]
        second_factor[l] = radii[1, code]


@leaf
def decode_split(split, order, work, words, stride, x):
    """Down the tree: read, look up, multiply. Leaves unit vectors' coordinates in x, whole numbers of the grid (SPEC 6.5)."""
    steps, per_bit, portions, nodes = split.tree.steps, split.tree.per_bit, split.tree.portions, split.tree.nodes
    bits, budget, radius, entries = work.bits, work.budget, work.radius, work.entries
    root_budget = split.root_budget
    words32 = words.view(np.int32)
    internal = per_bit.size
    store(bits, 0, ints(I32(split.radius_bits)))
    store(budget, 0, ints(I32(root_budget)))
    store(radius, 0, floats(F32(GRID)))
    for n in range(internal):
        s = len(NODE) * n
        a, b, shape = steps[s + NODE.left], steps[s + NODE.right], steps[s + NODE.shape]
        cap_a, cap_b, first = I32(steps[s + NODE.cap_a]), I32(steps[s + NODE.cap_b]), ints(I32(steps[s + NODE.codes]))
        have, where, whole = load(budget, n * LANES), load(bits, n * LANES), load(radius, n * LANES)
        width = width_of(have, per_bit[n])
        one = ints(I32(1)) << width
        if shape == OF_QUADS:  # the node's and its two quads' bits lie side by side: 56 at the most
            window = long_window_at(words, stride, bits, n * LANES)
            store(entries, 0, (one + (low_half(window) & (one - ints(I32(1)))) + first) << ints(I32(2)))
            cos, sin, moved, _ = gather_four_at(nodes, entries, 0)
            rest = have - width
            share = share_of(rest, moved, cap_a, cap_b, True, portions, I32(0))
            other = rest - share
            window = window >> to_long(width)
            store(bits, a, low_half(window) & ((ints(I32(1)) << share) - ints(I32(1))))
            store(bits, b, low_half(window >> to_long(share)) & ((ints(I32(1)) << other) - ints(I32(1))))
            store(budget, a, share)
            store(budget, b, other)
        else:
            code = window_at(words32, 2 * stride, bits, n * LANES) & (one - ints(I32(1)))
            store(entries, 0, (one + code + first) << ints(I32(2)))
            cos, sin, moved, _ = gather_four_at(nodes, entries, 0)
            rest = have - width
            share = share_of(rest, moved, cap_a, cap_b, shape == EVEN, portions, I32(steps[s + NODE.portions]))
            store(budget, a, share)
            store(budget, b, rest - share)
            store(bits, a, where + width)
            store(bits, b, where + width + share)
        store(radius, a, whole * as_float(cos))
        store(radius, b, whole * as_float(sin))
    if root_budget <= SMALL_BUDGETS * order:
        large = decode_small_quads(order // QUAD, internal * LANES, split.quads.codebook, work, x)
    else:
        large = order // QUAD
        for quad in range(large):
            work.listed[quad] = quad
    decode_quads(large, internal * LANES, split, work, x)


@leaf
def decode_small_quads(count, base, codebook, work, x):
    """Look up whole quads of up to CODEBOOK_BUDGET bits. Lists the others in ``work.listed``, and returns their number."""
    codes, budget, radius, entries, listed = work.bits, work.budget, work.radius, work.entries, work.listed
    largest, last = ints(I32(CODEBOOK_BUDGET)), ints(I32((2 << CODEBOOK_BUDGET) - 1))
    found = 0
    for quad in range(count):
        at = base + quad * LANES
        have = load(budget, at)
        code = (ints(I32(1)) << have) | load(codes, at)
        more = have > largest
        store(entries, quad * LANES, select(more, last, code) << ints(I32(2)))
        listed[found] = quad
        found += any_lane(more)
    for quad in range(count):
        p, q, r, s = gather_four_at(codebook, entries, quad * LANES)
        whole, target = load(radius, base + quad * LANES), 4 * quad * LANES
        store(x, target, nearest(whole * p))
        store(x, target + LANES, nearest(whole * q))
        store(x, target + 2 * LANES, nearest(whole * r))
        store(x, target + 3 * LANES, nearest(whole * s))
    return found


@leaf
def decode_quads(count, base, split, work, x):
    """Decode the first ``count`` quads of ``work.listed``, of any number of bits (SPEC 6.4); every code decodes."""
    by_budget, by_record, circle = split.quads.by_budget, split.quads.by_record, split.circle
    codes, budget, radius, entries, phases, listed = work
    for i in range(count):
        store(entries, i * LANES, load(budget, base + listed[i] * LANES) << ints(I32(2)))
    for i in range(count):  # which record, and the code inside it
        at = base + listed[i] * LANES
        code = load(codes, at)
        each, first, last, reciprocal = gather_four_at(by_budget, entries, i * LANES)
        cell = truncate(to_float(code) * as_float(reciprocal))  # off by one at most
        rest = code - cell * each
        cell = cell + select(rest >= each, ints(I32(1)), ints(I32(0))) - select(rest < ints(I32(0)), ints(I32(1)), ints(I32(0)))
        cell = min(cell, last)
        store(budget, at, (first + cell) << ints(I32(3)))
        store(codes, at, code - cell * each)
    for i in range(count):  # the two circles' phases; the pairs' shares of the radius take the place of record and code
        at = base + listed[i] * LANES
        rest = load(codes, at)
        cos, sin, n_b, reciprocal, step_a, step_b, _, _ = gather_eight_at(by_record, budget, at)
        sector_a = truncate((to_float(rest) + floats(F32(0.5))) * as_float(reciprocal))  # exact below 2^21
        store(phases, 2 * i * LANES, phase_of(sector_a, step_a))
        store(phases, (2 * i + 1) * LANES, phase_of(rest - sector_a * n_b, step_b))
        store(codes, at, cos)
        store(budget, at, sin)
    for i in range(count):
        at = base + listed[i] * LANES
        cos, sin, whole, target = as_float(load(codes, at)), as_float(load(budget, at)), load(radius, at), 4 * listed[i] * LANES
        cos_a, sin_a = gather_pair_at(circle, phases, 2 * i * LANES)
        cos_b, sin_b = gather_pair_at(circle, phases, (2 * i + 1) * LANES)
        store(x, target, nearest(whole * (cos * cos_a)))
        store(x, target + LANES, nearest(whole * (cos * sin_a)))
        store(x, target + 2 * LANES, nearest(whole * (sin * cos_b)))
        store(x, target + 3 * LANES, nearest(whole * (sin * sin_b)))


@inlined
def place_of(a, b, grid):
    """b's share of the energy a + b on a sin^2 grid of ``grid`` steps, int lanes."""
    share = b / (a + b + floats(TINY)) * floats(grid)
    return truncate(min(share, floats(grid - F32(1))))


@inlined
def turns_of(x, y):
    """Angle of (x, y) in turns, 0 .. 1: a polynomial, good to 2e-8."""
    a, b = magnitude(x), magnitude(y)
    q = min(a, b) / (max(a, b) + floats(TINY))
    z = q * q
    t = floats(F32(TURN_POLYNOMIAL[0]))
    t = t * z + floats(F32(TURN_POLYNOMIAL[1]))
    t = t * z + floats(F32(TURN_POLYNOMIAL[2]))
    t = t * z + floats(F32(TURN_POLYNOMIAL[3]))
    t = t * z + floats(F32(TURN_POLYNOMIAL[4]))
    t = t * z + floats(F32(TURN_POLYNOMIAL[5]))
    t = t * z + floats(F32(TURN_POLYNOMIAL[6]))
    t = t * z + floats(F32(TURN_POLYNOMIAL[7]))
    t = t * q
    t = select(b > a, floats(F32(0.25)) - t, t)
    t = select(x < floats(F32(0)), floats(F32(0.5)) - t, t)
    return select(y < floats(F32(0)), floats(F32(1)) - t, t)


@leaf
def analyse(x, order, tree, work):
    """Up the tree: the pairs' angles in turns, every node's energy, and each node's place on its sin^2 grid."""
    kind, left, right, grids = tree.kind, tree.left, tree.right, tree.grids
    turns, energy, places = work.turns, work.energy, work.places
    internal = kind.size
    for quad in range(order // QUAD):
        at = quad * 4 * LANES
        p, q, r, s = load(x, at), load(x, at + LANES), load(x, at + 2 * LANES), load(x, at + 3 * LANES)
        store(turns, quad * 2 * LANES, turns_of(p, q))
        store(turns, quad * 2 * LANES + LANES, turns_of(r, s))
        a, b = p * p + q * q, r * r + s * s
        node = (internal + quad) * LANES
        store(energy, node, a + b)
        store(places, node, place_of(a, b, F32(STEPS)))
    for i in range(internal):
        n = internal - 1 - i
        a, b = load(energy, left[n] * LANES), load(energy, right[n] * LANES)
        store(energy, n * LANES, a + b)
        store(places, n * LANES, place_of(a, b, grids[kind[n]]))


@leaf
def encode_split(rows, x, order, exponents, split, work, words, stride):
    """Rotated rows x, times 2^-exponents -> bits: each node writes its angle and splits the rest of its budget (SPEC 6)."""
    analyse(x, order, split.tree, work)
    tree, quads, radius_bits, steps = split.tree, split.quads, split.radius_bits, split.radius_steps
    kind, left, right, m_a, m_b, portions = tree.kind, tree.left, tree.right, tree.m_a, tree.m_b, tree.portions
    shift, look_up, bounds, look_shift, fixes = tree.shift, tree.look_up, tree.bounds, tree.grid_shift, tree.fixes
    turns, energy, places, bit_place = work.turns, work.energy, work.places, work.bit_place
    budget, codes, widths, cells = work.budget, work.codes, work.widths, work.cells
    internal, most = kind.size, portions.size // m_a.size
    store(codes, 0, radius_codes(load(energy, 0), load(exponents, 0), steps, radius_bits, split.energy_scale))
    for l in range(rows):
        words[l * stride] = U64(codes[l])
    store(bit_place, 0, ints(I32(radius_bits)))
    store(budget, 0, ints(I32(split.root_budget)))
    for n in range(internal):
        k = kind[n]
        a, b = left[n] * LANES, right[n] * LANES
        have, where, grid = load(budget, n * LANES), load(bit_place, n * LANES), load(places, n * LANES)
        width = width_of(have, tree.per_bit[k])
        code = gather(look_up, ((width + ints(I32(k * WIDTHS))) << ints(I32(COARSE_GRID_BITS))) + (grid >> ints(look_shift[k])))
        if fixes[k]:
            first = (width + ints(I32(k * WIDTHS))) * ints(I32(BOUNDS)) + ints(I32(1))
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
    for quad in range(order // QUAD):
        at = (internal + quad) * LANES
        store(codes, at, (load(budget, at) << ints(I32(COARSE_GRID_BITS))) + load(places, at))
    for quad in range(order // QUAD):
        at = (internal + quad) * LANES
        cell = gather_at(quads.look_up, codes, at)
        per_cell, first = gather_pair(quads.by_budget, load(budget, at) << ints(I32(1)))
        store(cells, quad * LANES, cell * per_cell)
        store(codes, at, (first + cell) << ints(I32(1)))
    for quad in range(order // QUAD):
        at = (internal + quad) * LANES
        n_a, n_b = gather_pair_at(quads.by_record, codes, at)
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
