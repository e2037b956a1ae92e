"""Levels of scalar coding (SPEC 16): fitted to a tensor or given, held to the errors of Lloyd and Max, and refused by name."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from conftest import BACKENDS, gaussian, rel_mse

import pqcodec
from pqcodec import InvalidArgument
from pqcodec import constants as c
from pqcodec.calibrate import shared_levels
from pqcodec.codings import scalar
from pqcodec.codings.declared import Affine, Codebook, half_numbers
from pqcodec.codings.levels import fitted_levels, q_norm
from pqcodec.codings.plan import plan_for
from pqcodec.options import EncodeOptions
from pqcodec.stream.header import Header

LLOYD_MAX = {1: 0.3634, 2: 0.1175, 3: 0.03454, 4: 0.009497}  # the least error of 2^bits levels on Gaussian numbers
# of KVQuant's algorithm without exceptions, in plain numpy, on Gaussian keys 4 x 2,048 x 128: bits a coordinate, relMSE
DENSE_KEYS = {"nuq4-key": (4.015625, 0.0101), "nuq3-key": (3.015625, 0.0366), "nuq2-key": (2.015625, 0.124)}


# -- figures -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("bits", LLOYD_MAX)
def test_fitted_levels_have_the_error_of_lloyd_and_max(bits: int) -> None:
    """Of one group, whose range all numbers share: as told by SPEC 16, coded and decoded."""
    x = np.random.default_rng(0).standard_normal((4096, 16))
    reach = float(np.abs(x).max())
    levels = fitted_levels(x.ravel() / reach, np.ones(x.size), 1 << bits)
    header = Header(
        c.CODING_SCALAR,
        c.DTYPE_FLOAT32,
        x.shape,
        16 * bits,
        0,
        chunk_tokens=4096,
        rounds=0,
        affine=Affine(4096, 1024, c.AFFINE_SCALE),
        codebook=Codebook(levels),
    )
    plan = plan_for(header)
    y, _, _ = scalar.decode(scalar.encode(x, plan, 0, "fast"), 4096, (0, 4096), plan, 0)
    assert ((x - y) ** 2).sum() / (x**2).sum() == pytest.approx(LLOYD_MAX[bits], rel=0.02)


@pytest.mark.parametrize("preset", DENSE_KEYS)
def test_gaussian_keys_have_the_errors_and_bits_that_are_known(preset: str) -> None:
    x = gaussian(4, 2048, 128)
    rate, error = DENSE_KEYS[preset]
    data = pqcodec.encode(x, preset=preset, backend="cpu")
    assert rel_mse(x, pqcodec.decode(data, backend="cpu")) == pytest.approx(error, rel=0.05)
    assert Header.from_bytes(data).bits_per_coordinate == rate
    assert len(data) == pqcodec.encoded_size(x.shape, "float32", preset=preset)


def test_levels_err_less_than_an_even_grid_of_the_same_groups() -> None:
    x = gaussian(4, 512, 32) ** 3  # long tails
    even = Header.from_bytes(pqcodec.encode(x, preset="int2", backend="cpu")).bits_per_coordinate
    errors = [
        rel_mse(x, pqcodec.decode(pqcodec.encode(x, preset=name, backend="cpu"), backend="cpu")) for name in ("nuq2", "int2")
    ]
    assert Header.from_bytes(pqcodec.encode(x, preset="nuq2", backend="cpu")).bits_per_coordinate == even
    assert errors[0] < 0.75 * errors[1]


# -- where levels come from ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("backend", BACKENDS)
def test_given_levels_are_those_of_the_stream(backend: str) -> None:
    x, levels = gaussian(2, 9, 32), (-1, -0.5, 0.25, 1)
    data = pqcodec.encode(x, preset="nuq2", levels=levels, backend=backend)
    found = pqcodec.inspect(data)
    assert (found.preset, found.levels, found.table) == ("nuq2", levels, None)
    low, high = (pick(x.numpy(), -1, keepdims=True) for pick in (np.min, np.max))
    place = (pqcodec.decode(data, backend=backend).numpy() - (high + low) / 2) / ((high - low) / 2)
    assert np.abs(place[..., None] - np.array(levels)).min(-1).max() < 2e-3  # scales and zeros are float16


@pytest.mark.parametrize("backend", BACKENDS)
def test_of_two_levels_that_are_equally_near_the_lower_one_is_taken(backend: str) -> None:
    x = np.array([[-1, 1, 0, 0.5, -0.5, 0.625]], np.float32)
    y = pqcodec.decode(pqcodec.encode(x, preset="nuq2", levels=(-1, 0, 0.25, 1), backend=backend), backend=backend)
    assert y.tolist() == [[-1, 1, 0, 0.25, -1, 0.25]]


def test_equal_levels_and_those_of_the_largest_float16_are_coded_by_both_alike() -> None:
    x = gaussian(2, 30, 20)
    for levels in ((0, 0, 0, 0), (-65504, -1, 1, 65504), (-0.0, 0, 0.0, 2**-24)):
        one, two = (pqcodec.encode(x, preset="nuq2", levels=levels, backend=name) for name in BACKENDS)
        assert one == two
        decoded = [pqcodec.decode(one, backend=name).numpy().tobytes() for name in BACKENDS]
        assert decoded[0] == decoded[1]


def test_fitted_levels_are_the_same_each_time_and_depend_on_the_seed() -> None:
    x = gaussian(8, 3000, 32)
    found = [pqcodec.inspect(pqcodec.encode(x, preset="nuq4", seed=seed, backend="cpu")).levels for seed in (0, 0, 5)]
    assert found[0] == found[1] != found[2]
    np.testing.assert_allclose(found[0], found[2], atol=0.05)


@pytest.mark.parametrize("options", [{}, {"center": "mean"}, {"center": "rope", "rope": pqcodec.Rope()}])
@pytest.mark.parametrize("preset", ["nuq3", "nuq3-key"])
def test_what_is_subtracted_before_does_not_count(preset: str, options: dict[str, Any]) -> None:
    x = gaussian(2, 300, 32)
    shifted = x + (0 if not options else 3 if options["center"] == "mean" else threes_under_rope(300, 32))
    plain = pqcodec.inspect(pqcodec.encode(x, preset=preset, backend="cpu")).levels
    found = pqcodec.inspect(pqcodec.encode(shifted, preset=preset, backend="cpu", **options)).levels
    np.testing.assert_allclose(found, plain, atol=0.03)


def threes_under_rope(tokens: int, head_dim: int) -> Any:
    """A vector of threes, turned by RoPE with each token's position."""
    from pqcodec.stages import centre

    field = pqcodec.Rope().field(head_dim)
    return torch.from_numpy(centre.turn(np.full(head_dim, 3, np.float32), *centre.phases(field, 0, tokens), field))


@pytest.mark.parametrize("shape", [(0, 64), (1, 64), (2, 3, 1), (0, 5, 8), (3, 0, 8), (7,)])
def test_tensors_of_few_numbers_or_none_have_levels(shape: tuple[int, ...]) -> None:
    x = np.ones(shape, np.float32)
    for preset in ("nuq2", "nuq2-key"):
        data = pqcodec.encode(x, preset=preset, backend="cpu")
        assert pqcodec.decode(data, backend="reference").tolist() == x.tolist()
        assert len(pqcodec.inspect(data).levels or ()) == 4


def test_the_search_takes_anything() -> None:
    """Few different numbers, one, or none that weighs anything: levels are finite and ascend."""
    for numbers, weights in (
        ([0.5], [1]),
        ([], []),
        ([1, -1, 1], [0, 0, 0]),
        ([-1, 1] * 50, [1e300] * 100),
        ([0] * 9, [1e-300] * 9),
    ):
        found = half_numbers(fitted_levels(np.array(numbers, float), np.array(weights, float), 16))
        assert list(found) == sorted(found)
        assert np.isfinite(found).all()


# -- refusals ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"preset": "pq3", "levels": (0, 1)}, "levels are given, but preset 'pq3' takes none"),
        ({"preset": "int2", "levels": (0, 1, 2, 3)}, "levels are given, but preset 'int2' takes none"),
        ({"preset": "nuq2", "levels": (0, 1)}, "levels: 2 levels for codes of 2 bits, which choose among 4"),
        ({"preset": "nuq2", "levels": (0, 1, 3, 2)}, "levels: levels are not finite, or do not ascend"),
        ({"preset": "nuq2", "levels": (0, 1, 2, np.inf)}, "levels: levels are not finite, or do not ascend"),
        ({"preset": "nuq2", "levels": (0, 1, 2, 1e6)}, r"levels \(0, 1, 2, 1000000.0\): numbers within float16 are expected"),
        ({"preset": "nuq2", "levels": 3}, "levels 3: numbers within float16 are expected"),
        ({"preset": "nuq2", "levels": "few"}, "levels 'few': numbers within float16 are expected"),
    ],
)
def test_levels_that_are_none_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidArgument, match=f"^{said}"):
        EncodeOptions(**options)


@pytest.mark.parametrize("codebook", [Codebook(None, bytes(32)), Codebook((0, 1, 2, 3))])
@pytest.mark.parametrize("kind", [(c.CODING_SPLIT, 48, 12, 2, None), (c.CODING_QUADS, 40, 8, 2, None)])
def test_other_codings_take_no_levels(kind: tuple[Any, ...], codebook: Codebook) -> None:
    coding, row_bits, radius_bits, rounds, affine = kind
    with pytest.raises(InvalidArgument, match="coding with levels"):
        Header(coding, 3, (1, 16), row_bits, radius_bits, rounds=rounds, affine=affine, codebook=codebook)


# -- levels that are fitted beforehand -----------------------------------------------------------------------------
@pytest.mark.parametrize("bits", [2, 3])
def test_q_norm_gives_back_mean_and_deviation_at_the_error_that_is_known(bits: int) -> None:
    """KVQuant's codes are those of the former levels: their error D becomes 2 - 2 sqrt(1 - D)."""
    x = np.random.default_rng(0).standard_normal(1 << 15) / 4.5 + 0.02
    weights = np.ones(len(x))
    plain = fitted_levels(x, weights, 1 << bits)
    old, new = (np.array(each, "<u2").view("<f2").astype(np.float64) for each in (plain, q_norm(plain, x, weights)))
    codes = np.searchsorted((old[1:] + old[:-1]) / 2, x)
    assert new[codes].mean() == pytest.approx(x.mean(), abs=1e-4)
    assert new[codes].std() == pytest.approx(x.std(), rel=1e-3)
    known = 2 - 2 * (1 - LLOYD_MAX[bits]) ** 0.5
    assert ((new[codes] - x) ** 2).mean() / x.var() == pytest.approx(known, rel=0.02)


def test_shared_levels_are_those_that_a_stream_fits_and_lose_as_little_of_others() -> None:
    x, y = gaussian(2, 2048, 16), gaussian(2, 2048, 16, seed=1)
    for preset in ("nuq3-key", "kvquant3"):
        table = shared_levels(x, preset, seed=7)
        assert table.levels == pqcodec.inspect(pqcodec.encode(x, preset=preset, seed=7, backend="cpu")).levels
        errors = [
            rel_mse(y, pqcodec.decode(pqcodec.encode(y, preset=preset, levels=levels, backend="cpu"), backend="cpu"))
            for levels in (table.levels, None)
        ]
        assert errors[0] == pytest.approx(errors[1], rel=0.02)
    both = shared_levels([x, y.half()], "nuq3-key")
    np.testing.assert_allclose(both.levels, shared_levels(x, "nuq3-key").levels, atol=0.02)


def test_q_norm_widens_what_streams_decode() -> None:
    """In part, as encoders take the nearest of the new levels."""
    x = gaussian(1, 4096, 8)
    found = []
    for normed in (False, True):
        data = pqcodec.encode(x, preset="nuq2-key", levels=shared_levels(x, "nuq2-key", q_norm=normed).levels, backend="cpu")
        y = pqcodec.decode(data, backend="cpu")
        found.append((float(y.std() / x.std()), rel_mse(x, y)))
    assert found[0][0] < found[1][0] - 0.01 < 1
    assert found[0][1] < found[1][1] < 1.03 * found[0][1]


def test_gradients_weigh_numbers_by_the_fisher_information() -> None:
    """Levels gather where errors cost most: the weighted error falls, the plain one rises."""
    x = gaussian(2, 1024, 8)
    slopes = torch.where(x > 1, 10.0, 0.1)
    errors = []
    for gradients in (None, slopes):
        table = shared_levels(x, "nuq2-key", gradients=gradients)
        y = pqcodec.decode(pqcodec.encode(x, preset="nuq2-key", levels=table.levels, backend="cpu"), backend="cpu")
        errors.append((float(((x - y) ** 2 * slopes**2).sum()), float(((x - y) ** 2).sum())))
    assert errors[1][0] < 0.6 * errors[0][0]
    assert errors[1][1] > errors[0][1]
    assert shared_levels(x, "nuq2-key", gradients=torch.full_like(x, 3)) == shared_levels(x, "nuq2-key")


@pytest.mark.parametrize(
    ("x", "options", "said"),
    [
        (gaussian(1, 9, 8), {"preset": "pq3"}, "has no levels"),
        ([], {}, "0 tensors"),
        (gaussian(1, 9, 8), {"gradients": gaussian(1, 8, 8)}, "not of the shape"),
        (gaussian(1, 9, 8), {"gradients": gaussian(1, 9, 8) * float("nan")}, "gradients hold NaN"),
    ],
)
def test_levels_that_cannot_be_fitted_are_refused(x: Any, options: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidArgument, match=said):
        shared_levels(x, **{"preset": "nuq2", **options})
