"""Law: how a whole cache shares its bits: a preset's name is the mean, keys and early values get more of it.

Measured on SmolLM2 (1,024-token prefix, two texts): keys carry three quarters of the next-token KL at equal bits; a key
layer's share grows with the square of its centred energy and more, since logits err by error times norm; of the values,
layers 0 and 1 carry a third. Presets of 2 bits have nothing to take away, presets of 5 and 6 nothing to gain.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from pqcodec import arrays, centre
from pqcodec import constants as c
from pqcodec.centre import Rope
from pqcodec.header import RopeField
from pqcodec.kernels.reference import widen
from pqcodec.presets import PRESETS

SHARED = ("pq2.5", "pq3", "pq3.5", "pq4")  # presets whose bits are shared
FEWEST_LAYERS = 8  # below, the early layers would take too much of the rest
EARLY_LAYERS = 2  # their values get a bit more
ENERGY_WEIGHT = 1.5  # bits for each doubling of a key layer's centred energy
_SPREAD = (-1.0, 1.5)  # bits that a key layer may be from the mean
_SAMPLES = 256  # tokens of each leading index that an energy is taken from
_RATES = {preset.half_bits / 2: name for name, preset in PRESETS.items() if preset.coding == c.CODING_SPLIT}


def centred_energy(x: Any, *, rope: Rope | None = None, exact_tokens: int = 0) -> float:
    """Mean squared norm of a key tensor's vectors [..., tokens, head_dim] minus their (RoPE-aware) mean.

    Taken from up to 256 evenly spaced tokens of each leading index, exact ones left out; NaN and Inf count as zero.

    >>> centred_energy(np.ones((2, 8, 64), np.float32))
    0.0
    """
    view = arrays.view(x)
    values, tokens = view.values(), view.shape[-2]
    field = rope.field(view.shape[-1]) if rope else None
    picked = np.unique(np.linspace(min(exact_tokens, max(tokens - 1, 0)), tokens - 1, _SAMPLES if tokens else 0).astype(int))
    total = 0.0
    for lead in range(len(values.starts)):
        rows = np.concatenate([widen(values.rows(lead, int(t), 1), view.dtype) for t in picked] or [np.zeros((0, 1))])
        rows = np.where(np.isfinite(rows), rows, 0).astype(np.float64)
        if field:
            rows = _turned_back(rows, field, picked)
        total += float(rows.var(0).sum()) if len(rows) else 0.0
    return total / max(len(values.starts), 1)


def _turned_back(rows: np.ndarray, field: RopeField, tokens: Any) -> np.ndarray:
    cos, sin = (np.concatenate(part) for part in zip(*(centre.phases(field, int(t), 1) for t in tokens), strict=True))
    return centre.turn_back(rows, cos, sin, field)


def share(preset: str, key_energies: Sequence[float]) -> tuple[list[str], list[str]]:
    """Presets of each layer's keys and values whose mean is at most ``preset``'s rate; layers are of equal size.

    >>> keys, values = share("pq3", [1.0] * 6 + [2.0, 4.0])
    >>> " ".join(keys)
    'pq2.5 pq2.5 pq2.5 pq2.5 pq2.5 pq2.5 pq4 pq5'
    >>> " ".join(values)
    'pq4 pq4 pq2.5 pq2.5 pq2.5 pq2.5 pq2.5 pq2.5'
    """
    layers = len(key_energies)
    if preset not in SHARED or layers < FEWEST_LAYERS:
        return [preset] * layers, [preset] * layers
    mean = PRESETS[preset].half_bits / 2
    late = mean - 0.5 if mean >= 3 else mean
    early = _at_most(mean + (1 if mean >= 3 else 0.5))
    values = [early if layer < EARLY_LAYERS else late for layer in range(layers)]
    budget = 2 * mean * layers - sum(values)
    energies = np.maximum(np.asarray(key_energies, np.float64), 1e-30)
    wanted = np.clip(ENERGY_WEIGHT * (np.log2(energies) - np.log2(energies).mean()), *_SPREAD)
    low, high = -64.0, 64.0
    for _ in range(50):  # the largest common rate that the budget allows
        middle = (low + high) / 2
        if sum(map(_at_most, wanted + middle)) <= budget + 1e-9:
            low = middle
        else:
            high = middle
    return [_RATES[_at_most(rate)] for rate in wanted + low], [_RATES[rate] for rate in values]


def _at_most(rate: float) -> float:
    """The preset's rate nearest to ``rate`` from below, or the lowest there is."""
    return max((r for r in _RATES if r <= rate + 0.25), default=min(_RATES))
