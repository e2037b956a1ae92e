"""Law: how a whole cache shares its bits: a preset's name is the mean, and what counts in the answer gets more of it.

Measured on SmolLM2-135M and Qwen2.5-0.5B with two texts each (1,024-token prefix, one key or value layer coded at a time): what
an error costs in next-token KL is a property of the layer, the same for unlike texts (correlation of logarithms 0.94), of
keys four times that of values, and grows with the layer's centred key energy and with how far its value energy is above
the trend of its neighbours. Values of the first two layers count much more, and so do the first keys. ``IMPORTANCE`` is 0.7 of
the regression over all four, which did better on texts that it had not seen; bits are then given where they save most.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from pqcodec import arrays, centre
from pqcodec import constants as c
from pqcodec.centre import Rope
from pqcodec.formats import exact
from pqcodec.kernels.reference import widen
from pqcodec.presets import PRESETS

Shared = dict[int, tuple[str, str]]  # presets of each layer's key and value

SHARED = ("pq2.5", "pq3", "pq3.5", "pq4")  # presets whose bits are shared; those of 2 have nothing to take away
FEWEST_LAYERS = 8  # below, the early layers would take too much of the rest


@dataclass(frozen=True)
class Importance:
    """log2 of what a tensor's relative error costs, in units of the mean: a sum over its layer's features."""

    level: float
    key_energy: float  # for each doubling of the layer's centred key energy over the geometric mean
    value_energy: float  # for each doubling of its value energy over the trend
    first: float  # of layer 0
    second: float  # of layer 1


IMPORTANCE = {
    "key": Importance(0.6, 1.7, 1.3, 1.8, 0.0),
    "value": Importance(-0.8, 1.1, 0.9, 2.8, 2.1),
}
_SAMPLES = 256  # tokens of each leading index that an energy is taken from, at least
_WIDE = 1 << 20  # coordinates that are widened to float64 at once
_RATES = {preset.half_bits / 2: name for name, preset in PRESETS.items() if preset.coding == c.CODING_SPLIT}


def energy(x: Any, *, rope: Rope | None = None, exact_tokens: int = 0, centred: bool = True) -> float:
    """Mean squared norm of a tensor's vectors [..., tokens, head_dim], minus their (RoPE-aware) mean unless ``centred=False``.

    Taken from 256 to 511 evenly spaced tokens of each leading index, exact ones left out; NaN and Inf count as zero.

    >>> energy(np.ones((2, 8, 64), np.float32)), energy(np.ones((2, 8, 64), np.float32), centred=False)
    (0.0, 64.0)
    """
    first = min(exact_tokens, max(x.shape[-2] - 1, 0))
    step = max((x.shape[-2] - first) // _SAMPLES, 1)
    seen = arrays.view(exact.on_cpu(x[..., first::step, :]))
    if not seen.stored.size:
        return 0.0
    stored = seen.stored.reshape(-1, *seen.shape[-2:])
    if rope and centred:
        field = rope.field(x.shape[-1])
        cos, sin = centre.phases(field, first, stored.shape[-2], step)
    found = []
    at_once = max(_WIDE // (stored.shape[-2] * stored.shape[-1]), 1)
    for lead in range(0, len(stored), at_once):
        rows = widen(stored[lead : lead + at_once], seen.dtype).astype(np.float64)
        rows = np.where(np.isfinite(rows), rows, 0)
        if rope and centred:
            rows = np.stack([centre.turn_back(lead, cos, sin, field) for lead in rows])
        found.append(rows.var(-2).sum(-1) if centred else (rows**2).sum(-1))
    return float(np.concatenate(found).mean())


def shares(preset: str, layers: int) -> bool:
    """Whether a cache of so many layers shares the bits of a preset."""
    return preset in SHARED and layers >= FEWEST_LAYERS


def share(preset: str, energies: Mapping[int, tuple[float, float]], sizes: Mapping[int, int] | None = None) -> Shared:
    """Presets of each layer's key and value whose mean is at most ``preset``'s rate.

    ``energies``: of each layer, (centred key energy, value energy); ``sizes``: coordinates of its key, which its value has
    too (None: all alike).

    >>> shared = share("pq3", {layer: (16.0 if layer == 5 else 1.0, 1.0) for layer in range(8)})
    >>> " ".join(key for key, _ in shared.values())
    'pq3.5 pq3 pq3 pq3 pq3 pq6 pq3 pq3'
    >>> " ".join(value for _, value in shared.values())
    'pq3.5 pq3 pq2 pq2 pq2 pq4 pq2 pq2'
    """
    layers = sorted(energies)
    if not shares(preset, len(layers)):
        return {layer: (preset, preset) for layer in layers}
    size = np.tile([1.0 if sizes is None else sizes[layer] for layer in layers], 2)
    keys, values = np.log2(np.maximum([energies[layer] for layer in layers], 1e-30)).T
    features = np.stack([np.ones(len(layers)), keys - keys.mean(), _above_trend(values), *np.eye(len(layers))[:2]])
    weights = np.array([list(vars(IMPORTANCE[role]).values()) for role in c.ROLES[:2]])
    cost = size * 2.0 ** (weights @ features).ravel()
    rates = sorted(_RATES)
    level = np.zeros(len(cost), int)
    budget = (PRESETS[preset].half_bits / 2 - rates[0]) * size.sum() * (1 + 1e-12)
    while True:  # the step that saves most for its bits, of those that the budget allows
        step = [rates[min(at + 1, len(rates) - 1)] - rates[at] for at in level]
        bits = size * step
        saved = np.array([4.0 ** -rates[at] * (1 - 4.0**-more) for at, more in zip(level, step, strict=True)])
        worth = np.where((bits > 0) & (bits <= budget), cost * saved / np.maximum(bits, 1e-30), -1)
        best = int(worth.argmax())
        if worth[best] <= 0:
            break
        level[best] += 1
        budget -= bits[best]
    chosen = [_RATES[rates[at]] for at in level]
    return dict(zip(layers, zip(chosen[: len(layers)], chosen[len(layers) :], strict=True), strict=True))


def _above_trend(energies: np.ndarray) -> np.ndarray:
    """How far log2 energies are above the line through those of all layers but the first, which often is of another kind."""
    at = np.arange(len(energies))
    above: np.ndarray = energies - np.polyval(np.polyfit(at[1:], energies[1:], 1), at)
    above[0] = 0
    return above
