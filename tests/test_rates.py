"""Shares of a cache's bits: the preset is the mean whatever the layers are, and no energy takes more than its share."""

from __future__ import annotations

import time
from itertools import pairwise

import numpy as np
import pytest

from pqcodec.codings.presets import PRESETS
from pqcodec.formats.policy import rates

LAYERS = 12


def rate(preset: str) -> float:
    return PRESETS[preset].rate


def energies(seed: int, spread: float = 2.0) -> dict[int, tuple[float, float]]:
    found = 2.0 ** np.random.default_rng(seed).normal(0, spread, (LAYERS, 2))
    return {layer: (float(key), float(value)) for layer, (key, value) in enumerate(found)}


@pytest.mark.parametrize("preset", rates.SHARED)
@pytest.mark.parametrize("spread", [0.0, 1.0, 8.0])
def test_the_mean_is_at_most_the_presets_rate_and_near_it(preset: str, spread: float) -> None:
    sizes = {layer: 1024 if layer % 6 == 5 else 511 for layer in range(LAYERS)}  # full attention among sliding windows
    for seed in range(5):
        shared = rates.share(preset, energies(seed, spread), sizes)
        bits = sum(sizes[layer] * (rate(key) + rate(value)) for layer, (key, value) in shared.items())
        mean = bits / (2 * sum(sizes.values()))
        assert rate(preset) - 0.5 / LAYERS < mean <= rate(preset)


@pytest.mark.parametrize("padding", [16, 64, 1024])
def test_streams_take_no_more_than_by_the_preset_alone(padding: int) -> None:
    """However blocks are padded; where little is lost by it, bits are shared nevertheless."""

    def bytes_of(shared: rates.Shared) -> int:
        return sum(-int(-100 * rate(preset) // padding) * padding for pair in shared.values() for preset in pair)

    for seed in range(5):
        shared = rates.share_within("quad3", energies(seed), bytes_of)
        assert bytes_of(shared) <= bytes_of(dict.fromkeys(range(LAYERS), ("quad3", "quad3")))
        assert len(set(shared.values())) > 1 or padding == 1024
    assert rates.share_within("quad3", {0: (1.0, 1.0)}, bytes_of) == {0: ("quad3", "quad3")}


def test_keys_get_more_than_values() -> None:
    shared = rates.share("pq3", dict.fromkeys(range(LAYERS), (1.0, 1.0)))
    assert all(rate(key) > rate(value) for key, value in list(shared.values())[2:])


def test_a_key_of_more_energy_gets_no_less() -> None:
    found = [rates.share("pq3", energies(0, 0.0) | {5: (2.0**log2, 1.0)})[5][0] for log2 in range(-4, 5)]
    assert all(rate(low) <= rate(high) for low, high in pairwise(found))
    assert rate(found[0]) < rate(found[-1])


@pytest.mark.parametrize("layer", [0, 1, 6])
def test_beyond_some_doublings_a_value_energy_changes_nothing(layer: int) -> None:
    """Gemma's first values have 60 times the energy of the others and count no more for it."""

    def shared(log2: float) -> rates.Shared:
        return rates.share("pq3", energies(0, 0.0) | {layer: (1.0, 2.0**log2)})

    assert rate(shared(30)[layer][1]) <= rate("pq4")
    assert rate(shared(30)[layer][0]) <= rate("pq4")


@pytest.mark.parametrize("value", [0.0, 1e-300, 1e300])
def test_any_energy_is_taken(value: float) -> None:
    for at in range(2):
        odd = tuple(value if at == role else 1.0 for role in range(2))
        assert len(rates.share("pq3", energies(0) | {3: odd})) == LAYERS


def test_few_layers_and_presets_without_room_are_not_shared() -> None:
    few = {layer: (1.0, 1.0) for layer in range(rates.FEWEST_LAYERS - 1)}
    assert set(rates.share("pq3", few).values()) == {("pq3", "pq3")}
    assert set(rates.share("pq2", energies(0)).values()) == {("pq2", "pq2")}
    assert set(rates.share("pq6", energies(0)).values()) == {("pq6", "pq6")}


def test_thousands_of_layers_share_in_no_time() -> None:
    """A step for each tensor and rate, each found by a heap: what was quadratic took over a minute."""
    start = time.perf_counter()
    shared = rates.share("pq3", {layer: (float(1 + layer % 97), 1.0) for layer in range(5000)})
    assert time.perf_counter() - start < 5
    assert sum(rate(key) + rate(value) for key, value in shared.values()) <= 2 * 5000 * rate("pq3") * (1 + 1e-9)
