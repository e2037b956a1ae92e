"""Law: the polar tree's numbers (SPEC 6): densities, cells, centroids and budgets, all from closed forms in float64.

A node of m = m_a + m_b Gaussian coordinates has the angle psi = atan2(|b|, |a|) with density
sin(psi)^(m_b-1) cos(psi)^(m_a-1) (arXiv 2502.02617, lemma 2, for unequal children). Its cells are bounded where
tan t_j = sqrt(m_b/m_a) (j/(n-j))^s, rounded to a grid in sin^2; its centroids are the conditional means of cos and sin.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from pqcodec import constants as c
from pqcodec.stages.circle import full_circle

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(48)
_PARTS = 4  # Gauss-Legendre panels a cell


def grid_bits(coordinates: int) -> int:
    """Bits of the sin^2 grid that bounds the cells of a node of ``coordinates`` (SPEC 6.2)."""
    return c.COARSE_GRID_BITS if coordinates <= c.GROUP else c.FINE_GRID_BITS


def truncate_to_half(x: np.ndarray) -> np.ndarray:
    """float64 -> the nearest float16 value towards zero, as float64 (any shape, |x| <= 1)."""
    _, exponent = np.frexp(np.where(x == 0, 1.0, x))
    step = np.exp2(np.maximum(exponent - 11, -24))
    return np.trunc(x / step) * step


def cell_bounds(m_a: int, m_b: int, n: int) -> np.ndarray:
    """The n + 1 boundaries of psi's cells, as integers: sin^2 psi times 2^grid_bits (SPEC 6.2)."""
    harmonic = 2 * m_a * m_b / (m_a + m_b) + c.CELL_SPREAD_OFFSET
    spread = c.CELL_SPREAD / np.sqrt(harmonic) * (1 + c.CELL_SPREAD_SMALL / harmonic)
    j = np.arange(1, n)
    tan2 = m_b / m_a * (j / (n - j)) ** (2 * spread)
    scale = 1 << grid_bits(m_a + m_b)
    inner = np.floor(scale * (tan2 / (1 + tan2)) + 0.5).astype(np.int64)
    return np.concatenate([[0], inner, [scale]])


def density(psi: np.ndarray, m_a: int, m_b: int) -> np.ndarray:
    """Unnormalised density of psi in (0, pi/2) at a node with children of m_a and m_b coordinates."""
    peak = np.arctan(np.sqrt((m_b - 1) / (m_a - 1))) if min(m_a, m_b) > 1 else np.pi / 4
    sin, cos = np.sin(psi), np.cos(psi)
    return (sin / np.sin(peak)) ** (m_b - 1) * (cos / np.cos(peak)) ** (m_a - 1)


def cell_means(bounds: np.ndarray, m_a: int, m_b: int) -> tuple[np.ndarray, np.ndarray]:
    """E[cos psi | cell], E[sin psi | cell]: float64 [n] each, for bounds [n + 1] in units of the sin^2 grid."""
    edges = np.arcsin(np.sqrt(bounds / bounds[-1]))
    cut = edges[:-1, None] + np.diff(edges)[:, None] * (np.arange(_PARTS + 1) / _PARTS)
    low, high = cut[:, :-1, None], cut[:, 1:, None]
    psi = (low + high) / 2 + (high - low) / 2 * _NODES
    mass = density(psi, m_a, m_b) * _WEIGHTS * (high - low)
    total = mass.sum((1, 2))
    return (mass * np.cos(psi)).sum((1, 2)) / total, (mass * np.sin(psi)).sum((1, 2)) / total


def angle_bits(budget: int, coordinates: int) -> int:
    """Bits of the angle at a node of ``coordinates`` >= 8 that owns ``budget`` bits (SPEC 6.3)."""
    return min(budget, max(1, min(c.MAX_ANGLE_BITS, 16 * budget // (15 * coordinates))))


@dataclass(frozen=True)
class NodeTable:
    """One kind of node above the quads. Entry (1 << bits) + code of each array belongs to that code of that width."""

    m_a: int
    m_b: int
    cos: np.ndarray  # float32 [256], multiplies the radius on the way to the left child
    sin: np.ndarray  # float32 [256], ... to the right child
    shift: np.ndarray  # int32 [256], bits that the left child gets above its proportional share
    bits: np.ndarray  # int32 [budget cap + 1], the angle's width for a budget
    bounds: np.ndarray  # int32 [8, 129], cell boundaries in sin^2 for each width

    @property
    def coordinates(self) -> int:
        """Coordinates under the node: of both children."""
        return self.m_a + self.m_b


@lru_cache(maxsize=64)
def node_table(m_a: int, m_b: int) -> NodeTable:
    """Cells, centroids and budget shifts of nodes with children of m_a and m_b coordinates (SPEC 6.3)."""
    size = 2 << c.MAX_ANGLE_BITS
    cos, sin = np.zeros(size, np.float32), np.zeros(size, np.float32)
    shift = np.zeros(size, np.int32)
    bounds = np.zeros((c.MAX_ANGLE_BITS + 1, (1 << c.MAX_ANGLE_BITS) + 1), np.int32)
    for bits in range(c.MAX_ANGLE_BITS + 1):
        n = 1 << bits
        edges = cell_bounds(m_a, m_b, n)
        mean_cos, mean_sin = cell_means(edges, m_a, m_b)
        cos[n : 2 * n], sin[n : 2 * n] = truncate_to_half(mean_cos), truncate_to_half(mean_sin)
        if bits:
            share = m_a * m_b / (m_a + m_b) * np.log2(mean_cos / mean_sin * np.sqrt(m_b / m_a))
            shift[n : 2 * n] = np.floor(share + 0.5)
        bounds[bits, : n + 1] = edges
    coordinates = m_a + m_b
    budgets = range(c.MAX_BUDGET_PER_COORDINATE * coordinates + 1)
    widths = np.array([angle_bits(budget, coordinates) for budget in budgets], np.int32)
    return NodeTable(m_a, m_b, cos, sin, shift, widths, bounds)


def split_budget(budget: np.ndarray, shift: np.ndarray, m_a: int, m_b: int) -> np.ndarray:
    """Bits of the left child, int, where ``budget`` is what the angle has left (SPEC 6.3)."""
    cap = c.MAX_BUDGET_PER_COORDINATE
    low, high = np.maximum(0, budget - cap * m_b), np.minimum(cap * m_a, budget)
    return np.clip(budget * m_a // (m_a + m_b) + shift, low, high)


def quad_cells(budget: int) -> int:
    """Cells of the angle between the two pairs of a quad that owns ``budget`` bits (SPEC 6.4).

    >>> [quad_cells(b) for b in (0, 6, 9, 12, 16, 28)]
    [1, 2, 4, 8, 20, 128]
    """
    return min(c.MAX_QUAD_CELLS, max(1, int(np.floor(2 ** (budget / 3 - 1) + 0.5))))


@dataclass(frozen=True)
class QuadTable:
    """Quads: four coordinates, one code. Arrays of records are indexed by first[budget] + cell."""

    cells: np.ndarray  # int32 [29], cells of the angle between the pairs
    per_cell: np.ndarray  # int64 [29], codes a cell: floor(2^budget / cells)
    first: np.ndarray  # int32 [29], the budget's first record
    bounds: np.ndarray  # int32 [29, 129], cell boundaries in sin^2
    n_a: np.ndarray  # int32 [records], cells of the first pair's circle
    n_b: np.ndarray  # int32 [records], ... of the second pair's
    cos: np.ndarray  # float32 [records], multiplies the radius on the way to the first pair
    sin: np.ndarray  # float32 [records], ... to the second pair


@lru_cache(maxsize=1)
def quad_table() -> QuadTable:
    """Cells, splits and centroids of quads (SPEC 6.4)."""
    budgets = range(c.MAX_BUDGET_PER_COORDINATE * c.QUAD + 1)
    cells = np.array([quad_cells(b) for b in budgets], np.int32)
    per_cell = np.array([(1 << b) // int(n) for b, n in zip(budgets, cells, strict=True)], np.int64)
    bounds = np.zeros((len(cells), c.MAX_QUAD_CELLS + 1), np.int32)
    columns: list[tuple[np.ndarray, ...]] = []
    for budget, n in enumerate(cells):
        edges = cell_bounds(2, 2, int(n))
        bounds[budget, : n + 1] = edges
        columns.append(_quad_records(edges, int(per_cell[budget])))
    n_a, n_b, cos, sin = (np.concatenate(column) for column in zip(*columns, strict=True))
    first = np.concatenate([[0], np.cumsum(cells)[:-1]]).astype(np.int32)
    return QuadTable(cells, per_cell, first, bounds, n_a, n_b, cos, sin)


def _quad_records(edges: np.ndarray, codes: int) -> tuple[np.ndarray, ...]:
    """n_a, n_b, cos, sin of each cell of a quad whose cells hold ``codes`` codes."""
    mean_cos, mean_sin = cell_means(edges, 2, 2)
    k = np.arange(len(edges) - 1)
    a_is_wide = 2 * k <= len(k) - 1
    ratio = np.where(2 * k == len(k) - 1, 1.0, np.where(a_is_wide, mean_cos / mean_sin, mean_sin / mean_cos))
    wide = np.clip(np.floor(np.sqrt(codes * ratio)), 1, codes).astype(np.int64)
    narrow = codes // wide
    wide = np.minimum(codes // narrow, c.MAX_CIRCLE_CELLS)
    narrow = np.minimum(narrow, c.MAX_CIRCLE_CELLS)
    n_a, n_b = np.where(a_is_wide, wide, narrow), np.where(a_is_wide, narrow, wide)
    cos = truncate_to_half(mean_cos * circle_shrink(n_a)).astype(np.float32)
    sin = truncate_to_half(mean_sin * circle_shrink(n_b)).astype(np.float32)
    return n_a.astype(np.int32), n_b.astype(np.int32), cos, sin


def circle_shrink(n: np.ndarray) -> np.ndarray:
    """Norm of the mean of a unit vector over one of n equal sectors: sin(pi/n) / (pi/n), and 0 for n = 1."""
    return np.where(n > 1, np.sinc(1 / np.asarray(n)), 0.0)


def circle_step(n: np.ndarray) -> np.ndarray:
    """K_n: half a sector of n in units of 2^-16 direction, int64; sector i points to ((2i+1) K_n + 2^15) >> 16."""
    n = np.asarray(n, np.int64)
    return ((np.int64(c.CIRCLE) << (c.PHASE_SHIFT - 1)) + n // 2) // n


@lru_cache(maxsize=1)
def circle_table() -> tuple[np.ndarray, np.ndarray]:
    """cos, sin of the 2,048 directions of level 1: float32 [2048] each, truncated to float16 values."""
    cos, sin = full_circle(c.CIRCLE)
    return truncate_to_half(cos).astype(np.float32), truncate_to_half(sin).astype(np.float32)


@dataclass(frozen=True)
class Tree:
    """The tree of an order: internal nodes in breadth-first order, then the quads from left to right.

    Children are numbered in one sequence: internal node i is i, quad q is len(kind) + q.
    """

    order: int
    tables: tuple[NodeTable, ...]
    kind: np.ndarray  # int32 [internal], index into tables
    left: np.ndarray  # int32 [internal]
    right: np.ndarray  # int32 [internal]

    @property
    def quads(self) -> int:
        """Quads of four coordinates, the leaves of the tree."""
        return self.order // c.QUAD


def children(coordinates: int) -> tuple[int, int]:
    """Coordinates under the left and right child of a node (SPEC 6.2): whole groups of 16, the odd one to the left.

    >>> children(128), children(96), children(48), children(16)
    ((64, 64), (48, 48), (32, 16), (8, 8))
    """
    if coordinates <= c.GROUP:
        return coordinates // 2, coordinates // 2
    left = -(-coordinates // (2 * c.GROUP)) * c.GROUP
    return left, coordinates - left


@lru_cache(maxsize=32)
def tree(order: int) -> Tree:
    """The polar tree of ``order`` coordinates, a multiple of 16."""
    level = [(0, order)]  # (first coordinate, coordinates)
    internal: list[tuple[int, int]] = []
    while level:
        internal += level
        level = [
            child
            for first, size in level
            for child in ((first, children(size)[0]), (first + children(size)[0], children(size)[1]))
            if child[1] > c.QUAD
        ]
    number = {node: i for i, node in enumerate(internal)}
    number |= {(c.QUAD * q, c.QUAD): len(internal) + q for q in range(order // c.QUAD)}
    kinds: dict[tuple[int, int], int] = {}
    kind, left, right = [], [], []
    for first, size in internal:
        pair = children(size)
        kind.append(kinds.setdefault(pair, len(kinds)))
        left.append(number[first, pair[0]])
        right.append(number[first + pair[0], pair[1]])
    as_int = [np.array(column, np.int32) for column in (kind, left, right)]
    return Tree(order, tuple(node_table(*pair) for pair in kinds), *as_int)
