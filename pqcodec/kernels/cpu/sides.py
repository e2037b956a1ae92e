"""Law: sums of tokens, of which a mean is made: turned back under RoPE, and NaN and Inf as zero vectors."""

from __future__ import annotations

import numpy as np

from pqcodec.kernels.cpu.lanes import LANES
from pqcodec.kernels.cpu.numbers import flag_bad_rows, largest_bits, load_tile
from pqcodec.kernels.cpu.offsets import keep_phases
from pqcodec.kernels.cpu.records import I64, Kind, RopeTable, jit


@jit
def sum_tokens(first_lead, last_lead, count, token_step, kind, source, rope, total):
    """Sums of ``count`` tokens of each lead, ``token_step`` apart: float64 total [leading, order].

    Records come as plain tuples.
    """
    kind, rope = Kind(*kind), RopeTable(*rope)
    flat, starts, token_stride, _, first_tokens, _ = source
    order = kind.order
    pairs = rope.frequencies.size
    tile = np.zeros(LANES * order, np.float32)
    scratch, largest = np.zeros(LANES * LANES, np.int32), np.zeros(LANES, np.int32)
    bad = np.zeros(LANES, np.bool_)
    cos, sin = np.zeros(count * pairs, np.float32), np.zeros(count * pairs, np.float32)
    filled = np.full(2, -1, np.int64)  # of cos and sin, see ``keep_phases``
    for lead in range(first_lead, last_lead):
        position = I64(rope.first_position + lead * rope.list_tokens + first_tokens)
        keep_phases(position, count, token_step, rope, cos, sin, filled)
        for row in range(0, count, LANES):
            rows = min(LANES, count - row)
            start = starts[lead] + row * token_stride
            load_tile(flat, start, token_stride, rows, kind.head_dim, kind.dtype, tile, order)
            largest_bits(tile, order, scratch, largest)
            flag_bad_rows(tile, rows, order, kind.dtype, largest, bad, 0)
            sum_rows(tile, rows, order, rope, cos, sin, row, total[lead])


@jit
def sum_rows(tile, rows, order, rope, cos, sin, first_row, total):
    """Add rows, turned back, to float64 total [order]."""
    pairs, pair_p, step = rope.frequencies.size, rope.pair_p, rope.step
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
