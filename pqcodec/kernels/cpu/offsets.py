"""Law: offsets (SPEC 9): each channel's stored mean, turned by its token's position under RoPE."""

from __future__ import annotations

import numpy as np

from pqcodec.constants import DTYPE_FLOAT16, LARGEST_FINITE, RUN_ROWS, RUN_TURN_BITS
from pqcodec.kernels.cpu.lane_look_ups import gather_pair
from pqcodec.kernels.cpu.lane_memory import load, load_wide, store
from pqcodec.kernels.cpu.lanes import LANES, as_bits, as_float, floats, ints
from pqcodec.kernels.cpu.records import F32, I32, I64, U64, leaf

_HALVES = np.finfo(np.float16)
_LARGEST_HALF = F32(LARGEST_FINITE[DTYPE_FLOAT16])
_NORMAL_HALF = I32(np.float32(_HALVES.smallest_normal).view(np.int32))  # as bits of a float32
# Adding 3 2^22 units to a number far below them, and taking them off again, rounds it to whole units, ties to even.
_UNITS_OF_TURN = F32(3 * 2.0 ** (22 - RUN_TURN_BITS))
_UNITS_OF_HALF = I32((22 - _HALVES.nmant + 1) << 23 | 1 << 22)  # added to the bits of a power of two: of float16's units there


@leaf
def fill_phases(first, tokens, step, rope, cos, sin):
    """cos and sin of each token and pair, float32 [tokens * pairs]; every product and sum rounds (SPEC 9.2).

    Token t is at position first + t * step, or at the one that is listed there.
    """
    frequencies, tables, listed = rope.frequencies, rope.phases, rope.listed.size > 0
    pairs = frequencies.size
    whole = pairs - pairs % LANES
    for t in range(tokens):
        place, at = I64(first + t * step), t * pairs
        if listed:
            place = I64(rope.listed[place])
        position = I32(place)
        for i in range(0, whole, LANES):
            turn = ints(position) * load(frequencies, i)
            cos_h, sin_h = gather_pair(tables, (turn >> ints(I32(24))) << ints(I32(1)))
            cos_l, sin_l = gather_pair(tables, ((turn >> ints(I32(15))) & ints(I32(510))) | ints(I32(512)))
            store(cos, at + i, cos_h * cos_l - sin_h * sin_l)
            store(sin, at + i, sin_h * cos_l + cos_h * sin_l)
        for i in range(whole, pairs):
            turn = U64(place) * U64(frequencies[i])
            h, l = ((turn >> U64(24)) & U64(255)) * U64(2), ((turn >> U64(16)) & U64(255)) * U64(2) + U64(512)
            cos[at + i] = tables[h] * tables[l] - tables[h + U64(1)] * tables[l + U64(1)]
            sin[at + i] = tables[h + U64(1)] * tables[l] + tables[h] * tables[l + U64(1)]


@leaf
def keep_phases(first, tokens, step, rope, cos, sin, filled):
    """``fill_phases``, unless they are there: ``filled``, int64 [2], is the position and the number of tokens that are.

    Streams of several lengths may begin at one position.
    """
    if rope.frequencies.size > 0 and (first != filled[0] or tokens > filled[1]):
        fill_phases(first, tokens, step, rope, cos, sin)
        filled[0], filled[1] = first, tokens


@leaf
def add_offset(tile, rows, order, offset, rope, cos, sin, first_row):
    """tile[r] += offset [order], the first 2 * pairs channels turned by each row's angles (SPEC 9.3)."""
    pairs, pair_p, step = rope.frequencies.size, rope.pair_p, rope.step
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


@leaf
def fill_phases_across(first, tokens, rope, of_pair, of_tile, cos, sin, steps):
    """``fill_phases`` with eight tokens of a pair side by side, and up to 7 tokens more.

    Pairs are ``of_pair`` numbers apart, each eight tokens ``of_tile``. ``steps``: scratch, int32 [lanes].
    """
    tables, listed = rope.phases, rope.listed.size > 0
    for t in range(0, tokens, LANES):
        for l in range(LANES):
            place = I64(first + min(t + l, tokens - 1))
            steps[l] = I32(rope.listed[place]) if listed else I32(place)
        position, at = load(steps, 0), t // LANES * of_tile
        for i in range(rope.frequencies.size):
            turn = position * ints(I32(rope.frequencies[i]))
            cos_h, sin_h = gather_pair(tables, (turn >> ints(I32(24))) << ints(I32(1)))
            cos_l, sin_l = gather_pair(tables, ((turn >> ints(I32(15))) & ints(I32(510))) | ints(I32(512)))
            store(cos, at + i * of_pair, cos_h * cos_l - sin_h * sin_l)
            store(sin, at + i * of_pair, sin_h * cos_l + cos_h * sin_l)


@leaf
def turn_offset(offset, order, rope, turning):
    """Fill ``along`` and ``across`` of an offset [order]; returns a bound of what it can add to a number."""
    pairs, pair_p, step, reach = rope.frequencies.size, rope.pair_p, rope.step, F32(0)
    for k in range(2 * pairs, order):
        turning.along[k], turning.across[k] = offset[k], F32(0)
        reach = max(reach, abs(offset[k]))
    for i in range(pairs):
        k = pair_p * i
        p, q = offset[k], offset[k + step]
        turning.along[k], turning.across[k] = p, -q
        turning.along[k + step], turning.across[k + step] = q, p
        reach = max(reach, abs(p) + abs(q))
    return reach


@leaf
def runs_in(tokens):
    """How many runs a block of so many tokens has."""
    return (tokens + RUN_ROWS - 1) // RUN_ROWS


@leaf
def keep_phases_of_runs(position, tokens, rope, run):
    """``keep_phases`` of each run's first row, of a block of so many tokens that begins at a position (SPEC 9.5, step 2)."""
    keep_phases(position, runs_in(tokens), RUN_ROWS, rope, run.cos, run.sin, run.filled)


@leaf
def keep_turns_of_run(rows, rope, cos, sin, filled):
    """cos and sin by which each row of a run is turned from the first one: ``keep_phases``, rounded (SPEC 9.5, step 3)."""
    if filled[1] < rows:
        keep_phases(0, rows, 1, rope, cos, sin, filled)
        round_turns(cos)
        round_turns(sin)


@leaf
def fill_turns_of_run_across(rows, rope, of_pair, of_tile, cos, sin, steps):
    """The same, as ``fill_phases_across`` has them."""
    fill_phases_across(0, rows, rope, of_pair, of_tile, cos, sin, steps)
    round_turns(cos)
    round_turns(sin)


@leaf
def round_turns(turns):
    """Round cosines and sines to the units of a run's turns."""
    for i in range(turns.size):
        turns[i] = (turns[i] + _UNITS_OF_TURN) - _UNITS_OF_TURN


@leaf
def begin_run(offset, order, rope, number, run):
    """Turn an offset [order] to the first row of a block's run ``number``, into ``run.offset`` (SPEC 9.5, steps 1 and 2).

    The stored numbers, times a power of two, are those of float16, and so are the rounded ones: both products are exact.
    """
    pairs, pair_p, step = rope.frequencies.size, rope.pair_p, rope.step
    largest, at = floats(_LARGEST_HALF), number * pairs
    for i in range(pairs):
        run.first[i], run.second[i] = offset[pair_p * i] * rope.to_halves, offset[pair_p * i + step] * rope.to_halves
    for i in range(0, pairs, LANES):
        c, s = load(run.cos, at + i), load(run.sin, at + i)
        p, q = load(run.first, i), load(run.second, i)
        x, y = p * c - q * s, p * s + q * c
        x, y = min(max(x, floats(-_LARGEST_HALF)), largest), min(max(y, floats(-_LARGEST_HALF)), largest)
        most = max(max(as_bits(x) & ints(I32(0x7FFFFFFF)), as_bits(y) & ints(I32(0x7FFFFFFF))), ints(_NORMAL_HALF))
        units = as_float((most & ints(I32(0x7F800000))) + ints(_UNITS_OF_HALF))
        store(run.first, i, (x + units) - units)
        store(run.second, i, (y + units) - units)
    back = F32(1) / rope.to_halves
    for i in range(pairs):
        run.offset[pair_p * i], run.offset[pair_p * i + step] = run.first[i] * back, run.second[i] * back
    for k in range(2 * pairs, order):
        run.offset[k] = offset[k]
