"""Law: the split coding (SPEC 6): a tree of angles that share a budget of bits, read and written group by group."""

from __future__ import annotations

import triton
import triton.language as tl

from pqcodec.kernels.on_triton.bits import get_field, put_field
from pqcodec.kernels.on_triton.numbers import (
    BOUNDS,
    CAP,
    CIRCLE,
    CODES,
    GRID,
    GROUP,
    MOST_WIDTH,
    NODE,
    PHASE_HALF,
    PHASE_SHIFT,
    QUAD_ROW,
    RADIUS_BIAS,
    RECORD,
    RECORD_FLOAT,
    SHARE_SHIFT,
    STEPS,
    TINY,
    WIDTH_OF_8,
    WIDTH_OF_16,
    WIDTH_SHIFT,
    WIDTHS,
    first_of,
    halves,
    nearest,
    turns_of,
)
from pqcodec.kernels.on_triton.rotation import rotated, rotated_back


@triton.jit
def radius_code(energy, exponent, RADIUS_BITS: tl.constexpr, RADIUS_STEPS: tl.constexpr, ENERGY_SCALE: tl.constexpr):
    """Code of the radius sqrt(energy / ENERGY_SCALE) * 2^-exponent; 0 for the zero vector (SPEC 6.1)."""
    bits = energy.to(tl.int32, bitcast=True)
    power = (bits >> 23) - 127
    mantissa = ((bits & 0x7FFFFF) | 0x3F800000).to(tl.float32, bitcast=True) / ENERGY_SCALE
    fraction = 0.5 * tl.log2(mantissa) + 0.5 * (power & 1).to(tl.float32)
    whole = (power >> 1) - exponent + RADIUS_BIAS
    code = whole * RADIUS_STEPS + tl.floor(fraction * RADIUS_STEPS + 0.5).to(tl.int32) + 1
    code = tl.minimum(tl.maximum(code, 1), (1 << RADIUS_BITS) - 1)
    return tl.where(energy > 0, code, 0)


@triton.jit
def width_of(budget, factor, least):
    """Bits of a node's angle (SPEC 6.3); ``factor`` is a ``look_ups.Division``'s."""
    width = (budget * factor) >> WIDTH_SHIFT
    return tl.minimum(tl.minimum(tl.maximum(width, least), MOST_WIDTH), budget)


@triton.jit
def share_of(rest, portion, moved, cap_a, cap_b):
    """Bits of the left child (SPEC 6.3)."""
    return tl.minimum(tl.maximum(portion + moved, tl.maximum(rest - cap_b, 0)), tl.minimum(rest, cap_a))


@triton.jit
def phase_of(sector, step):
    """Number, of 2,048 directions, of the middle of a sector on a circle whose sectors are ``step`` wide (SPEC 6.4)."""
    turn = (2 * sector + 1).to(tl.uint32) * step.to(tl.uint32) + PHASE_HALF
    return ((turn >> PHASE_SHIFT) & (CIRCLE - 1)).to(tl.int32)


@triton.jit
def decode_node(words, bit, budget, radius, mask, entry, factor, cap, node_cos, node_sin, node_shift):
    """Read a node of equal children: where their bits begin, their budgets and radii, joined in a last dimension of two."""
    width = width_of(budget, factor, 1)
    one = tl.full(width.shape, 1, tl.int32) << width
    at = entry + one + get_field(words, bit, width, mask)
    rest = budget - width
    share = share_of(rest, rest >> 1, tl.load(node_shift + at), cap, cap)
    bits = tl.join(bit + width, bit + width + share)
    return bits, tl.join(share, rest - share), tl.join(radius * tl.load(node_cos + at), radius * tl.load(node_sin + at))


@triton.jit
def decode_quads(words, bit, budget, radius, mask, quad_ints, quad_floats, records, record_floats, circle):
    """Read quads [R, 4]: their coordinates, whole numbers of the grid, float32 [R, 16] (SPEC 6.4, 6.5)."""
    code = get_field(words, bit, budget, mask)
    quad = quad_ints + len(QUAD_ROW.value) * budget
    codes, first, last = (
        tl.load(quad + QUAD_ROW.value.codes),
        tl.load(quad + QUAD_ROW.value.first_record),
        tl.load(quad + QUAD_ROW.value.last_cell),
    )
    cell = (code.to(tl.float32) * tl.load(quad_floats + budget)).to(tl.int32)  # off by one at most
    left = code - cell * codes
    cell = tl.minimum(cell + (left >= codes).to(tl.int32) - (left < 0).to(tl.int32), last)
    left = code - cell * codes
    record = records + len(RECORD.value) * (first + cell)
    n_b, step_a, step_b = (
        tl.load(record + RECORD.value.n_b),
        tl.load(record + RECORD.value.step_a),
        tl.load(record + RECORD.value.step_b),
    )
    floats = record_floats + len(RECORD_FLOAT.value) * (first + cell)
    cos, sin = tl.load(floats + RECORD_FLOAT.value.cos), tl.load(floats + RECORD_FLOAT.value.sin)
    sector = ((left.to(tl.float32) + 0.5) * tl.load(floats + RECORD_FLOAT.value.one_n_b)).to(tl.int32)  # exact below 2^21
    phase_a, phase_b = phase_of(sector, step_a), phase_of(left - sector * n_b, step_b)
    p, q = cos * tl.load(circle + phase_a), cos * tl.load(circle + CIRCLE + phase_a)
    r, s = sin * tl.load(circle + phase_b), sin * tl.load(circle + CIRCLE + phase_b)
    x = tl.join(tl.join(radius * p, radius * r), tl.join(radius * q, radius * s))
    return nearest(tl.reshape(x, [x.shape[0], GROUP]))


@triton.jit
def split_units(
    words,
    bit,
    group,
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
    ROOT_BUDGET: tl.constexpr,
    LEVELS: tl.constexpr,
    KIND_16: tl.constexpr,
    ROWS: tl.constexpr,
):
    """A group's coordinates in rows whose angles begin at ``bit`` [R]: whole numbers of the grid, float32 [R, 16].

    ``group``: one number, or one for each row [R].
    """
    budget = tl.full([ROWS], ROOT_BUDGET, tl.int32)
    radius = tl.full([ROWS], GRID, tl.float32)
    for level in range(LEVELS):
        node = path + (group * LEVELS + level) * len(NODE.value)
        right = tl.load(node + NODE.value.right) > 0
        width = width_of(budget, tl.load(node + NODE.value.width_factor), tl.load(node + NODE.value.least_width))
        one = tl.full([ROWS], 1, tl.int32) << width
        at = tl.load(node + NODE.value.kind) * CODES + one + get_field(words, bit, width, mask)
        rest = budget - width
        portion = (rest * tl.load(node + NODE.value.share_factor)) >> SHARE_SHIFT
        moved = tl.load(node_shift + at)
        share = share_of(rest, portion, moved, tl.load(node + NODE.value.cap_a), tl.load(node + NODE.value.cap_b))
        radius *= tl.load(tl.where(right, node_sin, node_cos) + at)
        budget = tl.where(right, rest - share, share)
        bit += width + tl.where(right, share, 0)
    entry = KIND_16 * CODES
    bit, budget, radius = decode_node(
        words, bit, budget, radius, mask, entry, WIDTH_OF_16, 8 * CAP, node_cos, node_sin, node_shift
    )
    mask8 = mask[:, None] & (tl.arange(0, 2) >= 0)[None, :]
    bit, budget, radius = decode_node(
        words, bit, budget, radius, mask8, entry + CODES, WIDTH_OF_8, 4 * CAP, node_cos, node_sin, node_shift
    )
    bit, budget = tl.reshape(bit, [ROWS, 4]), tl.reshape(budget, [ROWS, 4])
    radius = tl.reshape(radius, [ROWS, 4])
    mask4 = mask[:, None] & (tl.arange(0, 4) >= 0)[None, :]
    return decode_quads(words, bit, budget, radius, mask4, quad_ints, quad_floats, records, record_floats, circle)


@triton.jit
def split_radius(words, bit, mask, mantissas, RADIUS_BITS: tl.constexpr, RADIUS_STEPS: tl.constexpr):
    """Exponent and mantissa of the factor of rows whose radii begin at ``bit`` [R], and where it is 0."""
    code = get_field(words, bit, tl.full(bit.shape, RADIUS_BITS, tl.int32), mask)
    step = tl.maximum(code, 1) - 1
    octave = step // RADIUS_STEPS
    return octave - RADIUS_BIAS, tl.load(mantissas + step - octave * RADIUS_STEPS), code == 0


@triton.jit
def decode_split(
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
    ORDER: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROOT_BUDGET: tl.constexpr,
    RADIUS_BITS: tl.constexpr,
    RADIUS_STEPS: tl.constexpr,
    LEVELS: tl.constexpr,
    KIND_16: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Rows from ``bit0`` on -> acc [R, COLUMNS] rotated back; exponent and mantissa of each row's factor, and where it is 0."""
    exponent, mantissa, nothing = split_radius(words, bit0, mask, mantissas, RADIUS_BITS, RADIUS_STEPS)
    for group in range(ORDER // GROUP):
        v = split_units(
            words,
            bit0 + RADIUS_BITS,
            group,
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
            ROOT_BUDGET,
            LEVELS,
            KIND_16,
            ROWS,
        )
        acc = rotated_back(v, rotation, group, columns, acc, COLUMNS)
    return acc, exponent, mantissa, nothing


@triton.jit
def place_of(a, b, grid):
    """b's share of the energy a + b as a place on a sin^2 grid of ``grid`` steps."""
    return tl.minimum(b / (a + b + TINY) * grid, grid - 1.0).to(tl.int32)


@triton.jit
def cell_of(place, width, kind, grid_shift, look_up, bounds, FIXES: tl.constexpr):
    """The cell of a place on the sin^2 grid of a kind of nodes; FIXES bounds may lie inside one step of the look-up."""
    code = tl.load(look_up + (kind * WIDTHS + width) * STEPS + (place >> grid_shift)).to(tl.int32)
    at = bounds + (kind * WIDTHS + width) * BOUNDS + 1
    for _ in tl.static_range(FIXES):
        code += (tl.load(at + code) <= place).to(tl.int32)
    return code


@triton.jit
def encode_node(words, bit, budget, a, b, mask, kind, factor, cap, grid, look_up, bounds, node_shift):
    """Write the angle of a node of equal children on the coarse grid: where their bits begin and their budgets, joined."""
    width = width_of(budget, factor, 1)
    code = cell_of(place_of(a, b, grid), width, kind, 0, look_up, bounds, 0)
    put_field(words, bit, code, mask)
    rest = budget - width
    moved = tl.load(node_shift + kind * CODES + (tl.full(width.shape, 1, tl.int32) << width) + code)
    share = share_of(rest, rest >> 1, moved, cap, cap)
    return tl.join(bit + width, bit + width + share), tl.join(share, rest - share)


@triton.jit
def encode_group(
    words,
    bit,
    budget,
    v,
    mask,
    KIND_16: tl.constexpr,
    node_shift,
    look_up,
    bounds,
    quad_ints,
    quad_look_up,
    records,
    ROWS: tl.constexpr,
):
    """Write the angle over 16 coordinates of a group [R, 16], the two over 8, and the four quads (SPEC 6.3, 6.4)."""
    p, q = halves(v)
    pairs, turns = p * p + q * q, turns_of(p, q)
    a, b = halves(pairs)
    turn_a, turn_b = halves(turns)
    places, quads = place_of(a, b, 1.0 * STEPS), a + b
    a, b = halves(quads)
    eights = a + b
    a16, b16 = halves(eights)
    bit, budget = encode_node(
        words,
        bit,
        budget,
        first_of(a16),
        first_of(b16),
        mask,
        KIND_16,
        WIDTH_OF_16,
        8 * CAP,
        1.0 * STEPS,
        look_up,
        bounds,
        node_shift,
    )
    mask2 = mask[:, None] & (tl.arange(0, 2) >= 0)[None, :]
    bit, budget = encode_node(
        words, bit, budget, a, b, mask2, KIND_16 + 1, WIDTH_OF_8, 4 * CAP, 1.0 * STEPS, look_up, bounds, node_shift
    )
    bit, budget = tl.reshape(bit, [ROWS, 4]), tl.reshape(budget, [ROWS, 4])
    cell = tl.load(quad_look_up + budget * STEPS + places).to(tl.int32)
    quad = quad_ints + len(QUAD_ROW.value) * budget
    record = records + len(RECORD.value) * (tl.load(quad + QUAD_ROW.value.first_record) + cell)
    n_a, n_b = tl.load(record + RECORD.value.n_a), tl.load(record + RECORD.value.n_b)
    sector_a = tl.minimum((turn_a * n_a.to(tl.float32)).to(tl.int32), n_a - 1)
    sector_b = tl.minimum((turn_b * n_b.to(tl.float32)).to(tl.int32), n_b - 1)
    code = cell * tl.load(quad + QUAD_ROW.value.codes) + sector_a * n_b + sector_b
    put_field(words, bit, code, mask[:, None] & (budget > 0))


@triton.jit
def encode_split(
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
    ORDER: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROOT_BUDGET: tl.constexpr,
    RADIUS_BITS: tl.constexpr,
    RADIUS_STEPS: tl.constexpr,
    LEVELS: tl.constexpr,
    ENERGY_SCALE: tl.constexpr,
    KIND_16: tl.constexpr,
    FIXES: tl.constexpr,
    TERMS: tl.constexpr,
    OPERAND: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Scaled rows, as ``three_parts`` gives them, times 2^-exponent -> their bits from ``bit0`` on.

    Rows are rotated twice: for the energies of all groups, which the nodes above them need, and for each group's own bits.
    """
    GROUPS: tl.constexpr = COLUMNS // GROUP
    energies = tl.zeros([ROWS, GROUPS], tl.float32)
    for group in range(ORDER // GROUP):
        v = rotated(coarse, fine, finest, rotation, group, columns, TERMS, COLUMNS, OPERAND)
        own = tl.sum(v * v, 1)
        energies = tl.where((tl.arange(0, GROUPS) == group)[None, :], own[:, None], energies)
    code = radius_code(tl.sum(energies, 1), exponent, RADIUS_BITS, RADIUS_STEPS, ENERGY_SCALE)
    put_field(words, bit0, code, mask)
    for group in range(ORDER // GROUP):
        v = rotated(coarse, fine, finest, rotation, group, columns, TERMS, COLUMNS, OPERAND)
        bit = bit0 + RADIUS_BITS
        budget = tl.full([ROWS], ROOT_BUDGET, tl.int32)
        for level in range(LEVELS):
            node = path + (group * LEVELS + level) * len(NODE.value)
            kind, right = tl.load(node + NODE.value.kind), tl.load(node + NODE.value.right) > 0
            low, middle = tl.load(node + NODE.value.first_group), tl.load(node + NODE.value.middle_group)
            high = tl.load(node + NODE.value.end_group)
            groups = tl.arange(0, GROUPS)[None, :]
            a = tl.sum(tl.where((groups >= low) & (groups < middle), energies, 0.0), 1)
            b = tl.sum(tl.where((groups >= middle) & (groups < high), energies, 0.0), 1)
            width = width_of(budget, tl.load(node + NODE.value.width_factor), tl.load(node + NODE.value.least_width))
            moved_grid = tl.load(grid_shift + kind)
            grid = (tl.full([ROWS], STEPS, tl.int32) << moved_grid).to(tl.float32)
            code = cell_of(place_of(a, b, grid), width, kind, moved_grid, look_up, bounds, FIXES)
            first = tl.full([ROWS], group, tl.int32) == low  # the node's first group writes its angle
            put_field(words, bit, code, mask & first & (width > 0))
            rest = budget - width
            moved = tl.load(node_shift + kind * CODES + (tl.full([ROWS], 1, tl.int32) << width) + code)
            portion = (rest * tl.load(node + NODE.value.share_factor)) >> SHARE_SHIFT
            share = share_of(rest, portion, moved, tl.load(node + NODE.value.cap_a), tl.load(node + NODE.value.cap_b))
            budget = tl.where(right, rest - share, share)
            bit += width + tl.where(right, share, 0)
        encode_group(words, bit, budget, v, mask, KIND_16, node_shift, look_up, bounds, quad_ints, quad_look_up, records, ROWS)
