"""Law: scores of a stream's keys block by block: which rows of which blocks are wanted, tasks of threads, exact vectors."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from pqcodec import constants as c
from pqcodec.kernels.attention import AttentionJob, block_damage, exact_scores, softcapped
from pqcodec.kernels.cpu.lane_memory import load, store
from pqcodec.kernels.cpu.lane_rows import sums_of_rows
from pqcodec.kernels.cpu.lanes import LANES, floats, fused
from pqcodec.kernels.cpu.records import F32, leaf
from pqcodec.stream.checksum import checksum_keys
from pqcodec.stream.header import Header
from pqcodec.tensors.rows import address
from pqcodec.threads import threads

_CALLS = 4  # of a kernel, for each thread
TOKENS, LOW, HIGH, SOURCE, LEAD, AT, POSITION, CHUNK = range(8)  # what stands where in an item
Run = Callable[[list[Callable[[], int]]], None]
Kernel = Callable[[np.ndarray, np.ndarray, np.ndarray], None]  # items, their damage, scores float32 [leading, rows, tokens]


def scores_of_blocks(job: AttentionJob, run: Run, kernel: Kernel) -> np.ndarray:
    """Scores of the job's tokens, which ``kernel`` fills in from items: float32 [leading, rows, tokens]."""
    coded, h = job.keys, job.keys.header
    found = np.empty((h.leading, job.queries.shape[1], job.tokens[1] - job.tokens[0]), np.float32)
    items = _items(job)
    damaged = np.zeros(len(items), np.bool_)

    def task(first: int, last: int) -> int:
        kernel(items[first:last], damaged[first:last], found)
        return 0

    step = -(-len(items) // (_CALLS * threads()))
    run([partial(task, first, first + step) for first in range(0, len(items), max(step, 1))])
    for item in items[damaged]:
        job.damage.append(block_damage(h, int(item[CHUNK]), int(item[LEAD])))
    for lead, token, key in zip(coded.exact.leads, coded.exact.tokens - job.tokens[0], coded.exact.vectors, strict=True):
        found[lead, :, token] = exact_scores(job.queries[lead], key[None])[:, 0]
    return softcapped(found, job.softcap)


def _items(job: AttentionJob) -> np.ndarray:
    """Blocks that are read, lead by lead, int64 [n, 8]: tokens, wanted rows, address, lead, first score, position, chunk."""
    coded, h, (first, last) = job.keys, job.keys.header, job.tokens
    chunks = coded.chunks[1] - coded.chunks[0]
    lead, chunk = np.divmod(np.arange(h.leading * chunks), max(chunks, 1))
    chunk += coded.chunks[0]
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


def query_rows(job: AttentionJob) -> np.ndarray:
    """Queries as ``products_of_rows`` takes them: float32 [leading, rows, head_dim and zeros up to whole lanes]."""
    h = job.keys.header
    found = np.zeros((h.leading, job.queries.shape[1], -(-h.head_dim // LANES) * LANES), np.float32)
    found[..., : h.head_dim] = job.queries
    return found


def offset_rows(job: AttentionJob) -> np.ndarray:
    """Offsets float32 [leading, order], padded with zeros; none: [0, 0]."""
    h, offsets = job.keys.header, job.keys.offsets
    return np.zeros((0, 0), np.float32) if offsets is None else np.pad(offsets, ((0, 0), (0, h.order - h.head_dim)))


def keys_of(h: Header) -> np.ndarray:
    """Keys for the checksum of a stream's blocks."""
    return checksum_keys(-(-h.blocks.size_of(min(h.chunk_tokens, h.coded_tokens)) // 4) + 1)


@leaf
def products_of_rows(tile, rows, order, queries, at, width, sums):
    """The products of the query at queries [at : at + width] with rows of a tile: float lanes; ``sums`` is scratch [64]."""
    for r in range(rows):
        one, other = floats(F32(0)), floats(F32(0))
        for k in range(0, width - LANES, 2 * LANES):
            one = fused(load(tile, r * order + k), load(queries, at + k), one)
            other = fused(load(tile, r * order + k + LANES), load(queries, at + k + LANES), other)
        if width % (2 * LANES):
            one = fused(load(tile, r * order + width - LANES), load(queries, at + width - LANES), one)
        store(sums, r * LANES, one + other)
    return sums_of_rows(sums, 0)
