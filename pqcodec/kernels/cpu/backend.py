"""Law: the numba backend: turns a job into flat arrays and runs the tiles of ``tiles`` on all cores.

Kernels are compiled once and kept on disk (``disk_cache``); they hold no lock, so plain threads share the blocks.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import lru_cache, partial
from itertools import groupby
from typing import Any

import numpy as np

from pqcodec import constants as c
from pqcodec.codings import angles
from pqcodec.codings import look_ups as tables
from pqcodec.codings.plan import Plan, plan_for
from pqcodec.kernels.cpu import tiles
from pqcodec.kernels.cpu.lanes import LANES
from pqcodec.kernels.job import DecodeJob, EncodeJob, nobody, sampled
from pqcodec.stages import centre, rotation
from pqcodec.stream.checksum import checksum_keys
from pqcodec.stream.header import Header
from pqcodec.stream.orders import base_of
from pqcodec.tensors.rows import Values, address
from pqcodec.threads import threads

_TASK_BYTES = 1 << 22  # of input, for one thread at a time: small enough for progress, large enough to forget Python
_ONE_THREAD_BYTES = 1 << 16
_CODINGS = (c.CODING_SPLIT, c.CODING_PAPER)
# Bytes of output, as many as a core's own cache may hold; more is stored past the caches, which would read its memory first
_CACHED_BYTES = 1 << 20


def _run(tasks: list[Callable[[], int]], advance: Callable[[int], None]) -> None:
    """Run every task, the caller's thread among those that do, and tell ``advance`` what each returns."""
    waiting, done = deque(tasks), deque[int]()

    def work(told: Callable[[int], None]) -> None:
        while waiting:
            try:
                task = waiting.popleft()
            except IndexError:  # another thread was quicker
                return
            try:
                told(task())
            except BaseException:
                waiting.clear()
                raise

    def tell(blocks: int) -> None:
        done.append(blocks)
        while done:
            advance(done.popleft())

    others = [_pool(threads()).submit(work, done.append) for _ in range(min(threads(), len(tasks)) - 1)]
    try:
        work(tell)
        for other in others:
            if not other.cancel():  # all is done before it began, where many callers share the threads
                other.result()
    except BaseException:
        waiting.clear()
        wait([other for other in others if not other.cancel()])  # nothing is written into the caller's memory once it knows
        raise
    while done:
        advance(done.popleft())


@lru_cache(maxsize=1)
def _pool(workers: int) -> ThreadPoolExecutor:
    """Threads that wait for work: to start them takes longer than to decode a small tensor."""
    return ThreadPoolExecutor(workers, "pqcodec")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # a child has none of its parent's threads


# -- tables, flattened -------------------------------------------------------------------------------------------
@lru_cache(maxsize=32)
def _tree_arrays(order: int) -> tuple[tuple, tuple, np.ndarray, np.ndarray, tuple]:
    """A tree for ``tiles``: (its shape), (the encoder's tables), the decoder's table, the sin^2 grids float32, and (its
    shape as the decoder goes through it: ``tiles.STEP`` numbers a node, 16 / (15 coordinates) of each, portions)."""
    tree, nodes = angles.tree(order), tables.node_arrays(order)
    kinds = len(tree.tables)
    most = max(len(table.bits) for table in tree.tables)
    portions = np.zeros((kinds, most), np.int32)
    for i, table in enumerate(tree.tables):
        portions[i] = np.arange(most) * table.m_a // table.coordinates
    decoder = np.stack([nodes.cos, nodes.sin, nodes.shift.view(np.float32), np.zeros_like(nodes.cos)], 2)
    m_a, m_b = (np.array([getattr(table, side) for table in tree.tables], np.int32) for side in ("m_a", "m_b"))
    per_bit = (16 / (15 * (m_a + m_b))).astype(np.float32)
    kind = np.asarray(tree.kind, np.int64)
    shape = np.where(m_a == 4, tiles.OF_QUADS, np.where(m_a == m_b, tiles.EVEN, tiles.UNEVEN))
    steps = np.zeros((len(kind), tiles.STEP), np.int64)
    steps[:, 0], steps[:, 1] = np.multiply(tree.left, LANES), np.multiply(tree.right, LANES)
    steps[:, 2], steps[:, 3] = c.MAX_BUDGET_PER_COORDINATE * m_a[kind], c.MAX_BUDGET_PER_COORDINATE * m_b[kind]
    steps[:, 4], steps[:, 5], steps[:, 6] = kind * tiles.CODES, shape[kind], kind * most
    return (
        (tree.kind, tree.left, tree.right, m_a, m_b, per_bit, portions.ravel()),
        (nodes.shift.ravel(), nodes.look_up.ravel(), nodes.bounds.ravel(), nodes.grid_shift, nodes.fixes),
        decoder.ravel().view(np.int32),
        np.exp2(nodes.grid_shift + c.COARSE_GRID_BITS).astype(np.float32),
        (steps.ravel(), per_bit[kind], portions.ravel()),
    )


@lru_cache(maxsize=1)
def _quad_arrays() -> tuple[tuple, tuple]:
    """Quads for ``tiles``: (by budget: codes a cell and first record; cell look-up; n_a and n_b), and the decoder's
    (by budget: codes a cell, first record, last cell, 1 / codes; by record: cos, sin, n_b, 1 / n_b, K_a, K_b, 0, 0)."""
    table = angles.quad_table()
    codes = table.per_cell.astype(np.int32)
    encoder = (
        np.stack([codes, table.first], 1).ravel(),
        tables.quad_look_up().ravel(),
        np.stack([table.n_a, table.n_b], 1).ravel(),
    )
    by_budget = np.stack([codes, table.first, table.cells - 1, (1 / codes).astype(np.float32).view(np.int32)], 1)
    columns = (
        table.cos.view(np.int32),
        table.sin.view(np.int32),
        table.n_b,
        (1 / table.n_b).astype(np.float32).view(np.int32),
        angles.circle_step(table.n_a).astype(np.int32),
        angles.circle_step(table.n_b).astype(np.int32),
    )
    by_record = np.zeros((len(table.n_b), 8), np.int32)
    by_record[:, : len(columns)] = np.stack(columns, 1)
    return encoder, (by_budget.ravel(), by_record.ravel(), _codebook(table))


def _codebook(table: angles.QuadTable) -> np.ndarray:
    """Every point of the quads of few bits at radius 1: float32, entry 4 * (2^budget + code); products are exact."""
    points = np.zeros((2 << tiles.CODEBOOK_BUDGET, 4), np.float32)
    cos, sin = angles.circle_table()
    for budget in range(tiles.CODEBOOK_BUDGET + 1):
        code = np.arange(1 << budget)
        cell = np.minimum(code // table.per_cell[budget], table.cells[budget] - 1)
        record = table.first[budget] + cell
        sector_a, sector_b = np.divmod(code - cell * table.per_cell[budget], table.n_b[record])
        for column, mean, sector, n in ((0, table.cos, sector_a, table.n_a), (2, table.sin, sector_b, table.n_b)):
            turn = (2 * sector + 1) * angles.circle_step(n[record]) + (1 << (c.PHASE_SHIFT - 1))
            phase = (turn >> c.PHASE_SHIFT) % c.CIRCLE
            points[1 << budget : 2 << budget, column] = mean[record] * cos[phase]
            points[1 << budget : 2 << budget, column + 1] = mean[record] * sin[phase]
    return points.ravel()


@lru_cache(maxsize=1)
def _circle() -> np.ndarray:
    """cos and sin of the 2,048 directions, side by side: float32 [4096]."""
    return np.stack(angles.circle_table(), 1).ravel()


@lru_cache(maxsize=1)
def _paper_arrays() -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray]]:
    """Squared bounds in tan psi [3, 3]; cos and sin [3, 4] of levels 2 to 4."""
    bounds, cos, sin = tables.paper_cells()
    return bounds**2, (cos, sin)


def _offset_rows(offsets: np.ndarray | None, order: int) -> np.ndarray:
    """Offsets float32 [leading, order], padded with zeros; none: [0, 0]."""
    if offsets is None:
        return np.zeros((0, 0), np.float32)
    missing = order - offsets.shape[1]
    return np.pad(offsets, ((0, 0), (0, missing))) if missing else offsets


def _rope_arrays(h: Header) -> tuple[np.ndarray, int, int, int]:
    """Frequencies uint32 [pairs], the pairs' stride and step, and the first position."""
    if h.rope is None:
        return np.zeros(0, np.uint32), 1, 1, 0
    pairs = len(h.rope.frequencies)
    half = h.rope.pairing == c.ROPE_HALF
    first = h.rope.first_position % (1 << c.PHASE_BITS)
    return np.array(h.rope.frequencies, np.uint32), 1 if half else 2, pairs if half else 1, first


def _sizes(h: Header) -> tuple[int, ...]:
    return (h.coding, h.dtype, h.head_dim, h.order, h.row_bytes, h.chunk_tokens, h.leading, h.first_tokens, h.coded_tokens)


def _items(jobs: Sequence[DecodeJob], offsets: Sequence[np.ndarray]) -> np.ndarray:
    """The blocks of jobs of one kind, job by job and chunk by chunk, for ``tiles.decode_blocks``; ``offsets``: each job's,
    float32 [leading or 0, order].
    """
    found, first = [], 0
    for geometry, alike in groupby(jobs, _geometry):
        of = list(alike)
        found.append(_items_alike(geometry, of, offsets[first : first + len(of)]))
        first += len(of)
    return found[0] if len(found) == 1 else np.concatenate(found)


def _geometry(job: DecodeJob) -> tuple[int, ...]:
    """What ``_places`` wants of a job."""
    h = job.header
    sizes = (h.first_tokens, h.coded_tokens, h.chunk_tokens, h.row_bytes)
    return *sizes, job.first_chunk, job.last_chunk, job.last_lead - job.first_lead, job.first_token, job.last_token


def _items_alike(geometry: tuple[int, ...], jobs: Sequence[DecodeJob], offsets: Sequence[np.ndarray]) -> np.ndarray:
    """The blocks of jobs of one geometry."""
    start, places = _places(*geometry)
    items = np.repeat(places[None], len(jobs), 0)  # [jobs, chunks, leads, 8]

    def column(numbers: Iterable[int]) -> np.ndarray:
        return np.array(list(numbers), np.int64).reshape(-1, 1, 1)

    items[..., 3] += column(address(job.payload) for job in jobs)
    outs = [job.out for job in jobs if job.out is not None]
    if outs:
        strides, item = column(out.stride for out in outs), outs[0].flat.itemsize
        rows = (start - geometry[-2])[None, :, None] * strides + np.stack([out.starts for out in outs])[:, None]
        items[..., 4] = rows * item + column(address(out.flat) for out in outs)
        items[..., 6] = strides
    if offsets[0].size:
        leads = np.arange(places.shape[1]) + column(job.first_lead for job in jobs)
        items[..., 5] = leads * offsets[0].strides[0] + column(map(address, offsets))
    if jobs[0].header.rope:
        items[..., 7] += column(job.header.rope.first_position % (1 << c.PHASE_BITS) for job in jobs if job.header.rope)
    return items.reshape(-1, 8)


def _aligned(items: np.ndarray, h: Header) -> bool:
    """Whether the lanes of every row begin at multiples of their size."""
    item = c.ITEM_BYTES[h.dtype]
    return not (items[:, 4] % (LANES * item)).any() and not (items[:, 6] * item % (LANES * item)).any()


@lru_cache(maxsize=64)
def _places(
    exact: int, coded: int, chunk: int, row_bytes: int, low: int, high: int, leads: int, first_token: int, last_token: int
) -> tuple[np.ndarray, np.ndarray]:
    """Chunks low .. high - 1: their first tokens int64 [chunks], and items [chunks, leads, 8] without any address.

    ``exact`` and ``coded``: tokens of the tensor; ``chunk``: of a chunk; ``first_token`` and ``last_token``: what is wanted.
    """
    chunks = np.arange(low, high)
    tokens, start = np.minimum(chunk, coded - chunks * chunk), exact + chunks * chunk
    first = np.maximum(first_token - start, 0)
    items = np.zeros((high - low, leads, 8), np.int64)
    items[..., 0] = tokens[:, None]
    items[..., 1] = first[:, None]
    items[..., 2] = np.maximum(first, np.minimum(last_token - start, tokens))[:, None]
    items[..., 3] = ((chunks - low) * leads * (chunk * row_bytes + c.CHECKSUM_BYTES))[:, None]
    items[..., 3] += np.arange(leads) * (tokens * row_bytes + c.CHECKSUM_BYTES)[:, None]
    items[..., 7] = start[:, None]
    return start, items


def _plan_ints(plan: Plan) -> tuple[int, int, int, int, int]:
    steps = plan.radius_steps if plan.coding == c.CODING_SPLIT else 1
    return plan.radius_bits, steps, plan.root_budget, plan.order, plan.energy_scale


def _rotation(plan: Plan, verb: str) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """The signs of a tensor's coordinates, and for ``tiles.rotate``: H's base, places and signs between two rounds."""
    base = _base_places(plan.order, verb == "decode")
    if plan.rounds == 1:
        return plan.signs, (base, np.zeros(0, np.int64), plan.signs[:0])
    order = plan.permutation if verb == "encode" else np.argsort(plan.permutation)
    signs = plan.signs if verb == "encode" else plan.signs[order]
    return plan.first_signs, (base, order.astype(np.int64) * LANES, np.repeat(signs, LANES))


@lru_cache(maxsize=64)
def _base_places(order: int, transposed: bool) -> np.ndarray:
    """For ``tiles.base_stage``: int64 [b, b/4]; [0, 0] where H's base is 1."""
    base = rotation.base_matrix(base_of(order))
    if len(base) == 1:
        return np.zeros((0, 0), np.int64)
    fours = (base.T if transposed else base).reshape(len(base), -1, 4)
    which = (fours[:, :, None] == np.array(tiles.SUMS)).all(3).argmax(2)
    return (which + np.arange(fours.shape[1]) * len(tiles.SUMS)) * 2 * LANES


def _keys(h: Header, tokens: int) -> np.ndarray:
    """Keys for the checksum of a block of so many tokens."""
    return checksum_keys(-(-tokens * h.row_bytes // 4) + 1)


def _pieces(items: int, bytes_each: int) -> Iterable[tuple[int, int]]:
    """Ranges of about _TASK_BYTES, and at least one for each thread where the work is worth a thread."""
    step = max(1, _TASK_BYTES // max(bytes_each, 1))
    if items * bytes_each > _ONE_THREAD_BYTES:
        step = min(step, -(-items // threads()))
    return ((first, min(first + step, items)) for first in range(0, items, step))


class Cpu:
    """All cores, tiles of eight vectors."""

    name = "cpu"

    def covers(self, header: Header) -> bool:
        """Whether this backend codes streams of such a header."""
        return header.coding in _CODINGS

    def means(self, values: Values, header: Header) -> np.ndarray:
        h = header
        picked, count, step = sampled(values, h)
        total = np.zeros((h.leading, h.order))
        arguments = (
            _sizes(h),
            picked.flat,
            (picked.starts, picked.stride),
            _rope_arrays(h),
            centre.phase_pairs(),
            total,
        )

        def task(first: int, last: int) -> int:
            tiles.sum_tokens(first, last, count, step, *arguments)
            return 0

        _run([partial(task, *piece) for piece in _pieces(h.leading, count * h.vector_bytes)], lambda done: None)
        return total[:, : h.head_dim] / max(count, 1)

    def encode(self, job: EncodeJob) -> None:
        h, plan = job.header, plan_for(job.header)
        tree, nodes, _, grids, _ = _tree_arrays(h.order)
        arguments = (
            _sizes(h),
            job.values.flat,
            (job.values.starts, job.values.stride),
            -_offset_rows(job.offsets, h.order),
            _rope_arrays(h),
            centre.phase_pairs(),
            _plan_ints(plan),
            h.radius_exponent,
            *_rotation(plan, "encode"),
            tree,
            nodes,
            _quad_arrays()[0],
            grids,
            _paper_arrays()[0],
            _keys(h, min(h.chunk_tokens, h.coded_tokens)),
            job.bad.reshape(-1),
            job.payload,
        )

        def task(first: int, last: int) -> int:
            tiles.encode_blocks(first, last, *arguments)
            return last - first

        pieces = _pieces(h.chunks * h.leading, h.chunk_tokens * h.vector_bytes)
        _run([partial(task, *piece) for piece in pieces], job.advance)

    def decode(self, jobs: Sequence[DecodeJob], advance: Callable[[int], None] = nobody) -> None:
        kinds: dict[Any, list[DecodeJob]] = {}
        for job in jobs:
            kinds.setdefault((job.header.kind, job.out is not None), []).append(job)
        offsets = [[_offset_rows(job.offsets, job.header.order) for job in alike] for alike in kinds.values()]
        tasks, found = [], []
        large = sum(job.decoded_bytes for job in jobs) > _CACHED_BYTES
        for alike, rows in zip(kinds.values(), offsets, strict=True):
            items = _items(alike, rows)
            damaged = np.zeros(len(items), np.bool_)
            tasks += self._decoders(alike[0], items, large and _aligned(items, alike[0].header), damaged)
            found.append(damaged)
        _run(tasks, advance)
        for alike, damaged in zip(kinds.values(), found, strict=True):
            ends = np.cumsum([job.damaged.size for job in alike])
            for job, part in zip(alike, np.split(damaged, ends[:-1]), strict=True):
                job.damaged[:] = part.reshape(job.damaged.shape)

    @staticmethod
    def _decoders(job: DecodeJob, items: np.ndarray, past: bool, damaged: np.ndarray) -> list[Callable[[], int]]:
        """Tasks for blocks of the kind of a job; ``past``: their rows are stored past the caches."""
        h, plan = job.header, plan_for(job.header)
        _, _, nodes, _, tree = _tree_arrays(h.order)
        most = int(items[:, 0].max(initial=0))
        arguments = (
            (h.coding, h.dtype, h.head_dim, h.order, h.row_bytes, most),
            np.zeros(1, np.float32 if h.dtype == c.DTYPE_FLOAT32 else np.uint16),
            _rope_arrays(h)[:3],
            centre.phase_pairs(),
            _plan_ints(plan),
            h.radius_exponent,
            *_rotation(plan, "decode"),
            tree,
            nodes,
            _quad_arrays()[1],
            _paper_arrays()[1],
            _circle(),
            plan.radii if plan.coding == c.CODING_SPLIT else np.zeros((2, 0), np.float32),
            plan.mantissas[0],
            _keys(h, most),
            np.float32(c.LARGEST_FINITE[h.dtype]),
            job.out is not None,
            past,
        )

        def task(first: int, last: int) -> int:
            tiles.decode_blocks(items[first:last], *arguments, damaged[first:last])
            return last - first

        return [partial(task, *piece) for piece in _pieces(len(items), h.chunk_tokens * h.vector_bytes)]
