"""The peers of benchmarks/peers.py have the errors and bits that their papers give for Gaussian vectors."""

from __future__ import annotations

import pytest
import torch
from conftest import gaussian, rel_mse

from benchmarks.peers import EXACT_TOKENS, Affine, peers, q4_0, random_rotation, rope_mean
from pqcodec import Rope
from pqcodec.stages import centre

ROPE = Rope(theta=10000.0)
PEERS = peers(ROPE)


@pytest.mark.parametrize(
    ("name", "error", "bits"),
    [
        ("fp16", 4.3e-8, 16.0),
        ("fp8", 7e-4, 8.0),
        ("paper", 0.0320, 3.875),
        ("turboquant3", 0.0345, 3.125),
        ("turboquant4", 0.0095, 4.125),
        ("kivi2", 0.155, 3.0),
        ("kivi4", 0.00614, 5.0),
        ("q4_0", 0.0074, 4.5),
    ],
)
def test_error_and_bits_on_gaussian_vectors(name: str, error: float, bits: float) -> None:
    key, value = gaussian(2, 2048, 128, seed=1), gaussian(2, 2048, 128, seed=2)
    *decoded, found = PEERS[name].apply(key, value)
    assert found == pytest.approx(bits, rel=0.015)  # the paper's is a stream with a header and checksums
    for x, y in zip((key, value), decoded, strict=True):
        assert rel_mse(x, y) == pytest.approx(error, rel=0.03)


@pytest.mark.parametrize("dim", [-1, -2])
def test_affine_cells_are_no_further_than_half_a_step(dim: int) -> None:
    x = gaussian(2, 64, 64, seed=3).half().float()
    groups = x.unflatten(dim, (-1, 32))
    step = (groups.amax(dim, keepdim=True) - groups.amin(dim, keepdim=True)) / 15
    error = (x - Affine(4, dim)(x, 0)[0]).unflatten(dim, (-1, 32)).abs()
    assert bool((error <= 0.51 * step).all())


def test_tokens_behind_the_last_group_stay_in_16_bits() -> None:
    x = gaussian(1, 40, 64, seed=4).half().float()
    decoded, stored = Affine(2, -2)(x, 0)
    assert torch.equal(decoded[:, 32:], x[:, 32:])
    assert stored == 32 * 64 * 3 + 8 * 64 * 16


def test_q4_0_keeps_the_number_of_largest_size() -> None:
    x = torch.zeros(1, 1, 32)
    x[0, 0, 5], x[0, 0, 9] = -8.0, 7.0
    assert torch.equal(q4_0(x, 0)[0], x)


def test_constant_and_zero_groups_come_back() -> None:
    for x in (torch.zeros(1, 32, 64), torch.full((1, 32, 64), 3.0)):
        for name in ("kivi2", "kivi4", "turboquant3", "q4_0"):
            key, value, _ = PEERS[name].apply(x, x)
            assert torch.isfinite(key).all()
            assert torch.isfinite(value).all()
        assert torch.equal(PEERS["kivi2"].apply(x, x)[0], x)


def test_rotations_are_orthogonal_and_differ_by_seed() -> None:
    a, b = random_rotation(64, 0), random_rotation(64, 1)
    assert torch.allclose(a @ a.T, torch.eye(64), atol=1e-5)
    assert not torch.allclose(a, b, atol=0.01)


def test_cures_take_a_bias_away_that_turns_and_keep_the_first_tokens() -> None:
    """Keys of a constant bias before RoPE: bare, it costs the small part its bits; cured, the error is the small part's."""
    tokens, head_dim = 512, 64
    field = ROPE.field(head_dim)
    bias = 20 * gaussian(head_dim, seed=5).numpy()
    turned = torch.from_numpy(centre.turn(bias, *centre.phases(field, 0, tokens), field))
    small = gaussian(2, tokens, head_dim, seed=6)
    key = (small + turned).half().float()
    assert torch.allclose(rope_mean(key, ROPE, 0), turned.expand_as(key), atol=1.0)
    bare, _, bare_bits = PEERS["turboquant4"].apply(key, small)
    cured, value, bits = PEERS["turboquant4+cures"].apply(key, small)
    assert torch.equal(cured[:, :EXACT_TOKENS], key[:, :EXACT_TOKENS])
    assert torch.equal(value[:, :EXACT_TOKENS], small[:, :EXACT_TOKENS].half().float())
    assert float((cured - key).square().mean()) < 0.011
    assert float((bare - key).square().mean()) > 1.0
    means, exact = 16 / tokens / 2, EXACT_TOKENS / tokens * (16 - bare_bits)
    assert bits == pytest.approx(bare_bits + means + exact)
