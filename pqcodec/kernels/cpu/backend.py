"""Law: the CPU backend turns jobs into the records of the kernels, and runs the kernels in threads on all cores.

Kernels are compiled once and kept on disk (``disk_cache``). They release Python's lock, so threads run side by side.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import lru_cache, partial
from typing import Any

import numpy as np

from pqcodec import constants as c
from pqcodec.codings.plan import plan_for
from pqcodec.codings.residual import encode as encode_residual
from pqcodec.codings.vectors import Book
from pqcodec.kernels import attention
from pqcodec.kernels.cpu import (
    affine_blocks,
    affine_scores,
    attending,
    blocks,
    records,
    residual,
    sides,
    sketch,
    sketch_scores,
    tables,
    vectors,
)
from pqcodec.kernels.cpu.lanes import LANES
from pqcodec.kernels.cpu.records import ITEM
from pqcodec.kernels.job import DecodeJob, EncodeJob, nobody, sampled
from pqcodec.kernels.reference import encode_job_block
from pqcodec.stream.checksum import checksum_keys
from pqcodec.stream.header import Header
from pqcodec.stream.index import Blocks
from pqcodec.stream.orders import whole_groups
from pqcodec.tensors.rows import Values, address
from pqcodec.threads import threads

_TASK_BYTES = 1 << 22  # of rows in one task: few enough to report progress, enough that a task's own cost does not show
_ONE_THREAD_BYTES = 1 << 16  # of rows, up to which one thread does all
_CODINGS = (c.CODING_SPLIT, c.CODING_PAPER, c.CODING_QUADS, c.CODING_PAIRS, c.CODING_SCALAR, c.CODING_RESIDUAL, c.CODING_SKETCH)
# Larger outputs use non-temporal stores: ordinary ones would first read each line. Smaller ones stay in a core's own cache.
_CACHED_BYTES = 1 << 20
_SEARCHED = 1 << 12  # vectors whose nearest entries one task finds


def _run(tasks: list[Callable[[], int]], advance: Callable[[int], None]) -> None:
    """Run every task on all threads, the caller's among them, and pass what each returns to ``advance``, on the caller's."""
    waiting, done = deque(tasks), deque[int]()

    def work(report: Callable[[int], None]) -> None:
        while waiting:
            try:
                task = waiting.popleft()
            except IndexError:  # another thread took the last one
                return
            try:
                report(task())
            except BaseException:
                waiting.clear()
                raise

    def report(blocks: int) -> None:
        done.append(blocks)
        while done:
            advance(done.popleft())

    others = [_pool(threads()).submit(work, done.append) for _ in range(min(threads(), len(tasks)) - 1)]
    try:
        work(report)
        for other in others:
            if not other.cancel():  # where many callers share the threads, all may be done before it begins
                other.result()
    except BaseException:
        waiting.clear()
        wait(
            [other for other in others if not other.cancel()]
        )  # so that nothing is written into the caller's memory after it sees the error
        raise
    while done:
        advance(done.popleft())


@lru_cache(maxsize=1)
def _pool(workers: int) -> ThreadPoolExecutor:
    """Threads that wait for work, because starting them takes longer than decoding a small tensor."""
    return ThreadPoolExecutor(workers, "pqcodec")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # a child process has none of its parent's threads


# -- arguments -------------------------------------------------------------------------------------------------------
def _offset_rows(offsets: np.ndarray | None, order: int) -> np.ndarray:
    """Offsets float32 [leading, order], padded with zeros; none: [0, 0]."""
    if offsets is None:
        return np.zeros((0, 0), np.float32)
    missing = order - offsets.shape[1]
    return np.pad(offsets, ((0, 0), (0, missing))) if missing else offsets


def _kind(h: Header, tokens: int, order: int | None = None) -> tuple:
    """A Kind; ``tokens``: of a block, at the most; ``order``: None is that of the rows."""
    sizes = (h.row_bytes, h.blocks.beside, h.blocks.align, tokens)
    return tuple(records.Kind(h.coding, h.dtype, h.head_dim, order or h.order, *sizes))


def _of_plan(verb: str, h: Header) -> tuple[tuple, tuple]:
    """The Rotation and the SplitEncoder or SplitDecoder of a stream."""
    return tables.of_plan(verb, h.coding, h.head_dim, h.row_bits, h.radius_bits, h.seed, h.rounds)


def _source(h: Header, values: Values) -> tuple:
    """A RowSource."""
    tokens = (h.leading, h.first_tokens, h.coded_tokens)
    return tuple(records.RowSource(values.flat, values.starts, values.stride, *tokens))


def _items(jobs: Sequence[DecodeJob], offsets: Sequence[np.ndarray]) -> np.ndarray:
    """The blocks of jobs as ``decode_stream_blocks`` takes them, int64 [blocks, ITEM], job by job and chunk by chunk.

    ``offsets``: each job's, float32 [leading, order], or [0, 0].
    """
    places = [_places(*_geometry(job)) for job in jobs]
    of_jobs = np.array([_numbers(job, rows) for job, rows in zip(jobs, offsets, strict=True)], np.int64)
    each = np.repeat(of_jobs, list(map(len, places)), 0)
    payload, first_lead, shared, position, list_tokens, offset, offset_bytes, target, stride, item_bytes = each.T
    items, starts = np.concatenate(places), np.concatenate([_starts(job) for job in jobs])
    leads = items[:, ITEM.offset] + first_lead
    items[:, ITEM.lead] = leads * shared
    items[:, ITEM.source] += payload
    items[:, ITEM.position] += position + leads * list_tokens
    items[:, ITEM.offset] = offset + leads * offset_bytes
    items[:, ITEM.target] = target + (starts + items[:, ITEM.target] * stride) * item_bytes
    items[:, ITEM.stride] = stride
    return items


def _numbers(job: DecodeJob, offsets: np.ndarray) -> tuple[int, ...]:
    """What all blocks of a job have in common, in the order in which ``_items`` takes it; of what is not there zeros."""
    rope, positions, out = job.header.rope, job.positions, job.out
    turned = rope.first_position % (1 << c.PHASE_BITS) if rope and positions is None else 0
    lists = 0 if positions is None or len(positions) == 1 else positions.shape[1]
    added = (address(offsets), offsets.strides[0]) if offsets.size else (0, 0)
    result = (0, 0, 0) if out is None else (address(out.flat), out.stride, out.flat.itemsize)
    return address(job.payload), job.first_lead, bool(job.header.shared_ranges), turned, lists, *added, *result


def _starts(job: DecodeJob) -> np.ndarray:
    """The element of the result at which the leading index of each block of a job begins: int64 [blocks]."""
    chunks, leads = job.last_chunk - job.first_chunk, job.last_lead - job.first_lead
    if job.out is None:
        return np.zeros(chunks * leads, np.int64)
    return job.out.starts if chunks == 1 else np.tile(job.out.starts, chunks)


def _geometry(job: DecodeJob) -> tuple[int, ...]:
    """The arguments of ``_places`` for a job."""
    h = job.header
    blocks = h.blocks
    sizes = (h.first_tokens, h.coded_tokens, h.chunk_tokens, h.row_bytes, blocks.beside, blocks.align)
    return (
        *sizes,
        blocks.group_tokens,
        blocks.group_bytes,
        blocks.outliers,
        blocks.ends,
        blocks.head_dim,
        job.first_chunk,
        job.last_chunk,
        job.last_lead - job.first_lead,
        job.first_token,
        job.last_token,
    )


def _aligned(items: np.ndarray, h: Header) -> bool:
    """Whether every eight numbers of every row begin at a multiple of their size."""
    item = c.ITEM_BYTES[h.dtype]
    return not (items[:, ITEM.target] % (LANES * item)).any() and not (items[:, ITEM.stride] * item % (LANES * item)).any()


@lru_cache(maxsize=64)
def _places(
    exact: int,
    coded: int,
    chunk: int,
    row_bytes: int,
    beside: int,
    align: int,
    group_tokens: int,
    group_bytes: int,
    outliers: int,
    ends: int,
    head_dim: int,
    low: int,
    high: int,
    leads: int,
    first_token: int,
    last_token: int,
) -> np.ndarray:
    """Chunks low .. high - 1: items [chunks * leads, ITEM] without any address.

    Instead, ``source`` is the place in the payload, ``target`` that of row 0 among the wanted tokens, ``offset`` the leading
    index. ``exact`` and ``coded``: tokens of the tensor; ``chunk``: of a chunk; ``first_token`` and ``last_token``: what is
    wanted.
    """
    chunks = np.arange(low, high)
    tokens, start = np.minimum(chunk, coded - chunks * chunk), exact + chunks * chunk
    first = np.maximum(first_token - start, 0)
    items = np.zeros((high - low, leads, len(ITEM)), np.int64)
    items[..., ITEM.tokens] = tokens[:, None]
    items[..., ITEM.low] = first[:, None]
    items[..., ITEM.high] = np.maximum(first, np.minimum(last_token - start, tokens))[:, None]
    apart = (outliers, ends, head_dim)
    size = Blocks(0, high, leads, coded, chunk, row_bytes, beside, align, group_tokens, group_bytes, *apart).size_of
    items[..., ITEM.source] = ((chunks - low) * leads * size(chunk))[:, None] + np.arange(leads) * size(tokens)[:, None]
    items[..., ITEM.position] = start[:, None]
    items[..., ITEM.target] = (start - first_token)[:, None]
    items[..., ITEM.offset] = np.arange(leads)
    return items.reshape(-1, len(ITEM))


def _keys(h: Header, tokens: int) -> np.ndarray:
    """Keys for the checksum of a block of ``tokens``."""
    return checksum_keys(-(-h.blocks.size_of(tokens) // 4) + 1)


def _pieces(items: int, bytes_each: int) -> Iterable[tuple[int, int]]:
    """Ranges of items of about _TASK_BYTES each; at least one for each thread where there is work enough."""
    step = max(1, _TASK_BYTES // max(bytes_each, 1))
    if items * bytes_each > _ONE_THREAD_BYTES:
        step = min(step, -(-items // threads()))
    return ((first, min(first + step, items)) for first in range(0, items, step))


def _residual_encoders(job: EncodeJob) -> list[Callable[[], int]]:
    """Tasks that encode a block each by residual VQ: nearly all of their time is the search, the only part that is compiled."""
    plan, code = plan_for(job.header), partial(encode_residual, search=residual.entries_by_lanes)

    def task(chunk: int, lead: int) -> int:
        encode_job_block(job, plan, chunk, lead, code)
        return 1

    return [partial(task, chunk, lead) for chunk in range(job.header.chunks) for lead in range(job.header.leading)]


class Cpu:
    """All cores of the CPU, in tiles of eight vectors."""

    name = "cpu"

    def covers(self, header: Header) -> bool:
        """Whether this backend codes streams of such a header."""
        return header.coding in _CODINGS

    def means(self, values: Values, header: Header, positions: np.ndarray | None = None) -> np.ndarray:
        """Mean of the ``sampled`` tokens, turned back under RoPE, NaN and Inf as zero vectors: float64 [leading, head_dim]."""
        h = header
        picked, count, step = sampled(values, h)
        order = whole_groups(h.head_dim)  # of vectors; rows of them may have fewer numbers
        total = np.zeros((h.leading, order))
        arguments = (count, step, _kind(h, h.chunk_tokens, order), _source(h, picked), tables.rope(h, positions), total)

        def task(first: int, last: int) -> int:
            sides.sum_tokens(first, last, *arguments)
            return 0

        _run([partial(task, *piece) for piece in _pieces(h.leading, count * h.vector_bytes)], lambda done: None)
        return total[:, : h.head_dim] / max(count, 1)

    def turn(self, x: np.ndarray, header: Header, first: tuple[int, int], positions: np.ndarray | None, back: bool) -> None:
        """Turn vectors, or back, in place; see ``kernels.job.Backend``."""
        tiles = -(-x.shape[1] // vectors.TILE_TOKENS)
        arguments = (x, *first, np.float32(-1 if back else 1), tables.rope(header, positions))

        def task(low: int, high: int) -> int:
            vectors.turn_tiles(low, high, *arguments)
            return 0

        pieces = _pieces(tiles, vectors.TILE_TOKENS * len(x) * x.shape[2] * x.itemsize)
        _run([partial(task, *piece) for piece in pieces], nobody)

    def product(self, x: np.ndarray, matrix: np.ndarray) -> np.ndarray:
        """Rows times a matrix; see ``kernels.job.Backend``."""
        found = np.empty((len(x), matrix.shape[1]), np.float32)
        x, matrix = np.ascontiguousarray(x), np.ascontiguousarray(matrix)

        def task(low: int, high: int) -> int:
            vectors.multiply_rows(low, high, x, matrix, found)
            return 0

        _run([partial(task, *piece) for piece in _pieces(len(x), matrix.nbytes)], nobody)
        return found

    def encode(self, job: EncodeJob) -> None:
        """Encode every block of a job, as many threads at a time as there are cores."""
        h = job.header
        if h.coding == c.CODING_RESIDUAL:
            return _run(_residual_encoders(job), job.advance)
        numbers = (_source(h, job.values), -_offset_rows(job.offsets, h.order), tables.rope(h, job.positions))
        out = (_keys(h, min(h.chunk_tokens, h.coded_tokens)), job.bad.reshape(-1), job.payload)
        code: Any = blocks.encode_stream_blocks
        arguments: tuple
        if h.affine:
            code = affine_blocks.encode_affine_blocks
            arguments = (_kind(h, h.chunk_tokens), tables.groups(h, job.effort), *numbers, *out)
        elif h.sketch:
            code = sketch.encode_sketch_blocks
            table = tables.sketch_table("encode", h.sketch, h.head_dim, h.seed)
            arguments = (_kind(h, h.chunk_tokens), table, *numbers, *out)
        else:
            arguments = (
                _kind(h, h.chunk_tokens),
                *numbers,
                *_of_plan("encode", h),
                tables.paper_encoder(h),
                tables.quads_encoder(h.coding, h.head_dim, h.row_bits, job.effort),
                *out,
            )

        def task(first: int, last: int) -> int:
            code(first, last, *arguments)
            return last - first

        pieces = _pieces(h.chunks * h.leading, h.chunk_tokens * h.vector_bytes)
        return _run([partial(task, *piece) for piece in pieces], job.advance)

    def nearest(self, x: np.ndarray, book: Book) -> np.ndarray:
        """The entry of a codebook nearest to each of x float32 [n, channels of a group]: int64 [n]."""
        found = np.empty(len(x), np.int64)

        def task(first: int) -> int:
            found[first : first + _SEARCHED] = residual.entries_by_lanes(x[first : first + _SEARCHED], book)
            return 0

        _run([partial(task, first) for first in range(0, len(x), _SEARCHED)], lambda done: None)
        return found

    def decode(self, jobs: Sequence[DecodeJob], advance: Callable[[int], None] = nobody) -> None:
        """Check every block of the jobs (into ``job.damaged``), and decode where a job has ``out``."""
        kinds: dict[Any, list[DecodeJob]] = {}
        for job in jobs:
            scale = job.header.offset_exponent * job.header.runs  # which ``tables.rope`` has
            kinds.setdefault((job.header.kind, scale, job.out is not None, id(job.positions), job.shrunk), []).append(job)
        if not kinds:
            return
        alike = [job for same in kinds.values() for job in same]
        offsets = [_offset_rows(job.offsets, job.header.order) for job in alike]  # held while kernels read them
        items = _items(alike, offsets)
        damaged = np.zeros(len(items), np.bool_)
        large, tasks, last = sum(job.decoded_bytes for job in jobs) > _CACHED_BYTES, [], 0
        for same in kinds.values():
            first, last = last, last + sum(job.damaged.size for job in same)
            past = large and _aligned(items[first:last], same[0].header)
            tasks += self._decoders(same[0], items[first:last], past, damaged[first:last])
        _run(tasks, advance)
        last = 0
        for job in alike:
            first, last = last, last + job.damaged.size
            job.damaged[:] = damaged[first:last].reshape(job.damaged.shape)

    def scores(self, job: attention.AttentionJob) -> np.ndarray:
        """Scores of all tokens of a job: float32 [leading, rows, tokens]."""
        h, run = job.keys.header, partial(_run, advance=lambda done: None)
        if attending.covers(job):
            return attending.scores_of_codes(job, run)
        if sketch_scores.reads_signs(job):
            return sketch_scores.scores_of_signs(job, _kind(h, h.chunk_tokens), run)
        if h.affine and job.keys.positions is None:
            return affine_scores.scores_of_groups(job, _kind(h, h.chunk_tokens), run)
        return attention.scores_by_decoding(job, self)

    def attend(self, job: attention.AttentionJob) -> attention.Partial:
        """Attention to the tokens of a job, in float32."""
        if attending.covers(job):
            return attending.attend_to_codes(job, partial(_run, advance=lambda done: None))
        return attention.attend_by_decoding(job, self)

    @staticmethod
    def _decoders(job: DecodeJob, items: np.ndarray, past: bool, damaged: np.ndarray) -> list[Callable[[], int]]:
        """Tasks that decode blocks of the kind of a job; ``past``: by non-temporal stores."""
        h = job.header
        most = int(items[:, ITEM.tokens].max(initial=0))
        like = np.zeros(1, np.float32 if h.dtype == c.DTYPE_FLOAT32 else np.uint16)
        output = tuple(records.Output(like, np.float32(c.LARGEST_FINITE[h.dtype]), job.out is not None, past))
        decode: Any = blocks.decode_stream_blocks
        arguments: tuple
        if h.affine:
            decode = affine_blocks.decode_affine_blocks
            groups = tables.groups(h, look_up=job.out is not None)
            arguments = (_kind(h, most), groups, output, tables.rope(h, job.positions), _keys(h, most))
        elif h.coding == c.CODING_RESIDUAL:
            decode = residual.decode_residual_blocks
            books = residual.books_of(h, job.out is not None)
            arguments = (_kind(h, most), books, output, tables.rope(h, job.positions), _keys(h, most))
        elif h.sketch:
            decode = sketch.decode_sketch_blocks
            table = tables.sketch_table("decode", h.sketch, h.head_dim, h.seed, job.shrunk)
            arguments = (_kind(h, most), table, output, tables.rope(h, job.positions), _keys(h, most))
        else:
            arguments = (
                _kind(h, most),
                output,
                tables.rope(h, job.positions),
                *_of_plan("decode", h),
                tables.paper_decoder(h, plan_for(h).mantissas[0]),
                tables.quads_decoder(h.coding, h.head_dim, h.row_bits, plan_for(h).mantissas.tobytes()),
                _keys(h, most),
            )

        def task(first: int, last: int) -> int:
            decode(items[first:last], *arguments, damaged[first:last])
            return last - first

        return [partial(task, *piece) for piece in _pieces(len(items), h.chunk_tokens * h.vector_bytes)]
