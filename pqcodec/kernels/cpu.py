"""Law: the numba backend: turns a job into flat arrays and runs the tiles of ``cpu_tiles`` on all cores.

Kernels are compiled once and cached on disk by numba; they hold no lock, so plain threads share the blocks.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import numpy as np

from pqcodec import angles, centre
from pqcodec import constants as c
from pqcodec.checksum import checksum_keys
from pqcodec.errors import InvalidArgument
from pqcodec.header import Header
from pqcodec.kernels import cpu_tiles as tiles
from pqcodec.kernels.job import DecodeJob, EncodeJob, Values
from pqcodec.plan import Plan, plan_for

_TASK_BYTES = 1 << 20  # of input, for one thread at a time: small enough for progress, large enough to forget Python
_WIDTH_ROWS = c.MAX_ANGLE_BITS + 1


def threads() -> int:
    """Threads to use: PQCODEC_THREADS, or the processors that this process may run on."""
    wanted = os.environ.get("PQCODEC_THREADS", "")
    if not wanted:
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if not wanted.isdecimal() or not 1 <= int(wanted) <= 1024:
        raise InvalidArgument(f"PQCODEC_THREADS is {wanted!r}; a number from 1 to 1024 is expected")
    return int(wanted)


def _run(tasks: Iterable[Callable[[], int]], advance: Callable[[int], None]) -> None:
    """Run every task and tell ``advance`` what each returns."""
    workers = threads()
    if workers == 1:
        for task in tasks:
            advance(task())
        return
    with ThreadPoolExecutor(workers) as pool:
        for done in pool.map(lambda task: task(), tasks):
            advance(done)


# -- tables, flattened ---------------------------------------------------------------------------------------------
@lru_cache(maxsize=32)
def _tree_arrays(tree_order: int) -> tuple[tuple, tuple, tuple]:
    """(kind, left, right, m_a, m_b), encoder tables and decoder tables of a tree's nodes."""
    tree = angles.tree(tree_order)
    kinds = len(tree.tables)
    most = max(len(table.bits) for table in tree.tables)
    widths, halves = np.zeros((2, kinds, most), np.int32)
    cos, sin = np.zeros((2, kinds, 2 << c.MAX_ANGLE_BITS), np.float32)
    shift = np.zeros((kinds, 2 << c.MAX_ANGLE_BITS), np.int32)
    bounds = np.full((kinds, _WIDTH_ROWS, (1 << c.MAX_ANGLE_BITS) + 1), 1 << 30, np.int32)
    look_up = np.zeros((kinds, _WIDTH_ROWS, 1 << c.COARSE_GRID_BITS), np.uint8)
    look_shift = np.zeros(kinds, np.int32)
    for i, table in enumerate(tree.tables):
        n = len(table.bits)
        widths[i, :n] = table.bits
        halves[i, :n] = np.arange(n) * table.m_a // table.coordinates
        cos[i], sin[i], shift[i] = table.cos, table.sin, table.shift
        look_shift[i] = angles.grid_bits(table.coordinates) - c.COARSE_GRID_BITS
        for width in range(_WIDTH_ROWS):
            cells = 1 << width
            bounds[i, width, :cells] = table.bounds[width, :cells]
            look_up[i, width] = _cells_of_grid(table.bounds[width, :cells], int(look_shift[i]))
    fine = np.exp2(look_shift + c.COARSE_GRID_BITS).astype(np.float32)
    shape = tuple(np.array([getattr(table, side) for table in tree.tables], np.int32) for side in ("m_a", "m_b"))
    return (
        (tree.kind, tree.left, tree.right, *shape),
        (widths, shift, halves, look_up, bounds, look_shift, fine),
        (widths, shift, halves, cos, sin),
    )


def _cells_of_grid(lower: np.ndarray, shift: int) -> np.ndarray:
    """Cell of the first sin^2 place of each of 1,024 steps, uint8; lower [cells] are the cells' first places."""
    places = np.arange(1 << c.COARSE_GRID_BITS) << shift
    return (np.searchsorted(lower, places, side="right") - 1).astype(np.uint8)


@lru_cache(maxsize=1)
def _quad_arrays() -> tuple[tuple, tuple]:
    """Encoder tables and decoder tables of quads."""
    table = angles.quad_table()
    look_up = np.stack([_cells_of_grid(table.bounds[b, :n], 0) for b, n in enumerate(table.cells)])
    per_cell = table.per_cell.astype(np.int32)
    cell_reciprocal = ((1 << 56) // table.per_cell + 1).astype(np.uint64)
    record_reciprocal = ((1 << 40) // table.n_b.astype(np.int64) + 1).astype(np.uint64)
    steps = [angles.circle_step(n).astype(np.uint32) for n in (table.n_a, table.n_b)]
    encoder = (table.cells, per_cell, table.first, look_up, table.n_a, table.n_b)
    decoder = (table.cells, cell_reciprocal, per_cell, table.first, table.n_b, record_reciprocal, *steps, table.cos, table.sin)
    return encoder, decoder


@lru_cache(maxsize=1)
def _paper_arrays() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Squared bounds in tan psi [3, 3], cos and sin [3, 4] of levels 2 to 4."""
    bounds, cos, sin = zip(*(angles.paper_cells(level) for level in (2, 3, 4)), strict=True)
    return np.stack(bounds) ** 2, np.stack(cos), np.stack(sin)


def _rope_arrays(h: Header) -> tuple[np.ndarray, int, int, int]:
    """Frequencies uint64 [pairs], the pairs' stride and step, and the first position."""
    if h.rope is None:
        return np.zeros(0, np.uint64), 1, 1, 0
    pairs = len(h.rope.frequencies)
    half = h.rope.pairing == c.ROPE_HALF
    first = h.rope.first_position % (1 << c.PHASE_BITS)
    return np.array(h.rope.frequencies, np.uint64), 1 if half else 2, pairs if half else 1, first


def _sizes(h: Header) -> tuple[int, ...]:
    return (h.coding, h.dtype, h.head_dim, h.order, h.row_bytes, h.chunk_tokens, h.leading, h.first_tokens, h.coded_tokens)


def _nowhere(h: Header) -> Values:
    """Stands for the output of a job that only checks."""
    return Values(np.zeros(0, np.float32 if h.dtype == c.DTYPE_FLOAT32 else np.uint16), np.zeros(1, np.int64), 0, h.head_dim)


def _plan_ints(plan: Plan) -> tuple[int, int, int, int]:
    steps = plan.radius_steps if plan.coding == c.CODING_SPLIT else 1
    return plan.radius_bits, steps, plan.root_budget, plan.order


def _keys(h: Header) -> np.ndarray:
    return checksum_keys(-(-min(h.chunk_tokens, max(h.coded_tokens, 1)) * h.row_bytes // 4) + 1)


def _pieces(items: int, bytes_each: int) -> Iterable[tuple[int, int]]:
    """Ranges of about _TASK_BYTES, and at least one for each thread."""
    step = max(1, min(_TASK_BYTES // max(bytes_each, 1), -(-items // threads())))
    return ((first, min(first + step, items)) for first in range(0, items, step))


class Cpu:
    """All cores, tiles of 16 vectors."""

    name = "cpu"

    def means(self, values: Values, header: Header) -> np.ndarray:
        """Mean of the coded tokens (turned back under RoPE): float64 [leading, head_dim]."""
        h = header
        total = np.zeros((h.leading, h.head_dim))
        places = (values.starts, values.stride)

        def task(first: int, last: int) -> int:
            tiles.sum_blocks(first, last, _sizes(h), values.flat, places, _rope_arrays(h), centre.phase_tables(), total)
            return 0

        pieces = _pieces(h.leading, h.coded_tokens * h.vector_bytes)
        _run((lambda p=p: task(*p) for p in pieces), lambda done: None)
        return total / max(h.coded_tokens, 1)

    def encode(self, job: EncodeJob) -> None:
        h, plan = job.header, plan_for(job.header)
        tree, nodes, _ = _tree_arrays(h.order)
        quads, _ = _quad_arrays()
        offsets = job.offsets if job.offsets is not None else np.zeros((0, 0), np.float32)
        bad = job.bad.reshape(-1)
        arguments = (
            _sizes(h),
            job.values.flat,
            (job.values.starts, job.values.stride),
            offsets,
            _rope_arrays(h),
            centre.phase_tables(),
            _plan_ints(plan),
            h.radius_exponent,
            plan.signs,
            plan.base,
            tree,
            nodes,
            quads,
            _paper_arrays()[0],
            _keys(h),
            bad,
            job.payload,
        )

        def task(first: int, last: int) -> int:
            tiles.encode_blocks(first, last, *arguments)
            return last - first

        pieces = _pieces(h.chunks * h.leading, h.chunk_tokens * h.vector_bytes)
        _run((lambda p=p: task(*p) for p in pieces), job.advance)

    def decode(self, job: DecodeJob) -> None:
        h, plan = job.header, plan_for(job.header)
        tree, _, nodes = _tree_arrays(h.order)
        _, quads = _quad_arrays()
        _, paper_cos, paper_sin = _paper_arrays()
        work = np.array(
            [
                (chunk, lead, *job.rows_of(chunk), h.block_start(chunk, lead) - job.origin)
                for chunk in range(job.first_chunk, job.last_chunk)
                for lead in range(job.first_lead, job.last_lead)
            ],
            np.int64,
        ).reshape(-1, 5)
        damaged = job.damaged.reshape(-1)
        out = job.out or _nowhere(h)
        arguments = (
            _sizes(h),
            job.payload,
            job.origin,
            out.flat,
            (out.starts, out.stride),
            job.first_lead,
            job.first_token,
            job.offsets if job.offsets is not None else np.zeros((0, 0), np.float32),
            _rope_arrays(h),
            centre.phase_tables(),
            _plan_ints(plan),
            h.radius_exponent,
            plan.signs,
            plan.base,
            tree,
            nodes,
            quads,
            paper_cos,
            paper_sin,
            (plan.circle_cos, plan.circle_sin),
            plan.mantissas,
            _keys(h),
            np.float32(c.LARGEST_FINITE[h.dtype]),
            job.out is not None,
        )

        def task(first: int, last: int) -> int:
            tiles.decode_blocks(work[first:last], *arguments, damaged[first:last])
            return last - first

        _run((lambda p=p: task(*p) for p in _pieces(len(work), h.chunk_tokens * h.vector_bytes)), job.advance)
