"""The closed forms: densities against sampled angles, centroids, orders, budgets; and the paper's own numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import gaussian, rel_mse

import pqcodec
from pqcodec import constants as c
from pqcodec.codings import angles
from pqcodec.stages import rotation


@pytest.mark.parametrize(("m_a", "m_b"), [(2, 2), (4, 4), (8, 8), (16, 16), (32, 16), (64, 64), (48, 32)])
def test_densities_match_sampled_angles(m_a: int, m_b: int) -> None:
    x = np.random.default_rng(m_a).standard_normal((200_000, m_a + m_b))
    psi = np.arctan2(np.linalg.norm(x[:, m_a:], axis=1), np.linalg.norm(x[:, :m_a], axis=1))
    grid = np.linspace(0, np.pi / 2, 2001)
    middle = (grid[1:] + grid[:-1]) / 2
    cumulative = np.cumsum(angles.density(middle, m_a, m_b))
    expected = np.interp(np.sort(psi), grid[1:], cumulative / cumulative[-1])
    distance = np.abs(expected - (np.arange(len(psi)) + 0.5) / len(psi)).max()
    assert distance < 1.63 / np.sqrt(len(psi)) + 5e-4  # Kolmogorov-Smirnov, 1 %


def test_the_first_level_is_uniform() -> None:
    x = np.random.default_rng(0).standard_normal((200_000, 2))
    turns = np.sort(np.arctan2(x[:, 1], x[:, 0]) / (2 * np.pi) + 0.5)
    assert np.abs(turns - (np.arange(len(turns)) + 0.5) / len(turns)).max() < 1.63 / np.sqrt(len(turns))


@pytest.mark.parametrize(("m_a", "m_b"), [(4, 4), (8, 8), (32, 16)])
def test_centroids_are_the_sampled_means(m_a: int, m_b: int) -> None:
    x = np.random.default_rng(m_b).standard_normal((400_000, m_a + m_b))
    a, b = np.linalg.norm(x[:, :m_a], axis=1), np.linalg.norm(x[:, m_a:], axis=1)
    share = b**2 / (a**2 + b**2)
    table = angles.node_table(m_a, m_b)
    for bits in (1, 3):
        n = 1 << bits
        bounds = table.bounds[bits, : n + 1] / (1 << angles.grid_bits(m_a + m_b))
        cell = np.searchsorted(bounds[1:-1], share, side="right")
        for k in range(n):
            inside = cell == k
            assert np.sqrt(1 - share[inside]).mean() == pytest.approx(table.cos[n + k], abs=4e-3)
            assert np.sqrt(share[inside]).mean() == pytest.approx(table.sin[n + k], abs=4e-3)


def test_points_never_leave_the_unit_ball() -> None:
    """Truncated centroids keep every coordinate within the grid's 2,048 steps, and sums below 2^24."""
    for order in c.ROTATION_ORDERS:
        for table in angles.tree(order).tables:
            assert (table.cos.astype(float) ** 2 + table.sin.astype(float) ** 2).max() <= 1
    quads = angles.quad_table()
    assert (quads.cos.astype(float) ** 2 + quads.sin.astype(float) ** 2).max() <= 1
    cos, sin = (x.astype(float) for x in angles.circle_table())
    assert (cos**2 + sin**2).max() <= 1
    assert c.GRID * max(c.ROTATION_ORDERS) < 1 << 24


def test_quads_never_need_more_codes_than_their_budget() -> None:
    table = angles.quad_table()
    for budget, (cells, per_cell, first) in enumerate(zip(table.cells, table.per_cell, table.first, strict=True)):
        records = slice(first, first + cells)
        assert (table.n_a[records].astype(int) * table.n_b[records] <= per_cell).all()
        assert cells * per_cell <= 1 << budget


@pytest.mark.parametrize("order", c.ROTATION_ORDERS)
def test_hadamard_matrices_are_orthogonal(order: int) -> None:
    h = rotation.hadamard(order).astype(np.int64)
    np.testing.assert_array_equal(h @ h.T, order * np.eye(order, dtype=np.int64))


@pytest.mark.parametrize("order", c.ROTATION_ORDERS)
def test_trees_cover_every_coordinate_once(order: int) -> None:
    tree = angles.tree(order)
    children = np.concatenate([tree.left, tree.right])
    assert sorted(children) == list(range(1, len(tree.kind) + tree.quads))
    assert len(tree.kind) == order // 4 - 1


def test_signs_are_splitmix64() -> None:
    """SplitMix64 from seed 1234567, the values that its author publishes."""
    from pqcodec.stream.prng import splitmix64

    assert [int(z) for z in splitmix64(1234567, 0, 3)] == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_the_papers_numbers() -> None:
    """62 bits a block of 16 coordinates, 3.875 bits a coordinate, relMSE .0320 on Gaussian vectors of 128."""
    x = gaussian(4000, 128, seed=8)
    data = pqcodec.encode(x, preset="paper", backend="cpu")
    info = pqcodec.inspect(data)
    rows = (info.payload_bytes - 4 * -(-4000 // info.chunk_tokens)) / 4000
    assert 8 * rows / 128 == 3.875
    assert rel_mse(x, pqcodec.decode(data)) == pytest.approx(0.0320, abs=0.0003)


@pytest.mark.parametrize(
    ("preset", "expected"),
    [
        ("pq2", 0.1145),
        ("pq2.5", 0.0584),
        ("pq3", 0.0300),
        ("pq3.5", 0.0152),
        ("pq4", 0.00777),
        ("pq5", 0.00202),
        ("pq6", 0.000522),
    ],
)
def test_presets_keep_their_rate_and_error(preset: str, expected: float) -> None:
    x = gaussian(4000, 128, seed=9)
    data = pqcodec.encode(x, preset=preset, backend="cpu")
    info = pqcodec.inspect(data)
    rows = (info.payload_bytes - 4 * -(-4000 // info.chunk_tokens)) / 4000
    assert f"pq{8 * rows / 128:g}" == preset
    assert rel_mse(x, pqcodec.decode(data)) == pytest.approx(expected, rel=0.02)


def test_a_second_seed_gives_the_same_error() -> None:
    x = gaussian(2000, 64, seed=10)
    one, two = (rel_mse(x, pqcodec.decode(pqcodec.encode(x, seed=seed))) for seed in (0, 99))
    assert one == pytest.approx(two, rel=0.03)


def test_a_concentrated_vector_is_spread_by_the_rotation() -> None:
    x = torch.zeros(128, 128)
    x[torch.arange(128), torch.arange(128)] = 7.0
    assert rel_mse(x, pqcodec.decode(pqcodec.encode(x))) < 0.06
