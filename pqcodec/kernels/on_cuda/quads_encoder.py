"""Law: what ``quads_encoder.cuh`` searches: the representatives of a table of quads, as macros and as arrays."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np

from pqcodec import constants as c
from pqcodec.codings import quads
from pqcodec.codings.plan import Plan, plan_for
from pqcodec.stream.header import Header

# Levels of a quad's sorted magnitudes, by which cells are told apart, and a level's width in units of the table; the last
# level has no end.
LEVELS, WIDTH = (16, 16, 8, 4), 8
CANDIDATES = {4: 2, 5: 2, 6: 2, 7: 3, 8: 3, 9: 3, 10: 4}  # of a cell, by the bits of a table


def encoder_tables(plan: Plan) -> dict[str, np.ndarray]:
    """CELLS uint8 [cells, 4 candidates], CORNERS uint8 [representatives, 4], NUMBERS uint16 [representatives, 64 places of the
    three largest], and POINTS uint8 [points, 4]."""
    table = quads.table_of(plan)
    return {
        "CELLS": cells_of(table.bits) * np.uint8(_step(table)),
        "CORNERS": table.representatives.astype(np.uint8),
        "NUMBERS": table.numbers_by_three.astype(np.uint16),
        "POINTS": table.points.view(np.uint8),
    }


def _step(table: quads.Table) -> int:
    """What the numbers of representatives are multiplied with in CELLS: by a corner's bytes, if they still fit one byte."""
    return c.QUAD if c.QUAD * len(table.representatives) <= 256 else 1


@lru_cache(maxsize=16)
def cells_of(bits: int) -> np.ndarray:
    """The candidates of every cell: those representatives that are nearest most often, uint8 [cells, 4].

    Found for sorted magnitudes two units apart, the large ones further, with the density that the rotation gives them.
    """
    table = quads.points_of(bits)
    grid = np.concatenate([np.arange(1.0, 128, 2), np.arange(144.0, 256, 32)])
    spacing = np.gradient(grid)
    count, size = len(table.representatives), int(np.prod(LEVELS))
    half, weight = (table.representatives**2).sum(1) / 2, np.zeros(size * count)
    third, last = np.tril_indices(len(grid))
    for second in range(len(grid)):  # all magnitudes that descend
        smaller = third <= second
        pairs = np.stack([third[smaller], last[smaller]], 1)
        larger = np.arange(second, len(grid))
        places = np.empty((len(larger), len(pairs), c.QUAD), np.int64)
        places[..., 0], places[..., 1], places[..., 2:] = larger[:, None], second, pairs
        x = grid[places].reshape(-1, c.QUAD)
        level = np.minimum(x // WIDTH, np.array(LEVELS) - 1).astype(np.int64)
        nearest = (x @ table.representatives.T - half).argmax(1)
        weights = spacing[places].prod(-1).ravel() * np.exp(-(x * x).sum(1) / (2 * table.aim**2))
        weight += np.bincount(np.ravel_multi_index(tuple(level.T), LEVELS) * count + nearest, weights, size * count)
    total = weight.reshape(size, count)
    best = np.argsort(-total, axis=1, kind="stable")[:, :4]
    found = np.take_along_axis(total, best, 1) > 0
    return np.where(found, best, best[:, :1]).astype(np.uint8)  # where there are fewer, the first again


def encoder_definitions(h: Header, effort: str) -> dict[str, Any]:
    """The macros of ``quads_encoder.cuh`` and ``planes.cuh``."""
    table = quads.table_of(plan_for(h))
    least, most = c.QUADS_RADII
    inverses = table.aim / h.order * np.exp2(-np.arange(c.QUADS_RADIUS_STEPS) / c.QUADS_RADIUS_STEPS)
    return {
        "INDEX_BITS": table.bits,
        "INDEX_BYTES": quads.plane_bytes(h.order, table.bits)[1],
        "CANDIDATES": CANDIDATES[table.bits],
        "STEP": _step(table),
        "INVERSES": "{" + ",".join(f"{x!r}f" for x in map(float, inverses.astype(np.float32))) + "}",
        "CHOICES": len(c.QUADS_EFFORTS[effort]),
        "LEAST": f"({least})",
        "MOST_RADIUS": most - least + 1,
        "ENERGY_ORDERS": 3,  # a radius is a root of a mean square
        "ENERGY_SCALE": f"{(2.0 ** (h.order.bit_length() - 1) / h.order) ** 3!r}f",
        "RADIUS_BIAS": -least // c.QUADS_RADIUS_STEPS,
        "RADIUS_BITS": (most - least + 1).bit_length(),
        "RADIUS_STEPS": c.QUADS_RADIUS_STEPS,
    }
