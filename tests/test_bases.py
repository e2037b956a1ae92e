"""Channels and directions that linear stages take, held to closed forms and to figures that were measured beforehand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from pqcodec import InvalidArgument, bases

FIXTURE = Path(__file__).parent / "data" / "smollm2_kv.safetensors"
# of DecoQuant's 4 bits on SmolLM2's keys and values, 324 tokens of layers 0, 1, 15, 29: relMSE, and that of rounding alone
DECOQUANT = {"key": (0.0247, 0.0516), "value": (0.0291, 0.0456)}


def gaussian(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def lost(x: np.ndarray, y: np.ndarray) -> float:
    """Squared error over squared norm."""
    return float(((x - y) ** 2).sum() / (x**2).sum())


def rounded(x: np.ndarray, bits: int) -> np.ndarray:
    """Each vector [n, width] on an even symmetric grid of 2^bits - 1 levels up to its largest magnitude."""
    most = 2 ** (bits - 1) - 1
    step = (np.abs(x).max(1, keepdims=True) / most).astype(np.float16).astype(np.float64)
    return np.rint(x / np.where(step > 0, step, 1)).clip(-most, most) * step


# -- ThinK ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("dropped", "error"), [(0.4, 0.397), (0.5, 0.498)])
def test_dropped_channels_of_gaussian_keys_are_as_much_of_their_energy(dropped: float, error: float) -> None:
    keys, q = gaussian(4, 1024, 128), gaussian(12, 32, 128, seed=1)
    kept = bases.think(q, keys, dropped)
    assert kept.dtype == np.uint16
    assert kept.shape == (4, 128 - int(dropped * 128))
    thin = np.zeros_like(keys)
    np.put_along_axis(thin, kept[:, None].astype(int), np.take_along_axis(keys, kept[:, None].astype(int), 2), 2)
    assert lost(keys, thin) == pytest.approx(error, rel=0.02)


def test_channels_that_queries_ask_for_are_kept_by_the_group_of_heads() -> None:
    keys, q = gaussian(2, 3, 50, 8), gaussian(2, 6, 4, 8, seed=1)
    q[..., 5] *= 100  # asked for by all
    q[:, 1, :, 2] *= 100  # by the second head of the first group alone
    keys[..., 6] *= 1000
    q[..., 6] = 0  # large, and asked for by none
    scores = bases.channel_scores(q, keys)
    expected = [(q[b, 2 * h : 2 * h + 2] ** 2).mean(1).sum(0) * (keys[b, h] ** 2).mean(0) for b in range(2) for h in range(3)]
    np.testing.assert_allclose(scores.reshape(6, 8), expected, rtol=1e-5)
    kept = bases.think(torch.tensor(q), torch.tensor(keys), 0.75)
    assert kept[:, 0].tolist() == [[2, 5], [2, 5]]
    assert not (kept == 6).any()


@pytest.mark.parametrize(("pairs", "partner"), [("half", lambda j: j ^ 8), ("interleaved", lambda j: j ^ 1)])
def test_pairs_go_together(pairs: str, partner: Any) -> None:
    kept = bases.think(gaussian(4, 9, 16), gaussian(2, 40, 16, seed=1), 0.4, pairs=pairs)
    assert kept.shape == (2, 10)  # floor(.4 * 8) pairs go
    for head in kept.astype(int):
        assert sorted(head) == head.tolist()
        assert {partner(j) for j in head} == set(head)


# -- LoRC ----------------------------------------------------------------------------------------------------------
def test_the_energy_outside_a_basis_is_what_is_lost() -> None:
    """Of white vectors 1 - r / D'; of others the least that so few directions can lose."""
    x = gaussian(2, 3, 4000, 16)
    basis = bases.data_basis(x, 24)
    np.testing.assert_allclose(basis @ basis.T, np.eye(24), atol=1e-5)
    others = bases.vectors_of_heads(gaussian(1, 3, 4000, 16, seed=1))
    assert lost(others, others @ basis.T @ basis) == pytest.approx(0.5, rel=0.02)
    mixed = x * np.arange(1, 17, dtype=np.float32) ** -2 + np.float32(0.5)
    vectors = bases.vectors_of_heads(mixed)
    for centred in (False, True):
        around = vectors - vectors.mean(0) if centred else vectors
        basis = bases.data_basis(mixed, 5, centred=centred)
        energy = np.linalg.svd(around, compute_uv=False) ** 2
        assert lost(around, around @ basis.T @ basis) == pytest.approx(float(energy[5:].sum() / energy.sum()), rel=1e-4)


def test_a_basis_of_weights_loses_least_of_what_they_make_of_white_states() -> None:
    weight = (gaussian(48, 96) * np.arange(1, 49, dtype=np.float32)[:, None] ** -1).astype(np.float32)
    basis = bases.weight_basis(torch.tensor(weight, dtype=torch.bfloat16), 12)
    assert basis.shape == (12, 48)
    np.testing.assert_allclose(basis @ basis.T, np.eye(12), atol=1e-5)
    energy = np.linalg.svd(weight, compute_uv=False) ** 2
    made = gaussian(4000, 96, seed=1) @ weight.T
    assert lost(made, made @ basis.T @ basis) == pytest.approx(float(energy[12:].sum() / energy.sum()), rel=0.05)
    assert bases.condition_number(weight) == pytest.approx(float(np.linalg.cond(weight)), rel=1e-6)


def test_ranks_fall_as_the_logarithms_of_condition_numbers_add_up() -> None:
    ranks = bases.progressive_ranks([(166, 8.7), (20, 5.2), (23, 7.2), (39, 8.0), (36, 8.6), (31, 4.9)], 160, 80)
    assert ranks[0] == 160
    assert ranks[-1] == 80
    assert ranks == sorted(ranks, reverse=True)
    assert bases.progressive_ranks([(30, 5)], 100, 50) == [100]
    assert bases.progressive_ranks([(1, 1), (1, 1)], 100, 50) == [100, 100]


# -- DecoQuant -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("role", DECOQUANT)
def test_decoquant_has_the_errors_that_are_known(role: str) -> None:
    found = []
    for name, x in load_file(FIXTURE).items():
        if name.endswith(role):
            vectors = bases.vectors_of_heads(x)
            factor = bases.decoquant_factor(x).astype(np.float16).astype(np.float64)
            codes = rounded((vectors.reshape(-1, 16) @ np.linalg.inv(factor)).reshape(vectors.shape), 4)
            decoded = (codes.reshape(-1, 16) @ factor).reshape(vectors.shape)
            found.append((lost(vectors, decoded), lost(vectors, rounded(vectors, 4))))
    np.testing.assert_allclose(np.mean(found, 0), DECOQUANT[role], rtol=0.01)


def test_decoquant_has_nothing_to_gain_on_gaussian_vectors() -> None:
    x = gaussian(4, 1000, 128)
    vectors, factor = bases.vectors_of_heads(x), bases.decoquant_factor(x).astype(np.float64)
    codes = rounded((vectors.reshape(-1, 16) @ np.linalg.inv(factor)).reshape(vectors.shape), 4)
    assert lost(vectors, (codes.reshape(-1, 16) @ factor).reshape(vectors.shape)) == pytest.approx(0.0180, rel=0.02)


def test_a_factor_of_few_directions_has_an_inverse() -> None:
    x = np.zeros((1, 20, 32), np.float32)
    np.testing.assert_array_equal(bases.decoquant_factor(x), np.eye(16))
    x[..., ::16] = gaussian(1, 20, 2)
    factor = bases.decoquant_factor(x).astype(np.float16).astype(np.float64)
    rows = bases.vectors_of_heads(x).reshape(-1, 16)
    np.testing.assert_allclose(rows @ np.linalg.inv(factor) @ factor, rows, atol=1e-6)


# -- refusals ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: bases.think(gaussian(3, 4, 8), gaussian(2, 9, 8), 0.5), "a multiple of heads of queries"),
        (lambda: bases.think(gaussian(2, 4, 8), gaussian(2, 9, 6), 0.5), r"does not go with keys \(2, 9, 6\)"),
        (lambda: bases.think(gaussian(2, 4, 8), gaussian(2, 9, 8), 1.0), "dropped 1.0: a share"),
        (lambda: bases.think(gaussian(2, 4, 7), gaussian(2, 9, 7), 0.5, pairs="half"), "of an even number"),
        (lambda: bases.think(gaussian(2, 4, 8) * np.float32(np.nan), gaussian(2, 9, 8), 0.5), "NaN or Inf"),
        (lambda: bases.weight_basis(gaussian(8, 4), 9), "rank 9: a whole number from 1 to 8"),
        (lambda: bases.weight_basis(gaussian(8), 2), "weight of shape"),
        (lambda: bases.data_basis(gaussian(9, 8), 2), "heads, tokens, head_dim"),
        (lambda: bases.progressive_ranks([(float("inf"), 2)], 9, 4), "two finite numbers"),
        (lambda: bases.progressive_ranks([(3, 2)], 4, 9), "least 9: a whole number from 1 to 4"),
        (lambda: bases.decoquant_factor(gaussian(1, 9, 24)), "a multiple of 16"),
    ],
)
def test_what_has_no_answer_is_refused(call: Any, said: str) -> None:
    with pytest.raises(InvalidArgument, match=said):
        call()
