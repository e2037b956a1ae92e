"""Law: the split coding (SPEC 6) in numpy, as the specification tells it: bits follow the radius down the tree.

Vectors are rows. The encoder works in float64, the decoder in float32 and integers exactly as SPEC 6.5 prescribes.
"""

from __future__ import annotations

import numpy as np

from pqcodec import constants as c
from pqcodec.codings import angles
from pqcodec.codings.bits import read_field, write_field
from pqcodec.codings.plan import Plan


def encode(v: np.ndarray, plan: Plan, bits: np.ndarray, exponent: int = 0) -> None:
    """Rotated vectors v float64 [n, order] into bits [n, row_bits], down the tree; ``exponent`` is not used."""
    tree, n = plan.tree, len(v)
    internal = len(tree.kind)
    energy = np.zeros((internal + tree.quads, n))
    energy[internal:] = (v * v).reshape(n, tree.quads, c.QUAD).sum(2).T
    for node in reversed(range(internal)):
        energy[node] = energy[tree.left[node]] + energy[tree.right[node]]
    zeros = np.zeros(n, np.int64)
    write_field(bits, zeros, zeros + plan.radius_bits, radius_code(np.sqrt(energy[0]), plan))
    place, budget = np.zeros((2, internal + tree.quads, n), np.int64)
    place[0], budget[0] = plan.radius_bits, plan.root_budget
    for node in range(internal):
        table, left, right = tree.tables[tree.kind[node]], tree.left[node], tree.right[node]
        width = table.bits[budget[node]].astype(np.int64)
        grid = 1 << angles.grid_bits(table.coordinates)
        code = _cell(table.bounds[width], 1 << width, grid, energy[left], energy[right])
        write_field(bits, place[node], width, code)
        _descend(place, budget, node, left, right, table, width, code)
    for quad in range(tree.quads):
        _encode_quad(v[:, c.QUAD * quad :][:, : c.QUAD], plan, bits, place[internal + quad], budget[internal + quad])


def decode(bits: np.ndarray, plan: Plan, exponent: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Bits [n, row_bits] -> unit-norm coordinates on the grid, int32 [n, order], and the factors A, B [n]."""
    tree, n = plan.tree, len(bits)
    internal = len(tree.kind)
    zeros = np.zeros(n, np.int64)
    scale = plan.radii[:, read_field(bits, zeros, zeros + plan.radius_bits)]  # A and B (SPEC 6.1)
    place, budget = np.zeros((2, internal + tree.quads, n), np.int64)
    radius = np.zeros((internal + tree.quads, n), np.float32)
    place[0], budget[0], radius[0] = plan.radius_bits, plan.root_budget, c.GRID
    for node in range(internal):
        table, left, right = tree.tables[tree.kind[node]], tree.left[node], tree.right[node]
        width = table.bits[budget[node]].astype(np.int64)
        code = read_field(bits, place[node], width)
        radius[left] = radius[node] * table.cos[(1 << width) + code]
        radius[right] = radius[node] * table.sin[(1 << width) + code]
        _descend(place, budget, node, left, right, table, width, code)
    units = np.zeros((n, plan.order), np.int32)
    for quad in range(tree.quads):
        at = internal + quad
        code = read_field(bits, place[at], budget[at])
        units[:, c.QUAD * quad :][:, : c.QUAD] = _decode_quad(code, budget[at], radius[at], plan)
    return units, *scale


def radius_code(norm: np.ndarray, plan: Plan) -> np.ndarray:
    """Norm float64 [n] -> code int64 [n]; 0 is the zero vector (SPEC 6.1)."""
    log2 = np.log2(np.where(norm > 0, norm * plan.stretch, 1.0))
    code = 1 + np.floor(plan.radius_steps * (log2 + c.RADIUS_BIAS) + 0.5)
    return np.where(norm > 0, np.clip(code, 1, (1 << plan.radius_bits) - 1), 0).astype(np.int64)


def _cell(bounds: np.ndarray, cells: np.ndarray, grid: int, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Cell of the angle between energies a and b; bounds [n, 129] are each row's, of which ``cells`` + 1 count."""
    share = np.divide(b, a + b, out=np.zeros_like(b), where=a + b > 0)
    place = np.minimum(np.floor(share * grid), grid - 1)
    return ((bounds[:, 1:-1] <= place[:, None]) & (np.arange(1, bounds.shape[1] - 1) < cells[:, None])).sum(1)


def _descend(
    place: np.ndarray,
    budget: np.ndarray,
    node: int,
    left: int,
    right: int,
    table: angles.NodeTable,
    width: np.ndarray,
    code: np.ndarray,
) -> None:
    """Places and budgets of a node's children; the left child's bits follow the angle, the right child's follow those."""
    rest = budget[node] - width
    budget[left] = angles.split_budget(rest, table.shift[(1 << width) + code], table.m_a, table.m_b)
    budget[right] = rest - budget[left]
    place[left] = place[node] + width
    place[right] = place[left] + budget[left]


def _encode_quad(x: np.ndarray, plan: Plan, bits: np.ndarray, place: np.ndarray, budget: np.ndarray) -> None:
    """Four coordinates x float64 [n, 4] (SPEC 6.4)."""
    table = plan.quads
    energy_a, energy_b = (x[:, :2] ** 2).sum(1), (x[:, 2:] ** 2).sum(1)
    cells = table.cells[budget]
    cell = _cell(table.bounds[budget], cells, 1 << c.COARSE_GRID_BITS, energy_a, energy_b)
    record = table.first[budget] + cell
    n_a, n_b = table.n_a[record], table.n_b[record]
    code = cell * table.per_cell[budget] + sector(x[:, 0], x[:, 1], n_a) * n_b + sector(x[:, 2], x[:, 3], n_b)
    write_field(bits, place, budget, code)


def sector(x: np.ndarray, y: np.ndarray, n: np.ndarray) -> np.ndarray:
    """Which of n equal sectors of the circle (x, y) lies in, int64; sector 0 begins at angle 0."""
    turns = np.arctan2(y, x) / (2 * np.pi)
    return np.minimum(np.floor((turns - np.floor(turns)) * n), n - 1).astype(np.int64)


def _decode_quad(code: np.ndarray, budget: np.ndarray, radius: np.ndarray, plan: Plan) -> np.ndarray:
    """Four coordinates on the grid, int32 [n, 4]; every code of ``budget`` bits decodes to something."""
    table = plan.quads
    cell = np.minimum(code // table.per_cell[budget], table.cells[budget] - 1)
    record = table.first[budget] + cell
    n_a, n_b = table.n_a[record].astype(np.int64), table.n_b[record].astype(np.int64)
    sector_a, sector_b = np.divmod(code - cell * table.per_cell[budget], n_b)
    columns = []
    for mean, sector, n in ((table.cos[record], sector_a, n_a), (table.sin[record], sector_b, n_b)):
        phase = (((2 * sector + 1) * angles.circle_step(n) + (1 << (c.PHASE_SHIFT - 1))) >> c.PHASE_SHIFT) % c.CIRCLE
        columns += [mean * plan.circle_cos[phase], mean * plan.circle_sin[phase]]  # exact: 11 bits times 11 bits
    return np.rint(radius[:, None] * np.stack(columns, 1)).astype(np.int32)
