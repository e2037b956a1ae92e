"""Law: the Triton kernels: a program codes one block (a chunk of tokens of one leading index), checksum included.

They are the portable GPU kernels: no trigonometry, no shared scratch, every preset, head_dim and dtype. A program walks
the block in tiles of ROWS vectors, and a tile group by group (16 coordinates): the rotation of a group is a matrix product
with a matrix of integers, exact in the decoder (sums below 2^24), and its nodes are vectors over the tile's rows. Arithmetic
that decides output bits is never fused: kernels are launched with ``enable_fp_fusion=False``. Where a kernel reads or
writes is told by the spans of ``device.py``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pqcodec import constants as c
from pqcodec.codings import look_ups as t
from pqcodec.kernels import spans as d

# Triton wants globals to say that they are constants.
SPLIT: tl.constexpr = tl.constexpr(c.CODING_SPLIT)
FLOAT16: tl.constexpr = tl.constexpr(c.DTYPE_FLOAT16)
BFLOAT16: tl.constexpr = tl.constexpr(c.DTYPE_BFLOAT16)
FLOAT32: tl.constexpr = tl.constexpr(c.DTYPE_FLOAT32)
GRID: tl.constexpr = tl.constexpr(float(c.GRID))
CAP: tl.constexpr = tl.constexpr(c.MAX_BUDGET_PER_COORDINATE)
MOST_WIDTH: tl.constexpr = tl.constexpr(c.MAX_ANGLE_BITS)
RADIUS_BIAS: tl.constexpr = tl.constexpr(c.RADIUS_BIAS)
RADIUS_SPLIT: tl.constexpr = tl.constexpr(c.RADIUS_SPLIT)
RADIUS_SHIFT: tl.constexpr = tl.constexpr(c.RADIUS_SHIFT)
SECOND_FACTOR: tl.constexpr = tl.constexpr(2.0**-c.RADIUS_SHIFT)
PRIME: tl.constexpr = tl.constexpr(c.CHECKSUM_PRIME)
PRIME_GAP: tl.constexpr = tl.constexpr((1 << 32) - c.CHECKSUM_PRIME)
CIRCLE: tl.constexpr = tl.constexpr(c.CIRCLE)
PHASE_SHIFT: tl.constexpr = tl.constexpr(c.PHASE_SHIFT)
PHASE_HALF: tl.constexpr = tl.constexpr(1 << (c.PHASE_SHIFT - 1))
PHASE_TURNS: tl.constexpr = tl.constexpr(c.PHASE_BITS - 2 * c.PHASE_TABLE_BITS)
EXPONENT_AT: tl.constexpr = tl.constexpr(d.OFFSET_EXPONENT_AT)
STEPS: tl.constexpr = tl.constexpr(t.STEPS)
WIDTHS: tl.constexpr = tl.constexpr(t.WIDTHS)
BOUNDS: tl.constexpr = tl.constexpr(t.BOUNDS)
CODES: tl.constexpr = tl.constexpr(t.CODES)
WIDTH_SHIFT: tl.constexpr = tl.constexpr(t.WIDTH_SHIFT)
SHARE_SHIFT: tl.constexpr = tl.constexpr(t.SHARE_SHIFT)
PATH_FIELDS: tl.constexpr = tl.constexpr(t.PATH_FIELDS)
NODE_16: tl.constexpr = tl.constexpr(t.division(8, 8).width)
NODE_8: tl.constexpr = tl.constexpr(t.division(4, 4).width)
FIELDS: tl.constexpr = tl.constexpr(d.FIELDS)
PAYLOAD: tl.constexpr = tl.constexpr(d.PAYLOAD)
STREAM: tl.constexpr = tl.constexpr(d.STREAM)
LEADING: tl.constexpr = tl.constexpr(d.LEADING)
CODED: tl.constexpr = tl.constexpr(d.CODED)
EXACT: tl.constexpr = tl.constexpr(d.EXACT)
FIRST_CHUNK: tl.constexpr = tl.constexpr(d.FIRST_CHUNK)
FIRST_LEAD: tl.constexpr = tl.constexpr(d.FIRST_LEAD)
LEADS: tl.constexpr = tl.constexpr(d.LEADS)
FIRST_TOKEN: tl.constexpr = tl.constexpr(d.FIRST_TOKEN)
LAST_TOKEN: tl.constexpr = tl.constexpr(d.LAST_TOKEN)
STRIDE: tl.constexpr = tl.constexpr(d.STRIDE)
STARTS: tl.constexpr = tl.constexpr(d.STARTS)
FLAGS: tl.constexpr = tl.constexpr(d.FLAGS)
POSITION: tl.constexpr = tl.constexpr(d.POSITION)
OFFSETS_AT: tl.constexpr = tl.constexpr(d.OFFSETS_AT)
EXACT_AT: tl.constexpr = tl.constexpr(d.EXACT_AT)

_MAGIC: tl.constexpr = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding and taking it away rounds to an integer, ties to even
_TINY: tl.constexpr = tl.constexpr(1e-37)
_FAR: tl.constexpr = tl.constexpr(40)  # rows beyond 2^40 or below 2^-40 are scaled, so that squares stay in float32
_LARGEST: tl.constexpr = tl.constexpr(3.4028234663852886e38)


# -- which block ---------------------------------------------------------------------------------------------------
@triton.jit
def find_span(firsts, index, SEARCH: tl.constexpr):
    """The last span whose first block (or lead) is not behind ``index``; SEARCH = bits of the number of spans."""
    low = 0
    for i in tl.static_range(SEARCH):
        step = 1 << (SEARCH - 1 - i)
        low = tl.where(tl.load(firsts + low + step) <= index, low + step, low)
    return low


# -- bits ------------------------------------------------------------------------------------------------------------
@triton.jit
def read(words, bit, width, mask):
    """A field of ``width`` <= 28 bits; reads no word that the field does not touch."""
    shift = (bit & 31).to(tl.uint32)
    at = words + (bit >> 5)
    low = tl.load(at, mask=mask & (width > 0), other=0)
    high = tl.load(at + 1, mask=mask & ((bit & 31) + width > 32), other=0)
    value = (low >> shift) | ((high << 1) << (31 - shift))
    return (value & ((tl.full(width.shape, 1, tl.uint32) << width.to(tl.uint32)) - 1)).to(tl.int32)


@triton.jit
def write(words, bit, value, mask):
    """Or a field into words that were zero."""
    shift = (bit & 31).to(tl.uint32)
    at = words + (bit >> 5)
    bits = value.to(tl.uint32)
    high = (bits >> 1) >> (31 - shift)
    tl.atomic_or(at, bits << shift, mask=mask, sem="relaxed")
    tl.atomic_or(at + 1, high, mask=mask & (high != 0), sem="relaxed")


@triton.jit
def word_sum(words, skew, count, keys, TILE: tl.constexpr):
    """Checksum (SPEC 4.2) of ``count`` bytes that begin ``skew`` bytes behind an aligned word."""
    total = tl.zeros([TILE], tl.uint64)
    shift = (skew * 8).to(tl.uint32)
    for first in range(0, (count + 3) // 4, TILE):
        i = first + tl.arange(0, TILE)
        left = count - 4 * i
        low = tl.load(words + i, mask=left > 0, other=0, volatile=True)
        high = tl.load(words + i + 1, mask=left > 4 - skew, other=0, volatile=True)
        word = tl.where(skew == 0, low, (low >> shift) | ((high << 1) << (31 - shift)))
        kept = tl.where(left >= 4, 0, 32 - 8 * tl.maximum(left, 0)).to(tl.uint32)
        word = tl.where(left > 0, (word << (kept & 31)) >> (kept & 31), 0)
        product = word.to(tl.uint64) * tl.load(keys + 1 + i, mask=left > 0, other=0).to(tl.uint64)
        total += (product & 0xFFFFFFFF) + (product >> 32) * PRIME_GAP
    return reduced(total, count, keys)


@triton.jit
def reduced(total, count, keys):
    """Partial sums below 2^53 and the number of bytes -> the checksum."""
    total = (total & 0xFFFFFFFF) + (total >> 32) * PRIME_GAP
    length = tl.load(keys).to(tl.uint64) * count.to(tl.uint64)
    length = (length & 0xFFFFFFFF) + (length >> 32) * PRIME_GAP
    return ((tl.sum(total) + length) % PRIME).to(tl.uint32)


# -- numbers ---------------------------------------------------------------------------------------------------------
@triton.jit
def load_rows(start, tokens, stride, columns, mask, DTYPE: tl.constexpr):
    """Stored numbers at ``start`` (an address), tokens [R] times ``stride`` elements -> float32 [R, columns]."""
    at = tokens.to(tl.int64)[:, None] * stride + columns[None, :]
    if DTYPE == FLOAT32:
        x = tl.load(start.to(tl.pointer_type(tl.float32)) + at, mask=mask, other=0.0)
    else:
        raw = tl.load(start.to(tl.pointer_type(tl.uint16)) + at, mask=mask, other=0)
        if DTYPE == FLOAT16:
            x = raw.to(tl.float16, bitcast=True).to(tl.float32)
        else:
            x = (raw.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return x


@triton.jit
def store_rows(start, tokens, stride, columns, y, mask, DTYPE: tl.constexpr):
    """float32 within the dtype's range -> stored numbers, ties to even."""
    at = tokens.to(tl.int64)[:, None] * stride + columns[None, :]
    if DTYPE == FLOAT32:
        tl.store(start.to(tl.pointer_type(tl.float32)) + at, y, mask=mask)
    else:
        if DTYPE == FLOAT16:
            raw = y.to(tl.float16).to(tl.uint16, bitcast=True)
        else:
            bits = y.to(tl.uint32, bitcast=True)
            raw = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.uint16)
        tl.store(start.to(tl.pointer_type(tl.uint16)) + at, raw, mask=mask)


@triton.jit
def power_of_two(exponent):
    """2^exponent for -126 .. 127, float32."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def scaled(mantissa, exponent):
    """mantissa * 2^exponent where both are normal: the exponent's field is added."""
    return (mantissa.to(tl.int32, bitcast=True) + (exponent << 23)).to(tl.float32, bitcast=True)


# -- offsets ---------------------------------------------------------------------------------------------------------
@triton.jit
def phase_parts(position, frequency, phases):
    """cos and sin of a token's turn (SPEC 8.2); nothing is fused."""
    turn = (((position * frequency) >> PHASE_TURNS) & 0xFFFF).to(tl.int32)
    high, low = turn >> 8, turn & 255
    cos_h, sin_h = tl.load(phases + high), tl.load(phases + 256 + high)
    cos_l, sin_l = tl.load(phases + 512 + low), tl.load(phases + 768 + low)
    return cos_h * cos_l - sin_h * sin_l, sin_h * cos_l + cos_h * sin_l


@triton.jit
def load_offset(stream, offsets_at, lead, columns, wanted, HEAD_DIM: tl.constexpr):
    """Stored offsets of some columns, float32: half * 2^exponent, exact (SPEC 8.1)."""
    low = tl.load((stream + EXPONENT_AT).to(tl.pointer_type(tl.int16))).to(tl.int32)
    at = (stream + offsets_at + lead * (2 * HEAD_DIM + 4)).to(tl.pointer_type(tl.uint16))
    half = tl.load(at + columns, mask=wanted, other=0).to(tl.float16, bitcast=True).to(tl.float32)
    first = low // 2
    return half * power_of_two(first) * power_of_two(low - first)


@triton.jit
def turned(own, other, sign, cos, sin):
    """A channel of a pair at a token's angle (SPEC 8.3): own cos +- other sin, each operation rounded."""
    return own * cos + sign * (other * sin)


@triton.jit
def offset_rows(
    span, lead, tokens, columns, wanted, partner, pair, sign, frequencies, phases, HEAD_DIM: tl.constexpr, ROPE: tl.constexpr
):
    """The offset of each token: float32 [R, columns] ([1, columns] without RoPE); tokens from the tensor's first."""
    stream, offsets_at = tl.load(span + STREAM), tl.load(span + OFFSETS_AT)
    own = load_offset(stream, offsets_at, lead, columns, wanted, HEAD_DIM)[None, :]
    if ROPE:
        partners, pairs = tl.load(partner + columns), tl.load(pair + columns)
        other = load_offset(stream, offsets_at, lead, partners, wanted, HEAD_DIM)[None, :]
        turns = pairs >= 0
        frequency = tl.load(frequencies + tl.maximum(pairs, 0))
        position = tokens.to(tl.int64)[:, None] + tl.load(span + POSITION)
        cos, sin = phase_parts(position, frequency[None, :], phases)
        own = tl.where(turns[None, :], turned(own, other, tl.load(sign + columns)[None, :], cos, sin), own)
    return own


# -- the tree ----------------------------------------------------------------------------------------------------------
@triton.jit
def width_of(budget, factor, least):
    """The angle's bits (SPEC 6.3)."""
    width = (budget * factor) >> WIDTH_SHIFT
    return tl.minimum(tl.minimum(tl.maximum(width, least), MOST_WIDTH), budget)


@triton.jit
def share_of(rest, portion, moved, cap_a, cap_b):
    """Bits of the left child (SPEC 6.3)."""
    return tl.minimum(tl.maximum(portion + moved, tl.maximum(rest - cap_b, 0)), tl.minimum(rest, cap_a))


@triton.jit
def decode_node(words, bit, budget, radius, mask, entry, factor, cap, node_cos, node_sin, node_shift):
    """A node of equal children: both children's first bits, budgets and radii, joined in a last dimension of two."""
    width = width_of(budget, factor, 1)
    one = tl.full(width.shape, 1, tl.int32) << width
    at = entry + one + read(words, bit, width, mask)
    rest = budget - width
    share = share_of(rest, rest >> 1, tl.load(node_shift + at), cap, cap)
    bits = tl.join(bit + width, bit + width + share)
    return bits, tl.join(share, rest - share), tl.join(radius * tl.load(node_cos + at), radius * tl.load(node_sin + at))


@triton.jit
def phase_of(sector, step):
    turn = (2 * sector + 1).to(tl.uint32) * step.to(tl.uint32) + PHASE_HALF
    return ((turn >> PHASE_SHIFT) & (CIRCLE - 1)).to(tl.int32)


@triton.jit
def decode_quads(words, bit, budget, radius, mask, quad_ints, quad_floats, records, record_floats, circle):
    """Quads [R, 4] -> their coordinates on the grid, float32 [R, 16] (SPEC 6.4, 6.5)."""
    code = read(words, bit, budget, mask)
    codes, first, last = (
        tl.load(quad_ints + 3 * budget),
        tl.load(quad_ints + 3 * budget + 1),
        tl.load(quad_ints + 3 * budget + 2),
    )
    cell = (code.to(tl.float32) * tl.load(quad_floats + budget)).to(tl.int32)  # off by one at most
    left = code - cell * codes
    cell = tl.minimum(cell + (left >= codes).to(tl.int32) - (left < 0).to(tl.int32), last)
    left = code - cell * codes
    record = first + cell
    n_b, step_a, step_b = (
        tl.load(records + 4 * record + 1),
        tl.load(records + 4 * record + 2),
        tl.load(records + 4 * record + 3),
    )
    cos, sin = tl.load(record_floats + 3 * record), tl.load(record_floats + 3 * record + 1)
    sector = ((left.to(tl.float32) + 0.5) * tl.load(record_floats + 3 * record + 2)).to(tl.int32)  # exact below 2^21
    phase_a, phase_b = phase_of(sector, step_a), phase_of(left - sector * n_b, step_b)
    p, q = cos * tl.load(circle + phase_a), cos * tl.load(circle + CIRCLE + phase_a)
    r, s = sin * tl.load(circle + phase_b), sin * tl.load(circle + CIRCLE + phase_b)
    x = tl.join(tl.join(radius * p, radius * r), tl.join(radius * q, radius * s))
    return (tl.reshape(x, [x.shape[0], 16]) + _MAGIC) - _MAGIC


@triton.jit
def place_of(a, b, grid):
    """b's share of the energy a + b on a sin^2 grid."""
    return tl.minimum(b / (a + b + _TINY) * grid, grid - 1.0).to(tl.int32)


@triton.jit
def cell_of(place, width, kind, grid_shift, look_up, bounds, FIXES: tl.constexpr):
    """The cell of a place on the kind's sin^2 grid."""
    code = tl.load(look_up + (kind * WIDTHS + width) * STEPS + (place >> grid_shift)).to(tl.int32)
    at = bounds + (kind * WIDTHS + width) * BOUNDS + 1
    for _ in tl.static_range(FIXES):
        code += (tl.load(at + code) <= place).to(tl.int32)
    return code


@triton.jit
def encode_node(words, bit, budget, a, b, mask, kind, factor, cap, grid, look_up, bounds, node_shift):
    """A node of equal children on the coarse grid: writes its angle, gives both children's first bits and budgets."""
    width = width_of(budget, factor, 1)
    code = cell_of(place_of(a, b, grid), width, kind, 0, look_up, bounds, 0)
    write(words, bit, code, mask)
    rest = budget - width
    moved = tl.load(node_shift + kind * CODES + (tl.full(width.shape, 1, tl.int32) << width) + code)
    share = share_of(rest, rest >> 1, moved, cap, cap)
    return tl.join(bit + width, bit + width + share), tl.join(share, rest - share)


@triton.jit
def turns_of(x, y):
    """Angle of (x, y) in turns, 0 .. 1: a polynomial, good to 2e-8."""
    a, b = tl.abs(x), tl.abs(y)
    q = tl.minimum(a, b) / (tl.maximum(a, b) + _TINY)
    z = q * q
    t = -0.00074305835 * z + 0.00384616852
    t = t * z - 0.00944856755
    t = t * z + 0.0157660429
    t = t * z - 0.0223080879
    t = t * z + 0.0317820252
    t = t * z - 0.0530494615
    t = (t * z + 0.159154927) * q
    t = tl.where(b > a, 0.25 - t, t)
    t = tl.where(x < 0, 0.5 - t, t)
    return tl.where(y < 0, 1.0 - t, t)


@triton.jit
def halves(x):
    """[R, 2n] -> its even and odd columns, [R, n] each ([R] where n is 1)."""
    return tl.split(tl.reshape(x, [x.shape[0], x.shape[1] // 2, 2]))


@triton.jit
def first_of(x):
    """[R, 1] -> [R]."""
    return tl.reshape(x, [x.shape[0]])


@triton.jit
def radius_code(energy, exponent, RADIUS_STEPS: tl.constexpr, LARGEST_CODE: tl.constexpr, ENERGY_SCALE: tl.constexpr):
    """Code of sqrt(energy / ENERGY_SCALE) * 2^-exponent; 0 for the zero vector (SPEC 6.1)."""
    bits = energy.to(tl.int32, bitcast=True)
    power = (bits >> 23) - 127
    mantissa = ((bits & 0x7FFFFF) | 0x3F800000).to(tl.float32, bitcast=True) / ENERGY_SCALE
    fraction = 0.5 * tl.log2(mantissa) + 0.5 * (power & 1).to(tl.float32)
    whole = (power >> 1) - exponent + RADIUS_BIAS
    code = whole * RADIUS_STEPS + tl.floor(fraction * RADIUS_STEPS + 0.5).to(tl.int32) + 1
    code = tl.minimum(tl.maximum(code, 1), LARGEST_CODE)
    return tl.where(energy > 0, code, 0)


# -- blocks ------------------------------------------------------------------------------------------------------------
@triton.jit
def block_place(spans, firsts, index, ROW_BYTES, CHUNK, SEARCH: tl.constexpr):
    """Span, chunk, lead, tokens of the block, its address's aligned word and the bytes that it begins behind it."""
    which = find_span(firsts, index, SEARCH)
    span = spans + which * FIELDS
    local = index - tl.load(firsts + which)
    leads = tl.load(span + LEADS)
    chunk = tl.load(span + FIRST_CHUNK) + local // leads
    lead = tl.load(span + FIRST_LEAD) + local % leads
    tokens = tl.minimum(tl.load(span + CODED) - chunk * CHUNK, CHUNK)
    start = (
        tl.load(span + PAYLOAD) + chunk * tl.load(span + LEADING) * (CHUNK * ROW_BYTES + 4) + lead * (tokens * ROW_BYTES + 4)
    )
    skew = (start & 3).to(tl.int32)
    return span, chunk, lead, tokens.to(tl.int32), (start - skew).to(tl.pointer_type(tl.uint32)), skew


@triton.jit
def clear_blocks(spans, firsts, row_bytes, chunk_tokens, TILE: tl.constexpr, SEARCH: tl.constexpr):
    """Zeros over one block and its checksum."""
    _span, _chunk, _lead, tokens, words, skew = block_place(
        spans, firsts, tl.program_id(0).to(tl.int64), row_bytes, chunk_tokens, SEARCH
    )
    start = words.to(tl.pointer_type(tl.uint8)) + skew
    count = tokens * row_bytes + 4
    for first in range(0, count, TILE):
        i = first + tl.arange(0, TILE)
        tl.store(start + i, tl.zeros([TILE], tl.uint8), mask=i < count)


@triton.jit
def decode_blocks(
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
    ROWS: tl.constexpr,
    SEARCH: tl.constexpr,
    SUM_TILE: tl.constexpr,
):
    """Check one block, and decode the tokens of it that its span wants."""
    index = tl.program_id(0).to(tl.int64)
    span, chunk, lead, tokens, words, skew = block_place(spans, firsts, index, ROW_BYTES, CHUNK, SEARCH)
    count = tokens * ROW_BYTES
    end = (skew + count) * 8 + tl.zeros([1], tl.int32)
    always = end >= 0
    stored = (read(words, end, tl.full([1], 16, tl.int32), always)).to(tl.uint32)
    stored |= read(words, end + 16, tl.full([1], 16, tl.int32), always).to(tl.uint32) << 16
    good = word_sum(words, skew, count, keys, SUM_TILE)
    tl.store(flags + index + tl.arange(0, 1), (stored != good).to(tl.int32))

    begin = tl.load(span + EXACT) + chunk * CHUNK  # the block's first token
    low = tl.maximum(tl.load(span + FIRST_TOKEN) - begin, 0).to(tl.int32)
    high = tl.minimum(tl.load(span + LAST_TOKEN) - begin, tokens.to(tl.int64)).to(tl.int32)
    start = tl.load(starts + tl.load(span + STARTS) + lead - tl.load(span + FIRST_LEAD))
    stride = tl.load(span + STRIDE)
    columns = tl.arange(0, COLUMNS)
    inside = columns < HEAD_DIM
    for first_row in range(low, high, ROWS):
        row = first_row + tl.arange(0, ROWS)
        mask = row < high
        bit0 = skew * 8 + row * (8 * ROW_BYTES)
        acc = tl.zeros([ROWS, COLUMNS], tl.float32)
        if CODING == SPLIT:
            code = read(words, bit0, tl.full([ROWS], RADIUS_BITS, tl.int32), mask)
            step = tl.maximum(code, 1) - 1
            octave = step // RADIUS_STEPS
            exponent = octave - RADIUS_BIAS
            mantissa = tl.load(mantissas + step - octave * RADIUS_STEPS)
            for group in range(ORDER // 16):
                bit = bit0 + RADIUS_BITS
                budget = tl.full([ROWS], ROOT_BUDGET, tl.int32)
                radius = tl.full([ROWS], GRID, tl.float32)
                for level in range(LEVELS):
                    node = path + (group * LEVELS + level) * PATH_FIELDS
                    right = tl.load(node + 6) > 0
                    width = width_of(budget, tl.load(node), tl.load(node + 2))
                    one = tl.full([ROWS], 1, tl.int32) << width
                    at = tl.load(node + 5) * CODES + one + read(words, bit, width, mask)
                    rest = budget - width
                    portion = (rest * tl.load(node + 1)) >> SHARE_SHIFT
                    share = share_of(rest, portion, tl.load(node_shift + at), tl.load(node + 3), tl.load(node + 4))
                    radius *= tl.load(tl.where(right, node_sin, node_cos) + at)
                    budget = tl.where(right, rest - share, share)
                    bit += width + tl.where(right, share, 0)
                entry = KIND_16 * CODES
                bit, budget, radius = decode_node(
                    words, bit, budget, radius, mask, entry, NODE_16, 8 * CAP, node_cos, node_sin, node_shift
                )
                mask8 = mask[:, None] & (tl.arange(0, 2) >= 0)[None, :]
                bit, budget, radius = decode_node(
                    words, bit, budget, radius, mask8, entry + CODES, NODE_8, 4 * CAP, node_cos, node_sin, node_shift
                )
                bit, budget = tl.reshape(bit, [ROWS, 4]), tl.reshape(budget, [ROWS, 4])
                radius = tl.reshape(radius, [ROWS, 4])
                mask4 = mask[:, None] & (tl.arange(0, 4) >= 0)[None, :]
                v = decode_quads(words, bit, budget, radius, mask4, quad_ints, quad_floats, records, record_floats, circle)
                at = (group * 16 + tl.arange(0, 16))[:, None] * COLUMNS + columns[None, :]
                acc = tl.dot(v.to(tl.float16), tl.load(rotation + at), acc)
            nothing = code == 0
        else:
            largest = tl.zeros([ROWS], tl.float32)
            for group in range(ORDER // 16):
                largest = tl.maximum(largest, paper_radius(words, bit0 + 62 * group, mask))
            bits = largest.to(tl.int32, bitcast=True)
            power = tl.where(largest > 0, (bits >> 23) - 126, 0)
            for group in range(ORDER // 16):
                bit = bit0 + 62 * group
                radius = paper_radius(words, bit, mask) * power_of_two(11 - power)
                v = paper_coordinates(words, bit + 16, radius, mask, paper, circle)
                at = (group * 16 + tl.arange(0, 16))[:, None] * COLUMNS + columns[None, :]
                acc = tl.dot(v.to(tl.float16), tl.load(rotation + at), acc)
            exponent = power + radius_exponent
            mantissa = tl.load(mantissas + row * 0)
            nothing = row < 0
        small = exponent < RADIUS_SPLIT
        first_factor = tl.where(nothing, 0.0, scaled(mantissa, exponent + tl.where(small, RADIUS_SHIFT, 0)))
        second_factor = tl.where(small, SECOND_FACTOR, 1.0)
        y = acc * first_factor[:, None] * second_factor[:, None] + 0.0
        token = begin + row
        if OFFSETS:
            y += offset_rows(span, lead, token, columns, inside, partner, pair, sign, frequencies, phases, HEAD_DIM, ROPE)
        y = tl.minimum(tl.maximum(y, -limit), limit)
        target = token - tl.load(span + FIRST_TOKEN)
        store_rows(start, target, stride, columns, y, mask[:, None] & inside[None, :], DTYPE)


@triton.jit
def encode_blocks(
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
    GROUPS: tl.constexpr,
    LARGEST_CODE: tl.constexpr,
    ENERGY_SCALE: tl.constexpr,
    KIND_16: tl.constexpr,
    FIXES: tl.constexpr,
    OFFSETS: tl.constexpr,
    ROPE: tl.constexpr,
    TERMS: tl.constexpr,
    OPERAND: tl.constexpr,
    ROWS: tl.constexpr,
    SEARCH: tl.constexpr,
    SUM_TILE: tl.constexpr,
):
    """Encode one block into bytes that were zero; its span's flag counts the vectors with NaN or Inf, coded as zeros."""
    index = tl.program_id(0).to(tl.int64)
    span, chunk, lead, tokens, words, skew = block_place(spans, firsts, index, ROW_BYTES, CHUNK, SEARCH)
    begin = tl.load(span + EXACT) + chunk * CHUNK
    start = tl.load(starts + tl.load(span + STARTS) + lead)
    stride = tl.load(span + STRIDE)
    columns = tl.arange(0, COLUMNS)
    inside = columns < HEAD_DIM
    bad = tl.zeros([ROWS], tl.int32)
    for first_row in range(0, tokens, ROWS):
        row = first_row + tl.arange(0, ROWS)
        mask = row < tokens
        x = load_rows(start, begin + row, stride, columns, mask[:, None] & inside[None, :], DTYPE)
        finite = tl.max((tl.abs(x) > _LARGEST).to(tl.int32) | (x != x).to(tl.int32), 1) == 0
        bad += (mask & (finite == 0)).to(tl.int32)
        x = tl.where(finite[:, None], x, 0.0)
        if OFFSETS:
            o = offset_rows(span, lead, begin + row, columns, inside, partner, pair, sign, frequencies, phases, HEAD_DIM, ROPE)
            x = tl.where((finite & mask)[:, None], tl.minimum(tl.maximum(x - o, -_LARGEST), _LARGEST), 0.0)
        exponent = (tl.max(tl.abs(x), 1).to(tl.int32, bitcast=True) >> 23) - 127
        exponent = tl.where(tl.abs(exponent) > _FAR, -tl.minimum(tl.maximum(exponent, -126), 126), 0)
        x *= power_of_two(exponent)[:, None]
        one = x.to(tl.bfloat16)
        two = one  # float32 is the sum of three bfloat16, float16 of two: the products with R's entries are exact
        three = one
        if TERMS > 1:
            left = x - one.to(tl.float32)
            two = left.to(tl.bfloat16)
            three = (left - two.to(tl.float32)).to(tl.bfloat16)
        bit0 = skew * 8 + row * (8 * ROW_BYTES)
        if CODING == SPLIT:
            energies = tl.zeros([ROWS, GROUPS], tl.float32)
            for group in range(ORDER // 16):
                v = rotated(one, two, three, rotation, group, columns, TERMS, COLUMNS, OPERAND)
                own = tl.sum(v * v, 1)
                energies = tl.where((tl.arange(0, GROUPS) == group)[None, :], own[:, None], energies)
            code = radius_code(tl.sum(energies, 1), exponent, RADIUS_STEPS, LARGEST_CODE, ENERGY_SCALE)
            write(words, bit0, code, mask)
            for group in range(ORDER // 16):
                v = rotated(one, two, three, rotation, group, columns, TERMS, COLUMNS, OPERAND)
                bit = bit0 + RADIUS_BITS
                budget = tl.full([ROWS], ROOT_BUDGET, tl.int32)
                for level in range(LEVELS):
                    node = path + (group * LEVELS + level) * PATH_FIELDS
                    kind, right = tl.load(node + 5), tl.load(node + 6) > 0
                    low, middle, high = tl.load(node + 7), tl.load(node + 8), tl.load(node + 9)
                    groups = tl.arange(0, GROUPS)[None, :]
                    a = tl.sum(tl.where((groups >= low) & (groups < middle), energies, 0.0), 1)
                    b = tl.sum(tl.where((groups >= middle) & (groups < high), energies, 0.0), 1)
                    width = width_of(budget, tl.load(node), tl.load(node + 2))
                    moved_grid = tl.load(grid_shift + kind)
                    grid = (tl.full([ROWS], STEPS, tl.int32) << moved_grid).to(tl.float32)
                    code = cell_of(place_of(a, b, grid), width, kind, moved_grid, look_up, bounds, FIXES)
                    first = tl.full([ROWS], group, tl.int32) == low  # the node's first group writes its angle
                    write(words, bit, code, mask & first & (width > 0))
                    rest = budget - width
                    moved = tl.load(node_shift + kind * CODES + (tl.full([ROWS], 1, tl.int32) << width) + code)
                    portion = (rest * tl.load(node + 1)) >> SHARE_SHIFT
                    share = share_of(rest, portion, moved, tl.load(node + 3), tl.load(node + 4))
                    budget = tl.where(right, rest - share, share)
                    bit += width + tl.where(right, share, 0)
                encode_group(
                    words, bit, budget, v, mask, KIND_16, node_shift, look_up, bounds, quad_ints, quad_look_up, records, ROWS
                )
        else:
            for group in range(ORDER // 16):
                v = rotated(one, two, three, rotation, group, columns, TERMS, COLUMNS, OPERAND)
                encode_paper(words, bit0 + 62 * group, v, exponent, radius_exponent, mask, paper, ORDER)
    tl.atomic_add(flags + tl.load(span + FLAGS), tl.sum(bad))
    tl.debug_barrier()
    total = word_sum(words, skew, tokens * ROW_BYTES, keys, SUM_TILE)
    end = (skew + tokens * ROW_BYTES) * 8 + tl.zeros([1], tl.int32)
    write(words, end, total + tl.zeros([1], tl.uint32), end >= 0)


@triton.jit
def rotated(one, two, three, rotation, group, columns, TERMS: tl.constexpr, COLUMNS: tl.constexpr, OPERAND: tl.constexpr):
    """Sixteen rotated coordinates of each row, float32 [R, 16], times sqrt(ENERGY_SCALE).

    R's entries are 1 and -1, or of two rounds even: bfloat16 holds those up to 512, 16 standard deviations at order 1,024.
    """
    at = (group * 16 + tl.arange(0, 16))[None, :] * COLUMNS + columns[:, None]
    signs = tl.load(rotation + at).to(OPERAND)
    v = tl.dot(one.to(OPERAND), signs)
    if TERMS > 1:
        v = tl.dot(two.to(OPERAND), signs, v)
        v = tl.dot(three.to(OPERAND), signs, v)
    return v


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
    """The 16-node, the two 8-nodes and the four quads of a group [R, 16] (SPEC 6.3, 6.4)."""
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
        NODE_16,
        8 * CAP,
        1.0 * STEPS,
        look_up,
        bounds,
        node_shift,
    )
    mask2 = mask[:, None] & (tl.arange(0, 2) >= 0)[None, :]
    bit, budget = encode_node(
        words, bit, budget, a, b, mask2, KIND_16 + 1, NODE_8, 4 * CAP, 1.0 * STEPS, look_up, bounds, node_shift
    )
    bit, budget = tl.reshape(bit, [ROWS, 4]), tl.reshape(budget, [ROWS, 4])
    cell = tl.load(quad_look_up + budget * STEPS + places).to(tl.int32)
    record = tl.load(quad_ints + 3 * budget + 1) + cell
    n_a, n_b = tl.load(records + 4 * record), tl.load(records + 4 * record + 1)
    sector_a = tl.minimum((turn_a * n_a.to(tl.float32)).to(tl.int32), n_a - 1)
    sector_b = tl.minimum((turn_b * n_b.to(tl.float32)).to(tl.int32), n_b - 1)
    code = cell * tl.load(quad_ints + 3 * budget) + sector_a * n_b + sector_b
    write(words, bit, code, mask[:, None] & (budget > 0))


# -- paper coding (SPEC 7) ---------------------------------------------------------------------------------------------
@triton.jit
def paper_radius(words, bit, mask):
    """A block's radius, float32: the sign is ignored, NaN counts as 0, infinity as the largest float16."""
    bits = read(words, bit, tl.full(bit.shape, 15, tl.int32), mask)
    bits = tl.where(bits > 0x7C00, 0, tl.minimum(bits, 0x7BFF))
    return bits.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def paper_level(words, bit, radius, mask, cos, sin, COUNT: tl.constexpr):
    """Radii [R, COUNT] -> [R, 2 COUNT], by two bits each."""
    index = tl.arange(0, COUNT)[None, :]
    field = bit[:, None] + 2 * index
    code = read(words, field, tl.full(field.shape, 2, tl.int32), mask[:, None] & (index >= 0))
    both = tl.join(radius * tl.load(cos + code), radius * tl.load(sin + code))
    return tl.reshape(both, [both.shape[0], 2 * COUNT])


@triton.jit
def paper_coordinates(words, bit, radius, mask, paper, circle):
    """Sixteen coordinates on the grid; ``paper``: float32 [2, 3, 4], cos and sin of levels 2 to 4."""
    x = paper_level(words, bit, radius[:, None], mask, paper + 8, paper + 20, 1)
    x = paper_level(words, bit + 2, x, mask, paper + 4, paper + 16, 2)
    x = paper_level(words, bit + 6, x, mask, paper, paper + 12, 4)
    index = tl.arange(0, 8)[None, :]
    field = bit[:, None] + 14 + 4 * index
    code = read(words, field, tl.full(field.shape, 4, tl.int32), mask[:, None] & (index >= 0))
    phase = (2 * code + 1) * (CIRCLE // 32)
    x = tl.join(x * tl.load(circle + phase), x * tl.load(circle + CIRCLE + phase))
    return (tl.reshape(x, [x.shape[0], 16]) + _MAGIC) - _MAGIC


@triton.jit
def paper_cells(a, b, bounds):
    """Which of the four cells of a level: squared bounds in tan psi [3]."""
    code = (b >= tl.load(bounds) * a).to(tl.int32)
    code += (b >= tl.load(bounds + 1) * a).to(tl.int32)
    code += (b >= tl.load(bounds + 2) * a).to(tl.int32)
    return tl.where(a + b > 0, code, 0)


@triton.jit
def encode_paper(words, bit, v, exponent, radius_exponent, mask, paper, ORDER: tl.constexpr):
    """A block of 16: radius, levels 4, 3, 2 and 1; ``paper`` + 24: squared bounds [3, 3] of levels 2 to 4."""
    p, q = halves(v)
    code1 = tl.minimum((turns_of(p, q) * 16.0).to(tl.int32), 15)
    a, b = halves(p * p + q * q)
    code2 = paper_cells(a, b, paper + 24)
    a, b = halves(a + b)
    code3 = paper_cells(a, b, paper + 27)
    a, b = halves(a + b)
    code4 = paper_cells(a, b, paper + 30)
    energy = first_of(a + b)
    low = -exponent - radius_exponent
    first = low // 2
    radius = tl.sqrt(energy / ORDER) * power_of_two(first) * power_of_two(low - first)
    half = tl.minimum(radius, 65504.0).to(tl.float16).to(tl.uint16, bitcast=True).to(tl.int32)
    write(words, bit, half, mask)
    write_run(words, bit + 16, code4, mask, 2, 1)
    write_run(words, bit + 18, code3, mask, 2, 2)
    write_run(words, bit + 22, code2, mask, 2, 4)
    write_run(words, bit + 30, code1, mask, 4, 8)


@triton.jit
def write_run(words, bit, codes, mask, WIDTH: tl.constexpr, COUNT: tl.constexpr):
    """Fields of one width, codes [R, COUNT], side by side: at most 32 bits, one field."""
    value = tl.sum(codes.to(tl.uint32) << (WIDTH * tl.arange(0, COUNT)[None, :]).to(tl.uint32), 1)
    write(words, bit, value, mask)


# -- side sections -------------------------------------------------------------------------------------------------
@triton.jit
def sum_tokens(
    spans,
    firsts,
    starts,
    sums,
    partner,
    pair,
    sign,
    frequencies,
    phases,
    DTYPE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROPE: tl.constexpr,
    MEAN_TOKENS: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    SEARCH: tl.constexpr,
):
    """Sums of a part of the sampled tokens of one lead, turned back under RoPE: float64 sums [leads, PARTS, COLUMNS]."""
    index = tl.program_id(0).to(tl.int64)
    which = find_span(firsts, index, SEARCH)
    span = spans + which * FIELDS
    lead = index - tl.load(firsts + which)
    coded, exact = tl.load(span + CODED), tl.load(span + EXACT)
    step = tl.maximum((coded + MEAN_TOKENS - 1) // MEAN_TOKENS, 1)
    count = (coded + step - 1) // step
    start, stride = tl.load(starts + tl.load(span + STARTS) + lead), tl.load(span + STRIDE)
    columns = tl.arange(0, COLUMNS)
    inside = columns < HEAD_DIM
    part = tl.program_id(1)
    total = tl.zeros([COLUMNS], tl.float64)
    for first in range(part * ROWS, count, PARTS * ROWS):
        sample = first + tl.arange(0, ROWS)
        token = exact + sample * step
        mask = (sample < count)[:, None] & inside[None, :]
        x = load_rows(start, token, stride, columns, mask, DTYPE)
        finite = tl.max((tl.abs(x) > _LARGEST).to(tl.int32) | (x != x).to(tl.int32), 1) == 0
        back = tl.where(finite[:, None], x, 0.0).to(tl.float64)
        if ROPE:
            partners, pairs = tl.load(partner + columns), tl.load(pair + columns)
            other = load_rows(start, token, stride, partners, mask, DTYPE)
            other = tl.where(finite[:, None], other, 0.0).to(tl.float64)
            frequency = tl.load(frequencies + tl.maximum(pairs, 0))
            position = token[:, None] + tl.load(span + POSITION)
            cos, sin = phase_parts(position, frequency[None, :], phases)
            other = other * sin.to(tl.float64) * tl.load(sign + columns).to(tl.float64)[None, :]
            back = tl.where((pairs >= 0)[None, :], back * cos.to(tl.float64) - other, back)
        total += tl.sum(back, 0)
    tl.store(sums + (index * PARTS + part) * COLUMNS + columns, total)


@triton.jit
def largest_means(
    spans, firsts, sums, largest, MEAN_TOKENS: tl.constexpr, COLUMNS: tl.constexpr, PARTS: tl.constexpr, SEARCH: tl.constexpr
):
    """Means of one lead over sums [lead, 0], and the largest of a span's as float32 bits over largest [span]."""
    index = tl.program_id(0).to(tl.int64)
    which = find_span(firsts, index, SEARCH)
    coded = tl.load(spans + which * FIELDS + CODED)
    step = tl.maximum((coded + MEAN_TOKENS - 1) // MEAN_TOKENS, 1)
    count = tl.maximum((coded + step - 1) // step, 1)
    columns = tl.arange(0, COLUMNS)
    total = tl.zeros([COLUMNS], tl.float64)
    for part in range(PARTS):
        total += tl.load(sums + (index * PARTS + part) * COLUMNS + columns)
    mean = total / count.to(tl.float64)
    tl.store(sums + index * PARTS * COLUMNS + columns, mean)
    tl.atomic_max(largest + which, tl.max(tl.abs(mean).to(tl.float32)).to(tl.int32, bitcast=True))


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
    SEARCH: tl.constexpr,
):
    """One lead's means -> its section of halves (SPEC 8.1), and, by the span's first lead, the header's exponent."""
    index = tl.program_id(0).to(tl.int64)
    which = find_span(firsts, index, SEARCH)
    span = spans + which * FIELDS
    lead = index - tl.load(firsts + which)
    stream = tl.load(span + STREAM)
    bits = tl.load(largest + which)
    most = bits.to(tl.float32, bitcast=True)
    exponent = tl.minimum(tl.maximum((bits >> 23) - 126 - 15, LEAST), MOST)
    exponent = tl.where((most == 0) | ((most >= 0.0625) & (most < 32768.0)), 0, exponent)
    columns = tl.arange(0, COLUMNS)
    mean = tl.load(sums + index * PARTS * COLUMNS + columns)
    scaled_mean = tl.minimum(tl.maximum(mean * power_of_two(-exponent).to(tl.float64), -65504.0), 65504.0)
    half = scaled_mean.to(tl.float16).to(tl.uint16, bitcast=True)
    half = tl.where(columns < HEAD_DIM, half, 0)
    at = (stream + tl.load(span + OFFSETS_AT) + lead * (2 * HEAD_DIM + 4)).to(tl.pointer_type(tl.uint16))
    tl.store(at + columns, half, mask=columns < HEAD_DIM)
    total = unit_products(half, columns, columns < HEAD_DIM, keys)
    store_sum(at + HEAD_DIM, reduced(total, 2 * HEAD_DIM + tl.zeros([], tl.int32), keys))
    if lead == 0:  # the header's word at byte 40, and its checksum, which is linear in the words
        word = (stream + EXPONENT_AT).to(tl.pointer_type(tl.uint32))
        old = tl.load(word)
        new = (old & 0xFFFF0000) | (exponent & 0xFFFF).to(tl.uint32)
        place = (stream + tl.load(span + OFFSETS_AT) - 4).to(tl.pointer_type(tl.uint32))
        change = (new.to(tl.uint64) + PRIME - old.to(tl.uint64) % PRIME) % PRIME
        sum_ = tl.load(place).to(tl.uint64) + change * tl.load(keys + 1 + EXPONENT_AT // 4).to(tl.uint64) % PRIME
        tl.store(place, (sum_ % PRIME).to(tl.uint32))
        tl.store(word, new)


@triton.jit
def unit_products(unit, index, mask, keys):
    """Products of 16-bit units with the keys of their words, folded below 2^36."""
    word = unit.to(tl.uint64) << (16 * (index & 1)).to(tl.uint64)
    product = word * tl.load(keys + 1 + (index >> 1), mask=mask, other=0).to(tl.uint64)
    return (product & 0xFFFFFFFF) + (product >> 32) * PRIME_GAP


@triton.jit
def store_sum(at, total):
    """A checksum as two 16-bit units."""
    tl.store(at, (total & 0xFFFF).to(tl.uint16))
    tl.store(at + 1, (total >> 16).to(tl.uint16))


@triton.jit
def write_exact(
    spans, firsts, starts, keys, UNITS: tl.constexpr, ROW_UNITS: tl.constexpr, TILE: tl.constexpr, SEARCH: tl.constexpr
):
    """One lead's exact first tokens, copied as 16-bit units (UNITS a number, ROW_UNITS a vector), and their checksum."""
    index = tl.program_id(0).to(tl.int64)
    which = find_span(firsts, index, SEARCH)
    span = spans + which * FIELDS
    lead = index - tl.load(firsts + which)
    count = tl.load(span + EXACT) * ROW_UNITS
    at = (tl.load(span + STREAM) + tl.load(span + EXACT_AT) + lead * (2 * count + 4)).to(tl.pointer_type(tl.uint16))
    start = tl.load(starts + tl.load(span + STARTS) + lead).to(tl.pointer_type(tl.uint16))
    stride = tl.load(span + STRIDE) * UNITS
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

    flags [2 * index]: 1 the offsets' checksum, 2 an offset that is not finite; [2 * index + 1]: the exact tokens' checksum.
    """
    index = tl.program_id(0).to(tl.int64)
    which = find_span(firsts, index, SEARCH)
    span = spans + which * FIELDS
    local = index - tl.load(firsts + which)
    lead = tl.load(span + FIRST_LEAD) + local
    stream = tl.load(span + STREAM)
    if OFFSETS:
        at = (stream + tl.load(span + OFFSETS_AT) + lead * (2 * HEAD_DIM + 4)).to(tl.pointer_type(tl.uint16))
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
    begin, end = tl.load(span + FIRST_TOKEN), tl.load(span + LAST_TOKEN)
    exact = tl.load(span + EXACT)
    if begin < exact:
        count = exact * ROW_UNITS
        source = (stream + tl.load(span + EXACT_AT) + lead * (2 * count + 4)).to(tl.pointer_type(tl.uint16))
        target = tl.load(starts + tl.load(span + STARTS) + local).to(tl.pointer_type(tl.uint16))
        stride = tl.load(span + STRIDE) * UNITS
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
