"""Law: how a whole cache shares its bits: a preset's name is the mean, keys and early values get more of it.

Measured on SmolLM2 (1,024-token prefix, two texts): keys carry three quarters of the next-token KL at equal bits; a key
layer's share grows with the square of its centred energy and more, since logits err by error times norm; of the values,
layers 0 and 1 carry a third. Presets of 2 bits have nothing to take away, presets of 5 and 6 nothing to gain.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from pqcodec import arrays, centre
from pqcodec import constants as c
from pqcodec.centre import Rope
from pqcodec.formats import exact
from pqcodec.kernels.reference import widen
from pqcodec.presets import PRESETS

SHARED = ("pq2.5", "pq3", "pq3.5", "pq4")  # presets whose bits are shared
FEWEST_LAYERS = 8  # below, the early layers would take too much of the rest
EARLY_LAYERS = 2  # their values get a bit more
ENERGY_WEIGHT = 1.5  # bits for each doubling of a key layer's centred energy
_SPREAD = (-1.0, 1.5)  # bits that a key layer may be from the mean
_SAMPLES = 256  # tokens of each leading index that an energy is taken from, at least
_RATES = {preset.half_bits / 2: name for name, preset in PRESETS.items() if preset.coding == c.CODING_SPLIT}


def centred_energy(x: Any, *, rope: Rope | None = None, exact_tokens: int = 0) -> float:
    """Mean squared norm of a key tensor's vectors [..., tokens, head_dim] minus their (RoPE-aware) mean.

    Taken from 256 to 511 evenly spaced tokens of each leading index, exact ones left out; NaN and Inf count as zero.

    >>> centred_energy(np.ones((2, 8, 64), np.float32))
    0.0
    """
    first = min(exact_tokens, max(x.shape[-2] - 1, 0))
    step = max((x.shape[-2] - first) // _SAMPLES, 1)
    seen = arrays.view(exact.on_cpu(x[..., first::step, :]))
    rows = widen(seen.stored, seen.dtype).astype(np.float64)
    rows = np.where(np.isfinite(rows), rows, 0).reshape(-1, *rows.shape[-2:])
    if not rows.size:
        return 0.0
    if rope:
        field = rope.field(x.shape[-1])
        cos, sin = centre.phases(field, first, rows.shape[-2], step)
        rows = np.stack([centre.turn_back(lead, cos, sin, field) for lead in rows])
    return float(rows.var(-2).sum(-1).mean())


def shares(preset: str, layers: int) -> bool:
    """Whether a cache of so many layers shares the bits of a preset; of few layers the early ones would take too much."""
    return preset in SHARED and layers >= FEWEST_LAYERS


def share(preset: str, key_energies: Mapping[int, float], sizes: Mapping[int, int] | None = None) -> dict[int, tuple[str, str]]:
    """Presets of each layer's key and value whose mean is at most ``preset``'s rate.

    ``sizes``: coordinates of each layer's key, which its value has too (None: all alike).

    >>> shared = share("pq3", dict(enumerate([1.0] * 6 + [2.0, 4.0])))
    >>> " ".join(key for key, _ in shared.values())
    'pq2.5 pq2.5 pq2.5 pq2.5 pq2.5 pq2.5 pq4 pq5'
    >>> " ".join(value for _, value in shared.values())
    'pq4 pq4 pq2.5 pq2.5 pq2.5 pq2.5 pq2.5 pq2.5'
    """
    if not shares(preset, len(key_energies)):
        return {layer: (preset, preset) for layer in key_energies}
    layers = sorted(key_energies)
    size = np.array([1 if sizes is None else sizes[layer] for layer in layers], np.float64)
    mean = PRESETS[preset].half_bits / 2
    late = mean - 0.5 if mean >= 3 else mean
    early = _at_most(mean + (1 if mean >= 3 else 0.5))
    values = [early if layer < EARLY_LAYERS else late for layer in layers]
    budget = 2 * mean * size.sum() - size @ values
    energies = np.log2(np.maximum([key_energies[layer] for layer in layers], 1e-30))
    wanted = np.clip(ENERGY_WEIGHT * (energies - np.average(energies, weights=size)), *_SPREAD)
    low, high = -64.0, 64.0
    for _ in range(50):  # the largest common rate that the budget allows
        middle = (low + high) / 2
        if size @ [_at_most(rate) for rate in wanted + middle] <= budget * (1 + 1e-12):
            low = middle
        else:
            high = middle
    return {
        layer: (_RATES[_at_most(rate)], _RATES[value]) for layer, rate, value in zip(layers, wanted + low, values, strict=True)
    }


def _at_most(rate: float) -> float:
    """The preset's rate nearest to ``rate`` from below, or the lowest there is."""
    return max((r for r in _RATES if r <= rate + 0.25), default=min(_RATES))
