"""Law: how ``quads.cu`` is compiled for a kind of stream: its tables in shared memory, its threads, and the macros it gets."""

from __future__ import annotations

from typing import Any

import numpy as np

from pqcodec import constants as c
from pqcodec.codings import look_ups as t
from pqcodec.codings import quads
from pqcodec.codings.plan import plan_for
from pqcodec.kernels.on_cuda.tables import blob_of, shared_tables
from pqcodec.stream.header import Header

ORDERS = (32, 64, 96, 128, 160, 192, 224, 256)
ROWS = 16  # of a tile
COPIES = (32, 16, 8, 4, 2, 1)  # of a point in the table: with 32, a lane has its own
UPCOMING_BYTES = 64  # of shared memory for a warp's next block
THREADS = {32: 768, 64: 768, 96: 640, 128: 640, 160: 512, 192: 512, 224: 512, 256: 512}
OFFSET_THREADS = {order: min(threads, 512) for order, threads in THREADS.items()}


def takes(h: Header, tokens: int) -> bool:
    """Whether ``quads.cu`` decodes streams of such a header, whose blocks have ``tokens`` or the chunk's."""
    index_bytes = h.row_bytes - 1 - h.order // 8
    return h.order in ORDERS and h.head_dim == h.order and not any(n * index_bytes % 4 for n in (tokens, h.chunk_tokens))


def tables_of(h: Header, keys: bool, copies: int) -> tuple[np.ndarray, dict[str, int]]:
    """The blob, uint8 [bytes], and the macros that say where each array begins."""
    plan = plan_for(h)
    points = quads.table_of(plan).points[:, list(c.QUADS_SIGN_PLACES)]  # a byte for each coordinate, where its sign is
    own = {
        "POINTS": np.repeat(np.ascontiguousarray(points).view(np.uint32), copies, 1),
        "MANTISSAS": plan.mantissas,
        "MATRIX": _matrix(h),
    }
    words = h.blocks.size_of(h.chunk_tokens) // 4
    return blob_of({**own, **shared_tables(h, words if keys else 0)})


def _matrix(h: Header) -> np.ndarray:
    """Half of both rounds' matrix, int8 [order / 8 strips, order / 16 bricks, 8 channels, 16 bytes of inputs], as bytes."""
    place = np.arange(h.order)
    channels = place // 32 * 32 + place % 8 // 2 * 8 + place // 8 % 4 * 2 + place % 2
    quad = place // 32 * 8 + place % 16 // 4 * 2 + place // 16 % 2
    coordinates = quad * c.QUAD + np.array(c.QUADS_SIGN_PLACES)[place % 4]
    matrix = t.rotation_matrix(h.order, h.seed, 2)[coordinates][:, channels]
    columns = np.ascontiguousarray((matrix.T / 2).astype(np.int8)).view(np.uint8)
    return columns.reshape(h.order // 8, 8, -1, 16).swapaxes(1, 2)


def stage_bytes(h: Header) -> int:
    """Bytes of a tile's signs and indices, and of the word behind them that its last window may touch."""
    return -(-(ROWS * (h.row_bytes - 1) + 4) // 16) * 16


def definitions(h: Header, copies: int) -> dict[str, Any]:
    """The macros of ``quads.cu`` beside those of every kernel (``compiled.definitions``)."""
    least, most = c.QUADS_RADII
    return {
        "INDEX_BITS": quads.table_of(plan_for(h)).bits,
        "INDEX_BYTES": h.row_bytes - 1 - h.order // 8,
        "COPIES": copies,
        "LEAST": f"({least})",
        "MOST": most,
        "STEPS": c.QUADS_RADIUS_STEPS,
        "LOG2_STEPS": c.QUADS_RADIUS_STEPS.bit_length() - 1,
        "LARGEST_SUM": f"{127.0 * h.order**1.5!r}f",
    }
