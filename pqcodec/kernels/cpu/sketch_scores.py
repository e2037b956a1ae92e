"""Law: scores straight from the signs of a sketch (SPEC 21): no vector is made of them, and four signs are one look-up.

A query is multiplied by S once, and a table made of it: of every four projections, the sixteen sums that their signs may give,
side by side for eight queries. Outlier channels are others in every group of tokens: what they add to the projections is taken
out of one part of the sketch and put into the other, which makes new tables. Source: arXiv 2406.03482, section 3.
"""

from __future__ import annotations

import numpy as np
from numba import carray

from pqcodec.constants import CHECKSUM_BYTES
from pqcodec.kernels.attention import AttentionJob
from pqcodec.kernels.cpu import tables
from pqcodec.kernels.cpu.affine_blocks import block_scale
from pqcodec.kernels.cpu.bits import checksum
from pqcodec.kernels.cpu.block_scores import Run, keys_of, offset_rows, products_of_rows, query_rows, scores_of_blocks
from pqcodec.kernels.cpu.lane_memory import load, pointer, spread, store, word_at
from pqcodec.kernels.cpu.lane_rows import transpose
from pqcodec.kernels.cpu.lanes import LANES, floats, fused
from pqcodec.kernels.cpu.offsets import add_offset, keep_phases
from pqcodec.kernels.cpu.records import F32, I64, Kind, RopeTable, SketchQueries, SketchSums, SketchTable, jit, leaf, plain
from pqcodec.kernels.cpu.sketch import fill_apart, norm_factors, sketch_size

_SIGNS = 4  # of a look-up
_SUMS = 1 << _SIGNS
_MOST_ROWS = 32  # of queries of one leading index


def reads_signs(job: AttentionJob) -> bool:
    """Whether the kernel takes such keys, and so few rows of queries that it is quicker than to decode once for all."""
    keys = job.keys
    return keys.header.sketch is not None and keys.positions is None and job.queries.shape[1] <= _MOST_ROWS


def scores_of_signs(job: AttentionJob, kind: tuple, run: Run) -> np.ndarray:
    """Scores of the job's tokens: float32 [leading, rows, tokens]. ``kind``: a Kind of the keys."""
    h = job.keys.header
    assert h.sketch is not None
    table = tables.sketch_table("decode", h.sketch, h.head_dim, h.seed)
    arguments = (kind, table, offset_rows(job), tables.rope(h), _queries(job), keys_of(h), job.check)
    return scores_of_blocks(job, run, lambda items, damaged, found: score_signs(items, *arguments, damaged, found))


def _queries(job: AttentionJob) -> tuple:
    """A SketchQueries."""
    h, alone = job.keys.header, query_rows(job)
    assert h.sketch is not None
    rows, missing = job.queries.shape[1], -job.queries.shape[1] % LANES
    padded = np.pad(job.queries, ((0, 0), (0, missing), (0, h.order - h.head_dim))).astype(np.float32)
    eights = padded.reshape(h.leading, -1, LANES, h.order).swapaxes(2, 3)
    columns, scale = tables.sketch_columns(h.sketch, h.head_dim, h.seed)
    return plain(SketchQueries(rows, alone.shape[2], scale, alone.ravel(), np.ascontiguousarray(eights).ravel(), columns))


@jit
def score_signs(items, kind, sketch, offsets, rope, queries, keys, check, damaged, found):
    """Fill found [leading, rows, tokens] from the blocks of items. Records come as plain tuples."""
    kind, sketch, rope, queries = Kind(*kind), SketchTable(*sketch), RopeTable(*rope), SketchQueries(*queries)
    order, pairs = kind.order, rope.frequencies.size
    cos, sin = np.zeros(kind.chunk_tokens * pairs, np.float32), np.zeros(kind.chunk_tokens * pairs, np.float32)
    filled = np.full(2, -1, np.int64)  # of cos and sin, see ``keep_phases``
    tile, products, work = np.zeros(LANES * order, np.float32), np.zeros(LANES * LANES, np.float32), sketch_sums(sketch, order)
    eights = (queries.rows + LANES - 1) // LANES
    for eight in range(eights):
        have_lead = I64(-1)
        for i in range(items.shape[0]):
            tokens, low, high, source, lead, at, position, _ = items[i]
            size = sketch_size(tokens, kind, sketch) - CHECKSUM_BYTES
            payload = carray(pointer(source), (size + CHECKSUM_BYTES,), np.uint8)
            if check and eight == 0:
                damaged[i] = word_at(payload, size) != checksum(payload, 0, size, keys)
            if lead != have_lead:
                project_eight(queries, lead * eights + eight, work.every, order, work.whole)
                if not sketch.channels:
                    fill_sums(work.whole, sketch.blocks * order, work.inner)
            scale, have_lead, have_group = block_scale(payload, size), lead, I64(-1)
            keep_phases(position, tokens, 1, rope, cos, sin, filled)
            for row in range(low, high, LANES):
                rows, its = min(LANES, high - row), lead * eights + eight
                have_group = score_rows(payload, tokens, row, rows, kind, sketch, queries, its, scale, have_group, work)
                transpose(work.totals, 0)
                if offsets.size:
                    tile[:] = F32(0)
                    add_offset(tile, rows, order, offsets[lead], rope, cos, sin, row)
                for query in range(eight * LANES, min((eight + 1) * LANES, queries.rows)):
                    own = (query - eight * LANES) * LANES
                    if offsets.size:
                        q = (lead * queries.rows + query) * queries.width
                        of_offset = products_of_rows(tile, rows, order, queries.alone, q, queries.width, products)
                        store(work.totals, own, load(work.totals, own) + of_offset)
                    for r in range(rows):
                        found[lead, query, at + row - low + r] = work.totals[own + r]


@jit
def sketch_sums(sketch, order):
    """Scratch of one thread; behind the sums of a part are zeros, which ``sum_of_signs`` may read."""
    projections, words = max(sketch.blocks, sketch.outlier_blocks) * order * LANES, 4 * 8 // _SIGNS * _SUMS * LANES
    return SketchSums(
        inner=np.zeros((sketch.blocks * order // 8 + 3) // 4 * words, np.float32),
        outer=np.zeros((sketch.outlier_blocks * order // 8 + 3) // 4 * words, np.float32),
        totals=np.zeros(LANES * LANES, np.float32),
        factors=np.zeros(2 * LANES, np.float32),
        shorts=np.zeros(LANES, np.uint16),
        apart=np.zeros(order, np.float32),
        listed=np.zeros(order, np.int64),
        every=np.arange(order),
        whole=np.zeros(projections, np.float32),
        left=np.zeros(projections, np.float32),
        moved=np.zeros(projections, np.float32),
    )


@leaf
def score_rows(payload, tokens, row, rows, kind, sketch, queries, its, scale, have_group, work):
    """The scores of rows of a block of ``tokens`` for eight queries, number ``its``, row by row in ``work.totals``.

    ``have_group``: the group whose outlier channels ``work`` has sums without and with. Returns the one that it has then.
    """
    inner, outer = sketch.blocks * kind.order, sketch.outlier_blocks * kind.order
    for part in range(2 if sketch.channels else 1):
        factor = norm_factors(payload, row, rows, kind, sketch, part, work.shorts) * floats(queries.scale)
        store(work.factors, part * LANES, factor * floats(scale))
    for r in range(rows):
        if sketch.channels and (row + r) // sketch.tokens != have_group:
            have_group = (row + r) // sketch.tokens
            fill_apart(payload, tokens * kind.row_bytes + have_group * sketch.list_bytes, kind, sketch, work.apart)
            project_eight(queries, its, work.listed, list_channels(work), work.moved)
            for k in range(0, work.left.size, LANES):
                store(work.left, k, load(work.whole, k) - load(work.moved, k))
            fill_sums(work.left, inner, work.inner)
            fill_sums(work.moved, outer, work.outer)
        begin = (row + r) * kind.row_bytes + (4 if sketch.channels else 2)
        total = sum_of_signs(payload, begin, inner // 8, work.inner) * spread(work.factors, r)
        if sketch.channels:
            other = sum_of_signs(payload, begin + inner // 8, outer // 8, work.outer)
            total = total + other * spread(work.factors, LANES + r)
        store(work.totals, r * LANES, total)
    return have_group


@leaf
def list_channels(work):
    """List the outlier channels of a group; returns how many there are."""
    count = 0
    for k in range(work.apart.size):
        if work.apart[k] > 0:
            work.listed[count] = k
            count += 1
    return count


@leaf
def project_eight(queries, its, channels, count, found):
    """Products of S with the numbers of ``count`` channels of eight queries, number ``its``: found [projections, 8]."""
    projections, first = found.size // LANES, its * (queries.columns.size // (found.size // LANES))
    for i in range(projections):
        total = floats(F32(0))
        for j in range(count):
            k = channels[j]
            factor, number = spread(queries.columns, k * projections + i), load(queries.eights, (first + k) * LANES)
            total = fused(factor, number, total)
        store(found, i * LANES, total)


@leaf
def fill_sums(projections, count, sums):
    """Of every four of ``count`` projections of eight queries the sums with each of sixteen signs, the first sign lowest."""
    for i in range(0, count, _SIGNS):
        a, b, c, d = (
            load(projections, i * LANES),
            load(projections, (i + 1) * LANES),
            load(projections, (i + 2) * LANES),
            load(projections, (i + 3) * LANES),
        )
        to, less = i // _SIGNS * _SUMS * LANES, floats(F32(0)) - a
        for signs in range(0, _SUMS, 4):
            two = (c if signs & 4 else floats(F32(0)) - c) + (d if signs & 8 else floats(F32(0)) - d)
            store(sums, to + signs * LANES, less - b + two)
            store(sums, to + (signs + 1) * LANES, a - b + two)
            store(sums, to + (signs + 2) * LANES, less + b + two)
            store(sums, to + (signs + 3) * LANES, a + b + two)


@leaf
def sum_of_signs(payload, at, count, sums):
    """The sum of the projections of eight queries with the signs of ``count`` bytes of payload [at ...], float lanes.

    Bytes are read four at a time, up to three of them behind the signs, for which ``sums`` has zeros.
    """
    one, two, three, four = floats(F32(0)), floats(F32(0)), floats(F32(0)), floats(F32(0))
    for j in range(0, count, 4):
        word, begin = I64(word_at(payload, at + j)), 2 * j * _SUMS
        for i in range(2):  # of two bytes of the word, and of the two behind them
            low, high, to = word >> 8 * i, word >> 8 * i + 16, begin + 2 * i * _SUMS
            one = one + load(sums, (to + (low & (_SUMS - 1))) * LANES)
            two = two + load(sums, (to + _SUMS + (low >> _SIGNS & (_SUMS - 1))) * LANES)
            three = three + load(sums, (to + 4 * _SUMS + (high & (_SUMS - 1))) * LANES)
            four = four + load(sums, (to + 5 * _SUMS + (high >> _SIGNS & (_SUMS - 1))) * LANES)
    return one + two + (three + four)
