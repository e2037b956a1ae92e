"""Law: scores straight from codes whose rows share affine fields: eight rows are decoded at a time, and never all of a tensor.

A group's fields, and the cosines and sines of its pairs' angles, are looked up once for all its tokens and all queries. (The
kernel of arXiv 2502.00527 has a table of products for each query instead, which queries that share a key do not repay.)
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
from numba import carray

from pqcodec import constants as c
from pqcodec.constants import CHECKSUM_BYTES
from pqcodec.kernels.attention import AttentionJob, block_damage, exact_scores, softcapped
from pqcodec.kernels.cpu import tables
from pqcodec.kernels.cpu.affine_blocks import affine_size, block_scale, decode_rows, work_of
from pqcodec.kernels.cpu.bits import checksum
from pqcodec.kernels.cpu.lane_memory import load, pointer, store, sums_of_rows, word_at
from pqcodec.kernels.cpu.lanes import LANES, floats, fused
from pqcodec.kernels.cpu.offsets import add_offset, keep_phases
from pqcodec.kernels.cpu.records import F32, I64, Groups, Kind, RopeTable, jit
from pqcodec.stream.checksum import checksum_keys
from pqcodec.tensors.rows import address
from pqcodec.threads import threads

_CALLS = 4  # of a kernel, for each thread
TOKENS, LOW, HIGH, SOURCE, LEAD, AT, POSITION, CHUNK = range(8)  # what stands where in an item


def scores_of_groups(job: AttentionJob, kind: tuple, run: Callable[[list[Callable[[], int]]], None]) -> np.ndarray:
    """Scores of the job's tokens: float32 [leading, rows, tokens]. ``kind``: a Kind of the keys."""
    coded, h = job.keys, job.keys.header
    rows, width = job.queries.shape[1], -(-h.head_dim // LANES) * LANES
    queries = np.zeros((h.leading, rows, width), np.float32)
    queries[..., : h.head_dim] = job.queries
    found = np.empty((h.leading, rows, job.tokens[1] - job.tokens[0]), np.float32)
    items = _items(job)
    damaged = np.zeros(len(items), np.bool_)
    offsets = np.zeros((0, 0), np.float32)
    if coded.offsets is not None:
        offsets = np.pad(coded.offsets, ((0, 0), (0, h.order - h.head_dim)))
    keys = checksum_keys(-(-h.blocks.size_of(min(h.chunk_tokens, h.coded_tokens)) // 4) + 1)
    arguments = (kind, tables.groups(h), offsets, tables.rope(h), queries.ravel(), rows, width, keys, job.check)

    def task(first: int, last: int) -> int:
        score_groups(items[first:last], *arguments, damaged[first:last], found)
        return 0

    step = -(-len(items) // (_CALLS * threads()))
    run([partial(task, first, first + step) for first in range(0, len(items), max(step, 1))])
    for item in items[damaged]:
        job.damage.append(block_damage(h, int(item[CHUNK]), int(item[LEAD])))
    for lead, token, key in zip(coded.exact.leads, coded.exact.tokens - job.tokens[0], coded.exact.vectors, strict=True):
        found[lead, :, token] = exact_scores(job.queries[lead], key[None])[:, 0]
    return softcapped(found, job.softcap)


def _items(job: AttentionJob) -> np.ndarray:
    """Blocks that are read, int64 [n, 8]: tokens, wanted rows, address, leading index, first score, position, chunk."""
    coded, h, (first, last) = job.keys, job.keys.header, job.tokens
    chunk, lead = np.divmod(np.arange(coded.chunks[0] * h.leading, coded.chunks[1] * h.leading), h.leading)
    begin = h.first_tokens + chunk * h.chunk_tokens
    items = np.zeros((len(chunk), 8), np.int64)
    items[:, TOKENS] = np.minimum(h.chunk_tokens, h.coded_tokens - chunk * h.chunk_tokens)
    items[:, LOW] = np.maximum(first - begin, 0)
    items[:, HIGH] = np.minimum(last - begin, items[:, TOKENS])
    items[:, SOURCE] = address(coded.payload) + (chunk - coded.chunks[0]) * h.leading * h.blocks.chunk_bytes
    items[:, SOURCE] += lead * h.blocks.size_of(items[:, TOKENS])
    items[:, LEAD], items[:, CHUNK] = lead, chunk
    items[:, AT] = begin + items[:, LOW] - first
    items[:, POSITION] = begin + (h.rope.first_position % (1 << c.PHASE_BITS) if h.rope else 0)
    return items[items[:, LOW] < items[:, HIGH]]


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
                q = (lead * query_rows + query) * width
                for r in range(rows):
                    one, other = floats(F32(0)), floats(F32(0))
                    for k in range(0, width - LANES, 2 * LANES):
                        one = fused(load(tile, r * order + k), load(queries, q + k), one)
                        other = fused(load(tile, r * order + k + LANES), load(queries, q + k + LANES), other)
                    if width % (2 * LANES):
                        one = fused(load(tile, r * order + width - LANES), load(queries, q + width - LANES), one)
                    store(sums, r * LANES, one + other)
                store(result, 0, sums_of_rows(sums, 0))
                for r in range(rows):
                    found[lead, query, at + row - low + r] = result[r]
