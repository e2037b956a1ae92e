"""Law: what stages do to whole vectors before they are coded, and after: turned by RoPE's angles, multiplied by a matrix.

Every product and sum rounds by itself, in an order that the specification tells.
"""

from __future__ import annotations

import numpy as np

from pqcodec.constants import DTYPE_FLOAT32, LARGEST_FINITE
from pqcodec.kernels.cpu.offsets import keep_phases
from pqcodec.kernels.cpu.records import F32, I64, RopeTable, jit

TILE_TOKENS = 64  # whose cosines and sines are computed at once
_LARGEST = LARGEST_FINITE[DTYPE_FLOAT32]


@jit
def turn_tiles(first_tile, last_tile, x, first_lead, first_token, sign, rope):
    """Turn tiles of tokens of vectors x, float32 [leads, tokens, head_dim], in place (SPEC 9.3); ``sign``: -1 turns back."""
    rope = RopeTable(*rope)
    pairs, pair_p, step = rope.frequencies.size, rope.pair_p, rope.step
    cos, sin = np.zeros(TILE_TOKENS * pairs, np.float32), np.zeros(TILE_TOKENS * pairs, np.float32)
    filled = np.full(2, -1, np.int64)  # of cos and sin, see ``keep_phases``
    for tile in range(first_tile, last_tile):
        start = tile * TILE_TOKENS
        tokens = min(TILE_TOKENS, x.shape[1] - start)
        for lead in range(x.shape[0]):
            position = I64(rope.first_position + (first_lead + lead) * rope.list_tokens + first_token + start)
            keep_phases(position, tokens, 1, rope, cos, sin, filled)
            for t in range(tokens):
                turn = t * pairs
                for i in range(pairs):
                    c, s, p = cos[turn + i], sign * sin[turn + i], pair_p * i
                    a, b = x[lead, start + t, p], x[lead, start + t, p + step]
                    x[lead, start + t, p] = a * c - b * s
                    x[lead, start + t, p + step] = a * s + b * c


@jit
def multiply_rows(first_row, last_row, x, matrix, out):
    """Rows of x float32 [n, a] times a matrix float64 [a, b], into out float32 [n, b]; sums are float64, ascending."""
    sums = np.zeros(matrix.shape[1], np.float64)
    for row in range(first_row, last_row):
        sums[:] = 0
        for j in range(matrix.shape[0]):
            factor = np.float64(x[row, j])
            for i in range(sums.size):
                sums[i] += factor * matrix[j, i]
        for i in range(sums.size):
            out[row, i] = F32(min(max(sums[i], -_LARGEST), _LARGEST))
