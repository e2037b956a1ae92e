"""Law: the tree's and the quads' numbers laid out for look-ups; numpy arrays that the CPU and GPU backends share."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from pqcodec import constants as c
from pqcodec.codings import angles
from pqcodec.codings.paper import paper_cells
from pqcodec.stages import rotation

WIDTHS = c.MAX_ANGLE_BITS + 1
CODES = 2 << c.MAX_ANGLE_BITS
BOUNDS = (1 << c.MAX_ANGLE_BITS) + 1
STEPS = 1 << c.COARSE_GRID_BITS
WIDTH_SHIFT, SHARE_SHIFT = 24, 18  # divisions of budgets as multiplications: exact for every budget (checked below)


def cells_of_grid(lower: np.ndarray, shift: int) -> np.ndarray:
    """Cell of the first sin^2 place of each of 1,024 steps, uint8; lower [cells] are the cells' first places."""
    places = np.arange(STEPS) << shift
    return (np.searchsorted(lower, places, side="right") - 1).astype(np.uint8)


@dataclass(frozen=True)
class NodeArrays:
    """The kinds of internal nodes of one order, in the order of ``Tree.tables``."""

    cos: np.ndarray  # float32 [kinds, 256], entry (1 << width) + code
    sin: np.ndarray  # float32 [kinds, 256]
    shift: np.ndarray  # int32 [kinds, 256]
    look_up: np.ndarray  # uint8 [kinds, widths, 1024]: cell of the first place of each coarse step of sin^2
    bounds: np.ndarray  # int32 [kinds, widths, 129]: first place of each cell on the kind's own grid, then 2^30
    grid_shift: np.ndarray  # int32 [kinds]: places in a coarse step, as a shift
    fixes: np.ndarray  # int32 [kinds]: bounds that may lie inside one coarse step


@lru_cache(maxsize=32)
def node_arrays(order: int) -> NodeArrays:
    """Look-ups of the nodes above the quads (SPEC 6.2, 6.3)."""
    tables = angles.tree(order).tables
    kinds = len(tables)
    bounds = np.full((kinds, WIDTHS, BOUNDS), 1 << 30, np.int32)
    look_up = np.zeros((kinds, WIDTHS, STEPS), np.uint8)
    grid_shift, fixes = np.zeros((2, kinds), np.int32)
    for i, table in enumerate(tables):
        grid_shift[i] = angles.grid_bits(table.coordinates) - c.COARSE_GRID_BITS
        for width in range(WIDTHS):
            lower = table.bounds[width, : 1 << width]
            bounds[i, width, : len(lower)] = lower
            look_up[i, width] = cells_of_grid(lower, int(grid_shift[i]))
            if grid_shift[i]:
                fixes[i] = max(fixes[i], np.bincount(lower >> grid_shift[i]).max())
    cos, sin, shift = (np.stack([getattr(table, name) for table in tables]) for name in ("cos", "sin", "shift"))
    return NodeArrays(cos, sin, shift, look_up, bounds, grid_shift, fixes)


@lru_cache(maxsize=1)
def quad_look_up() -> np.ndarray:
    """Cell of a quad's place on its sin^2 grid: uint8 [29 budgets, 1024]."""
    table = angles.quad_table()
    return np.stack([cells_of_grid(table.bounds[b, :n], 0) for b, n in enumerate(table.cells)])


@dataclass(frozen=True)
class Division:
    """A node's divisions of a budget B as multiplications: 16 B div (15 n) and B m_a div (m_a + m_b) (SPEC 6.3)."""

    width: int  # (B * width) >> WIDTH_SHIFT
    share: int  # (B * share) >> SHARE_SHIFT


@lru_cache(maxsize=64)
def division(m_a: int, m_b: int) -> Division:
    """The factors of a node whose children have m_a and m_b coordinates; they are checked for every budget."""
    n = m_a + m_b
    found = Division(-(-(16 << WIDTH_SHIFT) // (15 * n)), -(-(m_a << SHARE_SHIFT) // n))
    budgets = np.arange(c.MAX_BUDGET_PER_COORDINATE * n + 1, dtype=np.int64)
    assert ((budgets * found.width >> WIDTH_SHIFT) == 16 * budgets // (15 * n)).all()
    assert ((budgets * found.share >> SHARE_SHIFT) == budgets * m_a // n).all()
    return found


class PathNode(NamedTuple):
    """A node above a group of 16 coordinates, on the path from the root to it (``paths``)."""

    width_factor: int  # of ``division``
    share_factor: int
    least_width: int  # bits
    cap_a: int  # of the left child's budget, in bits
    cap_b: int
    kind: int  # index in ``Tree.tables``; their number is a kind that passes everything on unchanged
    right: int  # 1 where the group lies in the right child
    first_group: int
    middle_group: int  # first of the right child
    end_group: int  # behind the last


@lru_cache(maxsize=32)
def paths(order: int) -> np.ndarray:
    """The nodes above each group of 16 coordinates, from the root down: int32 [groups, levels, fields of ``PathNode``].

    Paths that are shorter than the longest end in nodes that pass everything on unchanged.
    """
    tables = angles.tree(order).tables
    kinds = {(table.m_a, table.m_b): i for i, table in enumerate(tables)}
    found = []
    for group in range(order // c.GROUP):
        first, size, path = 0, order // c.GROUP, []
        while size > 1:
            m_a, m_b = angles.children(size * c.GROUP)
            step, middle = division(m_a, m_b), first + m_a // c.GROUP
            right = int(group >= middle)
            node = PathNode(
                width_factor=step.width,
                share_factor=step.share,
                least_width=1,
                cap_a=c.MAX_BUDGET_PER_COORDINATE * m_a,
                cap_b=c.MAX_BUDGET_PER_COORDINATE * m_b,
                kind=kinds[m_a, m_b],
                right=right,
                first_group=first,
                middle_group=middle,
                end_group=first + size,
            )
            path.append(node)
            first, size = (middle, m_b // c.GROUP) if right else (first, m_a // c.GROUP)
        found.append(path)
    levels = max(len(path) for path in found)
    table = np.zeros((len(found), levels, len(PathNode._fields)), np.int32)
    for group, path in enumerate(found):
        table[group, :] = PathNode(0, 0, 0, 0, 1 << 30, len(tables), 1, group, group, group)  # all of the budget goes right
        if path:
            table[group, : len(path)] = path
    return table


@lru_cache(maxsize=1)
def paper_levels() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The paper coding's levels 2 to 4: bounds in tan psi [3, 3], cos and sin of the centroids [3, 4]."""
    bounds, cos, sin = zip(*(paper_cells(level) for level in (2, 3, 4)), strict=True)
    return np.stack(bounds), np.stack(cos), np.stack(sin)


@lru_cache(maxsize=64)
def rotation_matrix(order: int, seed: int, rounds: int) -> np.ndarray:
    """R: float16 [order, order] of integers; the encoder takes v = R x / sqrt(order)^rounds, the decoder R^T (SPEC 5).

    One round: H D, of +-1. Two: H D P H E, whose entries are ``order`` at the most, and so exact.
    """
    hadamard = rotation.hadamard(order).astype(np.float32)  # products of such matrices are exact
    found = hadamard * rotation.signs(seed, order)
    if rounds == 2:
        first = hadamard * rotation.signs(seed, order, first_round=True)
        found = found @ first[rotation.permutation(order)]
    return found.astype(np.float16)
