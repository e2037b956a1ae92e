"""Law: scores straight from codes whose rows share affine fields: eight rows are decoded at a time, and never all of a tensor.

A group's fields, and the cosines and sines of its pairs' angles, are looked up once for all its tokens and all queries. (The
kernel of arXiv 2502.00527 has a table of products for each query instead, which queries that share a key do not repay.)
"""

from __future__ import annotations

import numpy as np
from numba import carray

from pqcodec.constants import CHECKSUM_BYTES
from pqcodec.kernels.attention import AttentionJob
from pqcodec.kernels.cpu import tables
from pqcodec.kernels.cpu.affine_blocks import affine_size, block_scale, decode_rows, work_of
from pqcodec.kernels.cpu.bits import checksum
from pqcodec.kernels.cpu.block_scores import Run, keys_of, offset_rows, products_of_rows, query_rows, scores_of_blocks
from pqcodec.kernels.cpu.lane_memory import pointer, store, word_at
from pqcodec.kernels.cpu.lanes import LANES
from pqcodec.kernels.cpu.offsets import add_offset, keep_phases
from pqcodec.kernels.cpu.records import F32, I64, Groups, Kind, RopeTable, jit


def scores_of_groups(job: AttentionJob, kind: tuple, run: Run) -> np.ndarray:
    """Scores of the job's tokens: float32 [leading, rows, tokens]. ``kind``: a Kind of the keys."""
    h, queries = job.keys.header, query_rows(job)
    records = (kind, tables.groups(h), offset_rows(job), tables.rope(h))
    arguments = (*records, queries.ravel(), *queries.shape[1:], keys_of(h), job.check)
    return scores_of_blocks(job, run, lambda items, damaged, found: score_groups(items, *arguments, damaged, found))


@jit
def score_groups(items, kind, groups, offsets, rope, queries, query_rows, width, keys, check, damaged, found):
    """Fill found [leading, rows, tokens] from the blocks of items; queries are [leading, rows, width], flat.

    Records come as plain tuples.
    """
    kind, groups, rope = Kind(*kind), Groups(*groups), RopeTable(*rope)
    order, pairs = kind.order, rope.frequencies.size
    tile, sums = np.zeros(LANES * order + LANES, np.float32), np.zeros(LANES * LANES, np.float32)
    cos, sin = np.zeros(kind.chunk_tokens * pairs, np.float32), np.zeros(kind.chunk_tokens * pairs, np.float32)
    filled = np.full(2, -1, np.int64)  # of cos and sin, see ``keep_phases``
    work, result = work_of(kind, groups), np.zeros(LANES, np.float32)
    for i in range(items.shape[0]):
        tokens, low, high, source, lead, at, position, _ = items[i]
        size = affine_size(tokens, kind, groups) - CHECKSUM_BYTES
        payload = carray(pointer(source), (size + CHECKSUM_BYTES,), np.uint8)
        if check:
            damaged[i] = word_at(payload, size) != checksum(payload, 0, size, keys)
        keep_phases(position, tokens, 1, rope, cos, sin, filled)
        scale, have_group = block_scale(payload, size), I64(-1)
        for row in range(low, high, LANES):
            rows = min(LANES, high - row)
            where = (tokens, row, rows, lead)
            have_group = decode_rows(payload, where, kind, groups, rope.phases, scale, have_group, work, tile)
            for r in range(rows):
                for k in range(kind.head_dim, width):
                    tile[r * order + k] = F32(0)
            if offsets.size:
                add_offset(tile, rows, order, offsets[lead], rope, cos, sin, row)
            for query in range(query_rows):
                products = products_of_rows(tile, rows, order, queries, (lead * query_rows + query) * width, width, sums)
                store(result, 0, products)
                for r in range(rows):
                    found[lead, query, at + row - low + r] = result[r]
